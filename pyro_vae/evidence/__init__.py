"""Estimators of log p(x), nearly all returning `Evidence`."""

from .adaptive_importance_sampling import AdaptiveImportanceSampling
from .annealed_importance_sampling import AnnealedImportanceSampling
from .annealing import AnnealedChains, Annealing
from .auto_evidence import AutoEvidence
from .barrier import Barrier
from .bidirectional_monte_carlo import BidirectionalMonteCarlo
from .estimator import Estimator, OfPair, check_builder
from .evidence import Evidence, well_known
from .exact_evidence import ExactEvidence, exact_record
from .fitted import Fitted, fit_proposals, fitted_log_weights, with_search
from .hmc import State
from .importance_sampling import ImportanceSampling
from .k_curve import KCurve
from .sandwich import Sandwich
from .self_check import SelfCheck
from .self_check_result import SelfCheckResult
from .simulated_arguments import check_data_option, simulate_arguments, simulate_data
from .summary import guide_draws, mean_std_error, summarise, summed_draws

__all__ = [
    "AdaptiveImportanceSampling",
    "AnnealedChains",
    "AnnealedImportanceSampling",
    "Annealing",
    "AutoEvidence",
    "Barrier",
    "BidirectionalMonteCarlo",
    "Estimator",
    "Evidence",
    "ExactEvidence",
    "Fitted",
    "ImportanceSampling",
    "KCurve",
    "Sandwich",
    "OfPair",
    "SelfCheck",
    "SelfCheckResult",
    "State",
    "exact_record",
    "fit_proposals",
    "fitted_log_weights",
    "guide_draws",
    "mean_std_error",
    "simulate_arguments",
    "check_builder",
    "check_data_option",
    "simulate_data",
    "summarise",
    "summed_draws",
    "well_known",
    "with_search",
]
