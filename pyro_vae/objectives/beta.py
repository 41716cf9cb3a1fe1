"""What the beta-ELBOs share: beta and its schedule, the count of updates, and the terms of the last call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.ops.provenance import detach_provenance
from pyro.poutine import Trace
from torch import Tensor, nn

from ..errors import OptionError, ScheduleWarning
from ..kernel import Beta, Betas, WeighedTraces, check_imputed, weigh_traces
from .terms import Density, Pass, Terms, places_of, terms_of
from .weights import Weight, check_weight, snapshot, value_of

CALLS_BEFORE_WARNING = 500  # more micro-batches or closure calls than one update has


class BetaELBO(ELBO):
    """What all beta-ELBOs share; comes before a class of Pyro, whose `_get_trace` it wraps."""

    _betas: Betas  # of this call
    _recorded: Betas  # the same, but whoever changes a tensor in place changes no record
    _passes: list[Pass]
    _complete: bool
    _terms: Terms | None

    def __init__(self, beta: Weight | Mapping[str, Weight] = 1.0, **options: Any) -> None:
        super().__init__(**options)
        if isinstance(self.num_particles, bool) or not isinstance(self.num_particles, int) or self.num_particles < 1:
            raise OptionError(f"num_particles must be a whole number >= 1, got {self.num_particles!r}")
        self.beta = beta
        self.num_updates = 0
        self._calls_since_update = 0
        self._forget()

    @property
    def beta(self) -> Weight | Mapping[str, Weight]:
        return MappingProxyType(self._beta) if isinstance(self._beta, dict) else self._beta

    @beta.setter
    def beta(self, beta: Weight | Mapping[str, Weight]) -> None:
        for weight in beta.values() if isinstance(beta, Mapping) else (beta,):
            check_weight(weight)
        self._beta = dict(beta) if isinstance(beta, Mapping) else beta

    @property
    def num_updates(self) -> int:
        return self._num_updates

    @num_updates.setter
    def num_updates(self, num_updates: int) -> None:
        if isinstance(num_updates, bool) or not isinstance(num_updates, int) or num_updates < 0:
            raise OptionError(f"num_updates must be a whole number >= 0, got {num_updates!r}")
        self._num_updates = num_updates
        self._calls_since_update = 0

    @property
    def terms(self) -> Terms | None:
        """The parts of the last call, computed when asked for; None before the first."""
        if self._terms is None and self._complete:
            self._terms = terms_of(self._passes, self.num_particles, self._recorded)
        return self._terms

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        loss: float = super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[misc]
        self.num_updates += 1
        return loss

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().differentiable_loss(model, guide, *args, **kwargs)  # type: ignore[misc]
        self._warn_if_schedule_stands_still()
        return loss

    def __call__(self, model: nn.Module, guide: nn.Module) -> ObjectiveModule:
        for program in (model, guide):
            if isinstance(getattr(program, "__self__", None), nn.Module):
                raise OptionError(
                    f"{program} is a method, so the parameters of its module would not be seen: pass nn.Modules "
                    "whose forward is the program (as vae.model and vae.guide of pv.VAE), or train with SVI"
                )
        return ObjectiveModule(model, guide, self)

    def state_dict(self) -> dict[str, int]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_updates = state["num_updates"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": [], "_terms": None, "_complete": False, "_betas": 1.0, "_recorded": 1.0}

    def _forget(self) -> None:
        self._betas = self._recorded = 1.0
        self._passes = []
        self._complete = False  # until all particles have run
        self._terms = None

    def _get_traces(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        self._forget()
        self._betas = self._betas_now()
        self._recorded = snapshot(self._betas)
        yield from super()._get_traces(model, guide, args, kwargs)
        self._complete = True

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        traces = weigh_traces(self._run_pair, model, guide, args, kwargs, self._betas)
        self._passes.append(self._measure(traces))
        if traces.imputed:
            check_imputed(traces.model_sites, traces.imputed)
        return traces.model, traces.guide

    def _run_pair(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        return super()._get_trace(model, guide, args, kwargs)  # type: ignore[safe-super]

    def _measure(self, traces: WeighedTraces) -> Pass:
        traces.model.compute_log_prob()
        traces.guide.compute_score_parts()
        return densities_of(traces)

    def _betas_now(self) -> Betas:
        if isinstance(self._beta, Mapping):
            return {name: value_of(weight, self.num_updates) for name, weight in self._beta.items()}
        return value_of(self._beta, self.num_updates)

    def _warn_if_schedule_stands_still(self) -> None:
        weights = self._beta.values() if isinstance(self._beta, Mapping) else (self._beta,)
        if not torch.is_grad_enabled() or not any(callable(w) and not isinstance(w, Tensor) for w in weights):
            return
        self._calls_since_update += 1
        if self._calls_since_update == CALLS_BEFORE_WARNING:
            warnings.warn(
                f"beta follows a schedule, but num_updates has been {self.num_updates} for {CALLS_BEFORE_WARNING} calls: "
                "only SVI advances it by itself. Set objective.num_updates = step after each optimiser step",
                ScheduleWarning,
                stacklevel=4,
            )


class ObjectiveModule(ELBOModule):
    """A pair under an objective as one `nn.Module` that returns the loss; its state holds `num_updates` too."""

    elbo: BetaELBO

    def get_extra_state(self) -> dict[str, int]:
        return self.elbo.state_dict()

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.elbo.load_state_dict(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys, own = args[2], f"{prefix}_extra_state"
        if own in missing_keys:  # the state of a module of Pyro, which has no count
            missing_keys.remove(own)


def densities_of(traces: WeighedTraces, analytic: Mapping[str, Tensor] | None = None) -> Pass:
    """The densities of one run, their scales without beta; a KL with a formula takes the place of its densities."""

    def density(site: Any, scale: Beta) -> Density:
        log_prob = detach_provenance(site["unscaled_log_prob"].detach())
        if isinstance(site["fn"], dist.Unit):
            log_prob = log_prob.clone()  # it may be a parameter itself, which the optimiser changes in place
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
