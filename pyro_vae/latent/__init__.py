"""What the latent space holds: its units, what its KL is made of, and what it costs to say more or less."""

from .beta_sweep import beta_sweep
from .collapse import CollapseMonitor
from .rate_distortion import RateDistortion
from .surgery import ELBOSurgery
from .units import ActiveUnits

__all__ = ["ActiveUnits", "CollapseMonitor", "ELBOSurgery", "RateDistortion", "beta_sweep"]
