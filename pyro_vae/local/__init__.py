"""Fits per datum: the guide's own family with offsets, and a Gaussian proposal. Serves evidence and gaps alike."""

from .gaussian import GaussianProposal, fit_gaussian, num_gradients_for, proposal_log_weights
from .offsets import GuideOffsets, fit_offsets
from .space import LatentSpace

__all__ = [
    "GaussianProposal",
    "GuideOffsets",
    "LatentSpace",
    "fit_gaussian",
    "fit_offsets",
    "num_gradients_for",
    "proposal_log_weights",
]
