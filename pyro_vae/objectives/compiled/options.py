"""The values of the option `compile=` of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import OptionError
from ...options import one_of, whole_number

MAX_GRAPHS = 8
Backend = Literal["inductor", "eager"]
KEYS = ("backend", "mode", "options", "max_graphs")


@dataclass(frozen=True)
class Options:
    """:ivar settings: those of `torch.compile`: `mode` and `options`."""

    backend: str = "inductor"
    max_graphs: int = MAX_GRAPHS
    settings: Mapping[str, Any] = field(default_factory=dict)


def options_of(compile: bool | Mapping[str, Any]) -> Options | None:
    """The options given by `compile=`; None where nothing is compiled."""
    if isinstance(compile, bool):
        return Options() if compile else None
    if not isinstance(compile, Mapping):
        raise OptionError(f"compile must be True, False or a dict with some of {', '.join(KEYS)}, got {compile!r}")
    if unknown := [key for key in compile if key not in KEYS]:
        raise OptionError(f"compile= has no option {unknown[0]!r}: it may have {', '.join(KEYS)}")
    given = dict(compile)
    backend = given.pop("backend", "inductor")
    one_of("the backend of compile=", backend, Backend)
    max_graphs = whole_number("max_graphs of compile=", given.pop("max_graphs", MAX_GRAPHS))
    if given and backend != "inductor":
        raise OptionError(f"compile= with backend={backend!r} compiles nothing, so it takes no {' and no '.join(given)}")
    return Options(backend, max_graphs, given)
