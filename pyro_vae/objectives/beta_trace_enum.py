"""The beta-ELBO with enumerated discrete latents: Pyro's TraceEnum_ELBO."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import SampleRing
from torch import Tensor

from ..errors import EnumerationError, MaskError, quoted
from .terms import Pass, Summable, places_of
from .traces.beta_elbo import BetaELBO
from .traces.beta_messenger import WeighedTraces
from .traces.dice import WholeDice, dice_elbo
from .traces.matching import Beta
from .traces.pyro_failures import pyro_failures
from .traces.shared_plates import check_plate_names


class BetaTraceEnum_ELBO(BetaELBO, TraceEnum_ELBO):
    """Pyro's `TraceEnum_ELBO` with a weight on the KL: sites marked ``infer={"enumerate": "parallel"}`` are summed out.

    It has the parameters, attributes and errors of `BetaTrace_ELBO`. B data, K particles, nats. A site that the guide
    enumerates has a KL with beta like any latent. A site that the model enumerates has no KL. It belongs to the likelihood
    where data depend on it, otherwise to the prior, with the beta of the latents that depend on it.

    :raises EnumerationError: (besides the others) if both data and a latent with beta other than one depend on a site that
        the model enumerates: inside the logarithm of a sum, single terms cannot be weighted.

    Example::

        guide = config_enumerate(guide)
        svi = SVI(model, guide, optimizer, pv.BetaTraceEnum_ELBO(beta=0.5, max_plate_nesting=1))
    """

    def _loss_alone(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float | Tensor:
        with pyro_failures(model, guide, args, kwargs):
            return super()._loss_alone(model, guide, args, kwargs)

    def _loss_and_grads(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float | Tensor:
        with pyro_failures(model, guide, args, kwargs):
            return super()._loss_and_grads(model, guide, args, kwargs)

    def _differentiable_loss(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        with pyro_failures(model, guide, args, kwargs):
            return super()._differentiable_loss(model, guide, args, kwargs)

    def _value_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        elbos = [dice_elbo(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        loss = -reduce(operator.add, elbos) / self.num_particles
        return loss.detach(), loss

    def _measure(self, traces: WeighedTraces) -> Pass:
        check_plate_names(traces.model_sites, traces.guide_sites)
        traces.model.compute_log_prob()
        traces.guide.compute_score_parts()
        if any("packed" not in s for s in (*traces.model_sites.values(), *traces.guide_sites.values())):
            traces.guide.pack_tensors()  # masks were carried over, so log-densities changed
            traces.model.pack_tensors(traces.guide.plate_to_symbol)
        summed = weigh_what_the_model_sums_out(traces)
        ordering, sum_dims = _compute_model_factors(traces.model, traces.guide)[2:4]
        check_readers(traces, ordering)
        dice = WholeDice(traces.guide, ordering)
        for terms in dice.log_probs.values():
            terms[:] = map(detached, terms)

        def expected(sites: Mapping[str, Any], names: Sequence[str]) -> list[Summable]:
            scales = {n: traces.scales.get(n, sites[n]["scale"]) for n in names if n in sites}
            return [Expected(dice, ordering[n], scaled(sites[n], scale)) for n, scale in scales.items()]

        model, guide = traces.model_sites, traces.guide_sites
        apart = {n: s for n, s in model.items() if n not in summed}
        observed = expected(apart, [n for n, s in apart.items() if s["is_observed"]])
        kl = {name: (expected(guide, names), expected(apart, names)) for name, names in traces.groups.items()}
        if summed:
            # log p(x, z) and log p(z) with the enumerated sites summed out: their difference is log p(x|z).
            scale = traces.scales[summed[0]]
            latents = [n for n in summed if not model[n]["is_observed"]]
            joint, prior = (
                Marginal(dice, factors(model, names, ordering), frozenset(sum_dims), scale) for names in (summed, latents)
            )
            if latents != summed:
                observed += [joint, Minus(prior)]
            owners = [name for name, names in traces.groups.items() if any(n in summed for n in names)]
            if owners:
                sides = [kl.pop(owner) for owner in owners]
                kl["+".join(owners)] = ([d for q, _ in sides for d in q], [prior, *(d for _, p in sides for d in p)])
        others = expected(guide, [n for n, s in guide.items() if s["is_observed"] and n not in traces.scales])
        return Pass(observed, kl, others, places_of(model.values()))


class Expected(NamedTuple):
    """The expectation of one site's log-density under the enumerated and sampled draws of the guide."""

    dice: Dice
    ordinal: frozenset[str]
    cost: Tensor

    def sum(self) -> Tensor:
        return torch.as_tensor(self.dice.compute_expectation({self.ordinal: [self.cost]}))


class Marginal(NamedTuple):
    """The expectation of the log of a product of densities of the model with its enumerated sites summed out."""

    dice: Dice
    factors: OrderedDict[frozenset[str], list[Tensor]]
    sum_dims: frozenset[str]
    scale: Beta

    def sum(self) -> Tensor:
        sizes = {d: n for fs in self.factors.values() for f in fs for d, n in zip(dims(f), f.shape, strict=True)}
        summed = contract_tensor_tree(self.factors, set(self.sum_dims), ring=SampleRing(cache={}, dim_to_size=sizes))
        costs = {t: [packed.scale_and_mask(f, scale=self.scale) for f in fs] for t, fs in summed.items()}
        return torch.as_tensor(self.dice.compute_expectation(costs))


class Minus(NamedTuple):
    marginal: Marginal

    def sum(self) -> Tensor:
        return -self.marginal.sum()


def factors(sites: Mapping[str, Any], names: Sequence[str], ordering: Mapping[str, frozenset[str]]) -> OrderedDict:
    """Log-densities by plates, masked but not scaled: the scale belongs outside of the logarithm of the sum."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name in names:
        tree.setdefault(ordering[name], []).append(scaled(sites[name], 1.0))
    return tree


def weigh_what_the_model_sums_out(traces: WeighedTraces) -> list[str]:
    """Give each site that the model enumerates the weight of the sites that depend on it; return these sites.

    Inside the logarithm of a sum, single factors cannot be weighted. The sum is part of the likelihood where data depend on
    it, otherwise part of the prior.
    """
    sites = traces.model_sites
    enumerated = [n for n, s in sites.items() if n not in traces.guide_sites and "_enumerate_dim" in s["infer"]]
    symbols = {sites[n]["infer"]["_enumerate_symbol"] for n in enumerated}
    # By the masked density, as in Pyro: what a class masks depends on the class.
    readers = [n for n, s in sites.items() if n not in enumerated and symbols & set(dims(s["packed"]["log_prob"]))]
    weightless = [n for n in readers if sites[n]["mask"] is False or sites[n]["infer"].get("_deterministic")]
    observed = [n for n in readers if sites[n]["is_observed"] and n not in weightless]
    latents = [n for n in readers if not sites[n]["is_observed"] and n not in weightless]
    carried = [n for n, s in traces.guide_sites.items() if symbols & set(dims(s["packed"]["log_prob"]))]
    if carried:
        raise MaskError(
            f"the model masks {quoted(carried)} by {quoted(enumerated)}, which it sums out, so the mask cannot be "
            "applied in the guide: enumerate it in the guide, or mask model and guide alike by data"
        )
    weighed = [n for n in latents if not same(sites[n]["scale"], traces.scales[n])]
    if observed and weighed:
        raise EnumerationError(
            f"the model sums out {quoted(enumerated)} in the densities of {quoted(observed)} and of {quoted(weighed)} "
            "together, so beta cannot be applied to the latents alone: enumerate it in the guide "
            f"(infer={{'enumerate': 'parallel'}} there), or give those latents beta = 1"
        )
    scales = [traces.scales.get(n, sites[n]["scale"]) for n in (*enumerated, *observed, *latents)]
    weights = [sites[n]["scale"] for n in latents]
    if not (all(same(s, scales[0]) for s in scales) and all(same(w, weights[0]) for w in weights)):
        raise EnumerationError(
            f"the model sums out {quoted(enumerated)} in the densities of {quoted([*observed, *latents])}, which have "
            "one weight inside the logarithm of a sum, but their betas or scales differ: give these latents one beta, "
            "move the summed-out site into the subsampled plate of the sites that depend on it, or enumerate it in "
            "the guide"
        )
    for name in (*enumerated, *weightless):
        sites[name]["scale"] = weights[0] if latents and not observed else scales[0]
    for name in enumerated:
        sites[name]["packed"]["mask"] = None  # as in Pyro, which sums p(c) to one under a mask too
    return [*enumerated, *readers]


def check_readers(traces: WeighedTraces, ordering: Mapping[str, frozenset[str]]) -> None:
    """Raise for a site outside a plate that depends on a site enumerated inside it.

    All elements of the plate share one axis of values, so they would change together. Pyro only warns.
    """
    for sites in (traces.guide_sites, traces.model_sites):
        owners = {s["infer"]["_enumerate_symbol"]: n for n, s in sites.items() if "_enumerate_symbol" in s["infer"]}
        for reader, site in sites.items():
            for symbol in dims(site["packed"]["log_prob"]):
                owner = owners.get(symbol, reader)
                if not ordering[owner] <= ordering[reader]:
                    raise EnumerationError(
                        f"'{reader}' depends on '{owner}', which is enumerated in a plate that '{reader}' is not in: "
                        "the elements of that plate would change their values together. Leave out "
                        f"infer={{'enumerate': ...}} of '{owner}', so that it is drawn (BetaTraceGraph_ELBO), or move "
                        f"'{reader}' into the plate"
                    )


def same(a: Beta, b: Beta) -> bool:
    return a is b or bool(torch.as_tensor(a == b).all())


def scaled(site: Any, scale: Beta) -> Tensor:
    # Twice, because Pyro's function drops the scale where there is a mask.
    masked = packed.scale_and_mask(detached(site["packed"]["unscaled_log_prob"]), mask=site["packed"]["mask"])
    result: Tensor = packed.scale_and_mask(masked, scale=scale)
    return result


def dims(tensor: Any) -> str:
    """The symbols by which Pyro names the axes of a packed tensor."""
    symbols: str = tensor._pyro_dims
    return symbols


def detached(tensor: Tensor) -> Tensor:
    copy = tensor.detach()
    setattr(copy, "_pyro_dims", dims(tensor))  # noqa: B010
    return copy
