"""A traced and compiled step that can be called, and how it is built and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import CompileError
from ..gradients import leaves_behind
from ..terms import Terms
from ..traces.matching import Beta
from ..weights import snapshot
from .calls import Arguments
from .inductor import compiled_function
from .options import Options
from .outputs import agree, lent
from .refusals import OTHERWISE, named_compiling, refuse_arguments, refuse_hooks, refuse_moved
from .runs import Step, eager_step, kept_buffers, kept_noise, numbers_of
from .surroundings import Surroundings, modules_inside
from .tracing import Traced, as_input, traced_step

if TYPE_CHECKING:
    from ..objective import Objective

CHECKED_CALLS, CHECKED_EVERY = (2, 10), 100  # calls of each graph that are checked, besides the first


class Graph:
    """A step for arguments of one shape, in one state of the programs.

    :ivar params: the parameters of the programs in Pyro's store, by name, see `runs.Eager`.
    :ivar leaves: the tensors that the loss may have a gradient for; `trained` are those for which it has one.
    """

    def __init__(
        self,
        key: tuple,
        traced: Traced,
        slots: dict[str, Tensor],
        params: dict[str, tuple[Tensor, bool]],
        modules: list[nn.Module],
        leaves: list[Tensor],
        surroundings: Surroundings,
    ) -> None:
        self.key, self.params, self.modules, self.leaves = key, params, modules, leaves
        self.trained, self.surroundings, self.num_calls = traced.trained, surroundings, 1
        self._traced, self._slots = traced, slots
        self._of_weights = [list(slots.values())[i] for i in traced.given if i < len(slots)]
        self._of_arguments = [i - len(slots) for i in traced.given if i >= len(slots)]
        self._last: dict[str, Any] = {}  # the numbers that are in the slots
        self._function: Callable = traced.module.forward
        self._lent: list[int] = []  # outputs whose memory is shared with other tensors

    def compile(self, weights: Mapping[str, Beta], arguments: Arguments, options: Options) -> list[Tensor]:
        """Compile, and run once."""
        inputs = self._inputs(arguments)
        self._function = compiled_function(self._traced.module, inputs, options)
        with named_compiling():
            outputs = self.run(weights, arguments)
        self._lent = lent(inputs, outputs, self._traced.num_parts, self.trained)
        return outputs

    def _inputs(self, arguments: Arguments) -> list[Tensor]:
        return [*self._of_weights, *[arguments.tensors[i] for i in self._of_arguments], *self._traced.held]

    def run(self, weights: Mapping[str, Beta], arguments: Arguments) -> list[Tensor]:
        with torch.no_grad():
            for name, slot in self._slots.items():
                weight = weights[name]
                if isinstance(weight, Tensor):
                    slot.copy_(weight)
                    self._last.pop(name, None)
                elif self._last.get(name) != weight:
                    slot.fill_(weight)
                    self._last[name] = weight
            outputs = self._function(*self._inputs(arguments))
            if not self._lent:
                return list(outputs)
            return [o.clone(memory_format=torch.contiguous_format) if i in self._lent else o for i, o in enumerate(outputs)]

    def call(
        self,
        objective: Objective,
        model: Callable,
        guide: Callable,
        arguments: Arguments,
        args: tuple,
        kwargs: Mapping[str, Any],
        weights: Mapping[str, Beta],
    ) -> list[Tensor]:
        """Run the graph; at some calls, run the programs too and compare."""
        self.num_calls += 1
        step = None
        if self.num_calls in CHECKED_CALLS or self.num_calls % CHECKED_EVERY == 0:
            step = eager_step(objective, model, guide, args, kwargs, self.leaves, self.modules).step
        outputs = self.run(weights, arguments)
        if step is not None:
            self.check(step, outputs)
        return outputs

    def parts(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs[: self._traced.num_parts]

    def gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs[self._traced.num_parts :]

    def outputs_of(self, step: Step) -> list[Tensor]:
        """The outputs that the graph should have for this step; empty where the step has other gradients."""
        gradients = [g for g in step.gradients if g is not None]
        return [*step.parts, *gradients] if len(gradients) == len(self.trained) else []

    def tell(self, objective: Objective, weights: Mapping[str, Beta], outputs: list[Tensor]) -> None:
        """Set the state of the objective as after an uncompiled run."""
        objective._forget()
        _, reconstruction, kl_sum, elbo, loss, *rest = self.parts(outputs)
        names = self._traced.names
        objective._given = weights
        betas = snapshot(objective._betas_now())
        objective._given = None
        objective._terms = Terms(
            reconstruction=reconstruction,
            kl=dict(zip(names, rest, strict=False)),
            kl_sum=kl_sum,
            elbo=elbo,
            loss=loss,
            beta=betas,
            plates=self._traced.plates,
        )
        objective._set_arrays(tuple(rest[len(names) :]))
        objective._complete = True

    def check(self, step: Step, outputs: list[Tensor]) -> None:
        """Raise if the graph gives other numbers than the programs on the same noise."""
        wanted, parts = self.outputs_of(step), self.parts(outputs)
        if agree(outputs, wanted, self._traced.num_parts):
            return
        raise CompileError(
            f"at call {self.num_calls} of a compiled step its loss is {float(parts[0]):.8g}, but that of the programs "
            f"is {float(step.parts[0]):.8g} on the same noise, or their gradients differ: a program uses something "
            "that is not in the graph, such as random numbers of Python or NumPy, a clock, or variables that changed. "
            f"Draw by torch or Pyro, and pass values that change as tensor arguments. {OTHERWISE}"
        )


def build(
    objective: Objective,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    args: tuple,
    kwargs: Mapping[str, Any],
    weights: Mapping[str, Beta],
    inputs: list[str],
    key: tuple,
    options: Options,
) -> tuple[Graph, list[Tensor]]:
    """Run the pair uncompiled, for this call; then trace and compile it for the next ones.

    Parameters and guides may be created in the first run. The graph is compared with another run, on other noise. Returns
    the graph and the outputs of this call.
    """
    refuse_arguments([*arguments.tensors, *(leaf.value for leaf in arguments.leaves if leaf is not None), *weights.values()])
    with modules_inside(model, guide) as modules:
        loss = objective._differentiable_loss(model, guide, args, kwargs)
    leaves = leaves_behind([loss])
    refuse_hooks(leaves)
    first = numbers_of(objective, loss.detach(), loss, leaves)
    slots = {name: as_input(weights[name], first.parts[0]) for name in inputs}
    eager = eager_step(objective, model, guide, args, kwargs, leaves, modules)
    traced = traced_step(objective, model, guide, arguments, {**weights, **slots}, leaves, modules)
    surroundings = Surroundings(modules, (model, guide), eager.params, [*traced.held, *leaves], objective)
    graph = Graph(key, traced, slots, eager.params, modules, leaves, surroundings)
    with kept_noise(modules), kept_buffers(modules), refuse_moved(traced.held, modules):
        graph.check(eager.step, graph.compile(weights, arguments, options))
    # Besides parameters, the first run may have had gradients of draws that were leaves.
    gradients: dict[int, Any] = {id(leaf): gradient for leaf, gradient in zip(leaves, first.gradients, strict=True)}
    return graph, [*first.parts, *(torch.empty_like(leaf).copy_(gradients[id(leaf)]) for leaf in graph.trained)]
