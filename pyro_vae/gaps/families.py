"""Rebuild the distributions of a guide with other parameters: the guide's plus offsets per datum."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.transforms import identity_transform

from ..densities import bounds_of, support_of
from ..errors import LocalFitError
from ..noise import kept_random_state
from ..proposals import bijection

UNIT_DRAWS = 20  # draws from which the unit of an offset is computed, where no parameter gives one
# Redundant parameters, which are skipped.
REDUNDANT = {"probs", "covariance_matrix", "precision_matrix"}

Shift = Callable[[str, Tensor, int, Tensor | None], Tensor]


def transforms_of(fn: Any) -> list[Any]:
    """The transforms that a distribution applies to draws of the innermost one."""
    while isinstance(
        fn, (dist.MaskedDistribution, dist.torch_distribution.ExpandedDistribution, torch.distributions.Independent)
    ):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return [*transforms_of(fn.base_dist), *fn.transforms]
    return []


def family_of(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def rebuilt(fn: Any, shift: Shift, batch_shape: torch.Size, event_dim: int = 0) -> Any:
    """The same distribution with `shift(name, unconstrained value, event dims)` applied to its parameters.

    :param batch_shape: the full batch shape at this level; an expanded distribution stores less.
    :param event_dim: dimensions of `batch_shape` that outer wrappers count as event dimensions.
    """
    if isinstance(fn, dist.MaskedDistribution):
        return rebuilt(fn.base_dist, shift, batch_shape, event_dim).mask(fn._mask)
    if isinstance(fn, dist.torch_distribution.ExpandedDistribution):
        return rebuilt(fn.base_dist, shift, batch_shape, event_dim)
    if isinstance(fn, torch.distributions.Independent):
        n = fn.reinterpreted_batch_ndims
        inner_shape = batch_shape + fn.base_dist.batch_shape[len(fn.base_dist.batch_shape) - n :]
        return rebuilt(fn.base_dist, shift, inner_shape, event_dim + n).to_event(n)
    # LogNormal has transforms of its base distribution
    if isinstance(fn, torch.distributions.TransformedDistribution) and not fn.arg_constraints:
        base = rebuilt(fn.base_dist, shift, batch_shape, event_dim)
        return dist.TransformedDistribution(base, fn.transforms)
    return rebuilt_leaf(fn, shift, batch_shape, event_dim)


class Moved(dist.TorchDistribution):
    """loc + scale * draw, for a distribution that cannot be rebuilt from parameters: a family that contains it."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, fn: Any, loc: Tensor, log_scale: Tensor) -> None:
        self.fn, self.loc, self.log_scale = fn, loc, log_scale
        self.has_rsample = fn.has_rsample
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        draws: Tensor = self.loc + self.log_scale.exp() * self.fn(sample_shape)
        return draws

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self.fn.log_prob((value - self.loc) / self.log_scale.exp())
        event_dim = len(self.event_shape)
        log_scale = self.log_scale.expand(self.batch_shape + self.event_shape)
        return log_prob - (log_scale.flatten(-event_dim).sum(-1) if event_dim else log_scale)


def moved_leaf(fn: Any, shift: Shift, batch_shape: torch.Size, event_dim: int) -> Moved:
    own_event, shape = len(fn.event_shape), batch_shape + fn.event_shape
    with kept_random_state(), torch.no_grad():
        draws = fn(torch.Size([UNIT_DRAWS]))
    zeros = draws.new_zeros(shape)
    spread = draws.std(0).expand(shape)
    return Moved(
        fn if fn.batch_shape == batch_shape else fn.expand(batch_shape),
        shift("shift", zeros, event_dim + own_event, spread),
        shift("log_scale", zeros, event_dim + own_event, None),
    )


def rebuilt_leaf(fn: Any, shift: Shift, batch_shape: torch.Size, event_dim: int) -> Any:
    if support_of(fn) is None:  # a flow of another library
        return moved_leaf(fn, shift, batch_shape, event_dim)
    if bounds_of(fn.support):
        raise LocalFitError(
            f"the support of {type(fn).__name__} moves with its parameters: use another family in the guide, or "
            "ImportanceSampling, which needs no fit"
        )
    parameters = {}
    for name, constraint in fn.arg_constraints.items():
        if name in REDUNDANT:
            continue
        value = getattr(fn, name)
        if constraint.is_discrete:
            parameters[name] = value
            continue
        own_event = value.ndim - len(fn.batch_shape)
        value = value.expand(batch_shape + value.shape[len(fn.batch_shape) :])
        transform = transform_to(constraint)
        parameters[name] = transform(shift(name, transform.inv(value), event_dim + own_event, unit_of(fn, name, value)))
    if isinstance(getattr(fn, "temperature", None), Tensor) and "temperature" not in fn.arg_constraints:
        # the temperature of a relaxed distribution: part of the family, not moved
        parameters["temperature"] = fn.temperature
    try:
        return type(fn)(**parameters)
    except (TypeError, NotImplementedError) as error:
        raise LocalFitError(
            f"{type(fn).__name__} cannot be rebuilt from its parameters {sorted(parameters)}: use another family in the "
            "guide, or ImportanceSampling, which needs no fit"
        ) from error


def unit_of(fn: Any, name: str, value: Tensor) -> Tensor | None:
    """The unit of a location: the scale of a distribution on the real line, or of the normal in a LogNormal."""
    if name != "loc" or not (isinstance(fn, dist.LogNormal) or bijection(fn.support) == identity_transform):
        return None
    unit = fn.scale if hasattr(fn, "scale") else fn.stddev
    return unit.expand(value.shape)
