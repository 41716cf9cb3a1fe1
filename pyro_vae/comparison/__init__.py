"""Which of several models is better on the same data, and whether these can tell."""

from .compare import compare
from .comparison import Comparison
from .paired_difference import PairedDifference

__all__ = ["Comparison", "PairedDifference", "compare"]
