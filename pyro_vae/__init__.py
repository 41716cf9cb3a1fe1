"""How far an ELBO is from log p(x), per datum and with honest error bars, and whose fault that is."""

from . import errors, exact, nn, plots, schedules
from .estimates import (
    CollapseHistory,
    Estimate,
    Evidence,
    Gaps,
    KCurve,
    Sandwich,
    SelfCheckResult,
    TrainingHistory,
    UnitActivity,
)
from .evaluate import evaluate
from .evidence import (
    AdaptiveImportanceSampling,
    AnnealedImportanceSampling,
    BidirectionalMonteCarlo,
    ExactEvidence,
    ImportanceSampling,
    SelfCheck,
)
from .gaps import InferenceGaps
from .latent import ActiveUnits, CollapseMonitor
from .models import VAE, ConditionalVAE, LinearVAE, conv_vae, mlp_conditional_vae, mlp_vae
from .monitor import Monitor
from .objectives import (
    AggressiveTraining,
    BetaTrace_ELBO,
    BetaTraceEnum_ELBO,
    BetaTraceGraph_ELBO,
    BetaTraceMeanField_ELBO,
    Decomposition,
    ImportanceWeightedELBO,
    InclusiveKL,
    Terms,
    TotalCorrelationELBO,
)
from .schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing, SigmoidAnnealing
from .simulate import Reconstruction, Simulation, reconstruct, simulate

__all__ = [
    "ActiveUnits",
    "AdaptiveImportanceSampling",
    "AggressiveTraining",
    "AnnealedImportanceSampling",
    "BetaTraceEnum_ELBO",
    "BetaTraceGraph_ELBO",
    "BetaTraceMeanField_ELBO",
    "BetaTrace_ELBO",
    "BidirectionalMonteCarlo",
    "CollapseHistory",
    "CollapseMonitor",
    "ConditionalVAE",
    "CosineAnnealing",
    "CyclicalAnnealing",
    "Decomposition",
    "Estimate",
    "Evidence",
    "ExactEvidence",
    "Gaps",
    "ImportanceSampling",
    "ImportanceWeightedELBO",
    "InclusiveKL",
    "InferenceGaps",
    "KCurve",
    "LinearAnnealing",
    "LinearVAE",
    "Monitor",
    "Reconstruction",
    "Sandwich",
    "SelfCheck",
    "SelfCheckResult",
    "SigmoidAnnealing",
    "Simulation",
    "Terms",
    "TotalCorrelationELBO",
    "TrainingHistory",
    "UnitActivity",
    "VAE",
    "conv_vae",
    "errors",
    "evaluate",
    "exact",
    "mlp_conditional_vae",
    "mlp_vae",
    "nn",
    "plots",
    "reconstruct",
    "schedules",
    "simulate",
]
