"""Records of results: frozen, per datum, with their errors, and they print themselves. In nats unless they say otherwise."""

from .curve import KCurve
from .evidence import Evidence
from .factors import FactorInformation
from .gaps import Gaps
from .joining import warn_about
from .latent_sample import LatentSample
from .mean import Estimate
from .ranks import Statistic
from .rate_distortion import BetaSweep, RateDistortionCurve
from .samples import SampleCheckResult
from .sandwich import Sandwich
from .self_check import SelfCheckResult
from .surgery import Surgery
from .training import TrainingHistory
from .traversal import Manifold, Traversal
from .units import CollapseHistory, UnitActivity

__all__ = [
    "BetaSweep",
    "CollapseHistory",
    "Estimate",
    "Evidence",
    "FactorInformation",
    "Gaps",
    "KCurve",
    "LatentSample",
    "Manifold",
    "RateDistortionCurve",
    "SampleCheckResult",
    "Sandwich",
    "SelfCheckResult",
    "Statistic",
    "Surgery",
    "TrainingHistory",
    "Traversal",
    "UnitActivity",
    "warn_about",
]
