"""A Pyro messenger that multiplies the scales of the unobserved sites of model and guide by beta."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.provenance import track_provenance
from pyro.poutine import Trace, unwrap
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...kernel import IMPUTED, check_subsample
from ..traces.shared_plates import check_not_shared, check_shared_plates
from .matching import (
    UNCONSTRAINED,
    Beta,
    Betas,
    check_guide,
    check_joint_scales,
    check_names,
    check_scales,
    drop_imputed,
    is_jacobian,
    kl_groups,
    make_losses_direct,
    share_masks,
)


def beta_at(betas: Betas, name: str) -> Beta:
    return betas.get(name, 1.0) if isinstance(betas, Mapping) else betas


class BetaMessenger(Messenger):
    """Multiplies the scale of every unobserved site by its beta, also by zero, and stores the scale without it.

    Also checks that the plates of the model have the same data as those of the guide.

    :param has_jacobians: whether factors with `has_rsample=True` are log-Jacobians, as in a guide.
    :param guide: for a model, the messenger that ran with the guide.
    """

    def __init__(self, betas: Betas, has_jacobians: bool, guide: BetaMessenger | None = None) -> None:
        super().__init__()
        self.betas, self.has_jacobians, self.guide = betas, has_jacobians, guide
        self.scales: dict[str, Beta] = {}
        self.indices: dict[str, Tensor] = {}  # of the plates, by name
        self.full_sizes: dict[str, int] = {}
        self._weighed: dict[tuple[float, int], Beta] = {}

    def __enter__(self) -> BetaMessenger:
        # Scales around the whole call are applied after ours, so the messages do not have them yet.
        self.outside = math.prod(m.scale for m in _PYRO_STACK if isinstance(m, ScaleMessenger))
        super().__enter__()
        return self

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            # Replay, an outer handler, would replace the model's indices by those of the guide.
            name = msg["name"]
            if self.guide is not None and name in self.guide.indices:
                known, size = self.guide.indices[name], self.guide.full_sizes[name]
                check_subsample(name, msg["fn"], msg["value"], known, size)
            return
        if msg["is_observed"] and not (self.has_jacobians and is_jacobian(msg)):
            return
        name = msg["name"]
        latent = name.removesuffix(UNCONSTRAINED) if msg["infer"].get("is_auxiliary") else name
        self.scales[name] = msg["scale"] * self.outside
        msg["scale"] = self._weigh(msg["scale"], beta_at(self.betas, latent))

    def _weigh(self, scale: Beta, beta: Beta) -> Beta:
        """The product; one tensor for all sites with the same scale, so that equality can be tested without reading it."""
        if isinstance(scale, Tensor):
            return scale * beta
        return self._weighed.setdefault((scale, id(beta)), scale * beta)

    def _pyro_post_sample(self, msg: Any) -> None:
        """Mark imputed values that are not reparameterised: see `check_imputed`."""
        if site_is_subsample(msg):
            self.indices[msg["name"]] = torch.as_tensor(msg["value"])
            self.full_sizes[msg["name"]] = msg["fn"].size
            return
        imputed = msg["name"].endswith(IMPUTED) and not msg["is_observed"]
        if self.guide is not None and imputed and msg["name"] not in self.guide.scales and not msg["fn"].has_rsample:
            msg["value"] = track_provenance(msg["value"], frozenset({msg["name"]}))


@dataclass(frozen=True, eq=False)
class WeighedTraces:
    """One run of guide and model with beta in the scales of their latents.

    :ivar model_sites: the model's sites, `guide_sites` the guide's, as Pyro's messages.
    :ivar scales: the scale of each latent without beta.
    :ivar groups: the sites of each KL, by the name under which it is reported.
    :ivar imputed: latents that the model draws because of `obs_mask`; they have no weight.
    """

    model: Trace
    guide: Trace
    model_sites: Mapping[str, Any]
    guide_sites: Mapping[str, Any]
    scales: Mapping[str, Beta]
    groups: Mapping[str, tuple[str, ...]]
    imputed: frozenset[str]


def weigh_traces(
    get_trace: Callable[..., tuple[Trace, Trace]],
    model: Callable,
    guide: Callable,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    betas: Betas,
) -> WeighedTraces:
    """Trace the pair by the `_get_trace` of an ELBO with beta in the scales; raise where beta has no meaning.

    Masks may have been copied from one side to the other, so the traces must compute their log-densities again.
    """
    interleaved = isinstance(unwrap(guide), GuideMessenger)  # the guide runs the model: one messenger sees both
    on_guide = BetaMessenger(betas, not interleaved)
    on_model = BetaMessenger(betas, False, on_guide)
    model_trace, guide_trace = get_trace(on_model(model), on_guide(guide), args, kwargs)
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    latents = [n for n, s in model_sites.items() if not s["is_observed"]]
    imputed = drop_imputed(model_trace, guide_sites, latents)
    check_guide(guide_sites, latents)
    check_not_shared(model_sites)
    make_losses_direct(guide_sites)
    if not interleaved:
        check_scales(on_model.scales, on_guide.scales)
        check_shared_plates(model_sites, guide_sites, on_model.indices, on_guide.indices)
    groups = kl_groups(guide_sites, latents)
    scales = {**on_model.scales, **on_guide.scales}
    check_joint_scales(scales, groups)
    if isinstance(betas, Mapping):
        check_names(betas, groups, guide_sites, latents)
    share_masks(model_trace, guide_trace, groups)
    return WeighedTraces(model_trace, guide_trace, model_sites, guide_sites, scales, groups, imputed)


def sample_sites(trace: Trace) -> dict[str, Any]:
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
