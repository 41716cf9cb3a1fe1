"""Shapes of images, and their sharpness."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from ..options import is_whole

SMALLEST = 4  # pixels on a side: below, a Laplacian has one row that varies, or none


def laplacian_variance(rows: Tensor, image_shape: Sequence[int]) -> Tensor:
    """The variance of the Laplacian of images (B, X), a measure of sharpness, (B,)."""
    images = rows.reshape(-1, *image_shape)
    if images.ndim == 4:
        images = images.mean(1)
    around = images[:, :-2, 1:-1] + images[:, 2:, 1:-1] + images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return (around - 4 * images[:, 1:-1, 1:-1]).flatten(1).var(1, correction=0)


def image_shape_of(shapes: Sequence[torch.Size], given: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of a datum as an image, or `None` if it is not an image."""
    size = sum(shape.numel() for shape in shapes)
    if given is not None:
        if math.prod(given) != size:
            raise OptionError(f"image_shape={tuple(given)} has {math.prod(given)} numbers, but a datum has {size}")
        return tuple(given)
    shape = tuple(shapes[0])
    if len(shape) == 1 and math.isqrt(size) ** 2 == size:
        shape = (math.isqrt(size),) * 2
    return shape if len(shapes) == 1 and len(shape) in (2, 3) and min(shape[-2:]) >= SMALLEST else None


def checked_shape(image_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(n) if is_whole(n) else 0 for n in image_shape) if isinstance(image_shape, Sequence) else ()
    if len(shape) not in (2, 3) or min(shape) < 1 or min(shape[-2:]) < SMALLEST:
        raise OptionError(
            f"image_shape must be (H, W) or (C, H, W), whole numbers, H and W at least {SMALLEST}, got {image_shape!r}"
        )
    return shape
