"""Train the guide of a frozen model further, and measure what that repairs of its gap."""

from .refit import Refit
from .refit_guide import refit_guide

__all__ = [
    "Refit",
    "refit_guide",
]
