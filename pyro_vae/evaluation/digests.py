"""What tells batches, options and parameters apart: SHA-256 of their numbers."""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..isolation import state_of

ADDRESS = r" at 0x[0-9a-fA-F]+"
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def digest_of(tree: Any) -> str:
    """Of a batch: tensors, arrays, numbers and strings in tuples, lists, dicts and plain objects.

    Of any other object only what it is, so that the same batch has the same digest in all processes.
    """
    found = hashlib.sha256()
    for part in parts_of(tree, set()):
        found.update(part)
    return found.hexdigest()


def parts_of(tree: Any, above: set[int]) -> Iterator[bytes]:
    """:param above: by id, what `tree` lies in, so that nothing that contains itself is gone round for ever."""
    if isinstance(tree, PLAIN):
        yield repr(tree).encode()
    elif isinstance(tree, Tensor):
        yield repr((tree.dtype, tuple(tree.shape))).encode()
        yield bytes_of(tree)
    elif hasattr(tree, "tobytes"):  # of NumPy
        yield repr((str(getattr(tree, "dtype", "")), getattr(tree, "shape", ()))).encode()
        yield tree.tobytes()
    else:
        yield type(tree).__name__.encode()
        if id(tree) in above:
            return
        if isinstance(tree, Mapping):
            inside: Any = [item for pair in tree.items() for item in pair]
        elif isinstance(tree, (set, frozenset)):
            inside = sorted(map(digest_of, tree))
        elif isinstance(tree, Collection):
            inside = list(tree)
        else:
            inside = [item for pair in getattr(tree, "__dict__", {}).items() for item in pair]
        yield str(len(inside)).encode()
        for item in inside:
            yield from parts_of(item, above | {id(tree)})


def bytes_of(tensor: Tensor) -> bytes:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def told(of: Any) -> dict[str, str]:
    """What must be the same where numbers are to be the same: the class, the options and the parameters of an estimator.

    An object without a `model` and a `guide` counts as a program itself.
    """
    programs = [getattr(of, name) for name in ("model", "guide") if hasattr(of, name)]
    options = re.sub(ADDRESS, "", repr(of)) if programs else ""
    return {"estimator": type(of).__name__, "options": options, "parameters": digest_of(state_of(*programs or [of]))}
