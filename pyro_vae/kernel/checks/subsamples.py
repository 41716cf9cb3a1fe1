"""Refuse pairs whose guide and model look at different data of a subsampled plate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import DatumPlateError, StructureError, SubsamplingError


def check_subsample(plate: str, fn: Any, given: Any, known: Tensor) -> None:
    """Refuse a plate that asks for other data than before, `known`: other indices, or another number.

    `fn` is what Pyro would draw the indices from; `given` is `subsample=`, or None.
    """
    if given is not None:
        if not same_indices(given, known):
            raise SubsamplingError(
                f"plate '{plate}' is given other subsample indices than it had before in this call: give model and guide "
                "the same subsample=. An autoguide draws indices of its own unless it is told these: "
                f"AutoNormal(model, create_plates=lambda x, index: pyro.plate('{plate}', {fn.size}, subsample=index)), a "
                "function of the model's arguments"
            )
        return
    size = fn.size if fn.subsample_size is None else min(fn.subsample_size, fn.size)
    if len(known) != size:
        raise DatumPlateError(f"plate '{plate}' has sizes {sorted({len(known), size})} in model and guide: they must agree")


def same_indices(given: Any, known: Tensor) -> bool:
    with torch._C.DisableTorchFunction():  # our own look at the indices is not the program's
        return given is known or torch.equal(torch.as_tensor(given, dtype=known.dtype, device=known.device), known)


def check_shared_plates(
    model_sites: Mapping[str, Any],
    guide_sites: Mapping[str, Any],
    model_indices: Mapping[str, Tensor],
    guide_indices: Mapping[str, Tensor],
) -> None:
    """Refuse a subsampled plate with two names: indices are shared by name, so each side may see other data."""
    for name, ours, theirs in renamed_plates(model_sites, guide_sites):
        if not (ours in model_indices and theirs in guide_indices):
            continue  # plates without a size
        if not same_indices(model_indices[ours], guide_indices[theirs]):
            raise SubsamplingError(
                f"latent site '{name}' is in plate '{ours}' of the model and in plate '{theirs}' of the guide, and they "
                "hold other data: give the plate the same name on both sides"
            )


def check_plate_names(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> None:
    """Refuse plates with two names beside enumeration: Pyro's sums know an axis by the name of its plate."""
    for name, ours, theirs in renamed_plates(model_sites, guide_sites):
        raise StructureError(
            f"latent site '{name}' is in plate '{ours}' of the model and in plate '{theirs}' of the guide, so its densities "
            "would be summed over two axes instead of one: give the plate the same name on both sides"
        )


def renamed_plates(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Latents whose plate at one dim has another name in the guide: the latent, the model's name, the guide's."""
    for name in (n for n in model_sites if n in guide_sites):
        ours, theirs = (
            {f.dim: f.name for f in s[name]["cond_indep_stack"] if f.vectorized} for s in (model_sites, guide_sites)
        )
        for dim in ours:
            if theirs.get(dim, ours[dim]) != ours[dim]:
                yield name, ours[dim], theirs[dim]
