"""The fault of a guide in one latent, in words and numbers, from its ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import normal_quantile
from .uniformity import GRID, counts_below, is_outside

LOG_DENSITY = "log q(z | x)"
CERTAIN = 3.0  # standard errors by which a fault must be significant to be named: one wrong name in 370


@dataclass(frozen=True)
class Row:
    """One latent, or log q(z | x), over all data in which it is not masked.

    :ivar name: of the latent.
    :ivar num_data: data in which it is not masked.
    :ivar faulty: whether its ranks are outside the band.
    :ivar largest: the largest distance of the distribution function of the ranks from the diagonal, in standard errors.
    :ivar fault: the fault in words; empty if none was found.
    """

    name: str
    num_data: int
    faulty: bool
    largest: float
    fault: str
    ranks: Tensor

    def coverage(self, level: float) -> float:
        """The share of data whose latent is inside the central interval of this probability under the guide.

        For log q(z | x): inside the region of highest density.
        """
        if self.name == LOG_DENSITY:
            return float((self.ranks > 1 - level).double().mean())
        return float(((self.ranks - 0.5).abs() < level / 2).double().mean())

    def expected_coverage(self, level: float, of_replicates: float) -> tuple[float, float]:
        """The interval that contains the coverage of a calibrated guide in this share of replicates."""
        half = normal_quantile(of_replicates) * math.sqrt(level * (1 - level) / max(self.num_data, 1))
        return max(level - half, 0.0), min(level + half, 1.0)


def row_of(name: str, ranks: Tensor, shift: Tensor, stretch: Tensor, false_alarm: float) -> Row:
    """The row from ranks, shift and stretch of all data, (N,), NaN where the latent is masked."""
    ranks = ranks[~ranks.isnan()].cpu()
    count = len(ranks)
    if not count:
        return Row(name, 0, False, 0.0, "", ranks)
    deviation = counts_below(ranks) / count - GRID
    largest = float((deviation.abs() / (GRID * (1 - GRID) / count).sqrt()).max())
    faulty = is_outside(ranks, false_alarm)
    describe = density_fault if name == LOG_DENSITY else latent_fault
    return Row(name, count, faulty, largest, describe(ranks, shift, stretch) if faulty else "", ranks)


def latent_fault(ranks: Tensor, shift: Tensor, stretch: Tensor) -> str:
    """The fault of a latent: too narrow or too wide, too low or too high.

    Its sizes are valid for any shape of posterior and guide.
    """
    scores, found = normal_scores(ranks), []
    spread = (float(scores.var()) - 1) * math.sqrt((len(scores) - 1) / 2) if len(scores) > 1 else 0.0
    if abs(spread) > CERTAIN:
        size = median_with_error(stretch)
        size = f", true latents lie {size} times as far from its middle as its draws do" if size else ""
        found.append(f"too {'narrow' if spread > 0 else 'wide'}{size}")
    place = float(scores.mean() / scores.std().clamp(min=1)) * math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    if abs(place) > CERTAIN:
        size = median_with_error(shift if place < 0 else -shift)
        size = f" by {size} of its standard deviations" if size else ""
        found.append(f"too {'high' if place < 0 else 'low'}{size}")
    return " and ".join(found) or "of another shape than the posterior"


def density_fault(ranks: Tensor, *_: Tensor) -> str:
    """The fault of the joint density of all latents of a datum."""
    place = float(normal_scores(ranks).mean()) * math.sqrt(len(ranks))
    if abs(place) <= CERTAIN:
        return "of another shape than the posterior"
    often = "too often where its density is low: too narrow, or in the wrong place" if place < 0 else (
        "too seldom where its density is low: too wide"
    )  # fmt: skip
    return f"true latents lie {often}"


def normal_scores(ranks: Tensor) -> Tensor:
    """Standard normal if the ranks are uniform; also normal for a wrong guide if guide and posterior are Gaussian."""
    return math.sqrt(2) * torch.erfinv((2 * ranks.double() - 1).clamp(-1 + 1e-15, 1 - 1e-15))


def median_with_error(values: Tensor) -> str:
    """ "1.43 +- 0.05"; the error is half the distance of the order statistics one standard error around the median."""
    ordered = values[~values.isnan()].double().cpu().sort().values
    count = len(ordered)
    if count < 20:
        return ""
    half = math.sqrt(count) / 2
    low, high = (ordered[round(count / 2 - 0.5 + side * half)] for side in (-1, 1))
    return f"{float(ordered.quantile(0.5)):.2f} +- {float(high - low) / 2:.2f}"
