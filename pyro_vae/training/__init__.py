"""Tools for training: schedules, a monitor, early stopping, aggressive training of the guide, an optimiser."""

from .aggressive_training import AggressiveTraining
from .early_stopping import EarlyStopping
from .fused_optim import FusedOptim
from .held_out_history import HeldOutHistory
from .kept_state import KeptState
from .monitor import Monitor
from .schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing, SigmoidAnnealing
from .training_history import TrainingHistory

__all__ = [
    "AggressiveTraining",
    "CosineAnnealing",
    "CyclicalAnnealing",
    "EarlyStopping",
    "FusedOptim",
    "HeldOutHistory",
    "KeptState",
    "LinearAnnealing",
    "Monitor",
    "SigmoidAnnealing",
    "TrainingHistory",
]
