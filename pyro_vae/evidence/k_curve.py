"""How an importance sampling estimate grows with the number of weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, described
from ..ops import log_mean_exp, log_mean_exp_std_error
from ..records import Estimate, Result, check_records, check_same, places, to_plain


@dataclass(frozen=True, eq=False, repr=False)
class KCurve(Result):
    """The estimate with K, K/2, K/4, ..., 1 weights, from the K independent weights of one run. B data, J sizes; nats.

    Values at smaller sizes are averages over disjoint blocks of the weights (a remainder is left out). Every value is
    therefore unbiased for the bound L_K of its size (Burda, Grosse and Salakhutdinov, 2016,
    https://arxiv.org/abs/1509.00519). A curve that still rises at its end has not reached log p(x). One that is level may
    still have missed a mode. All sizes share their draws, so two points differ by far less than their errors suggest: see
    `last_difference`.

    :ivar num_particles: the J sizes, ascending: 1 (the ELBO) first, K last.
    :ivar log_evidence: (J, B) mean over blocks of the log-mean of the weights in a block.
    :ivar std_error: (J, B) its Monte Carlo error. It comes from the spread between blocks where there are more blocks than
        weights in a block, otherwise from the delta method within blocks. NaN for K = 1.

    Example::

        curve = pv.ImportanceSampling(model, guide, num_particles=5000)(x).curve
        pv.plots.plot_k_curve(curve)
    """

    num_particles: tuple[int, ...]
    log_evidence: Tensor
    std_error: Tensor

    @classmethod
    def from_log_weights(cls, log_weight: Tensor) -> "KCurve":
        """The curve of independent log-weights (K, B); no copy of them is kept for each size."""
        if not isinstance(log_weight, Tensor) or log_weight.ndim != 2 or not log_weight.numel():
            raise ArgumentError(
                f"expected a tensor of log-weights (K, B), got {described(log_weight)}: pass K numbers for each of B data"
            )
        total = len(log_weight)
        sizes = tuple(total >> shift for shift in reversed(range(total.bit_length())))
        points = [_mean_over_blocks(log_weight, size) for size in sizes]
        values, std_errors = (torch.stack(side) for side in zip(*points, strict=True))
        return cls(sizes, values, std_errors)

    @classmethod
    def cat(cls, records: Sequence["KCurve"]) -> "KCurve":
        """Join the curves of several batches in their order."""
        check_records(cls, records)
        check_same(records, ("num_particles",))
        return cls(
            records[0].num_particles,
            torch.cat([r.log_evidence for r in records], 1),
            torch.cat([r.std_error for r in records], 1),
        )

    def select(self, kept: Tensor) -> "KCurve":
        """The curves of some of the data, by a mask (B,) or by indices."""
        kept = places(kept, len(self))
        return KCurve(self.num_particles, self.log_evidence[:, kept], self.std_error[:, kept])

    def __len__(self) -> int:
        return self.log_evidence.shape[1]

    def means(self) -> list[Estimate]:
        """The mean over the data, for each size."""
        return [Estimate.over_data(*point) for point in zip(self.log_evidence, self.std_error, strict=True)]

    def last_difference(self) -> Estimate:
        """The increase by the last doubling of K, mean over the data.

        Where the bias falls as 1/K, about as much is still missing.

        Its Monte Carlo error per datum is std_error^2 / sqrt(2), by the delta method: the difference is (a - b)^2 / 8 for
        the relative errors a and b of the two halves. NaN for K = 1.
        """
        if len(self.num_particles) == 1:
            nothing = torch.full_like(self.std_error[0], torch.nan)
            return Estimate.over_data(nothing, nothing)
        return Estimate.over_data(self.log_evidence[-1] - self.log_evidence[-2], self.std_error[-1].square() / 2**0.5)

    def _columns(self) -> dict[str, list[Any]]:
        sides = ("log_evidence", "std_error")
        return {
            f"{side}[{k}]": values.tolist()
            for side in sides
            for k, values in zip(self.num_particles, getattr(self, side), strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "num_particles": list(self.num_particles)}


def _mean_over_blocks(log_weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The mean over blocks of `size` log-weights, and its error, two tensors (B,)."""
    count = len(log_weight) // size
    blocks = log_weight[: count * size].unflatten(0, (count, size))
    values = log_mean_exp(blocks, 1)
    if count > size:
        return values.mean(0), values.std(0) / count**0.5
    return values.mean(0), log_mean_exp_std_error(blocks, 1).square().sum(0).sqrt() / count
