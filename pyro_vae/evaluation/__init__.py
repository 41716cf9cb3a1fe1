"""Estimators over whole data sets."""

from .evaluate import evaluate
from .loop import Found, OnError, over_batches, over_loader

__all__ = ["Found", "OnError", "evaluate", "over_batches", "over_loader"]
