"""Estimators over whole data sets."""

from .evaluate import evaluate
from .loop import Folder, OnError, over_batches, over_loader

__all__ = ["Folder", "OnError", "evaluate", "over_batches", "over_loader"]
