"""Which draws a program reads elsewhere: results carry the names of the draws behind them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .calls import Call
from .checks.agreement import READS
from .live import rehearsal
from .programs import Program, score
from .records import Record, close

SIZES = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]


def first_dependent(call: Call, names: Collection[str]) -> tuple[str, list[str]] | None:
    """Find the first site that the guide draws given other sites, and name these as far as they are known.

    Runs the guide at other draws with provenance tracking. Its densities must stay the same as well.
    """
    with torch.no_grad(), rehearsal(call.guide.fn, devices=[call.device]):
        first, other = call.draw(1), call.draw(1)
        moved = followed(call.guide, {n: other[n].value for n in names})
        for name in names:
            read = sorted(get_provenance(moved[name].log_prob) - {name})
            stays = close(first[name].log_prob, moved[name].fns[0].log_prob(first[name].value))
            if read or not stays:
                return name, read
    return None


def read_by_prior(call: Call, values: Mapping[str, Tensor], names: Collection[str]) -> dict[str, set[str]]:
    """The sites that the prior of each named latent depends on, from a plain run of the model."""
    record = followed(call.model, values)
    return {name: set(get_provenance(record[name].log_prob)) - {name} for name in names}


def followed(program: Program, values: Mapping[str, Tensor]) -> Record:
    """Run the program at given values of one particle with provenance: results carry the names of the sites behind them."""
    with Sizes():
        return score(program, {n: track_provenance(v, frozenset({n})) for n, v in values.items()}, 1)


class Sizes(TorchFunctionMode):
    """A shape with `numel()`: provenance tensors return plain tuples, but networks may call `x.shape.numel()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return torch.Size(found) if type(found) is tuple and func in SIZES else found


class LostProvenance(Sizes):
    """Note the names of draws that are read into Python or written into another tensor, where provenance ends.

    :ivar names: anything that comes later may depend on these draws.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: frozenset[str] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if in_place or name in READS or name == "tensor":
            self.names |= get_provenance([args, kwargs])
        return super().__torch_function__(func, types, args, kwargs)
