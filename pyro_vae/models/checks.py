"""Checks of the networks of a VAE and of their outputs."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..errors import ArgumentError, EmptyBatchError, NonFiniteError, OptionError, ProgramError, StructureError, described


def checked_network(role: str, network: Any, gives: str = "a distribution") -> nn.Module:
    """Check that a network is an nn.Module without a PyroModule inside, so that its parameters are trained."""
    if not isinstance(network, nn.Module):
        remedy = "pass pv.nn.StandardNormal(latent_dim)" if role == "prior" else "pass an nn.Module"
        raise OptionError(
            f"the {role} must be an nn.Module that returns {gives}, so that it follows .to() and is saved with the "
            f"rest, got {type(network).__name__}: {remedy}"
        )
    if any(isinstance(module, PyroModule) for module in network.modules()):
        raise OptionError(
            f"the {role} contains a PyroModule. Pyro stores its parameters under names that are the same for all its "
            "instances, so with two VAEs only the first would be trained: build the network from plain nn.Modules"
        )
    return network


def applied(role: str, network: Callable, *inputs: Any) -> TorchDistribution:
    """The distribution that a network returns."""
    return distribution(role, called(role, network, *inputs))


def called(role: str, network: Callable, *inputs: Any) -> Any:
    """The output of a network; an error of torch inside it is raised with the name of the network and its inputs."""
    try:
        return network(*inputs)
    except Exception as error:
        if type(error) not in (AttributeError, IndexError, RuntimeError, TypeError):
            raise
        raise ProgramError(
            f"the {role} fails on {', '.join(map(described, inputs))}: {type(error).__name__}: {error}. Pass tensors of the "
            "shape, dtype and device that it was built for"
        ) from error


def drawn(role: str, fn: TorchDistribution, *shape: int) -> Tensor:
    """A draw; torch's error for a draw from NaN is raised with the name of the network."""
    try:
        return fn.sample(shape)
    except (RuntimeError, ValueError) as error:
        raise NonFiniteError(
            f"cannot draw from the distribution of the {role} ({error}): look for NaN or infinite values in the inputs "
            "and in the parameters"
        ) from error


def num_rows(x: Any) -> int:
    if not isinstance(x, Tensor) or x.dim() == 0:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"x must be a tensor of data, one per row, (B, ...), got {shape}")
    if len(x) == 0:
        raise EmptyBatchError("x must have at least one row, got none: skip empty batches")
    return len(x)


def distribution(role: str, fn: Any) -> TorchDistribution:
    if not isinstance(fn, TorchDistributionMixin):
        raise StructureError(
            f"the {role} must return a distribution of pyro.distributions, got {type(fn).__name__}: end it with a head, "
            "nn.Sequential(network, pv.nn.Normal())"
        )
    return fn


def check_rows(fn: TorchDistribution, role: str, *batch_shapes: tuple[int, ...]) -> None:
    """Raise for a distribution that does not have one independent event per row."""
    if fn.batch_shape not in batch_shapes:
        expected = " or ".join(str(tuple(shape)) for shape in batch_shapes)
        raise StructureError(
            f"the {role} must return one distribution per row, batch shape {expected}, got batch shape "
            f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}: declare the dimensions of a row as one "
            "event with .to_event(), and keep the leading dimensions of the input"
        )


def batch_shape_of(z: Tensor, fn: TorchDistribution, role: str = "prior", drawn_by: str = "encoder") -> torch.Size:
    """The batch shape of latents that came from the guide, after a check that they have the event shape of the model's."""
    cut = z.dim() - len(fn.event_shape)
    if z.shape[cut:] != fn.event_shape:
        raise StructureError(
            f"latents of {drawn_by} and {role} must have the same event shape, got {tuple(z.shape)} for all rows from the "
            f"{drawn_by} and {tuple(fn.event_shape)} for one from the {role}: give both the same number of dimensions"
        )
    return z.shape[:cut]


def check_data(x: Tensor, likelihood: TorchDistribution, num_dims: int) -> None:
    """Raise for data whose shape after the first `num_dims` dimensions is not the event shape of the likelihood."""
    if likelihood.event_shape != x.shape[num_dims:]:
        kind = "rows" if num_dims == 1 else "steps"
        raise ArgumentError(
            f"the {kind} of x must have the event shape of the decoder's likelihood, {tuple(likelihood.event_shape)}, got "
            f"{tuple(x.shape[num_dims:])}: reshape x, or build the decoder for data of that shape"
        )
