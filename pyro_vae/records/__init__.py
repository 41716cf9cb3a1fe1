"""Common parts of all results: a mean with its errors, joining of batches, files, and the table of doubts."""

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
from .files import text_file, write_whole
from .joining import (
    check_records,
    check_same,
    concatenated,
    mean_cost,
    places,
    to_plain,
    warn_about,
    with_loader_index,
    without_warnings,
)
from .printing import page
from .result import Result
from .storing import from_arrays, load_value, save_value, to_arrays

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
    "check_records",
    "check_same",
    "concatenated",
    "counted",
    "difference",
    "from_arrays",
    "load_value",
    "mean_cost",
    "normal_quantile",
    "page",
    "places",
    "remedy_for",
    "save_value",
    "student_quantile",
    "student_tail",
    "text_file",
    "to_arrays",
    "to_plain",
    "warn_about",
    "with_loader_index",
    "without_doubt",
    "without_warnings",
    "write_whole",
]
