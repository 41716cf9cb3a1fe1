"""What became of a bad input: a named error, the right answer, or a fault."""

from __future__ import annotations

import dataclasses
import linecache
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor, nn

import pyro_vae
from pyro_vae import errors

OURS = Path(pyro_vae.__file__).parent
NAMED = tuple(getattr(errors, name) for name in errors.__all__ if not issubclass(getattr(errors, name), Warning))
OF_TRAINING = ("random state of torch", "parameter store", "numbers")  # a step of training changes them
SKIPPED = {"seconds", "stores", "pairs", "versions", "settings"}  # of records: no numbers of the data


@dataclasses.dataclass(frozen=True)
class Outcome:
    """:ivar cell: the name of the error, "right answer", or "FAULT" with what is wrong."""

    cell: str
    message: str = ""
    result: Any = None

    @property
    def is_fault(self) -> bool:
        return self.cell.startswith("FAULT")


def raised_by_us(error: BaseException) -> bool:
    """Whether a raise statement of the package raised it: code in C leaves no frame of its own behind."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    path = trace.tb_frame.f_code.co_filename
    return OURS in Path(path).parents and linecache.getline(path, trace.tb_lineno).strip().startswith("raise")


def state_of(programs: list[nn.Module]) -> dict[str, Any]:
    store, of_numpy = pyro.get_param_store(), numpy.random.get_state()
    return {
        "random state of torch": hash(torch.get_rng_state().numpy().tobytes()),
        "random state of numpy": hash(of_numpy[1].tobytes()) + of_numpy[2],
        "random state of python": hash(random.getstate()),
        "parameter store": {name: id(value) for name, value in store._params.items()},
        "modes": [m.training for p in programs for m in p.modules()],
        "numbers": [float(t.detach().double().sum()) for p in programs for t in (*p.parameters(), *p.buffers())],
        "argument checks": torch.distributions.Distribution._validate_args,
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


def judged(
    call: Callable[[], Any], programs: list[nn.Module], own: type[BaseException] | None = None, leaves: bool = False
) -> Outcome:
    """Run a call, and say what became of it.

    :param own: the class of an error that the program itself raises.
    :param leaves: whether the call trains, and the state is the caller's own.
    """
    before = state_of(programs)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = call()
        outcome = Outcome("right answer", "; ".join(str(warning.message) for warning in caught), result)
    except NAMED as error:
        outcome = Outcome(type(error).__name__, str(error))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if own is not None and type(error) is own:
            outcome = Outcome("the program's own error", text)
        elif type(error) in (TypeError, ValueError, KeyError) and raised_by_us(error):
            outcome = Outcome(type(error).__name__, str(error))
        else:
            outcome = Outcome(f"FAULT: bare {text}", text)
    after = state_of(programs)
    changed = [name for name in before if before[name] != after[name] and not (leaves and name in OF_TRAINING)]
    return Outcome(f"FAULT: changed {changed}", outcome.message) if changed else outcome


def numbers_in(result: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and number of a record, by where it stands."""
    if isinstance(result, Tensor):
        yield path, result.detach()
    elif isinstance(result, (int, float)) and not isinstance(result, bool):
        yield path, torch.tensor(result if abs(result) < 2**63 else float(result))
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from numbers_in(value, f"{path}.{key}")
    elif isinstance(result, (tuple, list)):
        for place, value in enumerate(result):
            yield from numbers_in(value, f"{path}.{place}")
    elif dataclasses.is_dataclass(result):
        for field in dataclasses.fields(result):
            if field.name not in SKIPPED:
                yield from numbers_in(getattr(result, field.name), f"{path}.{field.name}")


def same_numbers(found: Any, wanted: Any, tolerance: float = 1e-4) -> list[str]:
    """Where two results differ."""
    ours, theirs = dict(numbers_in(found)), dict(numbers_in(wanted))
    if ours.keys() != theirs.keys():
        return sorted(ours.keys() ^ theirs.keys())
    return [
        name
        for name, value in ours.items()
        if not (
            value.shape == theirs[name].shape
            and torch.allclose(value.double(), theirs[name].double(), tolerance, tolerance, equal_nan=True)
        )
    ]


MAIN = {"log_evidence", "elbo", "value", "kl", "marginal_kl", "rate", "distortion", "draws", "means", "ranks", "latents"}


def in_doubt(record: Any) -> bool:
    """Whether a record, or one within it, says of every datum, or of the whole, that its number is in doubt."""
    if isinstance(record, pyro_vae.Calibration):
        return bool(record.doubts)
    reliable = getattr(record, "reliable", None)
    if isinstance(reliable, Tensor):
        return not bool(reliable.any())
    inner = (getattr(record, name, None) for name in ("evidence", "test", "lower"))
    return any(in_doubt(part) for part in inner if part is not None)


def not_finite(result: Any) -> list[str]:
    """The main numbers of a result that are NaN or infinite."""
    return [
        name
        for name, value in numbers_in(result)
        if (not name or MAIN & set(name.split("."))) and value.is_floating_point() and not bool(value.isfinite().all())
    ]
