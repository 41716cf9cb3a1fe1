"""Densities that check the shape of their data, and the support while Pyro's argument checks are on."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.utils import broadcast_all
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import SupportError, described


@dataclass(frozen=True)
class Accepts:
    """The data that a head accepts: the support of a single number, the support in words, and a remedy for other data."""

    head: str
    support: Constraint
    words: str
    remedy: str


def finite_numbers(head: str) -> Accepts:
    remedy = (
        "correct or drop those rows, or fill in a finite number and mask them (poutine.mask). Latents are NaN where a "
        "network has diverged: lower the learning rate or standardise its input"
    )
    return Accepts(head, constraints.real, "finite numbers", remedy)


class CheckedIndependent(dist.Independent):
    """`Independent` whose `log_prob` raises for data without a density.

    The parameters come from our transforms and need no check, so the base is built with `validate_args=False`. The data are
    checked once, here. `kl_divergence` and the kernel treat it as an `Independent`.
    """

    accepts: Accepts

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CheckedIndependent":
        if _instance is None and torch.Size(batch_shape) == self.batch_shape:
            return self  # plates expand everything in them; expanding every parameter would only cost time
        new = super().expand(batch_shape, _instance)
        new.accepts = self.accepts
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        self.check(value)
        try:
            return self.summed(value)
        except RuntimeError as error:
            raise_if_apart(self, value, error)
            raise

    def check(self, value: Tensor) -> None:
        """Raise `SupportError` on data without a density."""
        check_value(value, self.event_shape, self.accepts)

    def summed(self, value: Tensor) -> Tensor:
        """The density of an event that has been checked."""
        return self.base_dist.log_prob(value).flatten(-self.reinterpreted_batch_ndims).sum(-1)


class CheckedBits(CheckedIndependent):
    """For a Bernoulli: the sign is changed after the sum over an event, which saves two passes over the data."""

    def summed(self, value: Tensor) -> Tensor:
        logits, value = broadcast_all(self.base_dist.logits, value)
        cost = binary_cross_entropy_with_logits(logits, value, reduction="none")
        return -cost.flatten(-self.reinterpreted_batch_ndims).sum(-1)


def raise_if_apart(fn: CheckedIndependent, value: Tensor, error: RuntimeError) -> None:
    """Raise if rows or device of the data are not those of the distribution, with torch's message."""
    bases = getattr(fn.base_dist, "fns", [fn.base_dist])  # names the columns of a table
    places = {part.device for base in bases for part in vars(base).values() if isinstance(part, Tensor)}
    batch_shape = value.shape[: value.ndim - len(fn.event_shape)]
    pairs = zip(reversed(batch_shape), reversed(fn.batch_shape), strict=False)
    if value.device in places and all(1 in pair or len(set(pair)) == 1 for pair in pairs):
        return
    raise SupportError(
        f"the {fn.accepts.head} head gave a distribution with batch shape {tuple(fn.batch_shape)} on "
        f"{', '.join(map(str, places))}, but the data are {described(value)} on {value.device} ({error}): give both the "
        "same rows, on one device"
    ) from error


def checked(base: Any, event_dim: int, accepts: Accepts) -> CheckedIndependent:
    """`base` with its rightmost `event_dim` batch dimensions as one event whose data are checked."""
    kind = CheckedBits if type(base) is dist.Bernoulli else CheckedIndependent
    fn = kind(base, event_dim)
    fn.accepts = accepts
    return fn


def check_value(value: Tensor, event_shape: torch.Size, accepts: Accepts) -> None:
    """Raise `SupportError` on data without a density."""
    check_shape(value, event_shape, accepts)
    check_support(value, len(event_shape), accepts)


def check_shape(value: Tensor, event_shape: torch.Size, accepts: Accepts) -> None:
    if not isinstance(value, Tensor) or value.is_complex():
        raise SupportError(
            f"the {accepts.head} head takes a tensor of {accepts.words}, got {described(value)}: pass torch.as_tensor(x)"
        )
    found = value.shape[max(value.ndim - len(event_shape), 0) :]
    if found != event_shape:  # costs nothing; a silent broadcast would give a wrong number
        raise SupportError(
            f"the {accepts.head} head gives events of shape {tuple(event_shape)}, but the data have shape "
            f"{tuple(value.shape)}: their last {len(event_shape)} dimensions must be the same. Reshape the data, or "
            "give the network's last layer head.num_outputs(event size) outputs"
        )


def check_support(value: Tensor, event_dim: int, accepts: Accepts) -> None:
    """By default, the support is checked if Pyro's validation is on at this moment."""
    checked_now = torch.distributions.Distribution._validate_args and not value.is_meta
    if checked_now and not all_inside(value.detach(), accepts.support):
        raise SupportError(describe(value.detach(), event_dim, accepts))


def all_inside(value: Tensor, support: Constraint) -> bool:
    """Whether every number is in the support: the fastest test that also fails for NaN."""
    if not value.numel():
        return True
    if isinstance(support, type(constraints.real)):
        # A sum with NaN or infinity is not finite; finite numbers whose sum overflows are then tested one by one.
        return bool(value.sum().isfinite()) or bool(value.isfinite().all())
    if isinstance(support, (type(constraints.boolean), constraints.integer_interval)):
        value = value.byte() if value.dtype == torch.bool else value
        return not value.round().clamp_(*bounds(support)).sub_(value).count_nonzero()  # twice as fast as torch.equal
    if isinstance(support, constraints.interval):
        (low, high), (smallest, largest) = bounds(support), value.aminmax()
        return bool((smallest >= low) & (largest <= high))
    return bool((support.check(value) & value.isfinite()).all())  # torch counts infinity as a positive number


def bounds(support: Any) -> tuple[float, float]:
    return (0, 1) if isinstance(support, type(constraints.boolean)) else (support.lower_bound, support.upper_bound)


def describe(value: Tensor, event_dim: int, accepts: Accepts) -> str:
    value = value.byte() if value.dtype == torch.bool else value
    inside = accepts.support.check(value) & value.isfinite()
    where = ""
    if value.ndim > event_dim:
        rows = (~inside).flatten(-event_dim).any(-1).nonzero().squeeze(-1).tolist()
        where = f" in rows {rows[:10]}{f' and {len(rows) - 10} more' if len(rows) > 10 else ''}"
    numbers = value[value.isfinite()]
    span = f"finite ones from {float(numbers.min()):g} to {float(numbers.max()):g}" if numbers.numel() else "none finite"
    return (
        f"the {accepts.head} head takes {accepts.words}, but {int((~inside).sum())} of {value.numel()} values are not"
        f"{where} ({span}), so they have no density: {accepts.remedy}"
    )
