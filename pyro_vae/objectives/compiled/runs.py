"""Runs of the pair without side effects: the eager step that a graph is compared with, and the run that is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ...errors import CompileError
from ...isolation import isolated_store, kept_traces
from ..terms import Terms
from .refusals import OTHERWISE
from .surroundings import PLAIN

if TYPE_CHECKING:
    from ..objective import Objective


class Step(NamedTuple):
    """The numbers of one step.

    :ivar parts: the loss, the tensors of `terms` and others that the objective keeps.
    :ivar gradients: by leaf; None where the loss does not depend on one.
    """

    parts: list[Tensor]
    gradients: list[Tensor | None]
    terms: Terms


def step_of(
    objective: Objective, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], leaves: list[Tensor]
) -> Step:
    """Run the pair once."""
    with torch.enable_grad():
        loss, surrogate = objective._value_and_surrogate(model, guide, args, kwargs)
        return numbers_of(objective, loss, surrogate, leaves)


def numbers_of(objective: Objective, loss: Tensor, surrogate: Tensor, leaves: list[Tensor]) -> Step:
    gradients: list[Any] = [None] * len(leaves)
    if leaves and surrogate.requires_grad:
        gradients = list(torch.autograd.grad(surrogate, leaves, allow_unused=True))
    terms = objective.terms
    assert terms is not None
    of_terms = [terms.reconstruction, terms.kl_sum, terms.elbo, terms.loss, *terms.kl.values()]
    return Step([loss.detach(), *of_terms, *objective._arrays()], gradients, terms)


class Eager(NamedTuple):
    """:ivar params: by name, the unconstrained tensor of each parameter, and whether it is the value as well."""

    step: Step
    params: dict[str, tuple[Tensor, bool]]


def eager_step(
    objective: Objective,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    leaves: list[Tensor],
    modules: list[nn.Module],
) -> Eager:
    """An uncompiled step on the next noise of torch; random state, parameters and buffers are restored.

    The random state of Python and NumPy is not restored, so that a program which uses it is detected.
    """
    store = pyro.get_param_store()
    with unseen_run(objective, model, guide, modules), kept_noise(modules):
        before = dict(store._params)
        with poutine.trace(param_only=True) as seen:
            step = step_of(objective, model, guide, args, kwargs, leaves)
        if moved := [n for n, tensor in before.items() if store._params.get(n, tensor) is not tensor]:
            raise CompileError(
                f"compile= expects parameters that only the optimiser changes, but the programs replace '{moved[0]}' "
                "in Pyro's store, as a baseline with use_decaying_avg_baseline does: remove that from the programs. "
                f"{OTHERWISE}"
            )
        values: dict[str, Any] = {name: site["value"] for name, site in seen.trace.nodes.items()}
        params = {name: (value.unconstrained(), value.unconstrained() is value) for name, value in values.items()}
        if local := [name for name, (_, is_value) in params.items() if not is_value and name not in store]:
            raise CompileError(
                f"compile= looks for constrained parameters in Pyro's store, but '{local[0]}' is stored in its module "
                f"only: train with pyro.settings.set(module_local_params=False). {OTHERWISE}"
            )
    return Eager(step, params)


@contextmanager
def kept_noise(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the random state of torch."""
    tensors = [p for m in modules for p in m._parameters.values() if p is not None]
    with torch.random.fork_rng(devices={p.device.index for p in tensors if p.device.type == "cuda"}):
        yield


@contextmanager
def unseen_run(objective: Objective, model: Callable, guide: Callable, modules: list[nn.Module]) -> Iterator[None]:
    """Hide a run from handlers around it, and restore what it changes: attributes, buffers, store, settings."""
    objects = [getattr(p, "__self__", p) for p in (model, guide)]
    programs = [p for p in objects if hasattr(p, "__dict__") and not isinstance(p, nn.Module)]
    checks = torch.distributions.Distribution._validate_args  # Pyro's own switch would overwrite it
    try:
        with (
            poutine.block(),
            isolated_store(),
            kept_traces(model, guide),
            kept_buffers(modules),
            kept_attributes([objective, *programs, *modules], ignored=objective),
            pyro.validation_enabled(False),
        ):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checks)


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    buffers = {id(b): b for m in modules for b in m._buffers.values() if b is not None}.values()
    saved = [(buffer, buffer.data, buffer.detach().clone()) for buffer in buffers]
    replaced = False
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, data, old in saved:
                if buffer.data_ptr() != data.data_ptr():
                    buffer.data, replaced = data, True
                if not torch.equal(buffer, old):
                    buffer.copy_(old)
    if replaced:
        raise CompileError(
            "compile= expects programs that change buffers in place, but one gives a buffer new memory (buffer.data = "
            f"...), which a graph would not do: write buffer.copy_(...). {OTHERWISE}"
        )


@contextmanager
def kept_attributes(owners: Iterable[Any], ignored: Any = None) -> Iterator[None]:
    """Restore the attributes of objects: tensors of a trace that a program keeps are unusable afterwards.

    :raises CompileError: where a program changes a plain attribute, such as a counter, or replaces a buffer or parameter by
        another tensor, which a graph would not do.
    """
    saved = []
    for owner in owners:
        tables = [vars(owner)[t] for t in ("_parameters", "_buffers", "_modules") if isinstance(owner, nn.Module)]
        saved.append((owner, dict(vars(owner)), [(table, dict(table)) for table in tables]))
    changed = []
    try:
        yield
    finally:
        for owner, attributes, tables_before in saved:
            if owner is not ignored:
                changed += [(owner, n) for n, v in vars(owner).items() if type(v) in PLAIN and v != attributes.get(n, v)]
                for table, content in tables_before:
                    changed += [(owner, n) for n, v in table.items() if v is not content.get(n, v)]
            vars(owner).clear()
            vars(owner).update(attributes)
            for table, content in tables_before:
                table.clear()
                table.update(content)
    for owner, name in changed:
        raise CompileError(
            f"compile= expects programs that do not change their attributes, but {type(owner).__name__}.{name} changes "
            "in a run, and the code of a program does not run again once it is traced: pass it as an argument, change "
            f"it outside of the program, or change a buffer in place (buffer.copy_). {OTHERWISE}"
        )
