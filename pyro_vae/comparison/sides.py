"""The numbers per datum that a comparison uses, and how far they may be wrong besides their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evidence import Evidence
from ..gaps import OF_LOG_EVIDENCE, Gaps
from ..records import normal_quantile

BOTH_WAYS = ("precision", "end of support")  # doubts for which a number may be too low or too high
SCATTER = 3.0  # multiples of eps and the number: the rounding of float32 sums, which may be the same for all data


@dataclass(frozen=True, eq=False)
class Side:
    """One kind of number of a record, log p(x) or ELBO, in double precision on the CPU.

    :ivar values: (N,) log p(x) or ELBO.
    :ivar std_errors: (N,) Monte Carlo errors.
    :ivar too_low: (N,) true where the number is in doubt and may be too low by more than its error.
    :ivar too_high: (N,) true where the number is in doubt and may be too high.
    :ivar lift: nats by which the mean may be too low besides its errors: the bias of a lower bound, and rounding.
    :ivar drop: nats by which it may be too high besides its errors.
    """

    name: str
    values: Tensor
    std_errors: Tensor
    too_low: Tensor
    too_high: Tensor
    lift: float
    drop: float


def evidence_of(record: Evidence | Gaps) -> Evidence:
    return record.evidence if isinstance(record, Gaps) else record


def doubts_of(record: Evidence | Gaps) -> dict[str, Tensor]:
    """(N,) bool by reason, only for reasons that concern log p(x); gaps have others."""
    known = {*evidence_of(record).doubts, *OF_LOG_EVIDENCE}
    return {reason: flags.cpu() for reason, flags in record.doubts.items() if reason in known}


def side_of_log_evidence(name: str, record: Evidence | Gaps, level: float) -> Side:
    """The side of log p(x): a lower bound in doubt is too low, an upper bound too high; other estimates may be either."""
    evidence, doubts = evidence_of(record), doubts_of(record)
    nothing = torch.zeros(len(record), dtype=torch.bool)
    either = any_of({reason: flags for reason, flags in doubts.items() if reason in BOTH_WAYS}, nothing)
    one_way = any_of({reason: flags for reason, flags in doubts.items() if reason not in BOTH_WAYS}, nothing)
    if "tails" in evidence.unchecked:  # too few weights to judge any datum
        one_way = ~nothing
    bias = bias_of(evidence, level)
    up, down = evidence.bound != "upper", evidence.bound not in ("lower",)
    rounding = rounding_of(evidence.log_evidence)
    return Side(
        name,
        plain(evidence.log_evidence),
        plain(evidence.std_error),
        too_low=either | one_way if up else either,
        too_high=either | one_way if down else either,
        lift=rounding + (bias if up else 0.0),
        drop=rounding + (bias if down else 0.0),
    )


def side_of_elbo(name: str, record: Evidence | Gaps) -> Side:
    """The side of the ELBO, which is unbiased, so only rounding makes it wrong."""
    error = record.std_errors["elbo"] if isinstance(record, Gaps) else record.elbo_std_error
    nothing = torch.zeros(len(record), dtype=torch.bool)
    rounded = doubts_of(record).get("precision", nothing)
    rounding = rounding_of(record.elbo)
    return Side(name, plain(record.elbo), plain(error), rounded, rounded, rounding, rounding)


def bias_of(evidence: Evidence, level: float) -> float:
    """Nats by which the mean may be wrong on the side of its bias.

    It is the part of the interval on that side beyond its symmetric part, and at least half the squared errors, which is the
    bias of the logarithm of a mean.
    """
    if evidence.bound == "exact":
        return 0.0
    known = evidence.select(evidence.log_evidence.isfinite() & evidence.std_error.isfinite())
    if not len(known):
        return 0.0
    half = normal_quantile(level) * float(known.mean().std_error)
    mean, (low, high) = float(known.mean().value), known.mean_confidence_interval(level)
    beyond = mean - half - low if evidence.bound == "upper" else high - mean - half
    return max(beyond, float(known.std_error.square().mean()) / 2, 0.0)


def rounding_of(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return SCATTER * torch.finfo(values.dtype).eps * float(finite.abs().mean()) if len(finite) else 0.0


def any_of(doubts: Mapping[str, Tensor], nothing: Tensor) -> Tensor:
    for flags in doubts.values():
        nothing = nothing | flags
    return nothing


def plain(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
