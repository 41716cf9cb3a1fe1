"""Pictures of the aggregated posterior beside the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import OptionError
from ..latent import LatentSample, unit_numbers
from ..options import whole_number
from .axes import axes_or_new, check_record, literal
from .style import BLUE, SKY, legend_beside, legend_over, name_ticks, width_of, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CUT = 0.005  # the share at either end of q(z) and of the prior that may lie outside a violin
HALF = 0.42  # the widest half, of the distance between two units
MARKERS = "osD^v<>PX*hp"


def plot_aggregated_posterior(sample: LatentSample, ax: Axes | None = None, *, num_units: int = 10) -> Axes:
    """The aggregated posterior q(z) of each latent unit against its prior.

    :param sample: what `AggregatedPosterior` returned.
    :param ax: where to draw; a new figure by default.
    :param num_units: at most so many units, those whose posterior means spread widest.
    :raises OptionError: if `num_units` is less than 1.

    Each unit has two histograms back to back, with the same bins and the same area. On the left, filled, are draws of q(z)
    over all data. On the right, in outline, are draws of the prior. The outermost half per cent of both is left out. The bar
    between them is the mean of the posterior means and one standard deviation to either side. A unit that has the same
    posterior for all data has a dot there, even where its q(z) agrees with the prior. Units whose posterior means have no
    formula have neither.

    Example::

        sample = pv.AggregatedPosterior(vae.model, vae.guide)(loader)
        pv.plots.plot_aggregated_posterior(sample)
    """
    check_record(sample, LatentSample, made_by="what AggregatedPosterior returned")
    num_units = whole_number("num_units", num_units)
    ax = axes_or_new(ax)
    shown = sample.order.tolist()[:num_units]
    for position, d in enumerate(shown):
        draws, prior = finite(sample.draws[:, d]), finite(sample.prior[:, d])
        if len(draws):
            draw_halves(ax, position, draws, prior)
    summary = {name: column.cpu()[shown].numpy() for name, column in sample.summary().items()}
    spread = np.nan_to_num(summary["std_of_means"])  # of one datum there is none
    ax.errorbar(
        range(len(shown)),
        summary["mean_of_means"],
        yerr=spread,
        fmt="o",
        color="black",
        markersize=4,
        elinewidth=2,
        label="posterior means",
    )
    name_ticks(ax, [sample.names[d] for d in shown])
    left_out = f" of {len(sample.names)}" if len(shown) < len(sample.names) else ""
    ax.set(
        xlim=(-0.6, len(shown) - 0.4),
        xlabel="unit, by spread of its posterior means",
        ylabel="value of the unit",
        title=f"q(z) of {sample.num_data} data against the prior, {len(shown)}{left_out} units",
    )
    legend_over(ax)
    return wrap_labels(ax)


def draw_halves(ax: Axes, position: int, draws: np.ndarray, prior: np.ndarray) -> None:
    """Two histograms back to back around x = `position`."""
    ends = [np.quantile(side, (CUT, 1 - CUT)) for side in (draws, prior)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 1 + min(max(math.isqrt(len(draws)), 5), 30))
    left, right = (np.histogram(side, edges)[0] / len(side) for side in (draws, prior))
    scale = HALF / max(left.max(), right.max())
    ax.stairs(
        position - scale * left, edges, baseline=position, orientation="horizontal", fill=True, color=SKY, label="q(z)"
    )
    ax.stairs(position + scale * right, edges, baseline=position, orientation="horizontal", color="black", label="prior")


def plot_latents(
    sample: LatentSample, ax: Axes | None = None, *, units: Sequence[int | str] = (0, 1), **kwargs: Any
) -> Axes:
    """The posterior means of two units by label, on a background of draws from the prior.

    :param sample: what `AggregatedPosterior` returned.
    :param ax: where to draw; a new figure by default.
    :param units: two names or indices.

    :param kwargs: passed on to `Axes.scatter` for the data, such as `s=` and `alpha=`.
    :raises OptionError: for units that are not two, or do not exist.

    Up to twelve different labels have a colour and a marker each; more are shades of one scale. Labels from 0 to 9 are
    drawn as digits. Data whose label is NaN, or for which a unit has no place, are left out. Units whose means have no
    formula are shown by their draws.

    Example::

        sample = pv.AggregatedPosterior(vae.model, vae.guide)(loader, labels=lambda batch: batch[1])
        pv.plots.plot_latents(sample)
    """
    check_record(sample, LatentSample, made_by="what AggregatedPosterior returned")
    if isinstance(units, str) or not isinstance(units, Sequence) or len(units) != 2:
        raise OptionError(f"units must be two names or indices, got {units!r}")
    first, second = unit_numbers(units, sample.names)
    ax = axes_or_new(ax)
    means, prior = (side[:, [first, second]].detach().cpu() for side in (sample.means, sample.prior))
    size = min(max(20_000 / len(means), 20), 40) * min(width_of(ax) / 350, 1)  # smaller where the axes are
    ax.scatter(prior[:, 0], prior[:, 1], s=size / 3, color="0.85", linewidths=0, label="prior")
    if sample.labels is None:
        style: dict[str, Any] = {"s": size, "color": BLUE, "edgecolors": "white", "linewidths": 0.3, "label": "data"}
        ax.scatter(means[:, 0], means[:, 1], **{**style, **kwargs})
    else:
        scatter_by_label(ax, means, sample.labels.detach().cpu(), size, kwargs)
    kind = "posterior mean" if bool(sample.analytic[[first, second]].all()) else "draw of the guide where no mean is known"
    ax.set(
        xlabel=literal(sample.names[first]),
        ylabel=literal(sample.names[second]),
        title=f"{sample.num_data} data, one {kind} each",
    )
    legend_beside(ax)
    return wrap_labels(ax)


def scatter_by_label(ax: Axes, points: Tensor, labels: Tensor, size: float, style: dict[str, Any]) -> None:
    """Points (N, 2), with a colour and a marker for each label, so that they are told apart in grey too."""
    from matplotlib import colormaps

    known = ~labels.isnan()
    points, labels = points[known], labels[known]
    different = labels.unique()
    if len(different) > len(MARKERS):
        drawn = ax.scatter(
            points[:, 0], points[:, 1], **{"s": size, "c": labels, "cmap": "viridis", "linewidths": 0, **style}
        )
        ax.figure.colorbar(drawn, ax=ax, label="label")
        return
    colors = [*colormaps["tab10"](range(10)), "black", "navy"]
    for place, label in enumerate(different.tolist()):
        digit = label in range(10)  # stands for itself
        chosen = points[labels == label]
        marker = f"${label:g}$" if digit else MARKERS[place]
        own: dict[str, Any] = {
            "s": (1.7 if digit else 1) * size,
            "color": colors[place],
            "marker": marker,
            "linewidths": 0.2,
            "label": f"{label:g}",
        }
        ax.scatter(chosen[:, 0], chosen[:, 1], **{**own, **style})


def finite(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return values[values.isfinite()].numpy()
