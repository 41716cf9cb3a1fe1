"""Parameters of a program in Pyro's store, under names that are different for each instance."""

import itertools
import warnings
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import pyro
import torch
from pyro.params.param_store import ParamStoreDict, param_with_module_name
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, apply_stack
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.parameter import is_lazy

from ..errors import ParameterStoreWarning, quoted

_numbers = itertools.count()
_abandoned: list[str] = []  # store names of programs that were deleted


class Program(nn.Module):
    """A model or guide whose parameters have names in Pyro's store that no other instance has.

    Pyro's `pyro.module` shares tensors by name: of two instances, or an instance and its copy, only the first would be
    trained, without an error. Here every instance, also a copy or an unpickled one, has a new number in its names. The
    parameters are those of the module: `announce` changes the store where the two differ, never the module.

    :param kind: "model" or "guide", the readable part of the store name.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._take_a_name()

    def _take_a_name(self) -> None:
        self.store_name = f"vae_{self.kind}_{next(_numbers)}"
        self._entered: dict[str, nn.Parameter] = {}  # the names that this program has put into the store
        # The garbage collector may run at any time, so it only records the names to delete.
        weakref.finalize(self, _abandoned.append, self.store_name).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)  # Pyro's weak reference, which cannot be pickled
        return {**vars(self), "_entered": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:  # called by copy, deepcopy and unpickling
        super().__setstate__(state)
        self._take_a_name()


def announce(program: Program) -> None:
    """Send the parameters of the program to Pyro's handlers (SVI, a trace), and enter them into Pyro's store.

    It does what `pyro.module` does, but a tensor in the store never replaces that of the module. The messages contain the
    tensors, so the store is only read. Frozen parameters are left out.
    """
    listeners = [messenger for messenger in _PYRO_STACK if listens(type(messenger))]  # type: ignore[arg-type]
    if not listeners:
        return
    traces = [messenger for messenger in listeners if type(messenger) is TraceMessenger]
    store = pyro.get_param_store()
    found = list(trainable(program, param_with_module_name(program.store_name, "")))
    missing = {name: parameter for name, parameter in found if store._params.get(name) is not parameter}
    if missing:
        enter(program, store, missing)
    for name, parameter in found:
        handle = vars(parameter).get("unconstrained")
        if handle is None or handle() is not parameter:  # a copy of a parameter has the handle of the original
            parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        message = param_message(name, parameter)
        if len(traces) < len(listeners):
            apply_stack(message)
            continue
        for trace in traces:  # as with SVI: the other handlers would do nothing, in every step for every parameter
            trace._pyro_post_param(message)


@cache  # called in every step for every messenger
def listens(kind: type[Messenger]) -> bool:
    """Whether messengers of a kind read or change parameters."""
    return (
        hasattr(kind, "_pyro_param")
        or hasattr(kind, "_pyro_post_param")
        or kind._process_message is not Messenger._process_message
        or kind._postprocess_message is not Messenger._postprocess_message
    )


def trainable(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient; twice as fast as `named_parameters`, and called in every step.

    Temporary tensors in their place (`torch.func.functional_call`) are not parameters and are not entered into the store.
    """
    for key, value in module._parameters.items():
        if isinstance(value, nn.Parameter) and value.requires_grad:
            yield prefix + key, value
    for key, child in module._modules.items():
        if child is not None:
            yield from trainable(child, f"{prefix}{key}.")


def param_message(name: str, parameter: nn.Parameter) -> Any:
    """The message that `pyro.param` would send to handlers, with its value set."""
    return {
        "type": "param",
        "name": name,
        "fn": pyro.get_param_store().get_param,
        "is_observed": False,
        "args": (name, parameter),
        "kwargs": {"constraint": constraints.real, "event_dim": None},
        "value": parameter,
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": True,
        "stop": False,
        "continuation": None,
        "infer": {},
    }


def enter(program: Program, store: ParamStoreDict, missing: dict[str, nn.Parameter]) -> None:
    """Put the tensors of the module into the store; warn where the store has others that this module did not put there."""
    while _abandoned:
        prefix = param_with_module_name(_abandoned.pop(), "")
        for name in [name for name in store._params if name.startswith(prefix)]:
            remove(store, name)
    foreign = []
    for name, parameter in missing.items():
        old = store._params.get(name)
        if old is not None:
            if old is not program._entered.get(name) and not same_values(old, parameter):
                foreign.append(name)
            remove(store, name)
    # `store[name] = parameter` would enter a copy of a parameter whose memory is not contiguous, and train that.
    store.set_state({"params": dict(missing), "constraints": dict.fromkeys(missing, constraints.real)})
    program._entered.update(missing)
    if foreign:
        warnings.warn(
            f"Pyro's parameter store had other values for {quoted(foreign)} than the {program.kind} (loaded from a "
            "file, or set by hand). Models and guides of pyro_vae keep the parameters of their modules, and the store "
            "now has those. Save and restore them with vae.state_dict() and vae.load_state_dict()",
            ParameterStoreWarning,
            stacklevel=2,
        )


def same_values(old: Tensor, parameter: nn.Parameter) -> bool:
    return not is_lazy(parameter) and old.shape == parameter.shape and torch.equal(old.to(parameter), parameter)


def remove(store: ParamStoreDict, name: str) -> None:
    """`del store[name]`; if the tensor has another name in the store, it is then found under that one."""
    tensor = store._params.pop(name)
    store._constraints.pop(name, None)
    store._param_to_name.pop(tensor, None)
    for other in [other for other, held in store._params.items() if held is tensor]:
        store._param_to_name[tensor] = other
