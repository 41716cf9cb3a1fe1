"""What a checkpoint costs, in per cent of the time of the run without it, at the pace that files are written by.

`ImportanceSampling` by `evaluate` over 10,000 data of 10 numbers. Time is taken inside one run, around all that a checkpoint
adds: digests of the data, copies of the results, files. So other work on the machine changes the figure little. Each row is
the median of the runs, with the least and the most.

    python tests/benchmarks/checkpoint_cost.py
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records_at_scale import WIDTH, first, guide, model  # noqa: E402

import pyro_vae as pv  # noqa: E402
from pyro_vae.evaluation import checkpoint as checkpoints  # noqa: E402
from pyro_vae.evaluation import loop  # noqa: E402

NUM_DATA = 10_000
WATCHED = [
    (loop, "digest_of"),
    (loop, "storable"),
    (checkpoints, "about_call"),
    *((checkpoints.Checkpoint, name) for name in ("__init__", "take", "add", "set_known", "check_all_taken", "write")),
]
spent, depth = 0.0, 0


def watch(owner: Any, name: str) -> None:
    """Count the seconds inside this function, unless it is called by another one that is watched."""
    function: Callable = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        global spent, depth
        begin, depth = time.perf_counter(), depth + 1
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1
            spent += time.perf_counter() - begin if not depth else 0.0

    setattr(owner, name, watched)


def cost(num_particles: int, batches: Any) -> tuple[float, float, int]:
    """Seconds of the run without what its checkpoint took, the share of that which it took, and the number of files."""
    global spent
    estimator = pv.ImportanceSampling(model, guide, num_particles=num_particles)
    with tempfile.TemporaryDirectory() as folder:
        spent, begin = 0.0, time.perf_counter()
        pv.evaluate(estimator, batches, args=first, seed=0, progress=False, checkpoint=folder)
        seconds = time.perf_counter() - begin - spent
        return seconds, spent / seconds, len(list(Path(folder).glob("batches-*.npz")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--particles", type=int, nargs="+", default=[5, 100])
    parser.add_argument("--batches", type=int, nargs="+", default=[100, 1000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for owner, name in WATCHED:
        watch(owner, name)
    x = 2**0.5 * torch.randn(NUM_DATA, WIDTH, generator=torch.Generator().manual_seed(0))
    print(f"{'particles':>9} {'batch':>6} {'seconds':>8} {'files':>6} {'checkpoint':>11} {'from':>7} {'to':>7}")
    for num_particles in options.particles:
        for size in options.batches:
            found = [cost(num_particles, x.split(size)) for _ in range(options.runs + 1)][1:]  # the first fills caches
            seconds, shares, files = (sorted(column) for column in zip(*found, strict=True))
            shown = f"{statistics.median(shares):>11.1%} {shares[0]:>7.1%} {shares[-1]:>7.1%}"
            print(f"{num_particles:>9} {size:>6} {statistics.median(seconds):>8.2f} {files[-1]:>6} {shown}", flush=True)


if __name__ == "__main__":
    main()
