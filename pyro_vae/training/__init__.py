"""Parts of a training run: schedules, a monitor and its history, aggressive training of the guide."""

from .aggressive_training import AggressiveTraining
from .monitor import Monitor
from .schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing, SigmoidAnnealing
from .training_history import TrainingHistory

__all__ = [
    "AggressiveTraining",
    "CosineAnnealing",
    "CyclicalAnnealing",
    "LinearAnnealing",
    "Monitor",
    "SigmoidAnnealing",
    "TrainingHistory",
]
