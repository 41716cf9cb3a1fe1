"""Errors raised in the user's programs: which program failed, with which arguments, and a hint about these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

from ...arguments import check_signature, devices_of, remedy_for, tensors_in
from ...errors import ArgumentError, EmptyBatchError, NonFiniteError, OutOfMemoryError, ProgramError
from ...isolation import isolated_store, modules_of
from ...noise import kept_random_state
from ..programs import Program

OF_TORCH = (RuntimeError, TypeError, IndexError, ValueError, AttributeError)
UNFINISHED = ("Could not run 'aten", 'missing the required "forward"')  # of torch's own NotImplementedError
LONGEST = 1000  # characters of an error of torch, which may list all its backends
OUT_OF_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")  # of torch on a CPU
EMPTY_PLATE = "size cannot be zero"  # of Pyro's ZeroDivisionError
OF_DTYPES = ("dtype", "scalar type", "Long", "Double", "Float")


def check_forward(side: str, program: Any) -> None:
    """Raise for a module that is not a program: `vae` in place of `vae.model`."""
    if not isinstance(program, torch.nn.Module) or type(program).__call__ is not torch.nn.Module.__call__:
        return  # messengers of Pyro are modules that define __call__
    if getattr(program.forward, "__func__", None) is torch.nn.Module.forward:
        methods = [name for name in ("model", "guide") if callable(getattr(program, name, None))]
        remedy = f"pass its method, {' or '.join(f'.{name}' for name in methods)}" if methods else "write its forward"
        raise ArgumentError(f"the {side} is a {type(program).__name__}, a module that cannot be called: {remedy}")


def raise_if_out_of_memory(error: Exception) -> None:
    if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
        return
    raise OutOfMemoryError(
        f"the memory does not hold this call ({type(error).__name__}: {without_shapes(error)[:LONGEST]}). It grows with the "
        "number of data of a call times that of particles, draws or chains of each: pass smaller batches (pv.evaluate joins "
        "their results), or take fewer particles"
    ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means too little memory, of an accelerator, Python, NumPy, or the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def named_failure(side: str, fn: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Put one line before an error of torch or Pyro. Errors of other classes come from the user, or from this package."""
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        raise_if_empty(error)
        if not is_of_torch(error):
            raise
        raise failure(f"the {side} fails on its arguments", error, [fn], args, kwargs) from error


@contextmanager
def named_late_failure() -> Iterator[None]:
    """The same for everything done with a pair: a program may fail at other data of the same shapes, or at other draws.

    It also covers linear algebra of this package, which fails for numbers beyond the precision.
    """
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        program = failing_program(error)
        if program is not None and is_of_torch(error):
            what = f"the {program.side} fails at these data or latents"
            raise failure(what, error, [program.fn], program.args, program.kwargs) from error
        if isinstance(error, torch.linalg.LinAlgError):
            raise NonFiniteError(
                f"a matrix has no inverse or no Cholesky factor ({str(error).strip()}): data, latents or scales of the "
                "model are too large, too small or too far apart for the precision. Standardise the data, or convert model, "
                "guide and data to float64 (.double())"
            ) from error
        raise


def failing_program(error: Exception) -> Program | None:
    """The program inside which an error was raised, from the frames of its traceback."""
    trace, found = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code is Program.run.__code__:
            found = trace.tb_frame.f_locals["self"]
        trace = trace.tb_next
    return found


@contextmanager
def named_failures(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """The same around a run of both programs in training. Which of them fails is found by plain runs after an error."""
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        programs = {"model": model, "guide": guide}
        for side, program in programs.items():
            check_program(side, program)
        raise_if_empty(error)
        if not is_of_torch(error):
            raise
        for side, program in programs.items():
            check_signature(side, program, args, kwargs)
        raise_if_one_fails(programs, error, args, kwargs)
        raise failure("model and guide fail together on their arguments", error, [model, guide], args, kwargs) from error


def check_program(side: str, program: Any) -> None:
    if not callable(program):
        raise ArgumentError(
            f"{side} must be callable, got {type(program).__name__}: pass a function, or a module with forward"
        )
    check_forward(side, program)


def raise_if_one_fails(programs: Mapping[str, Callable], error: Exception, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Name the program that fails alone with an error of the same class; the model is run at draws of the guide."""
    devices = devices_of((args, kwargs), modules_of(*programs.values()))
    with torch.no_grad(), kept_random_state(devices), isolated_store(), pyro.poutine.block():
        values: Any = None
        for side in ("guide", "model"):
            program = programs[side] if values is None else pyro.poutine.replay(programs[side], trace=values)
            try:
                values = pyro.poutine.trace(program).get_trace(*args, **kwargs)
            except type(error):
                raise failure(f"the {side} fails on its arguments", error, [programs[side]], args, kwargs) from error
            except Exception:
                return


def is_of_torch(error: Exception) -> bool:
    """Whether torch, Pyro or Python raised an error, so that its message does not name the program.

    Errors of other classes come from the user.
    """
    if type(error) is NotImplementedError:
        return any(words in str(error) for words in UNFINISHED)
    return type(error) in OF_TORCH


def raise_if_empty(error: Exception) -> None:
    if type(error) is ZeroDivisionError and EMPTY_PLATE in str(error):
        raise EmptyBatchError("the batch is empty: pass at least one datum") from error


def without_shapes(error: Exception) -> str:
    """The message of an error, without the table of all sites that Pyro adds."""
    return str(error).partition("Trace Shapes:")[0].strip() or "no message"


def failure(
    what: str, error: Exception, programs: Sequence[Callable], args: tuple, kwargs: Mapping[str, Any]
) -> ProgramError:
    text = without_shapes(error)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} (cut here; the error before this one has all of it)"
    return ProgramError(
        f"{what} ({described(args, kwargs)}): {type(error).__name__}: {text}{hint(programs, args, kwargs, text)}"
    )


def described(args: tuple, kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {kind(value)}" for name, value in by_name(args, kwargs).items()) or "none"


def by_name(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**{str(number): value for number, value in enumerate(args, start=1)}, **kwargs}


def kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "" if value.layout == torch.strided else f", {named(value.layout)}"
    return f"{named(value.dtype)} {tuple(value.shape)}{layout}{'' if value.device.type == 'cpu' else f' on {value.device}'}"


def named(part: torch.dtype | torch.layout) -> str:
    return str(part).removeprefix("torch.")


def hint(programs: Sequence[Callable], args: tuple, kwargs: Mapping[str, Any], text: str) -> str:
    """A hint about arguments that programs seldom accept, and about different dtypes or devices of data and parameters."""
    arguments = by_name(args, kwargs)
    for name, value in arguments.items():
        remedy = remedy_for(value)
        if remedy:
            return f". Argument {name} is a {type(value).__name__}: {remedy}"
    parameters = [p for module in modules_of(*programs) for p in module.parameters()]
    devices = {p.device for p in parameters} | {t.device for t in tensors_in((args, kwargs))}
    if len(devices) > 1:
        return f". Data and parameters lie on {', '.join(sorted(map(str, devices)))}: move all to one device, x.to(device)"
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    others = {t.dtype for t in tensors_in((args, kwargs))} - dtypes
    if len(dtypes) == 1 and others and any(word in text for word in OF_DTYPES):
        own = named(dtypes.pop())
        return (
            f". Its parameters are {own}: pass data of that kind (x.to(torch.{own})), or convert model and guide (.double())"
        )
    bad = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point() and not all_finite(v)]
    if bad:
        return f". Argument {bad[0]} has NaN or infinite values: remove those rows, or mask what is missing"
    return ""


def all_finite(value: Tensor) -> bool:
    return value.is_meta or value.layout != torch.strided or bool(value.isfinite().all())
