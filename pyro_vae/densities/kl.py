"""KL divergences that torch knows by formula."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence


def known_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q || p), whose shape is that of both batches together; None where torch knows no formula."""
    try:
        if q.batch_shape != p.batch_shape:  # some of torch's formulas do not broadcast: of Bernoullis, binomials
            shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
            q, p = q.expand(shape), p.expand(shape)
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return kl if isinstance(kl, Tensor) else None
