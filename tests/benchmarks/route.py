"""How much code one call runs through: functions, files, classes and pairs of caller and callee across files; by folder.

python tests/benchmarks/route.py
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv

PACKAGE = str(Path(pv.__file__).parent)


def model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.7 * x, 0.6).to_event(1))


def route(call: Callable[[], Any]) -> str:
    functions: set[tuple[str, str]] = set()
    edges: set[tuple[tuple[str, str], tuple[str, str]]] = set()

    def name_of(frame: FrameType) -> tuple[str, str]:
        return frame.f_code.co_filename, frame.f_code.co_qualname

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        functions.add(name_of(frame))
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        if caller is not None:
            edges.add((name_of(caller), name_of(frame)))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    named = {(file, name) for file, name in functions if "<" not in name.rpartition(".")[2]}  # no comprehensions
    classes = {(file, name.split(".")[0]) for file, name in named if "." in name and "<locals>" not in name}
    across = sum(a[0] != b[0] for a, b in edges)
    parts = Counter(part_of(file) for file, _ in named)
    by_part = ", ".join(f"{part} {count}" for part, count in parts.most_common())
    return f"{len(named):>10}{len({f for f, _ in named}):>8}{len(classes):>9}{len(edges):>8} ({across})\n    {by_part}"


def part_of(file: str) -> str:
    """The folder of a file, `kernel/checks` apart; the name of a file at the top."""
    path = Path(file).relative_to(PACKAGE)
    return "/".join(path.parts[:-1]) or path.stem


def main() -> None:
    warnings.simplefilter("ignore")
    x = torch.randn(20, 2)
    print(f"{'':<44}{'functions':>10}{'files':>8}{'classes':>9}{'edges':>8} (across files)")
    estimators = {
        "ImportanceSampling(check=False)": pv.ImportanceSampling(model, guide, seed=0, check=False),
        "ImportanceSampling": pv.ImportanceSampling(model, guide, seed=0),
        "InferenceGaps": pv.InferenceGaps(model, guide, seed=0),
    }
    for name, estimator in estimators.items():
        print(f"{name + ', first call':<44}{route(lambda: estimator(x))}")  # noqa: B023
        print(f"{name + ', second call':<44}{route(lambda: estimator(x))}")  # noqa: B023


if __name__ == "__main__":
    main()
