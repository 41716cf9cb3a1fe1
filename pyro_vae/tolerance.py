"""Equality of two runs of a program up to rounding."""

import torch
from torch import Tensor


def close(a: Tensor, b: Tensor) -> bool:
    """Whether all entries are equal, up to what another order of the same operations may change."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Per entry, so that one extreme datum does not loosen the tolerance for others; convolutions on a GPU may use TF32.
    rtol, atol = (1e-9, 1e-9) if a.dtype == torch.float64 else (1e-3, 1e-3) if a.is_cuda else (2e-5, 1e-4)
    return torch.allclose(a, b.to(a.dtype), rtol=rtol, atol=atol, equal_nan=True)
