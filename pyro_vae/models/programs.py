"""The Pyro programs of the VAEs, as modules that hold their networks."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from .checks import batch_shape_of, check_data, check_rows, checked_network, distribution, num_rows
from .parameters import Program, announce
from .seen import seen_part, zeros_and_mask


class Model(Program):
    """z ~ prior() and x ~ decoder(z) for every row of x: sites "latent" and "obs" in the plate "data"."""

    def __init__(self, decoder: nn.Module, prior: nn.Module) -> None:
        super().__init__("model")
        self.decoder = checked_network("decoder", decoder)
        self.prior = checked_network("prior", prior)

    def forward(self, x: Tensor) -> None:
        announce(self)
        sample_data(x, self.prior(), self.decoder)


class Guide(Program):
    """z ~ encoder(x) for every row of x: site "latent" in the plate "data"."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__("guide")
        self.encoder = checked_network("encoder", encoder)

    def forward(self, x: Tensor) -> None:
        announce(self)
        sample_latent(x, self.encoder)


class MissingDataModel(Model):
    """z ~ prior() and x ~ decoder(z) for every row of x, observed where x is not NaN."""

    def forward(self, x: Tensor) -> None:
        announce(self)
        sample_data(x, self.prior(), self.decoder, holes=True)


class MissingDataGuide(Guide):
    """z ~ encoder(x with zeros for missing values, and the mask) for every row of x."""

    def forward(self, x: Tensor) -> None:
        announce(self)
        sample_latent(x, lambda x: self.encoder(zeros_and_mask(x)))


class ConditionalModel(Program):
    """z ~ prior(y) and x ~ decoder(z, y) for every row of x: sites "latent" and "obs" in the plate "data"."""

    def __init__(self, decoder: nn.Module, prior: nn.Module) -> None:
        super().__init__("model")
        self.decoder = checked_network("decoder", decoder)
        self.prior = checked_network("prior", prior)

    def forward(self, x: Tensor, y: Tensor) -> None:
        announce(self)
        sample_data(x, prior_given(self.prior, y), lambda z: self.decoder(z, y))


class ConditionalGuide(Program):
    """z ~ encoder(x, y) for every row of x: site "latent" in the plate "data"."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__("guide")
        self.encoder = checked_network("encoder", encoder)

    def forward(self, x: Tensor, y: Tensor) -> None:
        announce(self)
        sample_latent(x, lambda x: self.encoder(x, y))


def sample_data(x: Tensor, prior: Any, decoder: Callable[[Tensor], Any], *, holes: bool = False) -> None:
    size = num_rows(x)
    with pyro.plate("data", size):
        z, rows = sample_rows("latent", "prior", prior, (), (size,))
        observe(x, decoder(z), rows, holes=holes)


def sample_latent(x: Tensor, encoder: Callable[[Tensor], Any]) -> None:
    size = num_rows(x)
    posterior = encoder(x)
    with pyro.plate("data", size):
        sample_rows("latent", "encoder", posterior, (size,))


def sample_rows(
    name: str, role: str, fn: Any, *batch_shapes: tuple[int, ...], drawn_by: str = "encoder"
) -> tuple[Tensor, torch.Size]:
    """Sample a latent from the distribution that a network returned; returns its value and its batch shape.

    :param drawn_by: the network of the guide that may have drawn the value.
    """
    fn = distribution(role, fn)
    check_rows(fn, role, *batch_shapes)
    z = pyro.sample(name, fn)
    return z, batch_shape_of(z, fn, role, drawn_by)


def observe(x: Tensor, likelihood: Any, rows: tuple[int, ...], *, holes: bool = False) -> None:
    """:param holes: whether NaN in x are missing values."""
    likelihood = distribution("decoder", likelihood)
    check_rows(likelihood, "decoder", rows)
    check_data(x, likelihood, 1)
    pyro.sample("obs", seen_part(likelihood, ~x.isnan()) if holes else likelihood, obs=x)


def prior_given(prior: nn.Module, y: Tensor) -> TorchDistribution:
    return distribution("prior", prior(y) if takes_an_argument(type(prior).forward) else prior())


@cache
def takes_an_argument(forward: Callable) -> bool:
    return len(inspect.signature(forward).parameters) > 1  # the first parameter is self
