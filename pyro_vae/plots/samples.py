"""Pictures of how samples and reconstructions look beside how likely the data are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..options import whole_number
from ..samples import SampleCheckResult
from .axes import axes_or_new, check_cmap, check_record, color_of, literal, prefixed
from .images import COLOURS, as_images
from .sheet import name_rows, show, size_of
from .style import SKY, count_in_wholes, legend_over, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 30
HELD_OUT = "held-out data"


def plot_likelihood_and_looks(
    result: SampleCheckResult, ax: Axes | None = None, *, color: Any = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """log p(x), in nats, against the reconstruction error, one point for each held-out datum.

    :param result: what `SampleCheck` returned, called with `evidence=`.
    :param ax: where to draw; a new figure by default. Draw several models on one, each with its `color` and `label`.
    :param color: of the points; black by default.
    :param label: the name of the model in a legend.
    :param kwargs: passed on to `Axes.scatter`, such as `marker=`.
    :raises ValueError: where the result has no log p(x).

    The title has Spearman's rank correlation of log p(x) and minus the error, with its sampling error. If log p(x) only
    measured how well data are reconstructed, the points would fall along one line.

    Example::

        evidence = pv.evaluate(pv.ImportanceSampling(vae.model, vae.guide), test_loader)
        looks = pv.SampleCheck(vae.model, vae.guide)(test_loader, train=train_loader, evidence=evidence)
        pv.plots.plot_likelihood_and_looks(looks)
    """
    check_record(result, SampleCheckResult, made_by="what SampleCheck returned")
    color = color_of(color)
    if result.log_evidence is None:
        raise ValueError("the result has no log p(x) to draw: call SampleCheck with evidence=")
    ax = axes_or_new(ax)
    correlation = result.rank_correlation()
    style = {"s": 16, "facecolors": "none", "edgecolors": color or "black", "linewidths": 0.8, **kwargs}
    x, y = result.reconstruction_error.cpu(), result.log_evidence.cpu()
    ax.scatter(x, y, label=None if label is None else literal(label), **style)
    ax.set(
        xlabel="reconstruction error (mean squared difference per value)",
        ylabel=f"{'log p(x)' if result.support_checked else 'score'}, nats",
        title=f"{len(result)} data: rank correlation {float(correlation.value):.2f} "
        f"\u00b1 {float(correlation.sampling_error):.2f}",
    )
    if label is not None:
        legend_over(ax)
    return wrap_labels(ax)


def plot_nearest_neighbours(
    result: SampleCheckResult, ax: Axes | None = None, *, color: Any = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """How far samples and held-out data are from the training datum that is nearest to them, in units of the data.

    :param result: what `SampleCheck` returned.
    :param ax: where to draw; a new figure by default. Draw several models on one, each with its `color` and `label`.
    :param color: of the outline of the samples; black by default.
    :param label: the name of the model in the legend.
    :param kwargs: passed on to `Axes.hist` for the samples, such as `linestyle=`.

    Filled bars are held-out data and the outline is as many samples, which are draws and not means. The title has the
    probability that a sample is nearer than a held-out datum. It is 1/2 where samples are distributed like data, and near 1
    where they are copies of training data.

    Example::

        looks = pv.SampleCheck(vae.model, vae.guide)(test_loader, train=train_loader)
        pv.plots.plot_nearest_neighbours(looks)
    """
    check_record(result, SampleCheckResult, made_by="what SampleCheck returned")
    color = color_of(color)
    ax = axes_or_new(ax)
    samples, data = (side.cpu().double() for side in (result.sample_distance, result.data_distance))
    top = max(float(samples.max()), float(data.max())) or 1.0
    ax.hist(data, bins=BINS, range=(0, top), color=SKY, label=HELD_OUT)
    style = {"histtype": "step", "color": color or "black", "linewidth": 1.5, **kwargs}
    ax.hist(samples, bins=BINS, range=(0, top), label=prefixed(label, "samples"), **style)
    nearer = result.probability_nearer()
    ax.set(
        xlabel="distance to the nearest training datum, units of the data",
        ylabel="number of data",
        title=f"P(sample nearer) = {float(nearer.value):.3f} \u00b1 {float(nearer.sampling_error):.3f}",
    )
    count_in_wholes(ax)
    legend_over(ax)
    return wrap_labels(ax)


def plot_copies(
    result: SampleCheckResult, ax: Axes | None = None, *, num_images: int = 8, cmap: Any = "gray_r", **kwargs: Any
) -> Axes:
    """The samples that are nearest to training data in the top row, and the nearest training datum of each below it.

    :param result: what `SampleCheck` returned, for data that are images. Three channels are colours; of another number of
        channels the mean is drawn.
    :param ax: where to draw; a new figure of a fitting size by default.
    :param num_images: how many samples, nearest first; the result keeps at most 20.
    :param cmap: colours of the values of grey images, a colour map of matplotlib. By default large values are black.
    :param kwargs: passed on to `Axes.imshow`, such as `vmin=` and `vmax=`.
    :raises ValueError: where the data are no images.

    Two rows that agree are copies. Two rows that are alike say little, since these samples are the nearest of all.

    Example::

        looks = pv.SampleCheck(vae.model, vae.guide)(test_loader, train=train_loader)
        pv.plots.plot_copies(looks)
    """
    check_record(result, SampleCheckResult, made_by="what SampleCheck returned")
    check_cmap(cmap)
    num_images = whole_number("num_images", num_images)
    if result.image_shape is None:
        raise ValueError("the data are no images, so there is nothing to draw: say image_shape=(H, W) to SampleCheck")
    pair = torch.stack([result.closest_samples, result.closest_train])[:, :num_images]
    images = pair.detach().cpu().flatten(0, 1).reshape(-1, *result.image_shape)
    if images.ndim == 4 and images.shape[1] != COLOURS:
        images = images.mean(1)
    images = as_images(images)
    num_columns = pair.shape[1]
    ax = axes_or_new(ax, size_of(images, num_columns, letters=10, lines=2))
    show(ax, images, num_columns, cmap=cmap, **kwargs)
    name_rows(ax, images, ["sample", "training\ndatum"])
    distances = result.sample_distance[result.closest[:num_columns]]
    ax.set(xlabel=f"distances {float(distances.min()):.3g} to {float(distances.max()):.3g}")
    return wrap_labels(ax)
