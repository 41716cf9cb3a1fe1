"""The Pyro programs of the hierarchical VAE: the model, the guide from the data up, and the ladder guide."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..errors import OptionError, described
from .checks import checked_network, num_rows
from .parameters import Program, announce
from .programs import observe, sample_rows

Sample = Callable[..., tuple[Tensor, torch.Size]]


class HierarchicalModel(Program):
    """z_L ~ prior(), z_l ~ layers[l - 1](z_{l+1}), x ~ decoder(z_1): sites "latent_L", ..., "latent_1" and "obs"."""

    def __init__(self, prior: nn.Module, layers: Sequence[nn.Module] | nn.ModuleList, decoder: nn.Module) -> None:
        super().__init__("model")
        self.prior = checked_network("prior", prior)
        self.layers = checked_networks("layers", layers)
        self.decoder = checked_network("decoder", decoder)

    def forward(self, x: Tensor) -> None:
        announce(self)
        size, top = num_rows(x), len(self.layers) + 1
        with pyro.plate("data", size):
            z, rows = sample_rows(f"latent_{top}", "prior", self.prior(), (), (size,), drawn_by=f"encoders[{top - 1}]")
            for below in reversed(range(len(self.layers))):
                fn = self.layers[below](z)
                z, rows = sample_rows(f"latent_{below + 1}", f"layers[{below}]", fn, rows, drawn_by=f"encoders[{below}]")
            observe(x, self.decoder(z), rows)


class BottomUpGuide(Program):
    """z_1 ~ encoders[0](x), z_l ~ encoders[l - 1](z_{l-1})."""

    def __init__(self, encoders: Sequence[nn.Module] | nn.ModuleList) -> None:
        super().__init__("guide")
        self.encoders = checked_networks("encoders", encoders)

    def forward(self, x: Tensor) -> None:
        announce(self)
        with pyro.plate("data", num_rows(x)):
            self.latents(x, sample_rows)

    def latents(self, x: Tensor, sample: Sample) -> Tensor:
        """Sample all layers; returns z_1."""
        path, rows = [x], x.shape[:1]
        for layer, encoder in enumerate(self.encoders):
            z, rows = sample(f"latent_{layer + 1}", f"encoders[{layer}]", encoder(path[-1]), rows)
            path.append(z)
        return path[1]


class LadderGuide(Program):
    """h_l = features[l - 1](h_{l-1}) with h_0 = x; z_L ~ encoders[L - 1](h_L), z_l ~ encoders[l - 1](z_{l+1}, h_l)."""

    def __init__(self, encoders: Sequence[nn.Module] | nn.ModuleList, features: Sequence[nn.Module] | nn.ModuleList) -> None:
        super().__init__("guide")
        self.encoders = checked_networks("encoders", encoders)
        self.features = checked_networks("features", features)
        check_number("features", self.features, len(self.encoders))

    def forward(self, x: Tensor) -> None:
        announce(self)
        with pyro.plate("data", num_rows(x)):
            self.latents(x, sample_rows)

    def latents(self, x: Tensor, sample: Sample) -> Tensor:
        """Sample all layers; returns z_1."""
        seen = [x]
        for network in self.features:
            seen.append(network(seen[-1]))
        rows: Any = x.shape[:1]
        inputs: tuple[Tensor, ...] = (seen.pop(),)
        for layer in reversed(range(len(self.encoders))):
            z, rows = sample(f"latent_{layer + 1}", f"encoders[{layer}]", self.encoders[layer](*inputs), rows)
            inputs = (z, seen.pop())
        return z


def checked_networks(role: str, networks: Sequence[nn.Module] | nn.ModuleList) -> nn.ModuleList:
    if not isinstance(networks, (list, tuple, nn.ModuleList)):  # a Sequential is one network, although it contains several
        raise OptionError(f"{role} must be a list of modules, one per layer from the data up, got {described(networks)}")
    return nn.ModuleList(checked_network(f"{role}[{n}]", network) for n, network in enumerate(networks))


def check_number(role: str, networks: nn.ModuleList, number: int) -> None:
    if len(networks) != number:
        raise OptionError(
            f"{role} must have one module per layer of latents, {number} here, got {len(networks)}: for L layers of "
            "latents pass L encoders and L - 1 layers, since the top layer has the prior"
        )
