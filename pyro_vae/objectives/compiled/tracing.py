"""One graph of loss, terms and gradients of a step, with all tensors that it uses as inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..traces.matching import Beta
from .calls import Arguments
from .refusals import RefuseReads, named_tracing
from .runs import step_of, unseen_run

if TYPE_CHECKING:
    from ..objective import Objective


class Traced(NamedTuple):
    """
    A traced step.

    :ivar module: from the inputs to a list, the parts of the step and then its gradients.
    :ivar given: the positions of the inputs that the graph uses, among those of a call: weights, then arguments.
    :ivar held: the other inputs: parameters, buffers and other tensors of the programs.
    :ivar names: names of the KLs; `plates` are the plates of the terms.
    :ivar num_parts: the number of outputs that are not gradients.
    :ivar trained: the leaves whose gradients follow.
    """

    module: fx.GraphModule
    given: list[int]
    held: list[Tensor]
    names: list[str]
    plates: Mapping[str, int]
    num_parts: int
    trained: list[Tensor]


def traced_step(
    objective: Objective,
    model: Callable,
    guide: Callable,
    arguments: Arguments,
    weights: Mapping[str, Beta],
    leaves: list[Tensor],
    modules: list[nn.Module],
) -> Traced:
    """Trace a step. Tensors among the weights become inputs, numbers stay numbers."""
    names = [name for name, weight in weights.items() if isinstance(weight, Tensor)]
    found: Any = None

    def run(*inputs: Tensor) -> list[Tensor]:
        nonlocal found
        args, kwargs = arguments.replaced(inputs[len(names) :])
        objective._given = {**weights, **dict(zip(names, inputs, strict=False))}
        found = step_of(objective, model, guide, args, kwargs, leaves)
        return [*found.parts, *(g for g in found.gradients if g is not None)]

    inputs = [*(weights[name] for name in names), *arguments.tensors]
    with unseen_run(objective, model, guide, modules), without_mkldnn(), named_tracing(), RefuseReads():
        module = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    module.graph.eliminate_dead_code()
    given, held = lift(module, len(inputs))
    trained = [leaf for leaf, gradient in zip(leaves, found.gradients, strict=True) if gradient is not None]
    return Traced(module, given, held, list(found.terms.kl), found.terms.plates, len(found.parts), trained)


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Disable mkldnn, whose kernels for recurrent layers cannot be traced: without it, the steps are traced."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def lift(module: fx.GraphModule, num_given: int) -> tuple[list[int], list[Tensor]]:
    """Turn the tensors that a graph holds into inputs, one for each tensor; drop given inputs that are not used."""
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == num_given
    given = [i for i, node in enumerate(placeholders) if node.users]
    for node in placeholders:
        if not node.users:
            graph.erase_node(node)
    inputs: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, node.target)
        if id(tensor) not in inputs:
            with graph.inserting_before(first):
                place = graph.placeholder(f"held_{len(inputs)}")
            place.meta.update(node.meta)
            inputs[id(tensor)] = tensor, place
        node.replace_all_uses_with(inputs[id(tensor)][1])
        if node is first:
            first = node.next
        graph.erase_node(node)
    for name in [n for n in (*module._buffers, *module._parameters, *vars(module)) if "_constant" in n]:
        delattr(module, name)
    graph.lint()
    module.recompile()
    return given, [tensor for tensor, _ in inputs.values()]


def weights_of(objective: Objective) -> tuple[dict[str, Beta], list[str]]:
    """The weights of this call by name, and the names of those that are inputs of a graph.

    The numbers one and zero are not inputs: objectives decide by them what to compute.
    """
    given = objective._weights()
    inputs = [name for name, weight in given.items() if not (type(weight) in (int, float) and weight in (0, 1))]
    return {name: objective._value(name) for name in given}, inputs


def as_input(weight: Beta, like: Tensor) -> Tensor:
    return torch.as_tensor(weight).detach().to(like.dtype).to(like.device).clone()
