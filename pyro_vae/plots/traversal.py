"""Sheets of images from walks through the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..latent import Manifold, Traversal
from .axes import axes_or_new, check_cmap, check_record, literal
from .images import as_images
from .sheet import name_places, show, size_of
from .style import SMALL, filled, letters_of, wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 10  # that have a name
WIDE = 20  # letters of a name beside its row


def plot_traversals(traversal: Traversal, ax: Axes | None = None, *, cmap: Any = "gray_r", **kwargs: Any) -> Axes:
    """What the decoder makes of one datum as one latent unit at a time moves over the quantiles of its prior.

    :param traversal: what `traverse` returned, of images (H, W), (1, H, W), flat squares (H * H,) or, in colour, (3, H, W).
    :param ax: where to draw; a new figure of a fitting size by default.
    :param cmap: colours of the values of grey images, a colour map of matplotlib. By default large values are black.
    :param kwargs: passed on to `Axes.imshow`, such as `vmin=` and `vmax=`.
    :raises ValueError: if the data are no images.

    Each row is a unit. Its label has the values of the unit at both ends, where its name leaves room. The columns are steps
    of equal probability under the prior, so that the steps of the values are wider towards the ends. On the left, before the
    line, is the datum itself.

    Example::

        walk = pv.traverse(vae.model, vae.guide, x[:1])
        pv.plots.plot_traversals(walk)
    """
    check_record(traversal, Traversal, made_by="what pv.traverse returned")
    check_cmap(cmap)
    num_units, num_steps = traversal.values.shape
    unmoved = traversal.datum.expand(num_units, 1, *traversal.datum.shape)
    images = as_images(torch.cat([unmoved, traversal.means], 1).flatten(0, 1))
    rows = [
        filled(name, WIDE) if len(name) > WIDE else f"{literal(name)}\n{float(values[0]):.2g} to {float(values[-1]):.2g}"
        for name, values in zip(traversal.names, traversal.values, strict=True)
    ]
    letters = max(len(line) for row in rows for line in row.split("\n"))
    ax = axes_or_new(ax, size_of(images, 1 + num_steps, letters=letters, lines=4))
    show(ax, images, 1 + num_steps, cmap=cmap, **kwargs)
    columns = ["datum", *(f"{100 * level:.0f}%" for level in traversal.levels.tolist())]
    label_sheet(ax, images, rows, columns)
    ax.axvline(images.shape[2], color="black", linewidth=0.8)
    start = "the posterior mean" if traversal.start == "mean" else "a draw of the guide"
    ax.set(title=f"One unit at a time, from {start}", xlabel="quantile of the unit's prior")
    return wrap_labels(ax)


def plot_manifold(manifold: Manifold, ax: Axes | None = None, *, cmap: Any = "gray_r", **kwargs: Any) -> Axes:
    """What the decoder makes of a grid over two latent units: the first from left to right, the second from bottom to top.

    :param manifold: what `manifold` returned, of images (H, W), (1, H, W), flat squares (H * H,) or, in colour, (3, H, W).
    :param ax: where to draw; a new figure of a fitting size by default.
    :param cmap: colours of the values of grey images, a colour map of matplotlib. By default large values are black.
    :param kwargs: passed on to `Axes.imshow`, such as `vmin=` and `vmax=`.
    :raises ValueError: if the data are no images.

    Rows and columns are labelled by the values of the units. These are quantiles of the prior, steps of equal probability,
    so that they are not evenly spaced.

    Example::

        grid = pv.manifold(vae.model, vae.guide, x[:1])
        pv.plots.plot_manifold(grid)
    """
    check_record(manifold, Manifold, made_by="what pv.manifold returned")
    check_cmap(cmap)
    first, second = ([f"{value:.2g}" for value in values] for values in manifold.values.tolist())
    images = as_images(manifold.means.transpose(0, 1).flip(0).flatten(0, 1))
    ax = axes_or_new(ax, size_of(images, len(first), letters=8, lines=4))
    show(ax, images, len(first), cmap=cmap, **kwargs)
    label_sheet(ax, images, second[::-1], first)
    ax.set(title="Means of the likelihood over two units")
    ax.set(xlabel=literal(manifold.names[0]), ylabel=literal(manifold.names[1]))
    return wrap_labels(ax)


def label_sheet(ax: Axes, images: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names at the rows and columns of a sheet that `show` has drawn; every second one, third one, ... where many."""
    name_places(ax, ax.set_yticks, images.shape[1], rows, 1 + (len(rows) - 1) // MOST_ROWS)
    most_columns = max(int(letters_of(ax) / SMALL / (1 + max(map(len, columns)))), 1)
    name_places(ax, ax.set_xticks, images.shape[2], columns, 1 + (len(columns) - 1) // most_columns)
