"""The data that have not converged, run without the others."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..proposals import GaussianProposal, LatentSpace
from .targets import NUM_PAIRS

SMALL = 2**20  # bytes of the largest site in one round, below which opening a call takes longer than it saves


class Active:
    """The data that still take part in a fit, in a call for them alone. Use it as a context manager.

    :ivar kept: their indices.
    :ivar space: the latents of a call for them.
    """

    def __init__(self, space: LatentSpace) -> None:
        self.whole = self.space = space
        self.kept = torch.arange(space.layout.batch_size, device=space.call.device)
        self._can_cut = 2 * NUM_PAIRS * space.call.structure.bytes_per_particle >= SMALL
        self._parts = ExitStack()
        self._calls: list[tuple[Any, int]] = []

    def __enter__(self) -> Active:
        return self

    def __exit__(self, *error: Any) -> None:
        spent = sum(call.cost * size for call, size in self._calls)
        self.whole.call.cost += round(spent / self.whole.layout.batch_size)
        self._parts.__exit__(*error)

    def narrow(self, unfinished: Tensor, q: GaussianProposal) -> bool:
        """Go on with the unfinished data alone, if they are half of the data here or fewer and the arguments can be cut.

        :param unfinished: (b,), of the data here.
        :param q: their Gaussians, at whose draws log p(x, z) of the data alone must be the same.
        :return: whether it does.
        """
        number = int(unfinished.sum())
        if not self._can_cut or not 0 < number <= len(unfinished) // 2:
            return False
        kept = self.kept[unfinished]
        if not self._calls:
            self.whole.compare_parts_at(q.draw)
        part = self._parts.enter_context(self.whole.call.part(kept))
        if part is None:
            self._can_cut = False
            return False
        self._calls.append((part, number))
        self.space, self.kept = self.whole.for_part(part, kept), kept
        return True
