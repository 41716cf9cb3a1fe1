"""The outputs of a graph: whether they are right, and which share memory with other tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import is_rough

# tolerance of terms, relative to the largest; ten times that for gradients
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
ROUGH = 1e-2  # of half precision


def agree(found: list[Tensor], wanted: list[Tensor], num_parts: int) -> bool:
    """Whether two steps have the same numbers up to rounding; terms and gradients are compared separately."""
    if [f.shape for f in found] != [w.shape for w in wanted]:
        return False
    tolerance = ROUGH if is_rough() or any(t.dtype not in TOLERANCE for t in wanted) else TOLERANCE[found[0].dtype]
    terms, gradients = zip(found[:num_parts], wanted, strict=False), zip(found[num_parts:], wanted[num_parts:], strict=True)
    return alike(list(terms), tolerance) and alike(list(gradients), 10 * tolerance)


def alike(pairs: list[tuple[Tensor, Tensor]], tolerance: float) -> bool:
    """Whether all numbers agree, relative to the largest of their tensor, or to 1/100 of the tolerance of all."""
    sizes = [float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).max()) if wanted.numel() else 0.0 for _, wanted in pairs]
    least = 0.01 * tolerance * max(sizes, default=0.0)  # rounding of sums in which large numbers cancel
    return all(
        torch.allclose(f.to(w.dtype), w, rtol=tolerance, atol=tolerance * size + least, equal_nan=True)
        for (f, w), size in zip(pairs, sizes, strict=True)
    )


def lent(inputs: list[Tensor], outputs: list[Tensor], num_parts: int, leaves: list[Tensor]) -> list[int]:
    """The outputs that share memory with an input or an earlier gradient, or have another layout than their leaf.

    For instance, a gradient of a linear loss may be the data tensor, which an optimiser must not change.
    """
    taken = {t.untyped_storage().data_ptr() for t in inputs}
    found = []
    for i, output in enumerate(outputs):
        place = output.untyped_storage().data_ptr()
        if place in taken or (i >= num_parts and output.stride() != leaves[i - num_parts].stride()):
            found.append(i)
        elif i >= num_parts:
            taken.add(place)
    return found
