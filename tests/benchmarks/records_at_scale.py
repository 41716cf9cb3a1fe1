"""Whether memory stays as it is while the data grow, and how long a record of a million data takes to handle.

The first table: `evaluate` over a loader that makes its batches of 10 numbers per datum as it goes, 1,000 data each, with
`ImportanceSampling` of 5 particles, every N in a process of its own: the bytes of the record, what the peak of the process
(RSS) grew by after a first short run, that peak less the one record, and by how much it is above that of the first N.
With `--checkpoint` the same for a run that writes one, and for the call that goes on from it when it is finished.
The second table: seconds for an `Evidence` of 1,000,000 data.

    python tests/benchmarks/records_at_scale.py
    python tests/benchmarks/records_at_scale.py --checkpoint --records 0
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402

import pyro_vae as pv  # noqa: E402

BATCH, WIDTH = 1_000, 10


class Stream(IterableDataset):
    """Batches that are made when they are asked for, and kept by nobody."""

    def __init__(self, num_data: int) -> None:
        self.num_data = num_data

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for first in range(0, self.num_data, BATCH):
            yield 2**0.5 * torch.randn(min(BATCH, self.num_data - first), WIDTH, generator=generator)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), WIDTH), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.75).to_event(1))


def evaluated(num_data: int, checkpoint: str | None = None) -> pv.Evidence:
    estimator = pv.ImportanceSampling(model, guide, num_particles=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(Stream(num_data), batch_size=None)
        return pv.evaluate(estimator, loader, args=first, seed=0, progress=False, checkpoint=checkpoint)


def first(x: Tensor) -> tuple[Tensor]:
    return (x,)


def bytes_of(record: Any) -> int:
    """Of all tensors of a record, those of records and mappings within it too."""
    if isinstance(record, Tensor):
        return record.nbytes
    if isinstance(record, dict):
        return sum(map(bytes_of, record.values()))
    return sum(bytes_of(getattr(record, field.name)) for field in fields(record)) if is_dataclass(record) else 0


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(num_data: int, checkpoint: str | None) -> dict[str, float]:
    """What an evaluation of so many data adds to the peak of this process, which runs nothing else."""
    torch.set_num_threads(1)
    evaluated(2 * BATCH)  # imports and caches
    before, begin = peak_rss(), time.perf_counter()
    record = evaluated(num_data, checkpoint)
    seconds = time.perf_counter() - begin
    return {"before": before, "peak": peak_rss(), "record": bytes_of(record), "seconds": seconds}


def memory_in_a_process(num_data: int, checkpoint: str = "") -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", str(num_data), *(["--folder", checkpoint] if checkpoint else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(title: str, found: dict[int, dict[str, float]]) -> None:
    columns = ("data", 10), ("seconds", 8), ("record, MB", 11), ("added, MB", 10), ("less the record, MB", 20), ("grown", 6)
    print(title, " ".join(f"{name:>{width}}" for name, width in columns), sep="\n")
    beyond = {num_data: one["peak"] - one["record"] for num_data, one in found.items()}
    for num_data, one in found.items():
        added, grown = (one["peak"] - one["before"]) / 1e6, beyond[num_data] / next(iter(beyond.values())) - 1
        sizes = f"{one['record'] / 1e6:>11.1f} {added:>10.1f} {beyond[num_data] / 1e6:>20.1f}"
        print(f"{num_data:>10,} {one['seconds']:>8.1f} {sizes} {grown:>6.1%}")


def some_evidence(num_data: int, seed: int) -> pv.Evidence:
    generator = torch.Generator().manual_seed(seed)
    one, two, three, four, five = torch.rand(5, num_data, generator=generator).unbind()
    return pv.Evidence(
        log_evidence=-one,
        std_error=two / 100,
        elbo=-one - 0.1,
        elbo_std_error=three / 10,
        ess=100 * four,
        pareto_k=five,
        smoothed=-one,
        bound="lower",
        num_particles=100,
        cost=100.0,
        method="importance sampling",
        fingerprint=torch.arange(num_data) + seed * num_data,
    )


def seconds_of(num_data: int, num_parts: int) -> dict[str, float]:
    """Seconds by the clock for everything that a user does with a record."""
    parts = [some_evidence(num_data // num_parts, seed) for seed in range(num_parts)]
    took: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        begin = time.perf_counter()
        result = call()
        took[name] = time.perf_counter() - begin
        return result

    record = timed(f"cat of {num_parts:,} parts", lambda: pv.Evidence.cat(parts))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.npz"
        timed("save", lambda: record.save(path))
        back = timed("load", lambda: pv.Evidence.load(path))
    assert torch.equal(back.log_evidence, record.log_evidence)
    timed("str", lambda: str(record))
    timed("repr", lambda: repr(record))
    timed("_repr_html_", record._repr_html_)
    timed("doubts", lambda: record.doubts)
    timed("warnings", record.warnings)
    timed("mean", record.mean)
    timed("confidence_interval", record.confidence_interval)
    timed("select of half", lambda: record.select(record.reliable))
    timed("to_dict", record.to_dict)
    timed("to_dataframe", record.to_dataframe)
    return took


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--checkpoint", action="store_true", help="write one, and go on from it")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(options.memory, options.folder)))
        return
    if options.checkpoint:
        with tempfile.TemporaryDirectory() as folder:
            for title in ("with a checkpoint", "from the finished checkpoint"):
                print_memory(title, {n: memory_in_a_process(n, f"{folder}/{n}") for n in options.data})
    else:
        print_memory("without a checkpoint", {n: memory_in_a_process(n) for n in options.data})
    if options.records:
        print(f"\nseconds, an Evidence of {options.records:,} data")
        for name, seconds in seconds_of(options.records, options.records // 100).items():
            print(f"{name:<22} {seconds:>8.2f}")


if __name__ == "__main__":
    main()
