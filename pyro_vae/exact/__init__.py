"""Closed forms and exact sums, with which the estimators of this package are tested.

Three families where ``log p(x)`` is known: the linear-Gaussian model, models with few discrete latents (enumeration) and
models with one or two continuous latents (quadrature). Everything is in nats. Shapes: ``B`` data, ``D`` latent dimensions,
``X`` data dimensions, ``N`` quadrature nodes. Nothing here depends on Pyro. Use float64 for full precision.
"""

from .gaussians import scalar_posterior
from .linear_gaussian import LinearGaussian, LinearGaussianCurve, LinearGaussianGaps
from .principal_axes import collapsed
from .sums import enumerate_log_evidence, enumerate_log_joint, quadrature_log_evidence

__all__ = [
    "LinearGaussian",
    "LinearGaussianCurve",
    "LinearGaussianGaps",
    "collapsed",
    "enumerate_log_evidence",
    "enumerate_log_joint",
    "quadrature_log_evidence",
    "scalar_posterior",
]
