"""The gaps between ELBO and log p(x), per datum: the optimum of the guide's family, and the estimator that compares."""

from .gaps import GAPS, OF_LOG_EVIDENCE, Gaps
from .inference_gaps import InferenceGaps

__all__ = [
    "GAPS",
    "Gaps",
    "InferenceGaps",
    "OF_LOG_EVIDENCE",
]
