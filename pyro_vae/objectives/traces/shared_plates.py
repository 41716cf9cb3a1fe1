"""Refuse pairs that call one plate by two names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ...errors import StructureError, SubsamplingError
from ...kernel import same_indices


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
