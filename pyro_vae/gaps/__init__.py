"""The gaps between ELBO and log p(x), per datum: the estimator, its record, and the fits of the family's optimum."""

from .gaps import GAPS, OF_LOG_EVIDENCE, Gaps
from .inference_gaps import InferenceGaps

__all__ = [
    "GAPS",
    "Gaps",
    "InferenceGaps",
    "OF_LOG_EVIDENCE",
]
