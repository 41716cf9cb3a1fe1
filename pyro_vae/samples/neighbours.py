"""Nearest training data, found in one pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..evaluation import exchanged

BATCH = 2**32  # a position is the index of the batch times this, plus the index within the batch
CHUNK = 2048  # rows on either side of a block of distances


class Neighbours:
    """The nearest training datum of each of Q rows, (Q, X), and its distance, in one pass over the training data.

    Candidates are found by inner products in double precision, relative to the centre of the rows. The distance to the
    candidate is then computed from the difference, so that a copy has distance zero and equal distances are equal.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries, self.middle = queries, queries.double().mean(0)
        self.distance = torch.full_like(queries[:, 0], math.inf, dtype=torch.double)
        self.place = torch.full_like(self.distance, torch.iinfo(torch.long).max, dtype=torch.long)
        self.rows = torch.zeros_like(queries)

    def add(self, train: Tensor, number: int) -> None:
        """Look at the batch with this number, in rising order."""
        for first_train in range(0, len(train), CHUNK):
            part = train[first_train : first_train + CHUNK].to(self.queries)
            for first in range(0, len(self.queries), CHUNK):
                self._compare(slice(first, first + CHUNK), part, number * BATCH + first_train)

    def merge(self) -> None:
        """Merge the results of the other processes of a group. Of equal distances the first is used."""
        for distance, place, rows in exchanged("the nearest data", (self.distance, self.place, self.rows)):
            nearer = (distance < self.distance) | ((distance == self.distance) & (place < self.place))
            self.distance = torch.where(nearer, distance, self.distance)
            self.place = torch.where(nearer, place, self.place)
            self.rows = torch.where(nearer.unsqueeze(1), rows, self.rows)

    def index(self, batches: Sequence[tuple[int, int]]) -> Tensor:
        """The indices of the nearest data among all training data, from the indices and sizes of all batches."""
        numbers, sizes = (self.place.new_tensor(column) for column in zip(*batches, strict=True))
        firsts = sizes.cumsum(0) - sizes
        return firsts[torch.searchsorted(numbers, self.place // BATCH)] + self.place % BATCH

    def _compare(self, chunk: slice, part: Tensor, first: int) -> None:
        queries, candidates = self.queries[chunk].double(), part.double()
        near = torch.cdist(queries - self.middle, candidates - self.middle, compute_mode="use_mm_for_euclid_dist").argmin(1)
        distance = (queries - candidates[near]).square().sum(1).sqrt()
        nearer = distance < self.distance[chunk]
        self.distance[chunk] = torch.where(nearer, distance, self.distance[chunk])
        self.place[chunk] = torch.where(nearer, near + first, self.place[chunk])
        self.rows[chunk] = torch.where(nearer.unsqueeze(1), part[near], self.rows[chunk])
