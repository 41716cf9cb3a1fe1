"""Pictures of results: each takes a record and an optional matplotlib `ax`, and returns the `ax`."""

from .calibration import plot_calibration
from .comparison import plot_comparison
from .factors import plot_factors
from .gaps import plot_gaps, plot_gaps_side_by_side
from .images import plot_reconstructions, plot_samples
from .k_curve import plot_k_curve
from .latent import plot_surgery, plot_units
from .latent_sample import plot_aggregated_posterior, plot_latents
from .per_datum import plot_gaps_per_datum, plot_pareto_k
from .rate_distortion import plot_rate_distortion
from .samples import plot_copies, plot_likelihood_and_looks, plot_nearest_neighbours
from .training import plot_held_out, plot_training
from .traversal import plot_manifold, plot_traversals

__all__ = [
    "plot_aggregated_posterior",
    "plot_comparison",
    "plot_calibration",
    "plot_copies",
    "plot_factors",
    "plot_gaps",
    "plot_gaps_per_datum",
    "plot_gaps_side_by_side",
    "plot_held_out",
    "plot_k_curve",
    "plot_latents",
    "plot_likelihood_and_looks",
    "plot_manifold",
    "plot_nearest_neighbours",
    "plot_pareto_k",
    "plot_rate_distortion",
    "plot_reconstructions",
    "plot_samples",
    "plot_surgery",
    "plot_training",
    "plot_traversals",
    "plot_units",
]
