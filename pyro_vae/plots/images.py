"""Pictures of data: reconstructions and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..options import whole_number
from ..simulate import Reconstruction, Simulation
from .axes import axes_or_new, check_cmap, check_record
from .sheet import name_rows, show, size_of
from .style import wrap_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 3


def plot_reconstructions(
    reconstruction: Reconstruction, ax: Axes | None = None, *, num_images: int = 10, cmap: Any = "gray_r", **kwargs: Any
) -> Axes:
    """Data in the top row, their reconstructions in the bottom row.

    :param reconstruction: what `reconstruct` returned; its first observed site is drawn. Images are (H, W), (1, H, W),
        flat squares (H * H,), or in colour (3, H, W).
    :param ax: where to draw; a new figure of a fitting size by default.
    :param num_images: how many of the data.
    :param cmap: colours of the values of grey images, a colour map of matplotlib. By default large values are black.
    :param kwargs: passed on to `Axes.imshow`, such as `vmin=` and `vmax=`.
    :raises ValueError: if the data are no images.

    All images share one scale, from the least value to the largest. Values of colour images that lie in [0, 1] are drawn as
    they are.

    Example::

        reconstruction = pv.reconstruct(vae.model, vae.guide, x)
        pv.plots.plot_reconstructions(reconstruction)
    """
    check_record(reconstruction, Reconstruction, made_by="what pv.reconstruct returned")
    check_cmap(cmap)
    num_images = whole_number("num_images", num_images)
    name = first_site(reconstruction.means)
    data, means = (as_images(side[name])[:num_images] for side in (reconstruction.observed, reconstruction.means))
    images = torch.cat([data, means])
    ax = axes_or_new(ax, size_of(images, num_columns=len(data), letters=14, lines=0.5))
    show(ax, images, num_columns=len(data), cmap=cmap, **kwargs)
    name_rows(ax, images, ["data", "reconstruction"])
    return ax


def plot_samples(
    simulation: Simulation, ax: Axes | None = None, *, num_images: int = 20, cmap: Any = "gray_r", **kwargs: Any
) -> Axes:
    """Samples from the model, as means of the likelihood at draws from the prior, in two rows.

    :param simulation: what `simulate` returned; its first observed site is drawn. Images are as in `plot_reconstructions`.
    :param ax: where to draw; a new figure of a fitting size by default.
    :param num_images: how many of the draws.
    :param cmap: colours of the values of grey images, a colour map of matplotlib. By default large values are black.
    :param kwargs: passed on to `Axes.imshow`, such as `vmin=` and `vmax=`.
    :raises ValueError: if the data are no images.

    Example::

        simulation = pv.simulate(vae.model, x)
        pv.plots.plot_samples(simulation)
    """
    check_record(simulation, Simulation, made_by="what pv.simulate returned")
    check_cmap(cmap)
    num_images = whole_number("num_images", num_images)
    images = as_images(simulation.means[first_site(simulation.means)])[:num_images]
    num_columns = math.ceil(len(images) / 2)
    ax = axes_or_new(ax, size_of(images, num_columns, lines=1.5))
    show(ax, images, num_columns, cmap=cmap, **kwargs)
    ax.set(title="samples from the model")
    return wrap_labels(ax)


def as_images(data: Tensor) -> Tensor:
    """(B, H, W) from flat squares (B, H * W), (B, H, W) or (B, 1, H, W); (B, H, W, 3) from (B, 3, H, W)."""
    data = data.detach().cpu()
    if data.ndim == 4 and data.shape[1] == 1:
        return data[:, 0]
    if data.ndim == 4 and data.shape[1] == COLOURS:
        return data.permute(0, 2, 3, 1)
    side = math.isqrt(data.shape[-1])
    if data.ndim == 2 and side**2 == data.shape[-1]:
        return data.reshape(-1, side, side)
    if data.ndim != 3:
        raise ValueError(
            "images must be (B, H, W), (B, 1, H, W), flat squares (B, H * H), or in colour (B, 3, H, W), "
            f"got {tuple(data.shape)}"
        )
    return data


def first_site(means: Mapping[str, Tensor]) -> str:
    if not means:
        raise ValueError("no observed site has a likelihood with a mean, so there is nothing to draw")
    return next(iter(means))
