"""Sum out enumerated sites one by one, in plates inside the datum and along chains of `pyro.markov`.

Variable elimination in logarithms: the factors that contain a site are added, and the site is summed out of the result by
`logsumexp`. (`pyro.ops.contract` multiplies exponentials that are scaled separately for each factor. There, two factors that
are high at different values underflow to a probability of zero.)
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EnumerationError, quoted
from .checks.structure import Structure
from .recorder import Layout
from .records import Record, SiteRecord, padded

MOST_BYTES = 2**31  # bytes of one table


@dataclass(frozen=True, eq=False)
class Factor:
    """Part of log p: (*values of `sites`, K, *plates), with `sites` in alphabetical order.

    :param plates: names and dims of the plates inside the datum that contain it.
    """

    tensor: Tensor
    sites: tuple[str, ...]
    plates: Mapping[str, int]


def sum_of_sites(log_probs: Mapping[str, Tensor], model: Record, structure: Structure) -> Tensor:
    """Sum the log-densities of sites of the model, (*E, K, *plates), over sites and plates, and sum out enumerated sites.

    Returns (*E, K, *plates) with a size of one for the plates inside the datum; E are the sites that the guide enumerates.
    """
    plates = {name: inner_plates(model[name], structure.layout) for name in log_probs}
    factors = [factor_of(name, log_prob, plates, structure) for name, log_prob in log_probs.items()]
    kept = structure.guide_enumerated
    left = summed_out(factors, {name: frozenset(own) for name, own in plates.items()}, frozenset(kept))
    return functools.reduce(operator.add, (in_order(factor, kept[::-1]) for factor in left))


def in_order(factor: Factor, sites: Sequence[str]) -> Tensor:
    """(*values of these sites, K, *plates), with size one for those on which the factor does not depend."""
    order = sorted(range(len(factor.sites)), key=lambda dim: sites.index(factor.sites[dim]))
    tensor = factor.tensor.permute(*order, *range(len(order), factor.tensor.ndim))
    return tensor[tuple(slice(None) if site in factor.sites else None for site in sites)]


def inner_plates(site: SiteRecord, layout: Layout) -> dict[str, int]:
    """Names and dims of the plates inside the datum, without those of size one."""
    return {f.name: f.dim for f in site.frames if f.vectorized and f.name != layout.datum_plate and f.size != 1}


def factor_of(name: str, log_prob: Tensor, plates: Mapping[str, Mapping[str, int]], structure: Structure) -> Factor:
    """A log-density with its axes of enumerated sites by name; those of size one are dropped."""
    width = structure.layout.num_plates + 1
    tensor = padded(log_prob, width)
    num_axes, in_scope = tensor.ndim - width, structure.axes_at(name)
    read = {dim: in_scope.get(num_axes - 1 - dim, "") for dim in range(num_axes) if tensor.shape[dim] > 1}
    for site in read.values():
        if not site:
            raise EnumerationError(
                f"site '{name}' reads an enumerated site outside the pyro.markov of that site: move it inside, raise "
                "history=, or take pyro.markov out"
            )
        if not plates[site].keys() <= plates[name].keys():
            raise EnumerationError(
                f"site '{name}' reads '{site}', enumerated in the plates {quoted(plates[site])}, from outside of them, as "
                "one for all: put it into the plate, or remove infer={'enumerate': ...} and let the guide draw it"
            )
    order = sorted(read, key=read.__getitem__)
    tensor = tensor.permute(*order, *(d for d in range(num_axes) if d not in read), *range(num_axes, tensor.ndim))
    tensor = tensor.reshape(tensor.shape[: len(order)] + tensor.shape[num_axes:])
    return Factor(tensor, tuple(read[dim] for dim in order), plates[name])


def summed_out(
    factors: Iterable[Factor], plates_of: Mapping[str, frozenset[str]], kept: frozenset[str] = frozenset()
) -> list[Factor]:
    """Factors of the sites in `kept` only, with all others summed out, outside all plates inside the datum.

    :param plates_of: the plates inside the datum by enumerated site; those in `kept` are in none.

    The innermost plates come first: their enumerated sites are summed out, then the logarithms are added over the plate.
    """
    factors = list(factors)
    while unfinished := [f for f in factors if f.plates or not kept.issuperset(f.sites)]:
        context = max((frozenset(f.plates) for f in unfinished), key=lambda p: (len(p), sorted(p)))
        here = [f for f in factors if f.plates.keys() == context]
        factors = [f for f in factors if f.plates.keys() != context]
        here = eliminated(here, [n for n, plates in plates_of.items() if plates == context and n not in kept])
        factors += [out_of_plates(f, context, plates_of) if context else f for f in here]
    return factors


def eliminated(factors: Sequence[Factor], names: Iterable[str]) -> list[Factor]:
    """Factors of one context without these sites; each step removes the site that leaves the smallest table."""
    left = dict.fromkeys(factors)  # in order
    members = {name: [f for f in factors if name in f.sites] for name in names}
    members = {name: own for name, own in members.items() if own}
    sizes = {name: table_size(own) for name, own in members.items()}
    while members:
        name = min(sizes, key=sizes.__getitem__)
        joined = members.pop(name)
        del sizes[name]
        result = sum_over(name, joined)
        for factor in joined:
            del left[factor]
        left[result] = None
        for other in result.sites:
            if other in members:
                members[other] = [f for f in members[other] if f in left] + [result]
                sizes[other] = table_size(members[other])
    return list(left)


def table_size(factors: Sequence[Factor]) -> int:
    """Numbers by particle and datum of all factors together."""
    return math.prod({n: size for f in factors for n, size in zip(f.sites, f.tensor.shape, strict=False)}.values())


def sum_over(name: str, factors: Sequence[Factor]) -> Factor:
    sites = tuple(sorted({site for factor in factors for site in factor.sites}))
    aligned = [
        f.tensor[tuple(slice(None) if site in f.sites else None for site in sites)] if sites != f.sites else f.tensor
        for f in factors
    ]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in aligned))
    num_bytes = math.prod(shape) * aligned[0].element_size()
    if num_bytes > MOST_BYTES:
        raise EnumerationError(
            f"to sum '{name}' out takes a table over {quoted(sites)} of {num_bytes / 2**30:.0f} GiB (at most "
            f"{MOST_BYTES / 2**30:.0f}): let fewer enumerated sites depend on one another, as in a chain under pyro.markov, "
            "or remove infer={'enumerate': ...} and let the guide draw them"
        )
    total = aligned[0]
    for tensor in aligned[1:]:
        total = total + tensor
    at = sites.index(name)
    return Factor(total.logsumexp(at), sites[:at] + sites[at + 1 :], factors[0].plates)


def out_of_plates(factor: Factor, context: frozenset[str], plates_of: Mapping[str, frozenset[str]]) -> Factor:
    """Add over the plates that contain none of the remaining sites."""
    kept = frozenset().union(*(plates_of[name] for name in factor.sites))
    if kept == context:
        raise EnumerationError(
            f"{quoted(factor.sites)} are enumerated in different plates and depend on one another in both, "
            "so the sum over them has no smaller parts. Make one of the plates a loop (for i in pyro.plate(...))"
        )
    dims = [dim for name, dim in factor.plates.items() if name not in kept]
    plates = {name: dim for name, dim in factor.plates.items() if name in kept}
    return Factor(factor.tensor.sum(dims, keepdim=True), factor.sites, plates)
