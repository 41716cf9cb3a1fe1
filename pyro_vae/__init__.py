"""How far an ELBO is from log p(x), per datum and with honest error bars, and whose fault that is."""

from . import errors, exact
from .estimates import Estimate, Evidence, Gaps
from .evaluate import evaluate
from .evidence import AdaptiveImportanceSampling, ImportanceSampling
from .gaps import InferenceGaps
from .simulate import Simulation, simulate

__all__ = [
    "AdaptiveImportanceSampling",
    "Estimate",
    "Evidence",
    "Gaps",
    "ImportanceSampling",
    "InferenceGaps",
    "Simulation",
    "errors",
    "evaluate",
    "exact",
    "simulate",
]
