"""Estimators of log p(x), all returning `Evidence`."""

from .adaptive import AdaptiveImportanceSampling
from .importance import ImportanceSampling

__all__ = ["AdaptiveImportanceSampling", "ImportanceSampling"]
