"""Draws so near to an end of their support that floats are too coarse for them: Beta draws next to one, in float32."""

import math

import torch
from torch import Tensor

from ..densities import next_to_far_end
from ..kernel import Call, Record, padded, reduce_to_datum

SHARE = 0.02  # of p(x), that such draws may carry


class CoarseDraws:
    """The share of the weight that lies on draws of the guide whose distance from an end of the support is mostly rounding.

    Floats next to one lie 6e-8 apart in float32. A draw of 1 - 1e-7 becomes a neighbour of it, whose density, of the prior
    and of the guide alike, is another. The weights look good, and their mean is wrong.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._log_near = self._log_all = torch.full((call.batch_size,), -math.inf, dtype=torch.float64, device=call.device)

    def watch(self, guide: Record, model: Record, log_weight: Tensor) -> None:
        """One noise block: draws of the guide and their log-weights, (K, B)."""
        layout, near = self._call.layout, torch.zeros_like(log_weight, dtype=torch.bool)
        for name in self._call.structure.latents:
            site = guide[name]
            if not site.fns or (coarse := next_to_far_end(site.fns[0], site.value)) is None:
                continue
            coarse = padded(coarse, 1 + layout.num_plates)
            if site.mask is not None:
                coarse = coarse & site.mask
            at_datum = reduce_to_datum(coarse.long(), layout) > 0
            near = near | at_datum.reshape(-1, *at_datum.shape[-2:]).any(0)  # for any value of what is enumerated
        log_weight = log_weight.detach().double()
        self._log_all = torch.logaddexp(self._log_all, log_weight.logsumexp(0))
        self._log_near = torch.logaddexp(self._log_near, torch.where(near, log_weight, -math.inf).logsumexp(0))

    def too_many(self) -> Tensor:
        """(B,)"""
        return self._log_near > self._log_all + math.log(SHARE)
