"""Where the time of an eager training step goes: matrix products, the optimiser, other operations of torch, and Python.

Milliseconds of the processor per step. The operations are those of torch's profiler; Python is the remainder of a step that
is timed without it, so it holds the dispatch of operations too.

    python tests/benchmarks/step_profile.py [--batches 32 128 512] [--steps 200]
"""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile
from training_speed import BY_HAND, STEPS, X

ROWS = (
    BY_HAND,
    "BetaTraceMeanField_ELBO as a module, fused Adam",
    "SVI + BetaTraceMeanField_ELBO + pv.FusedOptim",
    "SVI + Trace_ELBO + pv.FusedOptim",
)
PRODUCTS = ("aten::addmm", "aten::mm")
PARTS = ("products", "optimiser", "other operations", "Python", "all", "operations called")


def parts_of(name: str, batch: int, steps: int) -> dict[str, float]:
    x = (torch.rand(batch, X, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    step = STEPS[name](x)
    for _ in range(20):
        step()
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    whole = 1e3 * sorted(seconds)[steps // 2]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step()
    operations = [event for event in profiled.key_averages() if event.key.startswith("aten::")]
    own = {event.key: event.self_cpu_time_total / 1e3 / steps for event in operations}
    products = sum(own.get(name, 0.0) for name in PRODUCTS)
    adam = sum(ms for key, ms in own.items() if "fused_adam" in key)
    others = sum(own.values()) - products - adam
    number = sum(event.count for event in operations) / steps
    return dict(zip(PARTS, (products, adam, others, whole - products - adam - others, whole, number), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for batch in options.batches:
        print(f"batch {batch}, ms{'':40s}" + "".join(f"{part:>19s}" for part in PARTS))
        for name in ROWS:
            found = parts_of(name, batch, options.steps)
            print(f"{name:54s}" + "".join(f"{found[part]:19.2f}" for part in PARTS), flush=True)


if __name__ == "__main__":
    main()
