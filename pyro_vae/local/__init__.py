"""Fits per datum: the guide's own family with offsets, and a Gaussian proposal. Serves evidence and gaps alike."""

from .gaussian import GaussianProposal, fit_with_points, num_gradients_for
from .missed import Witnesses, missed_modes
from .mixture import MixtureProposal, proposal_log_weights
from .offsets import GuideOffsets, fit_offsets
from .posterior_side import SPACE, PosteriorSide
from .restart import restarted
from .search import num_starts_for, search
from .space import LatentSpace

__all__ = [
    "GaussianProposal",
    "GuideOffsets",
    "LatentSpace",
    "MixtureProposal",
    "PosteriorSide",
    "SPACE",
    "Witnesses",
    "fit_offsets",
    "fit_with_points",
    "missed_modes",
    "num_gradients_for",
    "num_starts_for",
    "proposal_log_weights",
    "restarted",
    "search",
]
