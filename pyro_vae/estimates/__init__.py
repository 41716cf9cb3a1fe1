"""Records of results: frozen, per datum, with their errors, and they print themselves. All values in nats."""

from .curve import KCurve
from .evidence import Evidence
from .gaps import Gaps
from .joining import warn_about
from .mean import Estimate
from .rate_distortion import BetaSweep, RateDistortionCurve
from .sandwich import Sandwich
from .self_check import SelfCheckResult
from .surgery import Surgery
from .training import TrainingHistory
from .units import CollapseHistory, UnitActivity

__all__ = [
    "BetaSweep",
    "CollapseHistory",
    "Estimate",
    "Evidence",
    "Gaps",
    "KCurve",
    "RateDistortionCurve",
    "Sandwich",
    "SelfCheckResult",
    "Surgery",
    "TrainingHistory",
    "UnitActivity",
    "warn_about",
]
