"""Flows without an inverse (planar, radial, Sylvester, block autoregressive), whose density is known only at their draws.

Pyro's transforms cache the last draw, by identity. The log-density is therefore computed as soon as a value is drawn, and a
value is reproduced by passing the same draw of the base through the flow.
"""

from typing import Any

import pyro.distributions.transforms as T
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from torch import Tensor
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from ..errors import StructureError
from .supports import TRANSFORMED, innermost

# Those of Pyro raise a KeyError for any value except their last draw.
WITHOUT_INVERSE = (ConditionedPlanar, ConditionedRadial, T.Sylvester, T.BlockAutoregressive, T.Polynomial)


def is_one_way(fn: Any) -> bool:
    """Whether the density of a distribution is known only at its draws."""
    base = innermost(fn)
    return type(base) in TRANSFORMED and any(lacks_inverse(t) for t in base.transforms)


def lacks_inverse(transform: Transform) -> bool:
    if isinstance(transform, ComposeTransform):
        return any(lacks_inverse(part) for part in transform.parts)
    if isinstance(transform, IndependentTransform):
        return lacks_inverse(transform.base_transform)
    return isinstance(transform, WITHOUT_INVERSE) or type(transform)._inverse is Transform._inverse


def draw_base(fn: Any) -> Tensor:
    base: Tensor = innermost(fn).base_dist()
    return base


def push(fn: Any, base: Tensor) -> Tensor:
    """The value from a draw of the base."""
    for transform in innermost(fn).transforms:
        base = transform(base)
    return base


def log_prob_at(name: str, fn: Any, value: Tensor) -> Tensor:
    """The log-density; raises where the value is not a draw of this flow."""
    try:
        log_prob: Tensor = fn.log_prob(value)
        return log_prob
    except (KeyError, NotImplementedError) as error:
        if not is_one_way(fn):
            raise
        raise StructureError(
            f"site '{name}' is a flow without an inverse, so its density is known only at its draws, but here it is "
            "needed at other values. Use a flow with an inverse (spline, affine coupling, affine autoregressive), or "
            "ImportanceSampling, which uses only draws of the guide"
        ) from error
