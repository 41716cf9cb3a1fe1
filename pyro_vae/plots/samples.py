"""Pictures of how samples and reconstructions look beside how likely the data are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..options import whole_number
from ..samples import SampleCheckResult
from .axes import axes_or_new, check_record
from .images import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 30


def plot_likelihood_and_looks(result: SampleCheckResult, ax: Axes | None = None) -> Axes:
    """log p(x) in nats against reconstruction error, a point per held-out datum.

    :param result: what `SampleCheck` returned, called with `evidence=`.
    :param ax: where to draw; a new figure by default.
    :raises ValueError: where the result has no log p(x).

    The title has Spearman's correlation of log p(x) and minus the error, with its sampling error. Were the two the same
    question, the points would fall along one line.

    Example::

        pv.plots.plot_likelihood_and_looks(looks)
    """
    check_record(result, SampleCheckResult, made_by="what SampleCheck returned")
    if result.log_evidence is None:
        raise ValueError("the result has no log p(x) to draw: call SampleCheck with evidence=")
    ax = axes_or_new(ax)
    correlation = result.rank_correlation()
    ax.scatter(
        result.reconstruction_error.cpu(), result.log_evidence.cpu(), s=16, facecolors="none", edgecolors="black", lw=0.7
    )
    ax.set(
        xlabel="reconstruction error, mean square per number",
        ylabel=f"{'log p(x)' if result.support_checked else 'score'}, nats",
        title=f"{len(result)} data: rank correlation {float(correlation.value):.2f} "
        f"\u00b1 {float(correlation.sampling_error):.2f}",
    )
    return ax


def plot_nearest_neighbours(result: SampleCheckResult, ax: Axes | None = None) -> Axes:
    """How far samples and held-out data are from their nearest training datum, in units of the data.

    :param result: what `SampleCheck` returned.
    :param ax: where to draw; a new figure by default.

    Filled: held-out data; outlined: as many samples, draws and not means. The probability that a sample is the nearer one
    is 1/2 where samples are distributed like data, and near 1 for copies.

    Example::

        pv.plots.plot_nearest_neighbours(looks)
    """
    check_record(result, SampleCheckResult, made_by="what SampleCheck returned")
    ax = axes_or_new(ax)
    samples, data = (side.cpu().double() for side in (result.sample_distance, result.data_distance))
    top = max(float(samples.max()), float(data.max())) or 1.0
    ax.hist(data, bins=BINS, range=(0, top), color="0.75", label="held-out data")
    ax.hist(samples, bins=BINS, range=(0, top), histtype="step", color="black", linewidth=1.5, label="samples")
    nearer = result.probability_nearer()
    ax.set(
        xlabel="distance to the nearest training datum, units of the data",
        ylabel=f"number of {len(result)}",
        title=f"P(sample nearer) = {float(nearer.value):.3f} \u00b1 {float(nearer.sampling_error):.3f}",
    )
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])
    ax.legend(frameon=False, ncols=2, loc="upper center")
    return ax


def plot_copies(result: SampleCheckResult, ax: Axes | None = None, *, num_images: int = 8) -> Axes:
    """The samples that are nearest to training data above, the training datum nearest to each below.

    :param result: what `SampleCheck` returned, for data that are images; colours are averaged.
    :param ax: where to draw; a new figure by default.
    :param num_images: how many samples, nearest first; the result keeps at most 20.
    :raises ValueError: where the data are no images.

    A copy is one where the two rows agree; that they are alike says little, for these are the nearest of all.

    Example::

        pv.plots.plot_copies(looks)
    """
    check_record(result, SampleCheckResult, made_by="what SampleCheck returned")
    num_images = whole_number("num_images", num_images)
    if result.image_shape is None:
        raise ValueError("the data are no images, so there is nothing to draw: say image_shape=(H, W) to SampleCheck")
    ax = axes_or_new(ax)
    pair = torch.stack([result.closest_samples, result.closest_train])[:, :num_images]
    images = pair.detach().cpu().flatten(0, 1).reshape(-1, *result.image_shape)
    show(ax, images.mean(1) if images.ndim == 4 else images, num_columns=pair.shape[1])
    distances = result.sample_distance[result.closest[: pair.shape[1]]]
    low, high = float(distances.min()), float(distances.max())
    ax.set(title=f"samples (top), nearest training data (bottom)\ndistances {low:.3g} to {high:.3g}")
    return ax
