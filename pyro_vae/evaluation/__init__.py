"""Estimators over whole data sets: loaders, checkpoints, several processes."""

from .checkpoint import checkpoint_at
from .evaluate import evaluate
from .loop import Folder, OnError, over_batches, over_loader
from .processes import exchanged, gathered, of_rank_0, rank_and_size, shared_seed, single_process

__all__ = [
    "Folder",
    "OnError",
    "checkpoint_at",
    "evaluate",
    "exchanged",
    "gathered",
    "of_rank_0",
    "over_batches",
    "over_loader",
    "rank_and_size",
    "shared_seed",
    "single_process",
]
