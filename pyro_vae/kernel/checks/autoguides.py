"""Pyro's autoguides: errors for those without a density per datum, and the sites of the others."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro.infer import autoguide
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine import unwrap
from pyro.poutine.guide import GuideMessenger

from ...errors import LazyGuideError, StructureError


def refuse_guide(guide: Callable, datum_plate: str | None, known: Collection[str] = ()) -> None:
    """Raise for autoguides that have no density per datum, and for those that were never run."""
    parts = auto_parts(guide) or [unwrap(guide)]
    for part in parts:
        name = type(part).__name__
        if isinstance(part, autoguide.AutoLaplaceApproximation):
            raise StructureError(f"{name} is a point mass and has no density: use AutoNormal, or an amortized guide")
        if isinstance(part, autoguide.AutoStructured):
            raise StructureError(f"{name} is not checked by the kernel: use AutoNormal, or an amortized guide")
        alone = len(parts) == 1
        joint = isinstance(part, AutoContinuous) and not (isinstance(part, autoguide.AutoDiagonalNormal) and alone)
        if joint and datum_plate is not None and not latents_of(part) <= set(known):
            raise StructureError(
                f"{name} is one joint density over all data and cannot be split per datum: use AutoNormal, or "
                "datum_plate=None to weigh the whole call as one datum"
            )
        lazy_auto = isinstance(part, autoguide.AutoGuide) and not isinstance(part, autoguide.AutoCallable)
        lazy_messenger = isinstance(part, GuideMessenger) and isinstance(part, torch.nn.Module)
        if (lazy_auto and getattr(part, "prototype_trace", True) is None) or (
            lazy_messenger and not any(True for _ in part.parameters())
        ):
            raise LazyGuideError(f"{name} was never run and has no parameters yet: train it, or call guide(*args) once")


def latents_of(part: Any) -> set[str]:
    trace = getattr(part, "prototype_trace", None)
    return {"?"} if trace is None else {name for name, _ in trace.iter_stochastic_nodes()}


def auto_parts(guide: Callable) -> list[Any]:
    """The autoguides that a guide consists of, not counting functions inside an AutoGuideList."""
    core = unwrap(guide)
    if isinstance(core, autoguide.AutoGuideList):
        return [part for item in core for part in auto_parts(item)]
    return [core] if isinstance(core, autoguide.AutoGuide) else []


def auto_sites(guide: Callable) -> set[str]:
    """The names of the draws of autoguides and of the latents that are point masses at their images."""
    names: set[str] = set()
    for part in auto_parts(guide):
        if isinstance(part, (autoguide.AutoNormal, AutoContinuous)) and part.prototype_trace is not None:
            latents = [name for name, _ in part.prototype_trace.iter_stochastic_nodes()]
            names.update(latents, (f"{name}_unconstrained" for name in latents), [f"_{part._pyro_name}_latent"])
    return names
