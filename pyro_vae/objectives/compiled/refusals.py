"""Errors for steps that cannot be compiled, with the reason and a remedy."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from ...errors import CompileError
from .surroundings import has_hooks

OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STANDARD = sysconfig.get_paths()["stdlib"]
LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (*torch.__path__, *pyro.__path__, OURS))
READS = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
OTHERWISE = "Or train with compile=False"


def refuse_handlers() -> None:
    """Raise for Pyro handlers around the call: the graph would not apply them at later calls."""
    for messenger in _PYRO_STACK:
        if isinstance(messenger, BlockMessenger) or (isinstance(messenger, TraceMessenger) and messenger.param_only):
            continue
        raise CompileError(
            f"compile= expects no handler of Pyro around a step, but it runs inside of a {type(messenger).__name__}: put it "
            f"around the programs instead, as poutine.scale(model, 0.5). {OTHERWISE}"
        )


def refuse_arguments(leaves: list[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise CompileError(
                "compile= gives gradients of parameters, but an argument, or a beta, requires one too: pass it detached "
                f"(x.detach()). {OTHERWISE}"
            )
        if type(leaf).__module__ == "numpy":
            raise CompileError(
                f"compile= expects data as tensors, but an argument is a {type(leaf).__name__} of NumPy, whose numbers "
                f"would become constants of the graph: pass torch.as_tensor(x). {OTHERWISE}"
            )


def refuse_hooks(leaves: list[Tensor]) -> None:
    if any(has_hooks(leaf) for leaf in leaves):
        raise CompileError(
            "compile= writes gradients of parameters directly, so that hooks on them would not run, or run twice, but "
            f"a parameter has a hook: remove it (handle.remove()), and clip gradients in the optimiser. {OTHERWISE}"
        )


@contextmanager
def refuse_moved(held: list[Tensor], modules: list[nn.Module]) -> Iterator[None]:
    """Raise for programs that change tensors in place other than buffers: a check runs them once more than training does."""
    buffers = {id(buffer) for module in modules for buffer in module._buffers.values()}
    others = [(tensor, tensor._version) for tensor in held if id(tensor) not in buffers and not tensor.is_inference()]
    try:
        yield
    finally:
        if any(tensor._version != version for tensor, version in others):
            raise CompileError(
                "compile= expects programs that change only buffers of modules, and these in place, but another "
                f"tensor changes in a run: register it as a buffer (module.register_buffer). {OTHERWISE}"
            )


READERS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")


class RefuseReads(TorchFunctionMode):
    """Raises where the value of a parameter or buffer is read in tracing: it would become a constant of the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READERS and args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            frame = traceback.extract_stack()[:-1]
            inside = [f for f in frame if not f.filename.startswith(LIBRARIES) and os.path.dirname(f.filename) != STANDARD]
            if args[0].numel() and read_by_program(frame):
                where = f"`{inside[-1].line}` ({inside[-1].filename}, line {inside[-1].lineno})" if inside else "a program"
                raise CompileError(
                    "compile= expects programs whose control flow does not depend on the values of tensors, but "
                    f"{where}, or a function that it calls, reads one: keep it a tensor (torch.where for an `if`; no "
                    f".item(), .numpy(), float()). {OTHERWISE}"
                )
        return func(*args, **(kwargs or {}))


def read_by_program(frames: list[traceback.FrameSummary]) -> bool:
    """Whether the last caller outside torch's internals is a program or a layer, not Pyro or this package."""
    ours = (*(f"{folder}{os.sep}" for folder in pyro.__path__), f"{OURS}{os.sep}")
    for frame in reversed(frames):
        if frame.filename.startswith(ours):
            return False
        if not frame.filename.startswith(LIBRARIES) or f"{os.sep}nn{os.sep}modules{os.sep}" in frame.filename:
            return True
    return False


@contextmanager
def named_tracing() -> Iterator[None]:
    """The programs have just run without error, so an error here is caused by tracing."""
    try:
        yield
    except CompileError:
        raise
    except Exception as error:
        kind, text = type(error).__name__, first_line(error)
        if kind in READS or "numpy()" in text or "data dependent" in text.lower() or "data-dependent" in text.lower():
            raise CompileError(
                "compile= expects programs whose control flow does not depend on the values of tensors, but "
                f"{place(error)}, or a function that it calls, reads one: keep it a tensor (torch.where for an `if`; "
                f"no .item(), .numpy(), boolean index). {OTHERWISE}"
            ) from error
        if "ProvenanceTensor" in text:
            raise CompileError(
                "compile= cannot trace BetaTraceGraph_ELBO, which follows draws that are not reparameterised through "
                f"the model to find the terms of each: use BetaTrace_ELBO or ImportanceWeightedELBO. {OTHERWISE}"
            ) from error
        raise CompileError(
            f"compile= could not trace {place(error)}: {kind}: {text}. Remove that from the program. {OTHERWISE}"
        ) from error


@contextmanager
def named_compiling() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        chain = [error, error.__cause__, getattr(error, "inner_exception", None)]
        if any(type(e).__name__ in ("InvalidCxxCompiler", "TritonMissing") for e in chain):
            raise CompileError(
                "compile= needs a C++ compiler (on GPUs also Triton), and none was found: install g++ (Debian and Ubuntu: "
                "apt install g++; macOS: xcode-select --install; Windows: the C++ build tools of Visual Studio; GPUs: pip "
                "install triton), or name yours in the environment variable CXX. compile={'backend': 'eager'} runs the "
                f"traced graph without a compiler. {OTHERWISE}"
            ) from error
        raise CompileError(
            f"the step was traced, but torch cannot compile it: {type(error).__name__}: {first_line(error)}. {OTHERWISE}"
        ) from error


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:300].rstrip(". ") if lines else "no message"


def place(error: BaseException) -> str:
    """The last frame outside torch, Pyro and this package: its file, line and text."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        known = file.startswith(LIBRARIES) or os.path.dirname(file) == STANDARD
        if not known and (os.path.isabs(file) or file.startswith("<ipython")):
            source = linecache.getline(file, line).strip()
            return f"`{source}` ({file}, line {line}, in {frame.f_code.co_name})"
    return "the program"
