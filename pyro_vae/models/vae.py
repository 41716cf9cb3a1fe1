"""The variational autoencoder: model and guide from an encoder, a decoder and a prior."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..errors import ArgumentError, StructureError
from ..options import amount
from .checks import applied, checked_network, drawn, num_rows
from .programs import Guide, Model


class Part:
    """A network of the model or the guide of a pair, which can be read and replaced at the pair."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def __set_name__(self, pair: type, name: str) -> None:
        self.name = name

    def __get__(self, pair: Any, kind: type | None = None) -> Any:
        return self if pair is None else getattr(getattr(pair, self.owner), self.name)


class Pair(nn.Module):
    """A `model` and a `guide`, which contain the networks, so that each tensor is registered once."""

    def __setattr__(self, name: str, value: Any) -> None:
        part = getattr(type(self), name, None)
        if isinstance(part, Part):  # nn.Module would register a second network under the same name
            setattr(getattr(self, part.owner), name, checked_network(name, value))
        else:
            super().__setattr__(name, value)


class Networks(Pair):
    """Base class of the VAEs: `model` contains the decoder and the prior, `guide` the encoder."""

    encoder, decoder, prior = Part("guide"), Part("model"), Part("model")


class VAE(Networks):
    r"""Variational autoencoder: p(z) = prior, p(x given z) = decoder(z), q(z given x) = encoder(x)::

        log p(x) >= E_q log p(x given z) - KL(q(z given x) to p(z))

    Kingma and Welling (2014, https://arxiv.org/abs/1312.6114). B data of shape X, latents of shape D.

    :param encoder: module that maps x, (B, X), to a distribution with batch shape (B,) and event shape (D,).
    :param decoder: module that maps z, (..., D), to a distribution with batch shape (...) and event shape X, for any leading
        dimensions: particles are left of the data.
    :param prior: module that returns a distribution with event shape (D,) when called, such as
        `pyro_vae.nn.StandardNormal`.
    :raises OptionError: for a network that is not a module, or one that contains a `PyroModule`.

    Call `vae.model` and `vae.guide` with x. They sample "latent" and observe "obs" in the plate "data" of B rows, as in
    Pyro's VAE tutorial. There is no N/B scale: a loss is that of the batch. Both are modules, so both ways to train in Pyro
    work, `SVI(vae.model, vae.guide, optim, loss)` and `loss(vae.model, vae.guide)` with `torch.optim`. Each instance, and
    each copy, has different names in Pyro's parameter store and trains separately. Save and load parameters with
    `state_dict()`, not with the store.

    The networks are at `vae.encoder`, `vae.decoder` and `vae.prior`, and may be replaced there.

    When called, model and guide raise `StructureError` where a network does not return one distribution per row,
    `ArgumentError` where x does not have the shape of the likelihood, and `EmptyBatchError` for no rows.

    Example::

        vae = pv.VAE(
            encoder=nn.Sequential(nn.Linear(64, 16), pv.nn.Normal()),
            decoder=nn.Sequential(nn.Linear(8, 64), pv.nn.Binomial(16)),
            prior=pv.nn.StandardNormal(8),
        )
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        svi.step(x)
        gaps = pv.InferenceGaps(vae.model, vae.guide, seed=0)(x)
    """

    programs: ClassVar[tuple[type[Model], type[Guide]]] = Model, Guide

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: nn.Module) -> None:
        super().__init__()
        model, guide = self.programs
        self.model = model(decoder, prior)
        self.guide = guide(encoder)

    def encode(self, x: Tensor) -> TorchDistribution:
        """q(z given x): a distribution with batch shape (B,) and event shape (D,)."""
        return applied("encoder", self.encoder, x)

    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x given z) for z of shape (..., D): a distribution with batch shape (...) and event shape X."""
        return applied("decoder", self.decoder, z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of the likelihood at one draw of q(z given x) per row: (B, X) to (B, X).

        It decodes one draw, as do `pyro_vae.reconstruct` and Pyro's tutorial: a draw exists for every guide, and the
        reconstruction term of the ELBO uses draws. To decode the posterior mean, use `vae.decode(vae.encode(x).mean).mean`.
        Draws from the caller's random state. The networks run in eval mode and without gradients; their modes are restored.

        :raises StructureError: for a likelihood without a mean, such as a categorical one.
        """
        with evaluating(self):
            return mean_of(self.decode(drawn("encoder", self.encode(x))))

    def generate(self, n: int) -> Tensor:
        """Draw n data from the model, z from the prior and x from the likelihood: (n, X).

        The data have the noise of the likelihood. For means without noise, use `vae.decode(vae.prior().sample((n,))).mean`.
        Draws from the caller's random state. The networks run in eval mode and without gradients; their modes are restored.

        :raises OptionError: for n below 1.
        """
        n = amount("n", n)
        with evaluating(self):
            return drawn("decoder", self.decode(drawn("prior", self.prior(), n)))

    def interpolate(self, x0: Tensor, x1: Tensor, num_steps: int = 9) -> Tensor:
        """The means of the likelihood along the line from the posterior mean of x0 to that of x1, (S, B, X).

        x0 and x1 are (B, X). Row b goes from x0[b] to x1[b] in S = `num_steps` steps, including both ends. The line is
        straight: a great circle, as is often used between draws of a standard normal prior, is for points of one length, and
        posterior means differ in length. The networks run in eval mode and without gradients; their modes are restored. To
        change one unit at a time, use `pyro_vae.traverse`.

        :raises OptionError: for fewer than two steps.
        :raises ArgumentError: for x0 and x1 of different shapes.
        :raises StructureError: where q(z given x) or the likelihood has no mean, such as a flow.
        """
        steps = torch.linspace(0.0, 1.0, amount("num_steps", num_steps, lowest=2))
        if num_rows(x0) != num_rows(x1) or x0.shape != x1.shape:
            raise ArgumentError(
                f"x0 and x1 must have the same shape, the two ends of each row, got {tuple(x0.shape)} and "
                f"{tuple(x1.shape)}: expand one datum to all rows by x.expand(len(other), *x.shape[1:])"
            )
        with evaluating(self):
            z0, z1 = (posterior_mean(self.encode(x)) for x in (x0, x1))
            steps = steps.to(z0).reshape(-1, *[1] * z0.ndim)
            return mean_of(self.decode((1 - steps) * z0 + steps * z1))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No gradients and eval mode, in which running statistics do not change; the mode of every module is restored."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training


def mean_of(likelihood: Any) -> Tensor:
    """The mean, (B, X)."""
    mean = known_mean(likelihood)
    if mean is None:
        raise StructureError(
            f"the likelihood, {name_of(likelihood)}, has no mean to reconstruct x with: draw from it, "
            "vae.decode(vae.encode(x).sample()).sample()"
        )
    return mean


def posterior_mean(posterior: Any) -> Tensor:
    mean = known_mean(posterior)
    if mean is None:
        raise StructureError(
            f"q(z given x), {name_of(posterior)}, has no formula for its mean: interpolate between two draws, "
            "vae.decode(torch.lerp(vae.encode(x0).sample(), vae.encode(x1).sample(), 0.5)).mean"
        )
    return mean


def known_mean(fn: Any) -> Tensor | None:
    """The mean, or `None` where a distribution has none; some distributions of torch return NaN then."""
    try:
        mean: Tensor = fn.mean
    except NotImplementedError:
        return None
    return None if bool(mean.isnan().all()) else mean


def name_of(fn: Any) -> str:
    return type(getattr(fn, "base_dist", fn)).__name__
