"""Dependences between sites: values are marked with the names of the draws from which they were computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor

from ..tolerance import close
from .calls import Call
from .checks.reads import Sizes
from .live import rehearsal
from .programs import Program, score
from .records import Record


def first_dependent(call: Call, names: Collection[str]) -> tuple[str, list[str]] | None:
    """Find the first site that the guide draws given other sites, and the names of these if known.

    It runs the guide at other draws with provenance tracking. The densities must also stay the same.
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
    """Run the program at given values of one particle with provenance: results are marked with the sites they depend on."""
    with Sizes():
        return score(program, {n: track_provenance(v, frozenset({n})) for n, v in values.items()}, 1)
