"""Objectives to train with: drop-in subclasses of `pyro.infer.ELBO`."""

from .aggressive import AggressiveTraining
from .enumeration import BetaTraceEnum_ELBO
from .importance_weighted import ImportanceWeightedELBO
from .inclusive import InclusiveKL
from .mean_field import BetaTraceMeanField_ELBO
from .terms import Terms
from .total_correlation import Decomposition, TotalCorrelationELBO
from .trace import BetaTrace_ELBO, BetaTraceGraph_ELBO

__all__ = [
    "AggressiveTraining",
    "BetaTraceEnum_ELBO",
    "BetaTraceGraph_ELBO",
    "BetaTraceMeanField_ELBO",
    "BetaTrace_ELBO",
    "Decomposition",
    "ImportanceWeightedELBO",
    "InclusiveKL",
    "Terms",
    "TotalCorrelationELBO",
]
