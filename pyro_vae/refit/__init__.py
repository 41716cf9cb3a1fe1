"""Train the guide of a frozen model further, and measure how much of its gap that closes."""

from .refit import Refit
from .refit_guide import refit_guide

__all__ = [
    "Refit",
    "refit_guide",
]
