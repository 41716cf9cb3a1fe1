"""Raise for pairs whose guide and model use different data of a subsampled plate."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...errors import DatumPlateError, SubsamplingError


def check_subsample(plate: str, fn: Any, given: Any, known: Tensor, known_size: int) -> None:
    """Raise for a plate with other data than before, `known` out of `known_size`: other indices, or another number.

    A plate of all data uses the subsample of the guide, as with Pyro's replay. `fn` is the distribution from which Pyro
    would draw the indices; `given` is `subsample=`, or None.
    """
    if given is not None:
        if not same_indices(given, known):
            raise SubsamplingError(
                f"plate '{plate}' is given other subsample indices than it had before in this call: give model and "
                "guide the same subsample=. An autoguide draws different indices unless it gets these: "
                f"AutoNormal(model, create_plates=lambda x, index: pyro.plate('{plate}', {fn.size}, subsample=index)), "
                "a function of the model's arguments"
            )
        return
    size = fn.size if fn.subsample_size is None else min(fn.subsample_size, fn.size)
    if len(known) != size and not size == fn.size == known_size:
        raise DatumPlateError(different_sizes(plate, {len(known), size}))


def different_sizes(plate: str, sizes: Collection[int]) -> str:
    return (
        f"plate '{plate}' has sizes {sorted(sizes)} in model and guide: give it the number of the data on both sides, as in "
        f"pyro.plate('{plate}', len(x)). An autoguide has parameters for the data that it was first run on, and no others"
    )


def same_indices(given: Any, known: Tensor) -> bool:
    with torch._C.DisableTorchFunction():  # this check reads the indices, not the program
        return given is known or torch.equal(torch.as_tensor(given, dtype=known.dtype, device=known.device), known)
