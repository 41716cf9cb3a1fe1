"""Records of results: frozen, per datum, with their errors, and they print themselves. All values in nats."""

from .evidence import Evidence
from .gaps import Gaps
from .joining import warn_about
from .mean import Estimate
from .sandwich import Sandwich
from .training import TrainingHistory

__all__ = ["Estimate", "Evidence", "Gaps", "Sandwich", "TrainingHistory", "warn_about"]
