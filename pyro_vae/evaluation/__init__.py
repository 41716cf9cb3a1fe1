"""Estimators over whole data sets."""

from .checkpoint import checkpoint_at
from .evaluate import evaluate
from .loop import Folder, OnError, over_batches, over_loader

__all__ = ["Folder", "OnError", "checkpoint_at", "evaluate", "over_batches", "over_loader"]
