"""A traced and compiled step that can be called, and how it is built and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from ...errors import CompileError
from ...kernel import modules_of
from ..terms import Terms
from ..traces.matching import Beta
from ..weights import snapshot
from .calls import Arguments
from .inductor import compiled_function
from .options import Options
from .refusals import OTHERWISE, refuse_arguments
from .runs import Eager, Step, eager_step
from .surroundings import Surroundings, modules_inside
from .tracing import Traced, as_input, is_fixed, traced_step

if TYPE_CHECKING:
    from ..objective import Objective

CHECKED_CALLS = (1, 2, 10, 100)  # of each graph
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of terms, relative to the largest; ten times that for gradients


class Graph:
    """A step for arguments of one shape, in one state of the programs."""

    def __init__(self, key: tuple, traced: Traced, slots: dict[str, Tensor], eager: Eager, function: Callable) -> None:
        self.key, self.params, self.trained = key, eager.params, traced.trained
        self.surroundings: Surroundings
        self.modules: list[nn.Module]
        self.num_calls = 0
        self._first: Eager | None = eager  # of the noise that the first call gets
        self._function, self._traced, self._slots = function, traced, slots
        self._of_weights = [list(slots.values())[i] for i in traced.given if i < len(slots)]
        self._of_arguments = [i - len(slots) for i in traced.given if i >= len(slots)]
        self._last: dict[str, Any] = {}  # numbers that stand in the slots

    def run(self, weights: Mapping[str, Beta], arguments: Arguments) -> list[Tensor]:
        with torch.no_grad():
            for name, slot in self._slots.items():
                weight = weights[name]
                if isinstance(weight, Tensor):
                    slot.copy_(weight)
                elif self._last.get(name) != weight:
                    slot.fill_(weight)
                    self._last[name] = weight
            given = [arguments.tensors[i] for i in self._of_arguments]
            outputs: list[Tensor] = self._function(*self._of_weights, *given, *self._traced.held)
        return outputs

    def due(
        self, objective: Objective, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> Step | None:
        """The step without compiling where this call is to be checked, else None."""
        self.num_calls += 1
        if self.num_calls not in CHECKED_CALLS:
            return None
        first, self._first = self._first, None
        return (first or eager_step(objective, model, guide, args, kwargs, self.modules)).step

    def parts(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs[: self._traced.num_parts]

    def gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs[self._traced.num_parts :]

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
        parts = self.parts(outputs)
        wanted = [g for g in step.gradients if g is not None]
        gradients = self.gradients(outputs)
        if [p.shape for p in step.parts] == [p.shape for p in parts] and len(wanted) == len(gradients):
            tolerance = TOLERANCE.get(parts[0].dtype, 1e-2)
            if alike(parts, step.parts, tolerance) and alike(gradients, wanted, 10 * tolerance):
                return
        raise CompileError(
            f"at call {self.num_calls} of a compiled step its loss is {float(parts[0]):.8g}, but that of the programs is "
            f"{float(step.parts[0]):.8g} on the same noise, or their gradients differ: a program uses what the graph cannot "
            "see, such as random numbers of Python or NumPy, a clock, or variables that changed. Draw by torch or Pyro, and "
            f"pass what changes as an argument, as a tensor. {OTHERWISE}"
        )


def first_run(objective: Objective, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """A call as without compiling, in which parameters and guides come into being.

    The random state is put back, unless parameters were drawn: what comes next must not repeat their noise.
    """
    store = pyro.get_param_store()
    known = lambda: (set(store._params), [id(p) for m in modules_of(model, guide) for p in m.parameters()])  # noqa: E731
    before = known()
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        objective._differentiable_loss(model, guide, args, kwargs)
        created = known() != before
        states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    if created:
        torch.set_rng_state(states[0])
        for device, state in zip(devices, states[1], strict=True):
            torch.cuda.set_rng_state(state, device)


def alike(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    """Whether all numbers agree, in units of the largest of them."""
    finite = [w.abs().nan_to_num(0.0, 0.0, 0.0).max() for w in wanted if w.numel()]
    largest = float(max(finite, default=torch.zeros(())))
    if any(t.dtype not in TOLERANCE for t in (*found, *wanted)):
        tolerance = max(tolerance, 1e-2)
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
) -> Graph:
    """Run the pair once as ever, once more to hold the graph against it, trace it, compile the graph."""
    refuse_arguments([*arguments.tensors, *(leaf.value for leaf in arguments.leaves if leaf is not None), *weights.values()])
    with modules_inside(model, guide) as modules:
        first_run(objective, model, guide, args, kwargs)
    eager = eager_step(objective, model, guide, args, kwargs, modules)
    slots = {
        name: as_input(w, eager.step.parts[0]) for name, w in weights.items() if not is_fixed(objective._weights()[name])
    }
    traced = traced_step(objective, model, guide, arguments, {**weights, **slots}, eager.leaves, modules)
    graph = Graph(key, traced, slots, eager, len)
    inputs = [*graph._of_weights, *(arguments.tensors[i] for i in graph._of_arguments), *traced.held]
    graph._function = compiled_function(traced.module, inputs, options)
    graph.modules = modules
    graph.surroundings = Surroundings(modules, (model, guide), eager.params, [*traced.held, *eager.leaves], objective)
    return graph
