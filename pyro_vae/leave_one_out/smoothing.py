"""Pareto-smoothed leave-one-out weights, and their scores."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import effective_sample_size, pareto_smooth

MOST_NUMBERS = 2**20  # numbers of the table of weights that are smoothed at once


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of B data from S draws.

    :ivar elpd: (B,) log p(x_n | x_-n).
    :ivar std_error: (B,) its Monte Carlo error (delta method for the ratio of two sums over the same draws).
    :ivar pareto_k: (B,) tail index of the weights without datum n.
    :ivar ess: (B,) effective sample size of these weights.
    :ivar influence: (S,) the contribution of each draw to the sum of all elpd, to first order.
    :ivar num_behind_error: (B,) the effective number of draws in the error: (sum t^2)^2 / sum t^4 of its terms; NaN where
        all are 0.
    :ivar share_doubted: (B,) the total weight of draws at which log p(x_n | theta) is in doubt.
    """

    elpd: Tensor
    std_error: Tensor
    pareto_k: Tensor
    ess: Tensor
    influence: Tensor
    num_behind_error: Tensor
    share_doubted: Tensor


def log_posterior_weights(log_ratio: Tensor, log_likelihood: Tensor) -> Tensor:
    """(S,), log p(theta) p(x | theta) / q(theta), from log p(theta) / q(theta), (S,), and log p(x_n | theta), (S, B)."""
    return log_ratio + log_likelihood.double().sum(1)


def smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed weights, (S, ...), not above the largest raw one (as published, and as ArviZ has them), and k."""
    raised, k = pareto_smooth(log_weights)
    return torch.minimum(raised, log_weights.amax(0, keepdim=True)), k


def without_each(log_ratio: Tensor, log_likelihood: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pieces of the data: their indices, log p(x_n | theta), (S, b), and the log-weights without each of them, (S, b)."""
    finite, zero = log_likelihood.isfinite(), log_likelihood == -math.inf
    total = log_ratio + torch.where(zero, 0.0, log_likelihood.double()).sum(1)  # a difference of infinities is undefined
    num_zero = zero.sum(1, keepdim=True)
    step = max(1, MOST_NUMBERS // len(log_likelihood))
    for first in range(0, log_likelihood.shape[1], step):
        part = slice(first, first + step)
        own = log_likelihood[:, part].double()
        log_weight = total.unsqueeze(1) - torch.where(finite[:, part], own, 0.0)
        ruled_out = num_zero - zero[:, part].long() > 0  # -inf by another datum
        yield part, own, torch.where(ruled_out, -math.inf, log_weight)


def scores(log_ratio: Tensor, log_likelihood: Tensor, doubted: Tensor) -> Scores:
    """The scores of all data.

    :param log_ratio: (S,), log p(theta) / q(theta), including log p of data that are not in the table.
    :param log_likelihood: (S, B).
    :param doubted: (S, B), where log p(x_n | theta) is in doubt.
    """
    columns: list[tuple[Tensor, ...]] = []
    influence = torch.zeros_like(log_ratio)
    for part, own, log_weight in without_each(log_ratio, log_likelihood):
        log_weight, k = smoothed(log_weight)
        share = log_weight.softmax(0)
        elpd = (log_weight + own).logsumexp(0) - log_weight.logsumexp(0)
        terms = share * (own - elpd).expm1()
        # With few draws the variance of a mean is that of its terms over S - 1, not S.
        terms = terms * math.sqrt(len(own) / max(len(own) - 1, 1))
        influence = influence + terms.sum(1)
        std_error = terms.square().sum(0).sqrt() if len(own) > 1 else torch.full_like(elpd, math.nan)
        relative = (terms / terms.abs().amax(0)).square()  # so that fourth powers do not underflow
        behind = relative.sum(0).square() / relative.square().sum(0)
        of_weights = effective_sample_size(log_weight), behind, (share * doubted[:, part]).sum(0)
        columns.append((elpd, std_error, k, *of_weights))
    elpd, std_error, k, ess, behind, share_doubted = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return Scores(elpd, std_error, k, ess, influence, behind, share_doubted)


def log_predictive(log_weights: Tensor, log_likelihood: Tensor) -> Tensor:
    """(B,), log p(x_n | x) under the posterior given all data, from its log-weights, (S,)."""
    weights = smoothed(log_weights)[0].log_softmax(0)
    return (weights.unsqueeze(1) + log_likelihood.double()).logsumexp(0)
