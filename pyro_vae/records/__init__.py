"""What all results share: a mean with its errors, joining batches, and the one table of doubts."""

from .doubts import (
    ANNEALED_CHAINS,
    EXACT_VALUE,
    FEW,
    FITTED_PROPOSALS,
    GUIDE_ITSELF,
    REVERSE_CHAINS,
    TO_TOLERANCE,
    are_many,
    counted,
    remedy_for,
    without_doubt,
)
from .estimate import LEVEL, Estimate, difference, normal_quantile, student_quantile, student_tail
from .joining import check_same, concatenated, mean_cost, to_plain, warn_about, with_loader_index, without_warnings
from .result import Result

__all__ = [
    "ANNEALED_CHAINS",
    "EXACT_VALUE",
    "Estimate",
    "FEW",
    "FITTED_PROPOSALS",
    "GUIDE_ITSELF",
    "LEVEL",
    "REVERSE_CHAINS",
    "TO_TOLERANCE",
    "Result",
    "are_many",
    "check_same",
    "concatenated",
    "counted",
    "difference",
    "mean_cost",
    "normal_quantile",
    "remedy_for",
    "student_quantile",
    "student_tail",
    "to_plain",
    "warn_about",
    "with_loader_index",
    "without_doubt",
    "without_warnings",
]
