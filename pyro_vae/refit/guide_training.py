"""Train the guide of a frozen model by Pyro's objectives and optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..batches import ToArguments, arguments_of
from ..densities import innermost
from ..errors import NonFiniteError, OptionError
from ..kernel import Call
from ..objectives import (
    BetaTraceEnum_ELBO,
    BetaTraceGraph_ELBO,
    BetaTraceMeanField_ELBO,
    ImportanceWeightedELBO,
)
from ..training import EarlyStopping, FusedOptim
from .frozen_model import FrozenModel, name_of
from .refit import Stopped

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class GuideTraining:
    """The training loop. Afterwards the guide is that of the best look, or the last one without held-out data.

    :ivar simulate: function from the arguments of a batch to arguments with data simulated from the model.
    :ivar num_simulated: updates on such data after each update on a batch.
    """

    model: Callable
    guide: Callable
    loss: Any
    optim: PyroOptim
    frozen: FrozenModel
    simulate: Callable[..., Arguments]
    num_simulated: int
    stopping: EarlyStopping | None
    num_updates: int = 0
    num_epochs: int = 0
    trained: dict[str, None] = field(default_factory=dict)

    def run(self, loader: Iterable[Any], args: ToArguments, num_epochs: int, bar: Any) -> Stopped:
        self.looks_say_stop()  # the current guide as the reference; the first look never stops
        for _ in range(num_epochs):
            self.num_epochs += 1
            losses = []
            for batch in loader:
                losses.append(self.update(*arguments_of(batch, args)))
                for _ in range(self.num_simulated):
                    self.update(*self.simulate(*arguments_of(batch, args)))
                if self.looks_say_stop():
                    return "held-out"
            self.step_schedulers(losses)
            bar.update()
        return "epochs"

    def looks_say_stop(self) -> bool:
        return self.looking(self.stopping)

    def last_look(self) -> None:
        """A look at the end of the loop, which may be the best state."""
        self.looking(None if self.stopping is None else self.stopping.look)

    def looking(self, look: Callable[[int], Any] | None) -> bool:
        try:
            return look is not None and bool(look(self.num_updates))
        except NonFiniteError as error:
            raise self.diverged("the held-out ELBO is not finite") from error

    def update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Like `SVI.step`, but only the parameters of the guide are passed to the optimiser."""
        with poutine.trace(param_only=True) as seen:
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        sites: dict[str, Any] = seen.trace.nodes
        params = {site["value"].unconstrained() for site in sites.values()}
        known = self.frozen.of_guide | self.frozen.of_model
        if any(param.grad is not None and bool(param.grad.any()) for param in params - known):
            self.frozen.learn(args, kwargs)  # parameters of a branch that the first batch did not use
        moving = params & self.frozen.of_guide
        if not moving and not self.num_updates:
            zero_grads(params)
            raise OptionError(self.none_registered(params))
        self.optim(moving)  # type: ignore[arg-type]  # a set, as SVI does
        zero_grads(params - self.frozen.of_model)
        if not self.num_updates:
            self.trained |= dict.fromkeys(sorted(map(name_of, moving)))
        self.num_updates += 1
        value = sum(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)
        if not math.isfinite(value):
            raise self.diverged(f"the loss became {value}")
        return value

    def diverged(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{what} in epoch {self.num_epochs} of the refit: lower the learning rate of the optimiser, or look for "
            "scales that underflow to 0 in the guide, which has been restored to the best kept state"
        )

    def none_registered(self, params: Collection[Tensor]) -> str:
        return (
            f"no parameter that the guide's densities depend on is registered with Pyro, so none can be trained "
            f"({len(params)} others are): call pyro.module(name, network) in the guide, with a name that no other network "
            "in the parameter store has had"
        )

    def step_schedulers(self, losses: list[float]) -> None:
        """Step the schedulers once per epoch; those that need a loss get its mean."""
        optim: Any = self.optim
        if isinstance(optim, PyroLRScheduler):
            scheduler = optim.pt_scheduler_constructor
        elif isinstance(optim, FusedOptim):
            scheduler = optim.scheduler
        else:
            return
        if scheduler is ReduceLROnPlateau:
            optim.step(sum(losses) / len(losses))
        elif scheduler is not None:
            optim.step()


def default_loss(call: Call, prior_sites: Collection[str], datum_plate: str | None) -> Any:
    """The form of the ELBO with the least noise for the draws of the pair."""
    structure = call.structure
    if prior_sites:
        return ImportanceWeightedELBO(num_particles=1, prior_sites=prior_sites, datum_plate=datum_plate)
    if structure.guide_enumerated or structure.model_enumerated:
        return BetaTraceEnum_ELBO()
    with torch.no_grad():
        drawn = [site for site in call.draw(1).values() if not site.is_observed]
    if all(innermost(site.fns[0]).has_rsample for site in drawn):
        return BetaTraceMeanField_ELBO()
    return BetaTraceGraph_ELBO()


def check_loss(loss: Any) -> Any:
    if not callable(getattr(loss, "loss_and_grads", None)):
        raise OptionError(
            f"loss must be an objective such as pv.BetaTrace_ELBO() or pyro.infer.Trace_ELBO(), got {type(loss).__name__}"
        )
    return loss


def check_optim(optim: Any) -> None:
    if not isinstance(optim, PyroOptim):
        raise OptionError(
            f"optim must be an optimiser of Pyro, such as pyro.optim.Adam({{'lr': 1e-3}}) or "
            f"pv.FusedOptim(torch.optim.Adam, {{'lr': 1e-3}}), got {type(optim).__name__}"
        )
