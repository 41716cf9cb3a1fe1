"""Pictures of data: reconstructions and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..options import whole_number
from ..simulate import Reconstruction, Simulation
from .axes import axes_or_new, check_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_reconstructions(reconstruction: Reconstruction, ax: Axes | None = None, *, num_images: int = 10) -> Axes:
    """Data above, reconstructions below.

    :param reconstruction: what `reconstruct` returned; its first observed site is drawn.
    :param ax: where to draw; a new figure by default.
    :param num_images: how many of the data.
    """
    check_record(reconstruction, Reconstruction, made_by="what pv.reconstruct returned")
    num_images = whole_number("num_images", num_images)
    ax = axes_or_new(ax)
    name = first_site(reconstruction.means)
    data, means = (as_images(side[name])[:num_images] for side in (reconstruction.observed, reconstruction.means))
    show(ax, torch.cat([data, means]), num_columns=len(data))
    ax.set(title="data (top), reconstructions (bottom)")
    return ax


def plot_samples(simulation: Simulation, ax: Axes | None = None, *, num_images: int = 20) -> Axes:
    """Means of the likelihood at draws from the prior.

    :param simulation: what `simulate` returned; its first observed site is drawn.
    :param ax: where to draw; a new figure by default.
    :param num_images: how many of the draws.
    """
    check_record(simulation, Simulation, made_by="what pv.simulate returned")
    num_images = whole_number("num_images", num_images)
    ax = axes_or_new(ax)
    images = as_images(simulation.means[first_site(simulation.means)])[:num_images]
    show(ax, images, num_columns=math.ceil(len(images) / 2))
    ax.set(title="samples from the model")
    return ax


def as_images(data: Tensor) -> Tensor:
    """(B, H, W) from flat squares, (B, H * W), from (B, H, W) or from (B, 1, H, W)."""
    data = data.detach().cpu()
    if data.ndim == 4 and data.shape[1] == 1:
        data = data[:, 0]
    side = math.isqrt(data.shape[-1])
    if data.ndim == 2 and side**2 == data.shape[-1]:
        data = data.reshape(-1, side, side)
    if data.ndim != 3:
        raise ValueError(f"images must be (B, H, W), (B, 1, H, W) or flat squares (B, H * H), got {tuple(data.shape)}")
    return data


def show(ax: Axes, images: Tensor, num_columns: int) -> None:
    num_images, height, width = images.shape
    num_rows = math.ceil(num_images / num_columns)
    sheet = images.new_full((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1), float("nan"), dtype=torch.float)
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        top, left = row * (height + 1), column * (width + 1)
        sheet[top : top + height, left : left + width] = image
    ax.imshow(sheet.numpy(), cmap="gray_r", interpolation="nearest")
    ax.set_axis_off()


def first_site(means: Mapping[str, Tensor]) -> str:
    if not means:
        raise ValueError("no observed site has a likelihood with a mean, so there is nothing to draw")
    return next(iter(means))
