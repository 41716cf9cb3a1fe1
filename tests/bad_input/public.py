"""Which public names the tables hold, and why they do without the others."""

from __future__ import annotations

import dataclasses
import inspect

import pyro_vae as pv
from pyro_vae.records import Result

from .entrances import ENTRANCES
from .others import OTHERS

# Names without an argument of their own, or none that a user gives.
WITHOUT = {
    "single_process": "takes no argument",
    "nn.Head": "the base of the heads, which are all there",
    "ops.pareto_k_of_tail": "for weights that are not kept, after pareto_k",
    "ops.size_of_tail": "the same",
    "exact.LinearGaussianCurve": "made by LinearGaussian.rate_distortion",
    "exact.LinearGaussianGaps": "made by LinearGaussian.gaps",
}


def made_by_us(name: str) -> bool:
    """A record: estimators make it, and what a user calls of it is in the table by its methods."""
    thing = getattr(pv, name, None)
    return inspect.isclass(thing) and issubclass(thing, Result) and dataclasses.is_dataclass(thing)


def public() -> set[str]:
    """Every public name that can be called, those of sub-packages with theirs before them."""
    names = {name for name in pv.__all__ if not inspect.ismodule(getattr(pv, name))}
    for part in ("nn", "plots", "exact", "ops", "schedules", "models"):
        module = getattr(pv, part)
        listed = getattr(module, "__all__", [n for n, f in vars(module).items() if is_own_function(f, module.__name__)])
        names |= {f"{part}.{name}" for name in listed if name not in names}
    return names


def is_own_function(thing: object, module: str) -> bool:
    return inspect.isfunction(thing) and thing.__module__ == module and not thing.__name__.startswith("_")


def in_tables() -> set[str]:
    """The names of entrances, and those at the head of a call: `Evidence.cat` is one of `Evidence`."""
    found = {entrance.name for entrance in ENTRANCES}
    for other in OTHERS:
        words = other.name.partition(",")[0].split(".")
        found |= {".".join(words[:count]) for count in range(1, len(words) + 1)}
    return found


def missing() -> set[str]:
    return {name for name in public() - in_tables() - WITHOUT.keys() if not made_by_us(name)}
