"""Training objectives: drop-in subclasses of `pyro.infer.ELBO`."""

from .beta_trace import BetaTrace_ELBO, BetaTraceGraph_ELBO
from .beta_trace_enum import BetaTraceEnum_ELBO
from .beta_trace_mean_field import BetaTraceMeanField_ELBO
from .gradients import leaves_behind
from .importance_weighted_elbo import ImportanceWeightedELBO
from .inclusive_kl import InclusiveKL
from .terms import Terms
from .total_correlation_elbo import Decomposition, TotalCorrelationELBO
from .traces.draw_order import depends_on_own_draw, out_of_order

__all__ = [
    "BetaTraceEnum_ELBO",
    "BetaTraceGraph_ELBO",
    "BetaTraceMeanField_ELBO",
    "BetaTrace_ELBO",
    "Decomposition",
    "ImportanceWeightedELBO",
    "InclusiveKL",
    "Terms",
    "TotalCorrelationELBO",
    "depends_on_own_draw",
    "leaves_behind",
    "out_of_order",
]
