"""Errors for a plate with different names in model and guide, and for one observation for all data of a plate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ...errors import ArgumentError, StructureError, SubsamplingError
from ...kernel import same_indices

PARTICLES = "num_particles_vectorized"  # Pyro's plate for many particles


def check_shared_plates(
    model_sites: Mapping[str, Any],
    guide_sites: Mapping[str, Any],
    model_indices: Mapping[str, Tensor],
    guide_indices: Mapping[str, Tensor],
) -> None:
    """Raise for a subsampled plate with two names: indices are shared by name, so each side may use other data."""
    for name, ours, theirs in renamed_plates(model_sites, guide_sites):
        if not (ours in model_indices and theirs in guide_indices):
            continue  # plates without a size
        if not same_indices(model_indices[ours], guide_indices[theirs]):
            raise SubsamplingError(
                f"latent site '{name}' is in plate '{ours}' of the model and in plate '{theirs}' of the guide, and the "
                "two have different data: give the plate the same name on both sides"
            )


def check_plate_names(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> None:
    """Raise for plates with two names where sites are enumerated: Pyro's sums identify an axis by the name of its plate."""
    for name, ours, theirs in renamed_plates(model_sites, guide_sites):
        raise StructureError(
            f"latent site '{name}' is in plate '{ours}' of the model and in plate '{theirs}' of the guide, so its densities "
            "would be summed over two axes instead of one: give the plate the same name on both sides"
        )


def check_not_shared(model_sites: Mapping[str, Any]) -> None:
    """Raise for an observed event without an axis for any plate: usually a single datum, x[0], in place of a batch."""
    for name, site in model_sites.items():
        event_dim = site["fn"].event_dim
        if not site["is_observed"] or not event_dim or not site["value"].numel():  # a factor has an empty value
            continue
        batch = site["value"].shape[: site["value"].ndim - event_dim]
        plates = [f for f in site["cond_indep_stack"] if f.vectorized and f.size > 1 and f.name != PARTICLES]
        if plates and all(len(batch) < -f.dim or batch[f.dim] == 1 for f in plates):
            raise ArgumentError(
                f"the plate '{plates[-1].name}' holds {plates[-1].size} data, but the observed site '{name}' has one value "
                f"of shape {tuple(site['value'].shape)} for all of them. A single datum needs its own axis: pass x[None] or "
                "x[:1]. If all data do share this observation, expand it to one row per datum"
            )


def renamed_plates(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Latents whose plate at one dimension has another name in the guide: (latent, name in the model, name in the guide)."""
    for name in (n for n in model_sites if n in guide_sites):
        ours, theirs = (
            {f.dim: f.name for f in s[name]["cond_indep_stack"] if f.vectorized} for s in (model_sites, guide_sites)
        )
        for dim in ours:
            if theirs.get(dim, ours[dim]) != ours[dim]:
                yield name, ours[dim], theirs[dim]
