"""Records in a file: a plain JSON description and named tensors. Nothing in it is executed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from os import PathLike
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import RecordFileError
from .files import read_arrays, write_arrays
from .result import Result

FORMAT = 1  # version of the description; raised when older versions of the package would misread it
NAME_LENGTH = 200
AGAIN = "create the record again with the current classes"


def save_value(path: str | PathLike[str], value: Any) -> None:
    """Write a record, or a list, tuple or mapping of records and plain values, into one file; see `write_arrays`.

    :raises RecordFileError: if something in it cannot be stored, or the file cannot be written.
    """
    plain, arrays = to_arrays(value)
    write_arrays(path, {"format": FORMAT, "value": plain}, arrays)


def load_value(path: str | PathLike[str]) -> Any:
    """Read a value written by `save_value`, exactly; tensors on the CPU.

    :raises RecordFileError: if the file is missing, damaged, or of a newer version.
    """
    header, arrays = read_arrays(path)
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise RecordFileError(f"'{path}' has no format number, expected one up to {FORMAT}: load a file that save() wrote")
    if header["format"] > FORMAT:
        raise RecordFileError(
            f"'{path}' has format {header['format']}, expected one up to {FORMAT}: it was written by a newer pyro_vae; "
            "update the package, pip install -U pyro_vae"
        )
    try:
        return from_arrays(header.get("value"), arrays)
    except RecordFileError as error:
        raise RecordFileError(f"'{path}': {error}") from error


def known_records() -> dict[str, type[Result]]:
    """Every record class by its name; of two with the same name, that of this package, otherwise the later one."""
    found, queue = [], [Result]
    while queue:
        below = queue.pop(0).__subclasses__()
        found += below
        queue += below
    found.sort(key=lambda kind: kind.__module__.partition(".")[0] == __name__.partition(".")[0])
    return {kind.__name__: kind for kind in found}


def to_arrays(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A JSON description, and the tensors that it names, on the CPU.

    Tensors are named like the columns of a DataFrame: `log_evidence`, `std_errors[elbo]`, `evidence.ess`.

    :raises RecordFileError: for a value that is not a record, tensor, number, string, list, tuple or mapping.
    """
    arrays: dict[str, Tensor] = {}
    return _described(value, "", arrays, known_records()), arrays


def _described(value: Any, place: str, arrays: dict[str, Tensor], known: Mapping[str, type[Result]]) -> Any:
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        return {"tensor": _added(value, place, arrays)}
    if isinstance(value, Result):
        return _described_record(value, place, arrays, known)
    if isinstance(value, Mapping):
        pairs = [
            [_described(key, f"{place}.key", arrays, known), _described(part, f"{place}[{key}]", arrays, known)]
            for key, part in value.items()
        ]
        return {"mapping": pairs}
    if type(value) in (list, tuple, torch.Size):
        parts = [_described(part, f"{place}[{number}]", arrays, known) for number, part in enumerate(value)]
        return {"list" if type(value) is list else "tuple": parts}
    raise RecordFileError(
        f"cannot store {place.lstrip('.') or 'the value'}, which is a {type(value).__name__}, expected a record, tensor, "
        "number, string, list, tuple or mapping of them: put one of these in its place with dataclasses.replace"
    )


def _described_record(value: Result, place: str, arrays: dict[str, Tensor], known: Mapping[str, type[Result]]) -> Any:
    name = type(value).__name__
    if known.get(name) is not type(value):
        raise RecordFileError(
            f"cannot store a {name} of {type(value).__module__}: loading finds a class by its name, and another {name} has "
            f"the same; rename it, or {AGAIN}"
        )
    stored = [f.name for f in fields(value) if f.name not in value._not_stored]  # type: ignore[arg-type]
    return {
        "record": name,
        "fields": {n: _described(getattr(value, n), f"{place}.{n}", arrays, known) for n in stored},
    }


def _added(value: Tensor, place: str, arrays: dict[str, Tensor]) -> str:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise RecordFileError(
            f"cannot store the tensor {place.lstrip('.')}, layout {value.layout}, device {value.device}, expected a dense "
            "one with values: give the record value.to_dense()"
        )
    name = base = re.sub(r"[^\w.\[\], +-]", "_", place.lstrip("."))[:NAME_LENGTH] or "value"
    again = 1
    while name in arrays:
        again += 1
        name = f"{base} ({again})"
    arrays[name] = value.detach().cpu().resolve_conj().resolve_neg()
    return name


def from_arrays(plain: Any, arrays: Mapping[str, Tensor]) -> Any:
    """The value described by `to_arrays`.

    Classes are looked up by name among the record classes; nothing is imported or evaluated.

    :raises RecordFileError: for an unknown class, field or type of value, or a missing one.
    """
    return _restored(plain, arrays, known_records())


def _restored(plain: Any, arrays: Mapping[str, Tensor], known: Mapping[str, type[Result]]) -> Any:
    match plain:
        case None | bool() | int() | float() | str():
            return plain
        case {"float": "nan" | "inf" | "-inf" as name}:
            return float(name)
        case {"tensor": str(name)} if name in arrays:
            return arrays[name]
        case {"list": list(parts)}:
            return [_restored(part, arrays, known) for part in parts]
        case {"tuple": list(parts)}:
            return tuple(_restored(part, arrays, known) for part in parts)
        case {"mapping": list(pairs)}:
            return {_restored(key, arrays, known): _restored(part, arrays, known) for key, part in pairs}
        case {"record": str(name), "fields": dict(parts)}:
            return _record(name, {n: _restored(part, arrays, known) for n, part in parts.items()}, known)
    raise RecordFileError(f"expected a value that this version knows, got {str(plain)[:80]}: update pyro_vae, or {AGAIN}")


def _record(name: str, values: dict[str, Any], known: Mapping[str, type[Result]]) -> Result:
    if name not in known:
        raise RecordFileError(
            f"has a {name}, which is not a known record class ({', '.join(sorted(known))}): define or import the class "
            "before loading, or update pyro_vae"
        )
    kind = known[name]
    names = {f.name: f for f in fields(kind) if f.init}  # type: ignore[arg-type]
    values = {**{n: empty for n, empty in kind._not_stored.items() if n in names}, **values}
    needed = {n for n, f in names.items() if f.default is MISSING and f.default_factory is MISSING}
    more, missing = sorted(values.keys() - names.keys()), sorted(needed - values.keys())
    if more or missing:
        raise RecordFileError(
            f"a {name} has the fields {', '.join(names)}; the file has {', '.join(more) or 'none'} beside them and lacks "
            f"{', '.join(missing) or 'none'}: load it with the version of pyro_vae that wrote it, or {AGAIN}"
        )
    return kind(**values)
