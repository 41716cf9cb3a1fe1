"""Base class of the beta-ELBOs on Pyro's traces: beta in the scales of the latents, the densities of each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
from pyro.ops.provenance import detach_provenance
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor

from ...autocast import for_program
from ...densities import FillHoles
from ..objective import BetaObjective
from ..terms import Density, Pass, Terms, places_of, terms_of
from ..weights import snapshot
from .beta_messenger import WeighedTraces, weigh_traces
from .matching import Beta, Betas, check_imputed


class BetaELBO(BetaObjective):
    """Base class of the beta-ELBOs; it is listed before a class of Pyro, whose `_get_trace` it wraps."""

    _betas: Betas  # of this call
    _recorded: Betas  # the same, in memory that later changes in place do not affect
    _passes: list[Pass]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_passes": [], "_betas": 1.0, "_recorded": 1.0}

    def _forget(self) -> None:
        super()._forget()
        self._betas = self._recorded = 1.0
        self._passes = []

    def _make_terms(self) -> Terms:
        return terms_of(self._passes, self.num_particles, self._recorded)

    def _differentiable_loss(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        loss = super()._differentiable_loss(model, guide, args, kwargs)
        warn_if_nan(loss.detach(), "loss")  # as Pyro's classes do
        return loss

    def _get_traces(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        self._forget()
        self._betas = self._betas_now()
        self._recorded = snapshot(self._betas)
        yield from super()._get_traces(FillHoles()(model), FillHoles()(guide), args, kwargs)
        self._complete = True

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        traces = weigh_traces(self._run_pair, model, guide, args, kwargs, self._betas)
        self._passes.append(self._measure(traces))
        if traces.imputed:
            check_imputed(traces.model_sites, traces.imputed)
        return traces.model, traces.guide

    def _guess_max_plate_nesting(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
        with for_program():
            super()._guess_max_plate_nesting(model, guide, args, kwargs)

    def _run_pair(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with for_program():  # Pyro also takes the log-densities of its sites there
            return super()._get_trace(model, guide, args, kwargs)  # type: ignore[safe-super]

    def _measure(self, traces: WeighedTraces) -> Pass:
        with for_program():
            traces.model.compute_log_prob()
            traces.guide.compute_score_parts()
        return densities_of(traces)


def densities_of(traces: WeighedTraces, analytic: Mapping[str, Tensor] | None = None) -> Pass:
    """The densities of one run, with scales without beta; an analytic KL replaces its densities."""

    def density(site: Any, scale: Beta) -> Density:
        log_prob = detach_provenance(site["unscaled_log_prob"].detach())
        if isinstance(site["fn"], dist.Unit):
            log_prob = log_prob.clone()  # it may be a parameter, which the optimiser changes in place
        return Density(log_prob, scale, detach_provenance(site["mask"]))

    def side(sites: Mapping[str, Any], names: tuple[str, ...]) -> list[Density]:
        return [density(sites[n], traces.scales[n]) for n in names if n in sites]

    analytic = analytic or {}
    model, guide = traces.model_sites, traces.guide_sites
    observed = [s for s in model.values() if s["is_observed"]]
    others = [s for n, s in guide.items() if s["is_observed"] and n not in traces.scales]
    known: dict[str, tuple[list[Density], list[Density]]] = {
        n: ([Density(kl.detach(), traces.scales[n], guide[n]["mask"])], []) for n, kl in analytic.items()
    }
    sampled = {n: names for n, names in traces.groups.items() if n not in known}
    return Pass(
        observed=[density(s, s["scale"]) for s in observed],
        kl={**known, **{n: (side(guide, names), side(model, names)) for n, names in sampled.items()}},
        others=[density(s, s["scale"]) for s in others],
        places=places_of(model.values()),
    )
