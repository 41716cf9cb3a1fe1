"""Proposals for each datum: unconstrained space, fitted Gaussians and mixtures, search for modes."""

from .bijections import bijection
from .gaussian import GaussianProposal, eigh, fit_with_points, num_gradients_for, unchecked_gradient, values_and_gradient
from .gradients import check_gradients, differentiable, refuse_gradients
from .missed import Witnesses, missed_modes
from .mixture import MixtureProposal, draws_of_prior, proposal_draws, proposal_log_weights
from .posterior_side import SPACE, PosteriorSide
from .search import SEARCHED_DIM, num_starts_for, search
from .space import LatentSpace

__all__ = [
    "GaussianProposal",
    "LatentSpace",
    "MixtureProposal",
    "PosteriorSide",
    "SEARCHED_DIM",
    "SPACE",
    "Witnesses",
    "bijection",
    "check_gradients",
    "differentiable",
    "draws_of_prior",
    "eigh",
    "fit_with_points",
    "missed_modes",
    "num_gradients_for",
    "num_starts_for",
    "proposal_draws",
    "proposal_log_weights",
    "refuse_gradients",
    "search",
    "unchecked_gradient",
    "values_and_gradient",
]
