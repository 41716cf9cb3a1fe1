"""What the latent space holds: which of its units are used, and whether they fall silent during training."""

from .collapse import CollapseMonitor
from .units import ActiveUnits

__all__ = ["ActiveUnits", "CollapseMonitor"]
