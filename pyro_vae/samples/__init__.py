"""Checks of reconstructions and samples of a model: error, sharpness, distance to the training data."""

from .ranks import Statistic
from .sample_check import SampleCheck
from .sample_check_result import SampleCheckResult

__all__ = [
    "SampleCheck",
    "SampleCheckResult",
    "Statistic",
]
