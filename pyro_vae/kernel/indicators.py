"""Discrete draws that only the guide has, such as the component of a mixture: log q(z given x) is a sum over them.

    q(z given x) = sum_i q(i given x) q(z given i, x)

The guide draws i and then z. Its density at z is computed with one run of the guide for every value of i.
"""

import itertools
import math
from collections.abc import Iterator
from copy import copy
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..densities import support_of, support_values
from .checks.structure import Structure
from .log_densities import reduce_to_datum
from .programs import Program, Values, score
from .recorder import Adjust, Layout
from .records import Record, SiteRecord


def summed_over(
    guide: Program, drawn: Record, values: Values, structure: Structure, num_particles: int, adjust: Adjust | None = None
) -> Record:
    """The guide at given values of its latents, without the indicators: each log-density is given only the sites before it.

    :param drawn: any run of the guide, for the values that the indicators can take.
    """
    layout = structure.layout
    totals: dict[str, list[Tensor]] = {}  # by site, the log-densities up to there, one (K, B) for each combination
    record: Record = {}
    for chosen in combinations(drawn, structure):
        record = score(guide, {**values, **chosen}, num_particles, adjust=adjust)
        total = torch.zeros((), device=next(iter(values.values())).device)
        for name, site in record.items():
            if name not in structure.guide_sites and not name.endswith("_unconstrained"):
                continue  # a loss of the guide, left out of log q
            total = total + reduce_to_datum(site.log_prob, layout)
            totals.setdefault(name, []).append(total)
    before: Tensor | float | None = None
    result: Record = {}
    for name, terms in totals.items():
        summed = torch.stack(terms).logsumexp(0)
        if before is None:  # sites before all indicators are equal in all terms
            before = math.log(len(terms))
        if name not in structure.indicators:
            result[name] = summed_site(record[name], summed - before, layout)
        before = summed
    return result


def combinations(drawn: Record, structure: Structure) -> Iterator[dict[str, Tensor]]:
    """All values of all indicators, in the shapes of their draws."""
    listed = [numbered_values(drawn, name) for name in structure.indicators]
    for chosen in itertools.product(*listed):
        yield {name: value.expand_as(drawn[name].value) for name, value in zip(structure.indicators, chosen, strict=True)}


def numbered_values(drawn: Record, name: str) -> Tensor:
    values = support_values(drawn[name].fns[0])
    assert values is not None  # otherwise it is not an indicator
    return values


def summed_site(site: SiteRecord, log_prob: Tensor, layout: Layout) -> SiteRecord:
    """The site with another log-density, (K, B), without masked elements, and without formulas."""
    shape = [1] * layout.num_plates
    if layout.datum_dim is not None:
        shape[layout.datum_dim] = layout.batch_size
    summed = copy(site)
    summed.__dict__.pop("log_prob", None)
    summed._log_prob = lambda: log_prob.reshape(len(log_prob), *shape)
    summed.fns, summed.is_summed = [Summed(fn) for fn in site.fns], True
    return summed


class Summed(dist.TorchDistribution):
    """Placeholder for the distribution of a latent where other draws are summed out: a mixture without formulas."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, fn: Any) -> None:
        self._support, self.has_rsample = support_of(fn), fn.has_rsample
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        if self._support is None:
            raise NotImplementedError
        return self._support
