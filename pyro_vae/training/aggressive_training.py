"""Aggressive training of the guide, against posterior collapse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from pyro.poutine import unwrap
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from ..batches import NO_BATCH, ToArguments, arguments_of, check_loader, first_element
from ..errors import EmptyBatchError, OptionError, described
from ..isolation import eval_mode
from ..noise import kept_random_state
from ..options import whole_number


class AggressiveTraining:
    """Many steps of the guide for each step of the model, early in training, against posterior collapse.

    Early in training the guide is far from the posterior. The model may then learn to ignore the latents, after which the
    guide has nothing to learn: the posterior has collapsed. Here only the guide is updated, on one batch after the other,
    until its loss no longer falls. Then only the model is updated, once (He et al., 2019, https://arxiv.org/abs/1901.05534).
    Continue with ``svi.step`` once `CollapseMonitor` and the rate show that the latents are in use, after some tens to
    hundreds of such steps.

    :param svi: a `pyro.infer.SVI`, whose optimiser, parameters and objective are used.
    :param batches: a `DataLoader` or any other iterable that can be iterated repeatedly.
    :param args: function from a batch to the positional arguments of model and guide, or to a dict of keywords; by default
        it takes the batch's first element.
    :param max_inner_steps: most steps of the guide for each step of the model.
    :param window: number of steps in the means of the loss that are compared. The paper's 10 are too few where the loss of a
        batch is noisy: the guide then stops too early (`tutorials/experiments/collapse.md`).

    :ivar num_inner_steps: steps of the guide in the last call of `step`; it falls as the guide approaches the posterior.
    :raises OptionError: for counts below 1, an iterator that can be iterated only once, or a guide that uses all parameters.
        Parameters that both sides use count as the guide's.
    :raises EmptyBatchError: for a loader without batches.

    Every update, also of the guide, adds one to `num_updates` of the objective, so schedules advance faster. So does a decay
    inside the optimiser (`lrd` of Pyro's ClippedAdam).

    Example::

        aggressive = pv.AggressiveTraining(svi, loader)
        for _ in range(500):
            aggressive.step()
        for (x,) in loader:
            svi.step(x)
    """

    def __init__(
        self,
        svi: SVI,
        batches: Iterable[Any],
        *,
        args: ToArguments = first_element,
        max_inner_steps: int = 200,
        window: int = 50,
    ) -> None:
        if not isinstance(svi, SVI):
            raise OptionError(f"expected an SVI of pyro.infer, got {described(svi)}: pass SVI(model, guide, optim, loss)")
        check_loader(batches)
        if iter(batches) is batches:
            raise OptionError("batches must be iterable repeatedly: pass a DataLoader or a list, not an iterator")
        self.svi = svi
        self.max_inner_steps = whole_number("max_inner_steps", max_inner_steps)
        self.window = whole_number("window", window)
        self.num_inner_steps = 0
        self._loader, self._args = batches, args
        self._batches: Iterator[Any] = iter(())
        self._of_guide: frozenset[str] | None = None

    def step(self) -> float:
        """Update the guide until its loss no longer falls, then the model once.

        :returns: the loss of the model's batch.
        """
        before = float("inf")
        losses: list[float] = []
        self.num_inner_steps = 0
        while self.num_inner_steps < self.max_inner_steps:
            losses.append(self._update(self._next_args(), of_guide=True))
            self.num_inner_steps += 1
            if len(losses) == self.window:
                mean = sum(losses) / self.window
                if not mean < before:  # NaN stops it too
                    break
                before, losses = mean, []
        return self._update(self._next_args(), of_guide=False)

    def _update(self, arguments: tuple[tuple, dict[str, Any]], of_guide: bool) -> float:
        """Like `SVI.step`, but only for the parameters of one side."""
        svi = self.svi
        with poutine.trace(param_only=True) as seen:
            args, kwargs = arguments
            loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
        sites: dict[str, Any] = seen.trace.nodes
        params = {name: site["value"].unconstrained() for name, site in sites.items()}
        if self._of_guide is None:
            self._of_guide = self._find_side(args, kwargs, params)
            if self._of_guide.issuperset(params):
                self._of_guide = None
                zero_grads(set(params.values()))
                raise OptionError(
                    "the guide uses all parameters, so no parameters of the model are left to train separately: with "
                    "pyro.module, register in the guide only modules that the guide uses"
                )
        svi.optim({param for name, param in params.items() if (name in self._of_guide) == of_guide})
        # gradients of the other side are cleared too, so that its next step does not use them
        zero_grads(set(params.values()))
        return sum(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)

    def _find_side(self, args: tuple, kwargs: dict[str, Any], params: Mapping[str, Tensor]) -> frozenset[str]:
        """The names of the parameters that the guide uses; all others belong to the model.

        Other names of the same tensors are included.
        """
        used = parameters_of(self.svi.guide, args, kwargs)
        if isinstance(unwrap(self.svi.guide), GuideMessenger):  # an autoguide runs the model as well
            used -= parameters_of(self.svi.model, args, kwargs)
        return frozenset(name for name, param in params.items() if param in used)

    def _next_args(self) -> tuple[tuple, dict[str, Any]]:
        for _ in range(2):
            for batch in self._batches:
                return arguments_of(batch, self._args)
            self._batches = iter(self._loader)
        raise EmptyBatchError(NO_BATCH)


def parameters_of(program: Callable, args: tuple, kwargs: dict[str, Any]) -> set[Tensor]:
    """The parameters that a run of the program uses. Batch norm is frozen in it, and the random state is restored."""
    with (
        torch.no_grad(),
        kept_random_state(),
        eval_mode(program),
        poutine.block(),
        poutine.trace(param_only=True) as seen,
    ):
        program(*args, **kwargs)
    values: list[Any] = [site["value"] for site in seen.trace.nodes.values()]
    return {value.unconstrained() for value in values}
