"""Sheets of images from walks through the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..latent import Manifold, Traversal
from .axes import axes_or_new, check_record, literal
from .images import as_images, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TICKS = 10


def plot_traversals(traversal: Traversal, ax: Axes | None = None) -> Axes:
    """A row of images for each unit as it moves over the quantiles of its prior, and on the left the datum unmoved.

    :param traversal: what `traverse` returned, of images (H, W), (1, H, W) or flat squares (H * H,).
    :param ax: where to draw; a new figure by default.

    Row labels have the unit and the range of its values, columns the quantiles.

    :raises ValueError: if the data are no images.

    Example::

        pv.plots.plot_traversals(pv.traverse(vae.model, vae.guide, x[:1]))
    """
    check_record(traversal, Traversal, made_by="what pv.traverse returned")
    num_units, num_steps = traversal.values.shape
    unmoved = traversal.datum.expand(num_units, 1, *traversal.datum.shape)
    images = as_images(torch.cat([unmoved, traversal.means], 1).flatten(0, 1))
    ax = axes_or_new(ax)
    show(ax, images, num_columns=1 + num_steps)
    rows = [
        f"{literal(name)}\n{float(values[0]):.2g} to {float(values[-1]):.2g}"
        for name, values in zip(traversal.names, traversal.values, strict=True)
    ]
    columns = ["datum", *(f"{100 * level:.0f}%" for level in traversal.levels.tolist())]
    label_sheet(ax, images, rows, columns)
    ax.axvline(images.shape[2], color="black", linewidth=0.8)
    start = "the posterior mean" if traversal.start == "mean" else "a draw of the guide"
    ax.set(title=f"One unit at a time, from {start}", xlabel="quantile of the unit's prior")
    return ax


def plot_manifold(manifold: Manifold, ax: Axes | None = None) -> Axes:
    """A sheet of images over two units of the latents: the first from left to right, the second from bottom to top.

    :param manifold: what `manifold` returned, of images (H, W), (1, H, W) or flat squares (H * H,).
    :param ax: where to draw; a new figure by default.

    :raises ValueError: if the data are no images.

    Example::

        pv.plots.plot_manifold(pv.manifold(vae.model, vae.guide, x[:1]))
    """
    check_record(manifold, Manifold, made_by="what pv.manifold returned")
    first, second = ([f"{value:.2g}" for value in values] for values in manifold.values.tolist())
    images = as_images(manifold.means.transpose(0, 1).flip(0).flatten(0, 1))
    ax = axes_or_new(ax)
    show(ax, images, num_columns=len(first))
    label_sheet(ax, images, second[::-1], first)
    ax.set(
        title="Means of the likelihood over two units", xlabel=literal(manifold.names[0]), ylabel=literal(manifold.names[1])
    )
    return ax


def label_sheet(ax: Axes, images: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names at the rows and columns of a sheet that `show` has drawn; every second one, third one, ... where many."""
    ax.set_axis_on()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize="small")
    _, height, width = images.shape
    for set_ticks, names, size in ((ax.set_yticks, rows, height), (ax.set_xticks, columns, width)):
        step = 1 + (len(names) - 1) // MOST_TICKS
        places = range(0, len(names), step)
        set_ticks([place * (size + 1) + (size - 1) / 2 for place in places], [names[place] for place in places])
