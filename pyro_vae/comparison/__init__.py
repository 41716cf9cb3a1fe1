"""Comparison of models by log p(x) on the same data."""

from .compare import compare
from .comparison import Comparison
from .paired_difference import PairedDifference

__all__ = ["Comparison", "PairedDifference", "compare"]
