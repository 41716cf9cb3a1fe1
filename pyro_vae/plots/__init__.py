"""Pictures of results: each takes a record and an optional matplotlib `ax`, and returns the `ax`."""

from .evidence import plot_gaps, plot_k_curve
from .images import plot_reconstructions, plot_samples
from .latent import plot_surgery, plot_units
from .rate_distortion import plot_rate_distortion
from .training import plot_training

__all__ = [
    "plot_gaps",
    "plot_k_curve",
    "plot_rate_distortion",
    "plot_reconstructions",
    "plot_samples",
    "plot_surgery",
    "plot_training",
    "plot_units",
]
