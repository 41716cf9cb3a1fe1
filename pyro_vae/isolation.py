"""Run a user's program without side effects on parameter store, random state, settings, buffers and stored traces."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.poutine import unwrap
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .arguments import unwrapped
from .autocast import for_programs_alone
from .errors import ArgumentError, BatchCouplingError, quoted
from .noise import kept_random_state

STORE = ("_params", "_param_to_name", "_constraints")  # the dictionaries of Pyro's parameter store
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
OFF_BY_DEFAULT = {F.alpha_dropout, F.feature_alpha_dropout}
BATCH_NORMS = {F.batch_norm, torch.batch_norm}
WATCHED = DROPOUTS | BATCH_NORMS
BATCH_NORM = (
    "batch norm is in train mode: each datum would depend on the others of its batch, and evaluation would change the "
    "running statistics. Call .eval() on the modules of model and guide first"
)


def modules_of(*programs: Callable) -> list[torch.nn.Module]:
    """The modules of the programs: programs that are modules, or the modules of which they are methods."""
    owners = []
    for program in programs:
        core, bound = unwrapped(program)
        owners += [getattr(core, "__self__", core), *bound[:1]]  # the object that a decorated method is bound to
    return [owner for owner in owners if isinstance(owner, torch.nn.Module)]


def stored_parameters() -> dict[str, Tensor]:
    """The unconstrained parameters in Pyro's store, by name."""
    return dict(pyro.get_param_store()._params)


@contextmanager
def isolated_store() -> Iterator[None]:
    """Let programs read the parameter store, and remove entries that they add on exit.

    It swaps the dictionaries of the store, because `scope(get_state())` drops the `unconstrained` handles of parameters that
    the user may hold. Handles that a run attaches to parameters of a module are removed, because they cannot be pickled.
    """
    store = pyro.get_param_store()
    saved = {name: getattr(store, name) for name in STORE}
    had_handle = {id(param) for param in store._params.values() if "unconstrained" in vars(param)}
    for name in STORE:
        setattr(store, name, dict(saved[name]))
    try:
        yield
    finally:
        for param in store._params.values():
            if id(param) not in had_handle:
                vars(param).pop("unconstrained", None)
        for name in STORE:
            setattr(store, name, saved[name])


@contextmanager
def kept_traces(*programs: Callable) -> Iterator[None]:
    """Restore the trace that a GuideMessenger stores on itself."""
    guides = [unwrap(program) for program in programs if isinstance(unwrap(program), GuideMessenger)]
    saved = [(guide, guide.__dict__.get("trace")) for guide in guides]
    try:
        yield
    finally:
        for guide, trace in saved:
            guide.__dict__["trace"] = trace


def refuse_batch_norm(module: torch.nn.Module, args: Any) -> None:
    """Raise for batch norm in train mode, in every run: a module in a closure may change its mode between two calls.

    Other modules that use statistics of the batch in train mode have an attribute `couples_batch`.
    """
    if not module.training:
        return
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        raise BatchCouplingError(BATCH_NORM)
    if getattr(module, "couples_batch", False):
        raise BatchCouplingError(
            f"{module} in train mode uses statistics of the batch, so the density of a datum would depend on other "
            "data of its batch: call .eval() on the model first"
        )


@contextmanager
def eval_mode(*programs: Callable) -> Iterator[list[torch.nn.Module]]:
    """Put all modules of the programs, and all that run inside, in eval mode. Restore every flag on exit.

    Modules in closures are found when they are called. Yields the modules that were in train mode, as they are found.
    """
    switched: list[torch.nn.Module] = []

    def switch(module: torch.nn.Module, args: Any = ()) -> None:
        if module.training:
            switched.append(module)
            module.training = False

    hook = register_module_forward_pre_hook(switch)
    try:
        for owner in modules_of(*programs):
            for module in owner.modules():
                switch(module)
        yield switched
    finally:
        hook.remove()
        for module in switched:
            module.training = True


@contextmanager
def unseen(*programs: Callable, devices: list[torch.device]) -> Iterator[None]:
    """Hide runs from handlers around the call, and restore random state, stored traces and settings on exit.

    Argument checks of distributions are off, because the kernel checks data and results. Autocast applies to programs only.
    """
    torch_validation = torch.distributions.Distribution._validate_args  # Pyro's own switch would overwrite it
    with ExitStack() as stack:
        stack.enter_context(pyro.poutine.block())
        stack.callback(torch.distributions.Distribution.set_default_validate_args, torch_validation)
        stack.enter_context(kept_random_state(devices))
        stack.enter_context(kept_traces(*programs))
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(for_programs_alone())
        yield


@contextmanager
def isolated(*programs: Callable, devices: list[torch.device]) -> Iterator[None]:
    """Like `unseen`; also restore the parameter store, and raise for batch norm in train mode."""
    with isolated_store(), unseen(*programs, devices=devices):
        hook = register_module_forward_pre_hook(refuse_batch_norm)
        try:
            yield
        finally:
            hook.remove()


def is_active_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call of a torch function applies dropout."""
    if func not in DROPOUTS:
        return False
    training = kwargs.get("training", args[2] if len(args) > 2 else func not in OFF_BY_DEFAULT)
    return bool(training) and kwargs.get("p", args[1] if len(args) > 1 else 0.5) > 0


class LayerWatch(TorchFunctionMode):
    """Watches the layers that run inside for batch norm, dropout and changes of buffers.

    Functional batch norm in train mode raises. Dropout is switched off and noted. Buffers that change are restored and
    named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saw_dropout = False
        self._before: dict[int, tuple[str, Tensor, Tensor]] = {}

    def __enter__(self) -> "LayerWatch":
        self._hook = register_module_forward_pre_hook(self._look_at)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()
        moved = [(name, buffer, old) for name, buffer, old in self._before.values() if not torch.equal(buffer, old)]
        for _, buffer, old in reversed(moved):
            buffer.detach().copy_(old)
        if moved and error[0] is None:
            raise ArgumentError(
                f"running the programs changed the buffers {quoted(name for name, _, _ in moved)}: call .eval() on the "
                "modules of model and guide"
            )

    def _look_at(self, module: torch.nn.Module, args: Any) -> None:
        for name, buffer in module.named_buffers(recurse=False):
            self._before.setdefault(id(buffer), (f"{type(module).__name__}.{name}", buffer, buffer.detach().clone()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in WATCHED:  # by far most calls
            return func(*args, **kwargs)
        if func in BATCH_NORMS and (kwargs.get("training") or (len(args) > 5 and args[5])):
            raise BatchCouplingError(BATCH_NORM)
        if is_active_dropout(func, args, kwargs):
            self.saw_dropout = True
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)
