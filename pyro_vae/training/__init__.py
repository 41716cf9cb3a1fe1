"""Parts of a training run: schedules, a monitor and its history, aggressive training of the guide, an optimiser."""

from .aggressive_training import AggressiveTraining
from .fused_optim import FusedOptim
from .monitor import Monitor
from .schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing, SigmoidAnnealing
from .training_history import TrainingHistory

__all__ = [
    "AggressiveTraining",
    "CosineAnnealing",
    "CyclicalAnnealing",
    "FusedOptim",
    "LinearAnnealing",
    "Monitor",
    "SigmoidAnnealing",
    "TrainingHistory",
]
