"""How far an ELBO is from log p(x), per datum and with honest error bars, and whose fault that is."""

from . import errors, exact, plots
from .estimates import Estimate, Evidence, Gaps
from .evaluate import evaluate
from .evidence import AdaptiveImportanceSampling, ImportanceSampling
from .gaps import InferenceGaps
from .objectives import BetaTrace_ELBO, BetaTraceEnum_ELBO, BetaTraceGraph_ELBO, BetaTraceMeanField_ELBO, Terms
from .simulate import Reconstruction, Simulation, reconstruct, simulate

__all__ = [
    "AdaptiveImportanceSampling",
    "BetaTraceEnum_ELBO",
    "BetaTraceGraph_ELBO",
    "BetaTraceMeanField_ELBO",
    "BetaTrace_ELBO",
    "Estimate",
    "Evidence",
    "Gaps",
    "ImportanceSampling",
    "InferenceGaps",
    "Reconstruction",
    "Simulation",
    "Terms",
    "errors",
    "evaluate",
    "exact",
    "plots",
    "reconstruct",
    "simulate",
]
