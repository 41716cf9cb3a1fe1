"""Nearest training data, found in one pass."""

import math

import torch
from torch import Tensor

CHUNK = 2048  # rows on either side of a block of distances


class Neighbours:
    """The nearest training datum of each of Q rows, (Q, X), and its distance, from training data seen once.

    Candidates are found by inner products in double precision, about the middle of the rows; what counts is the distance
    to the candidate, taken from the difference, so that a copy is at zero and equal distances are equal.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries, self.middle = queries, queries.double().mean(0)
        self.distance = torch.full_like(queries[:, 0], math.inf, dtype=torch.double)
        self.index = torch.zeros_like(self.distance, dtype=torch.long)
        self.rows = torch.zeros_like(queries)
        self.num_train = 0

    def add(self, train: Tensor) -> None:
        for part in train.split(CHUNK):
            part = part.to(self.queries)
            for first in range(0, len(self.queries), CHUNK):
                self._compare(slice(first, first + CHUNK), part)
            self.num_train += len(part)

    def _compare(self, chunk: slice, part: Tensor) -> None:
        queries, candidates = self.queries[chunk].double(), part.double()
        near = torch.cdist(queries - self.middle, candidates - self.middle, compute_mode="use_mm_for_euclid_dist").argmin(1)
        distance = (queries - candidates[near]).square().sum(1).sqrt()
        nearer = distance < self.distance[chunk]
        self.distance[chunk] = torch.where(nearer, distance, self.distance[chunk])
        self.index[chunk] = torch.where(nearer, near + self.num_train, self.index[chunk])
        self.rows[chunk] = torch.where(nearer.unsqueeze(1), part[near], self.rows[chunk])
