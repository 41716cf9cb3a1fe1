"""What the latent space holds: its units, what its KL is made of, and what it costs to say more or less."""

from .beta_sweep import beta_sweep
from .collapse import CollapseMonitor
from .factors import MutualInformationGap
from .rate_distortion import RateDistortion
from .sample import AggregatedPosterior
from .surgery import ELBOSurgery
from .traversal import manifold, traverse
from .units import ActiveUnits

__all__ = [
    "ActiveUnits",
    "AggregatedPosterior",
    "CollapseMonitor",
    "ELBOSurgery",
    "MutualInformationGap",
    "RateDistortion",
    "beta_sweep",
    "manifold",
    "traverse",
]
