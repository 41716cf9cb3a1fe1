"""Estimators of log p(x), nearly all returning `Evidence`."""

from .adaptive_importance_sampling import AdaptiveImportanceSampling, fitted_log_weights, with_search
from .annealed_importance_sampling import AnnealedImportanceSampling, Annealing
from .bidirectional_monte_carlo import BidirectionalMonteCarlo
from .evidence import Evidence, well_known
from .exact_evidence import ExactEvidence
from .hmc import State
from .importance_sampling import ImportanceSampling, mean_std_error, summarise
from .k_curve import KCurve
from .sandwich import Sandwich
from .self_check import SelfCheck
from .self_check_result import SelfCheckResult

__all__ = [
    "AdaptiveImportanceSampling",
    "AnnealedImportanceSampling",
    "Annealing",
    "BidirectionalMonteCarlo",
    "Evidence",
    "ExactEvidence",
    "ImportanceSampling",
    "KCurve",
    "Sandwich",
    "SelfCheck",
    "SelfCheckResult",
    "State",
    "fitted_log_weights",
    "mean_std_error",
    "summarise",
    "well_known",
    "with_search",
]
