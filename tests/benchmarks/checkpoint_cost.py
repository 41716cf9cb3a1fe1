"""What writing a checkpoint costs: per cent of the time of the same run without one, at the pace that files are written by.

`evaluate` over 10,000 data of 10 numbers with the defaults of `ImportanceSampling` and of `AdaptiveImportanceSampling`. Runs
with and without a checkpoint take turns; the figure is the median of the ratios of neighbours, with the least and the most.

    python tests/benchmarks/checkpoint_cost.py
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records_at_scale import WIDTH, first, guide, model  # noqa: E402

import pyro_vae as pv  # noqa: E402

NUM_DATA = 10_000


def seconds(estimator: Any, batches: Any, checkpoint: Path | None) -> float:
    begin = time.perf_counter()
    pv.evaluate(estimator, batches, args=first, seed=0, progress=False, checkpoint=checkpoint)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x = 2**0.5 * torch.randn(NUM_DATA, WIDTH, generator=torch.Generator().manual_seed(0))
    print(f"{'estimator':>28} {'batch':>6} {'seconds':>8} {'files':>6} {'a checkpoint adds':>18} {'from':>7} {'to':>7}")
    for estimator in (pv.ImportanceSampling(model, guide), pv.AdaptiveImportanceSampling(model, guide)):
        for size in (100, 1000):
            batches = x.split(size)
            pv.evaluate(estimator, batches[:2], args=first, progress=False)  # caches
            plain, added, num_files = [], [], 0
            for _ in range(options.rounds):
                with tempfile.TemporaryDirectory() as folder:
                    plain.append(seconds(estimator, batches, None))
                    added.append(seconds(estimator, batches, Path(folder)) / plain[-1] - 1)
                    num_files = len(list(Path(folder).glob("batches-*.npz")))
            shown = f"{statistics.median(added):>18.1%} {min(added):>7.1%} {max(added):>7.1%}"
            name = type(estimator).__name__
            print(f"{name:>28} {size:>6} {statistics.median(plain):>8.2f} {num_files:>6} {shown}", flush=True)


if __name__ == "__main__":
    main()
