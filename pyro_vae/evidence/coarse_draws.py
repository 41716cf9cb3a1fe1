"""The share of the importance weight on draws that floating point resolves too coarsely."""

import math

import torch
from torch import Tensor

from ..kernel import Call, Record

SHARE = 0.02  # largest share of p(x) that such draws may carry


class CoarseDraws:
    """The share of the weight on coarse draws of the guide.

    A draw is coarse where its distance from an end of the support, or from another draw, is mostly rounding: see
    `Call.coarse`.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._log_near = self._log_all = torch.full((call.batch_size,), -math.inf, dtype=torch.float64, device=call.device)

    def watch(self, guide: Record, model: Record, log_weight: Tensor) -> None:
        """One noise block: draws of the guide and their log-weights, (K, B)."""
        near = self._call.coarse(guide, len(log_weight)).to(log_weight.device)
        log_weight = log_weight.detach().double()
        self._log_all = torch.logaddexp(self._log_all, log_weight.logsumexp(0))
        self._log_near = torch.logaddexp(self._log_near, torch.where(near, log_weight, -math.inf).logsumexp(0))

    def too_many(self) -> Tensor:
        """(B,)"""
        return self._log_near > self._log_all + math.log(SHARE)
