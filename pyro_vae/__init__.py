"""How far an ELBO is from log p(x), per datum and with honest error bars, and whose fault that is."""

from . import errors, exact, plots
from .estimates import Estimate, Evidence, Gaps
from .evaluate import evaluate
from .evidence import AdaptiveImportanceSampling, ImportanceSampling
from .gaps import InferenceGaps
from .simulate import Reconstruction, Simulation, reconstruct, simulate

__all__ = [
    "AdaptiveImportanceSampling",
    "Estimate",
    "Evidence",
    "Gaps",
    "ImportanceSampling",
    "InferenceGaps",
    "Reconstruction",
    "Simulation",
    "errors",
    "evaluate",
    "exact",
    "plots",
    "reconstruct",
    "simulate",
]
