"""A traced and compiled step that can be called, and how it is built and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import CompileError
from ..terms import Terms
from ..traces.matching import Beta
from ..weights import snapshot
from .calls import Arguments
from .inductor import compiled_function
from .options import Options
from .refusals import OTHERWISE, refuse_arguments
from .runs import Step, eager_step, kept_buffers, kept_noise, leaves_of, numbers_of
from .surroundings import Surroundings, modules_inside
from .tracing import Traced, as_input, is_fixed, traced_step

if TYPE_CHECKING:
    from ..objective import Objective

CHECKED_CALLS = (2, 10, 100)  # of each graph, beside the first
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of terms, relative to the largest; ten times that for gradients


class Graph:
    """A step for arguments of one shape, in one state of the programs.

    :ivar params: by name, what the programs have in Pyro's store, see `runs.Eager`.
    :ivar leaves: what the loss may have a gradient of; `trained` are those of which it has one.
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
        self._last: dict[str, Any] = {}  # the numbers that stand in the slots
        self._function: Callable = traced.module.forward

    def compile(self, arguments: Arguments, options: Options) -> None:
        self._function = compiled_function(self._traced.module, self._inputs(arguments), options)

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
            outputs: list[Tensor] = self._function(*self._inputs(arguments))
        return outputs

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
        """Run, at some calls beside the programs."""
        self.num_calls += 1
        step = None
        if self.num_calls in CHECKED_CALLS:
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
        """What the graph would return for it; empty where the step has other gradients."""
        gradients = [g for g in step.gradients if g is not None]
        return [*step.parts, *gradients] if len(gradients) == len(self.trained) else []

    def tell(self, objective: Objective, weights: Mapping[str, Beta], outputs: list[Tensor]) -> None:
        """Give the objective what it would have after a run of its own."""
        objective._forget()
        _, reconstruction, kl_sum, elbo, loss, *rest = self.parts(outputs)
        names = self._traced.terms.kl
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
            plates=self._traced.terms.plates,
        )
        objective._set_arrays(tuple(rest[len(names) :]))
        objective._complete = True

    def check(self, step: Step, outputs: list[Tensor]) -> None:
        """Refuse a graph that gives other numbers than the programs on the same noise."""
        wanted, parts = self.outputs_of(step), self.parts(outputs)
        if [w.shape for w in wanted] == [o.shape for o in outputs]:
            tolerance = TOLERANCE.get(parts[0].dtype, 1e-2)
            same = alike(parts, self.parts(wanted), tolerance)
            if same and alike(self.gradients(outputs), self.gradients(wanted), 10 * tolerance):
                return
        raise CompileError(
            f"at call {self.num_calls} of a compiled step its loss is {float(parts[0]):.8g}, but that of the programs is "
            f"{float(step.parts[0]):.8g} on the same noise, or their gradients differ: a program uses what the graph cannot "
            "see, such as random numbers of Python or NumPy, a clock, or variables that changed. Draw by torch or Pyro, and "
            f"pass what changes as an argument, as a tensor. {OTHERWISE}"
        )


def alike(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    """Whether all numbers agree, in units of the largest of them."""
    if any(t.dtype not in TOLERANCE for t in (*found, *wanted)):
        tolerance = max(tolerance, 1e-2)
    largest = max((float(w.abs().nan_to_num(0.0, 0.0, 0.0).max()) for w in wanted if w.numel()), default=0.0)
    return all(
        torch.allclose(f.to(w.dtype), w, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
        for f, w in zip(found, wanted, strict=True)
    )


def build(
    objective: Objective,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    args: tuple,
    kwargs: Mapping[str, Any],
    weights: Mapping[str, Beta],
    key: tuple,
    options: Options,
) -> tuple[Graph, list[Tensor]]:
    """Run the pair as without compiling, which is this call; trace and compile it for the next ones.

    Parameters and guides may come into being in that run. The graph is held against another one, on other noise. Returns
    the graph and the outputs of this call.
    """
    refuse_arguments([*arguments.tensors, *(leaf.value for leaf in arguments.leaves if leaf is not None), *weights.values()])
    with modules_inside(model, guide) as modules:
        loss = objective._differentiable_loss(model, guide, args, kwargs)
    leaves = leaves_of(loss)
    first = numbers_of(objective, loss.detach(), loss, leaves)
    slots = {name: as_input(w, first.parts[0]) for name, w in weights.items() if not is_fixed(objective._weights()[name])}
    eager = eager_step(objective, model, guide, args, kwargs, leaves, modules)
    traced = traced_step(objective, model, guide, arguments, {**weights, **slots}, leaves, modules)
    surroundings = Surroundings(modules, (model, guide), eager.params, [*traced.held, *leaves], objective)
    graph = Graph(key, traced, slots, eager.params, modules, leaves, surroundings)
    graph.compile(arguments, options)
    with kept_noise(modules), kept_buffers(modules):
        graph.check(eager.step, graph.run(weights, arguments))
    # Beside parameters, the first run may have had gradients at draws that were leaves.
    gradients: dict[int, Any] = {id(leaf): gradient for leaf, gradient in zip(leaves, first.gradients, strict=True)}
    return graph, [*first.parts, *(gradients[id(leaf)] for leaf in graph.trained)]
