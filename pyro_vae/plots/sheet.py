"""Many images on one pair of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .style import LETTER, SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def show(ax: Axes, images: Tensor, num_columns: int, *, cmap: Any = "gray_r", **kwargs: Any) -> None:
    """Images of `as_images` row by row, a pixel apart, without axes."""
    if images.ndim == 4:
        images = between_0_and_1(images, kwargs.pop("vmin", None), kwargs.pop("vmax", None))
    height, width = images.shape[1:3]
    num_rows = math.ceil(len(images) / num_columns)
    size = num_rows * (height + 1) - 1, num_columns * (width + 1) - 1, *images.shape[3:]
    between = 1.0 if images.ndim == 4 else math.nan  # white: matplotlib draws no missing colour
    sheet = torch.full(size, between, dtype=torch.float)
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        top, left = row * (height + 1), column * (width + 1)
        sheet[top : top + height, left : left + width] = image
    ax.imshow(sheet.numpy(), **{"cmap": cmap, "interpolation": "nearest", **kwargs})
    ax.set_axis_off()


def between_0_and_1(images: Tensor, low: float | None, high: float | None) -> Tensor:
    """Colours are drawn as they are where they lie in [0, 1], and on a scale from the least to the largest elsewhere."""
    images = images.float()
    if low is None:
        low = min(float(images.min()), 0.0)
    if high is None:
        high = max(float(images.max()), 1.0)
    return ((images - low) / (high - low)).clip(0, 1)


def size_of(images: Tensor, num_columns: int, *, letters: int = 0, lines: float = 0.0) -> tuple[float, float]:
    """The size of a figure, in inches: as wide as usual, as high as the images are then.

    :param letters: of the longest name of a row.
    :param lines: of text above and below the images.
    """
    from matplotlib import rcParams

    height, width = images.shape[1:3]
    ratio = math.ceil(len(images) / num_columns) * (height + 1) / (num_columns * (width + 1))
    wide, font = rcParams["figure.figsize"][0], rcParams["font.size"] / 72
    beside, above = SMALL * LETTER * letters * font, (1.4 * lines + 1) * font
    high = max(wide - beside, 1.0) * ratio
    most = 1.2 * wide  # a tall sheet gets a narrower figure
    return (wide, high + above) if high <= most else (beside + most / ratio, most + above)


def name_rows(ax: Axes, images: Tensor, names: Sequence[str]) -> None:
    name_places(ax, ax.set_yticks, images.shape[1], names)


def name_places(ax: Axes, set_ticks: Any, size: int, names: Sequence[str], step: int = 1) -> None:
    """Names at the rows or columns of a sheet; `size` is the number of pixels of an image in that direction."""
    if not ax.axison:  # `show` has left nothing but the images
        ax.set_axis_on()
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0, labelsize="small")
        ax.set(xticks=[], yticks=[])
    places = range(0, len(names), step)
    set_ticks([place * (size + 1) + (size - 1) / 2 for place in places], [names[place] for place in places])
