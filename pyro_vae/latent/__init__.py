"""Analyses of the latent space: active units, parts of the KL, rate and distortion, factors, traversals."""

from .active_units import ActiveUnits
from .aggregated_posterior import AggregatedPosterior
from .beta_sweep import beta_sweep
from .collapse_monitor import CollapseMonitor
from .elbo_surgery import ELBOSurgery
from .factor_information import FactorInformation
from .latent_sample import LatentSample
from .mutual_information_gap import MutualInformationGap
from .naming import unit_numbers
from .rate_distortion import RateDistortion
from .rate_distortion_curve import BetaSweep, RateDistortionCurve
from .surgery import Surgery
from .traversal import Manifold, Traversal
from .traverse import manifold, traverse
from .unit_activity import CollapseHistory, UnitActivity

__all__ = [
    "ActiveUnits",
    "AggregatedPosterior",
    "BetaSweep",
    "CollapseHistory",
    "CollapseMonitor",
    "ELBOSurgery",
    "FactorInformation",
    "LatentSample",
    "Manifold",
    "MutualInformationGap",
    "RateDistortion",
    "RateDistortionCurve",
    "Surgery",
    "Traversal",
    "UnitActivity",
    "beta_sweep",
    "manifold",
    "traverse",
    "unit_numbers",
]
