"""The conditional VAE: model and guide given another variable y."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..errors import ArgumentError, OptionError, described
from ..nn import Head
from .checks import applied, drawn, num_rows
from .programs import ConditionalGuide, ConditionalModel, prior_given
from .vae import Networks, evaluating, mean_of


class ConditionalVAE(Networks):
    r"""Conditional VAE: p(z given y) = prior, p(x given z, y) = decoder(z, y), q(z given x, y) = encoder(x, y)::

        log p(x given y) >= E_q log p(x given z, y) - KL(q(z given x, y) to p(z given y))

    Sohn, Lee and Yan (2015, https://papers.nips.cc/paper/5775). B data of shape X, latents of shape D, conditions of shape
    C. y is given, not modelled: it has no density, and it cannot be missing.

    :param encoder: module that maps x, (B, X), and y, (B, C), to a distribution with batch shape (B,) and event shape (D,).
    :param decoder: module that maps z, (..., B, D), and y, (B, C), to a distribution with batch shape (..., B) and event
        shape X; particles are left of the data, so y must be broadcast, as in `Concatenated`.
    :param prior: module that returns a distribution with event shape (D,). If its `forward` takes an argument, it is called
        with y (a network and a head). If it takes none (`pyro_vae.nn.StandardNormal`), the prior does not depend on y.
    :raises OptionError: for a network that is not a module, or one that contains a `PyroModule`.

    Call `vae.model` and `vae.guide`, and estimators built with them, with (x, y). Everything else is as in `VAE`.

    Example::

        vae = pv.ConditionalVAE(
            encoder=pv.models.Concatenated(nn.Sequential(nn.Linear(64 + 10, 16), pv.nn.Normal())),
            decoder=pv.models.Concatenated(nn.Sequential(nn.Linear(8 + 10, 64), pv.nn.Binomial(16))),
            prior=pv.nn.StandardNormal(8),
        )
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        svi.step(x, y)      # y: one-hot labels, (B, 10)
        result = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), loader, args=lambda batch: (batch[0], batch[1]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: nn.Module) -> None:
        super().__init__()
        self.model = ConditionalModel(decoder, prior)
        self.guide = ConditionalGuide(encoder)

    def encode(self, x: Tensor, y: Tensor) -> TorchDistribution:
        """q(z given x, y): a distribution with batch shape (B,) and event shape (D,)."""
        return applied("encoder", self.encoder, x, y)

    def decode(self, z: Tensor, y: Tensor) -> TorchDistribution:
        """p(x given z, y) for z of shape (..., B, D): a distribution with batch shape (..., B) and event shape X."""
        return applied("decoder", self.decoder, z, y)

    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of the likelihood at one draw of q(z given x, y) per row: (B, X) to (B, X); as `VAE.reconstruct`."""
        with evaluating(self):
            return mean_of(self.decode(drawn("encoder", self.encode(x, y)), y))

    def generate(self, y: Tensor) -> Tensor:
        """Draw one datum for each row of y, (B, C): (B, X); otherwise as `VAE.generate`."""
        with evaluating(self):
            prior = prior_given(self.prior, y).expand(torch.Size((num_rows(y),)))
            return drawn("decoder", self.decode(drawn("prior", prior), y))


class Concatenated(nn.Module):
    """A network of several inputs: `network(cat(inputs))`, joined along the last dimension.

    Leading dimensions are broadcast: with z of K particles, (K, B, D), and y, (B, C), the input of the network is (K, B, D +
    C).

    :param network: module with one input, whose width is the sum of the widths of all inputs.
    :param first: module that is applied to the first input before it is joined, such as a head's `input_layer()`.
    :raises ArgumentError: when called, for inputs whose rows do not correspond.

    Example::

        decoder = pv.models.Concatenated(nn.Sequential(nn.Linear(8 + 10, 64), pv.nn.Binomial(16)))
        decoder(torch.randn(5, 100, 8), torch.zeros(100, 10)).batch_shape    # (5, 100)
    """

    def __init__(self, network: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.first = nn.Identity() if first is None else first

    def forward(self, *inputs: Tensor) -> Any:
        if strange := [one for one in inputs if not isinstance(one, Tensor) or not one.ndim]:
            raise ArgumentError(f"inputs that are joined must be tensors (..., B, width), got {described(strange[0])}")
        inputs = (self.first(inputs[0]), *inputs[1:])
        rows = [tensor.shape[:-1] for tensor in inputs]
        try:
            leading = torch.broadcast_shapes(*rows)
        except RuntimeError:
            leading = None
        # labels (B,) would be taken for one condition of size B for all rows
        if leading is None or not all(rows) and any(rows):
            raise ArgumentError(
                "inputs that are joined must have a row for each datum, (..., B, width), got shapes "
                f"{shapes_of(inputs)}: pass one condition per datum, labels as one-hot"
            )
        return self.network(torch.cat([tensor.expand(*leading, -1) for tensor in inputs], -1))


class WithSizeFactor(nn.Module):
    """A decoder of counts with size factors: `head(network(z), size_factor)`, called with z and y.

    The first column of y, (B, 1 + C), is the size factor of the datum, which multiplies the mean. It may be the datum's
    total count divided by the mean total count, or an exposure time. The other C columns are conditions, such as a one-hot
    batch, which are joined to z as by `Concatenated`. The factor is given, not modelled.

    :param network: module of z and the conditions, (..., D + C), to the raw numbers of the head.
    :param head: a head of counts of `pyro_vae.nn`, called with raw numbers and a size factor.
    :raises OptionError: for a head without a size factor.
    :raises ArgumentError: when called, for y without a column, or factors that are not positive.

    Example::

        likelihood = pv.nn.NegativeBinomial("learned", theta_shape=(64,))
        vae = pv.ConditionalVAE(
            encoder=pv.models.Concatenated(nn.Sequential(nn.Linear(64 + 1, 16), pv.nn.Normal()), likelihood.input_layer()),
            decoder=pv.models.WithSizeFactor(nn.Linear(8, likelihood.num_outputs(64)), likelihood),
            prior=pv.nn.StandardNormal(8),
        )
        counts = torch.poisson(torch.full((100, 64), 3.0))
        total = counts.sum(-1, keepdim=True)
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(counts, total / total.mean())
    """

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        if not isinstance(head, Head) or "size_factor" not in inspect.signature(head.forward).parameters:
            raise OptionError(
                f"head must be a head of counts, whose forward takes a size_factor, got {type(head).__name__}: pass "
                "pv.nn.Poisson(), pv.nn.NegativeBinomial() or one of their zero-inflated variants"
            )
        self.network, self.head = Concatenated(network), head

    def forward(self, z: Tensor, y: Tensor) -> Any:
        if not isinstance(y, Tensor) or y.ndim < 2 or not y.shape[-1]:
            raise ArgumentError(
                f"y must have a row for each datum whose first column is its size factor, (B, 1 + C), got {described(y)}: "
                "pass size_factor.unsqueeze(-1)"
            )
        size_factor, conditions = y[..., 0].reshape(*y.shape[:-1], *[1] * self.head.event_dim), y[..., 1:]
        return self.head(self.network(z, conditions) if conditions.shape[-1] else self.network(z), size_factor)


def shapes_of(tensors: Iterable[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
