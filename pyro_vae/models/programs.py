"""The Pyro programs of the VAEs, as modules that hold their networks."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..errors import ArgumentError
from .checks import batch_shape_of, check_rows, checked_network, distribution, num_rows
from .parameters import Program, announce


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


def sample_data(x: Tensor, prior: Any, decoder: Callable[[Tensor], Any]) -> None:
    size = num_rows(x)
    check_rows(distribution("prior", prior), "prior", (), (size,))
    with pyro.plate("data", size):
        z = pyro.sample("latent", prior)
        batch_shape = batch_shape_of(z, prior)
        likelihood = distribution("decoder", decoder(z))
        check_rows(likelihood, "decoder", batch_shape)
        check_event_shape(likelihood, x)
        pyro.sample("obs", likelihood, obs=x)


def sample_latent(x: Tensor, encoder: Callable[[Tensor], Any]) -> None:
    size = num_rows(x)
    posterior = distribution("encoder", encoder(x))
    check_rows(posterior, "encoder", (size,))
    with pyro.plate("data", size):
        pyro.sample("latent", posterior)


def check_event_shape(likelihood: TorchDistribution, x: Tensor) -> None:
    if likelihood.event_shape != x.shape[1:]:
        raise ArgumentError(
            f"the rows of x must have the event shape of the decoder's likelihood, {tuple(likelihood.event_shape)}, got "
            f"{tuple(x.shape[1:])}: reshape x, or build the decoder for data of that shape"
        )


def prior_given(prior: nn.Module, y: Tensor) -> TorchDistribution:
    return distribution("prior", prior(y) if takes_an_argument(type(prior).forward) else prior())


@cache
def takes_an_argument(forward: Callable) -> bool:
    return len(inspect.signature(forward).parameters) > 1  # the first is self
