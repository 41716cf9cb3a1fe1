"""Resampling of weighted draws."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel import Call
from ..noise import Noise
from .enumerated import Labels
from .weighted_draws import WeightedDraws

RESAMPLING, LABELS = 2, 3  # noise blocks


def resampled(call: Call, weights: Tensor, num_samples: int) -> Tensor:
    """(S, B), the indices of the resampled draws among K, in random order."""
    call.set_noise(Noise.POSTERIOR, RESAMPLING)
    num_data = weights.shape[1]
    order = torch.arange(num_samples, dtype=weights.dtype, device=weights.device).unsqueeze(-1)
    offset = torch.rand(1, num_data, dtype=weights.dtype, device=weights.device)
    ends = weights.cumsum(0)
    position = (order + offset) / num_samples * ends[-1:]
    index = torch.searchsorted(ends.T.contiguous(), position.T.contiguous(), right=True).T.clamp(max=len(weights) - 1)
    shuffle = torch.rand(num_samples, num_data, device=weights.device).argsort(0)
    return index.gather(0, shuffle)


def gathered(call: Call, draws: WeightedDraws, index: Tensor) -> dict[str, Tensor]:
    """The chosen draws by site, (S, *plates, *event)."""
    chosen: dict[str, Tensor] = {}
    for block in draws.blocks():
        here = (index >= block.first) & (index < block.first + len(block))
        rows = (index - block.first).clamp(0, len(block) - 1)
        for name, value in block.values.items():
            by_datum = data_first(call, name, value)
            taken = by_datum[rows, torch.arange(index.shape[1], device=index.device)]
            chosen[name] = where(here, taken, chosen[name]) if name in chosen else taken
    return {name: data_back(call, name, value) for name, value in chosen.items()}


def drawn_labels(call: Call, values: dict[str, Tensor], num_samples: int) -> dict[str, Tensor]:
    """A draw of each site that the guide enumerates, given draws of the latents, (S, *plates, *event) by site."""
    labels = Labels(call)
    call.set_noise(Noise.POSTERIOR, LABELS)
    level = torch.rand(num_samples, call.batch_size, dtype=torch.float64, device=call.device)
    pieces: dict[str, list[Tensor]] = {}
    for first, length in call.chunks(num_samples):
        some = {name: value[first : first + length] for name, value in values.items()}
        total = torch.zeros_like(level[first : first + length])
        chosen: dict[str, Tensor] = {}
        for share, given in labels(some, length):
            taken = (total <= level[first : first + length]) & (
                share > 0
            )  # the last value at which the cumulative sum is not above it
            for name, value in given.items():
                by_datum = data_first(call, name, value)
                chosen[name] = where(taken, by_datum, chosen[name]) if name in chosen else by_datum
            total = total + share
        for name, by_datum in chosen.items():
            pieces.setdefault(name, []).append(by_datum)
    return {name: data_back(call, name, torch.cat(parts)) for name, parts in pieces.items()}


def where(flags: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Select by (K, B) flags between values (K, B, ...)."""
    return torch.where(flags.reshape(*flags.shape, *[1] * (first.ndim - 2)), first, second)


def data_first(call: Call, name: str, value: Tensor) -> Tensor:
    """(K, *plates, *event) to (K, B, ...)."""
    axis = data_axis(call, name)
    return value.unsqueeze(1) if axis is None else value.movedim(axis, 1)


def data_back(call: Call, name: str, value: Tensor) -> Tensor:
    """The inverse of `data_first`."""
    axis = data_axis(call, name)
    return value.squeeze(1) if axis is None else value.movedim(1, axis)


def data_axis(call: Call, name: str) -> int | None:
    """The axis of the data in the values of a site, counted from the right; `None` where a call is one datum."""
    layout = call.layout
    return None if layout.datum_dim is None else layout.datum_dim - layout.event_dims[name]
