"""Estimators of log p(x), nearly all returning `Evidence`."""

from .adaptive import AdaptiveImportanceSampling
from .annealed import AnnealedImportanceSampling
from .bidirectional import BidirectionalMonteCarlo
from .exact import ExactEvidence
from .importance import ImportanceSampling
from .self_check import SelfCheck

__all__ = [
    "AdaptiveImportanceSampling",
    "AnnealedImportanceSampling",
    "BidirectionalMonteCarlo",
    "ExactEvidence",
    "ImportanceSampling",
    "SelfCheck",
]
