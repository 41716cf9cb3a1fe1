"""Base class of all objectives: counts updates, evaluates schedules, keeps the terms of the last call, makes a module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from ..autocast import for_programs_alone
from ..errors import OptionError, ScheduleWarning
from ..kernel import named_failures
from ..options import MOST_DIMS, amount, flag, whole_number
from .compiled import Compiled, compiled_or_none
from .gradients import with_gradient_of
from .terms import Terms
from .traces.matching import Beta, Betas
from .untrained import UntrainedWatch
from .weights import Schedule, Weight, checked_weights, value_of

CALLS_BEFORE_WARNING = 500  # calls without an update, more than micro-batches or closures make


class Objective(ELBO):
    """A mix-in before a class of Pyro; also the base class where the kernel runs the pair."""

    _complete: bool
    _terms: Terms | None
    _given: Mapping[str, Beta] | None = None  # weights that are inputs of a graph, by name

    def __init__(self, *, compile: bool | Mapping[str, Any] = False, **options: Any) -> None:
        check_options_of_pyro(**options)
        super().__init__(**options)
        self._compiled: Compiled | None = compiled_or_none(compile)
        self.num_particles = amount("num_particles", self.num_particles)
        self.num_updates = 0
        self._calls_since_update = 0
        self._forget()

    @property
    def num_updates(self) -> int:
        return self._num_updates

    @num_updates.setter
    def num_updates(self, num_updates: int) -> None:
        self._num_updates = whole_number("num_updates", num_updates, lowest=0)
        self._calls_since_update = 0

    @property
    def terms(self) -> Terms | None:
        """The parts of the last call, computed on first access; None before the first call."""
        if self._terms is None and self._complete:
            self._terms = self._make_terms()
        return self._terms

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        with named_failures(model, guide, args, kwargs), for_programs_alone():
            return float(self._loss_alone(model, guide, args, kwargs))

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        with named_failures(model, guide, args, kwargs), for_programs_alone():
            if self._compiled is None:
                loss = float(self._loss_and_grads(model, guide, args, kwargs))
            else:
                loss = self._compiled.loss_and_grads(self, model, guide, args, kwargs)
        self.num_updates += 1
        return loss

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        with named_failures(model, guide, args, kwargs), for_programs_alone():
            if self._compiled is None or not torch.is_grad_enabled():
                loss = self._differentiable_loss(model, guide, args, kwargs)
            else:
                loss = self._compiled.differentiable_loss(self, model, guide, args, kwargs)
        self._warn_if_schedule_stands_still()
        return loss

    def _loss_alone(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float | Tensor:
        return super().loss(model, guide, *args, **kwargs)  # type: ignore[misc]

    def _loss_and_grads(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float | Tensor:
        return super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[misc]

    def _differentiable_loss(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        loss, surrogate = self._value_and_surrogate(model, guide, args, kwargs)
        return with_gradient_of(surrogate, loss)

    def _value_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The loss, detached, and the surrogate whose gradient is used. No tensor is read, so that it can be traced."""
        raise NotImplementedError

    def _arrays(self) -> tuple[Tensor, ...]:
        """Other tensors that the last call computed, besides its terms."""
        return ()

    def _set_arrays(self, arrays: tuple[Tensor, ...]) -> None:
        pass

    def __call__(self, model: nn.Module, guide: nn.Module) -> ObjectiveModule:
        for program in (model, guide):
            if isinstance(getattr(program, "__self__", None), nn.Module):
                raise OptionError(
                    f"{program} is a method, so the parameters of its module would not be found: pass nn.Modules whose "
                    "forward is the program (as vae.model and vae.guide of pv.VAE), or train with SVI"
                )
        return ObjectiveModule(model, guide, self)

    def state_dict(self) -> dict[str, int]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_updates = state["num_updates"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_terms": None, "_complete": False}

    def _forget(self) -> None:
        self._complete = False  # until all particles have run
        self._terms = None

    def _make_terms(self) -> Terms:
        raise NotImplementedError

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The weights of this objective that follow a schedule, by name."""
        weights = self._weights()
        return {name: weight for name, weight in weights.items() if callable(weight) and not isinstance(weight, Tensor)}

    def _weights(self) -> dict[str, Weight]:
        return {}

    def _value(self, name: str) -> Beta:
        """The weight with this name at this update."""
        if self._given is not None:
            return self._given[name]
        return value_of(self._weights()[name], self.num_updates, "beta" if name.startswith("beta of ") else name)

    def _betas_now(self) -> Betas:
        return 1.0

    def _warn_if_schedule_stands_still(self) -> None:
        if not torch.is_grad_enabled() or not self.schedules:
            return
        self._calls_since_update += 1
        if self._calls_since_update == CALLS_BEFORE_WARNING:
            warnings.warn(
                f"{', '.join(self.schedules)} follows a schedule, but num_updates has been {self.num_updates} for "
                f"{CALLS_BEFORE_WARNING} calls: only SVI advances it automatically. Set objective.num_updates = step "
                "after each optimiser step",
                ScheduleWarning,
                stacklevel=4,
            )


class BetaObjective(Objective):
    """An objective with a weight on the KL."""

    def __init__(
        self, beta: Weight | Mapping[str, Weight] = 1.0, *, compile: bool | Mapping[str, Any] = False, **options: Any
    ) -> None:
        super().__init__(compile=compile, **options)
        self.beta = beta

    @property
    def beta(self) -> Weight | Mapping[str, Weight]:
        return MappingProxyType(self._beta) if isinstance(self._beta, dict) else self._beta

    @beta.setter
    def beta(self, beta: Weight | Mapping[str, Weight]) -> None:
        self._beta = checked_weights(beta)

    def _weights(self) -> dict[str, Weight]:
        if isinstance(self._beta, Mapping):
            return {f"beta of '{name}'": weight for name, weight in self._beta.items()}
        return {"beta": self._beta}

    def _betas_now(self) -> Betas:
        if isinstance(self._beta, Mapping):
            return {name: self._value(f"beta of '{name}'") for name in self._beta}
        return self._value("beta")


class ObjectiveModule(ELBOModule):
    """A pair under an objective as one `nn.Module` that returns the loss; its state holds `num_updates` too."""

    elbo: Objective

    def __init__(self, model: nn.Module, guide: nn.Module, elbo: Objective) -> None:
        super().__init__(model, guide, elbo)
        self._untrained = UntrainedWatch(self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().forward(*args, **kwargs)
        if not self._untrained.done and loss.requires_grad:
            self._untrained.look(self, loss)
        return loss

    def get_extra_state(self) -> dict[str, int]:
        return self.elbo.state_dict()

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.elbo.load_state_dict(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys, own = args[2], f"{prefix}_extra_state"
        if own in missing_keys:  # the state of a module of Pyro, which has no num_updates
            missing_keys.remove(own)


def check_options_of_pyro(vectorize_particles: bool = False, max_plate_nesting: float = math.inf, **others: Any) -> None:
    """Check options that Pyro accepts unchecked and that would fail in a later step."""
    flag("vectorize_particles", vectorize_particles)
    if not (isinstance(max_plate_nesting, float) and max_plate_nesting == math.inf):  # Pyro raises for it
        whole_number("max_plate_nesting", max_plate_nesting, lowest=0, highest=MOST_DIMS)
