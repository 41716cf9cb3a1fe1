"""Compiled steps of an objective: its graphs, and the two ways to train with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK, apply_stack
from pyro.util import warn_if_nan
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import CompileError
from .calls import arguments_of, settings_now
from .graphs import Graph, build
from .options import Options, options_of
from .refusals import OTHERWISE, refuse_arguments, refuse_handlers
from .tracing import weights_of

if TYPE_CHECKING:
    from ..objective import Objective

__all__ = ["Compiled", "compiled_or_none"]


def compiled_or_none(compile: bool | Mapping[str, Any]) -> Compiled | None:
    options = options_of(compile)
    return None if options is None else Compiled(options)


class Compiled:
    """The graphs of one objective, the most recently used first. A copy has none."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._graphs: list[Graph] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "_graphs": []}

    def loss_and_grads(
        self, objective: Objective, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> float:
        graph, outputs = self._run(objective, model, guide, args, kwargs)
        if _PYRO_STACK:
            send_parameters(graph.params)
        add_gradients(graph.trained, graph.gradients(outputs))
        loss = outputs[0].item()
        warn_if_nan(loss, "loss")  # type: ignore[call-overload]
        return loss

    def differentiable_loss(
        self, objective: Objective, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> Tensor:
        graph, outputs = self._run(objective, model, guide, args, kwargs)
        if _PYRO_STACK:
            send_parameters(graph.params)
        if not graph.trained:
            return outputs[0]
        loss: Tensor = WithGradients.apply([outputs[0], graph.gradients(outputs)], *graph.trained)
        return loss

    def _run(
        self, objective: Objective, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Graph, list[Tensor]]:
        refuse_handlers()
        refuse_arguments([*objective._weights().values()])
        arguments, (weights, inputs) = arguments_of(args, kwargs), weights_of(objective)
        fixed = {name: weight for name, weight in weights.items() if name not in inputs}
        key = (model, guide, fixed, inputs, arguments.signature(), settings_now())
        graph = self._find(key)
        if graph is None:
            self._make_room()
            graph, outputs = build(objective, model, guide, arguments, args, kwargs, weights, inputs, key, self.options)
            self._graphs.insert(0, graph)
        else:
            try:
                outputs = graph.call(objective, model, guide, arguments, args, kwargs, weights)
            except CompileError:
                self._graphs.remove(graph)
                raise
        graph.tell(objective, weights, outputs)
        return graph, outputs

    def _find(self, key: tuple) -> Graph | None:
        for i, graph in enumerate(self._graphs):
            if graph.key == key and graph.surroundings.hold():
                if i:
                    self._graphs.insert(0, self._graphs.pop(i))
                return graph
        return None

    def _make_room(self) -> None:
        """Drop graphs of tensors that no longer exist; raise if there would be more than `max_graphs`."""
        self._graphs = [graph for graph in self._graphs if not graph.surroundings.replaced()]
        if len(self._graphs) >= self.options.max_graphs:
            shapes = [[tuple(shape) for shape, *_ in graph.key[4][0]] for graph in self._graphs]
            raise CompileError(
                f"max_graphs is reached: the objective has {len(shapes)} compiled steps, for arguments of the shapes "
                f"{shapes}. Each call with other shapes, plain arguments or attributes of the programs compiles one "
                "more: pad batches to a few sizes, pass numbers that change as tensors, or raise "
                f"compile={{'max_graphs': ...}}. " + OTHERWISE
            )


class WithGradients(torch.autograd.Function):
    """A loss whose gradients have been computed with it."""

    @staticmethod
    def forward(ctx: Any, known: list[Any], *leaves: Tensor) -> Tensor:
        loss: Tensor
        loss, ctx.gradients = known
        return loss.clone()  # `terms` may hold the same tensor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Drop the references to the gradients, so that autograd uses them without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise CompileError(
                "backward() was called twice on a loss of an objective with compile=, which has its gradients only "
                "once: call the objective again. " + OTHERWISE
            )
        if grad.device.type != "cpu" or grad.item() != 1.0:
            gradients = torch._foreach_mul(gradients, grad)
        return None, *gradients


def add_gradients(leaves: list[Tensor], gradients: list[Tensor]) -> None:
    """Add gradients as backward() does: existing gradients are changed in place."""
    there, more = [], []
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf.grad is None:
            leaf.grad = gradient
        else:
            there.append(leaf.grad)
            more.append(gradient)
    if there:
        with torch.no_grad():
            torch._foreach_add_(there, more)


def send_parameters(params: Mapping[str, tuple[Tensor, bool]]) -> None:
    """Send the parameters of the programs to Pyro's handlers, such as that of SVI."""
    store = pyro.get_param_store()
    for name, (tensor, is_value) in params.items():
        if is_value:
            if "unconstrained" not in vars(tensor):
                tensor.unconstrained = weakref.ref(tensor)  # type: ignore[attr-defined]
            value = tensor
        else:
            value = store[name]
        apply_stack(message(name, value))


def message(name: str, value: Tensor) -> Any:
    """The message that `pyro.param` sends to handlers, with its value set."""
    return {
        "type": "param",
        "name": name,
        "fn": pyro.param,
        "is_observed": False,
        "args": (name,),
        "kwargs": {},
        "value": value,
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": True,
        "stop": False,
        "continuation": None,
        "infer": {},
    }
