"""Functions that build a VAE in one line, with networks and a prior that fit the data."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import OptionError
from ..nn import MLP, BesideMask, ConvNet, DeconvNet, Head, Normal, StandardNormal
from ..nn.bodies import widths_of
from ..options import amount
from .conditional import Concatenated, ConditionalVAE
from .missing import MissingDataVAE
from .vae import VAE

Activation = Callable[[], nn.Module]


def mlp_vae(
    data_dim: int,
    latent_dim: int,
    *,
    likelihood: Head,
    posterior: Head | None = None,
    hidden: Sequence[int] = (400,),
    activation: Activation = nn.ReLU,
) -> VAE:
    """Build a `VAE` for vectors from multilayer perceptrons: x (B, X), latents (B, D), standard normal prior.

    :param data_dim: X.
    :param latent_dim: D.
    :param likelihood: head of the decoder, from `pyro_vae.nn`. Its `input_layer()` is applied to x before the encoder. It is
        copied, so one head can be passed to several VAEs.
    :param posterior: head of the encoder; `Normal()`, a diagonal Gaussian, unless given.
    :param hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
    :param activation: function that returns the activation module between the layers.
    :returns: a `VAE`, untrained and in train mode.
    :raises OptionError: for a dimension or a width below 1, or a likelihood that is not a head for vectors.

    Example::

        vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
        for _ in range(2000):
            svi.step(digits[torch.randint(len(digits), (100,))])     # digits: (N, 64), whole numbers 0..16
    """
    likelihood, posterior = own_head("likelihood", likelihood, 1), own_posterior(posterior)
    prior = StandardNormal(latent_dim)
    width = input_shape(likelihood, (amount("data_dim", data_dim, lowest=1),))[0]
    encoder = MLP(width, posterior.num_outputs(latent_dim), hidden=hidden, activation=activation)
    decoder = MLP(latent_dim, likelihood.num_outputs(data_dim), hidden=tuple(hidden)[::-1], activation=activation)
    return VAE(nn.Sequential(likelihood.input_layer(), encoder, posterior), nn.Sequential(decoder, likelihood), prior)


def mlp_missing_vae(
    data_dim: int,
    latent_dim: int,
    *,
    likelihood: Head,
    posterior: Head | None = None,
    hidden: Sequence[int] = (400,),
    activation: Activation = nn.ReLU,
) -> MissingDataVAE:
    """Build a `MissingDataVAE` for vectors x (B, X) with NaN for missing values.

    The input of the encoder is x and the mask, (B, 2 X).

    :param data_dim: X.
    :param latent_dim: D.
    :returns: a `MissingDataVAE`, untrained and in train mode.
    :raises OptionError: as in `mlp_vae`, which has the other parameters, and for `Normal("optimal")`.

    Example::

        vae = pv.mlp_missing_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16))
        holes = torch.rand(digits.shape) < 0.3
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), pv.ImportanceWeightedELBO(num_particles=20))
        svi.step(digits.masked_fill(holes, torch.nan))
    """
    likelihood, posterior = own_head("likelihood", likelihood, 1), own_posterior(posterior)
    if getattr(likelihood, "couples_batch", False):
        raise OptionError(
            "the scale of Normal('optimal') is computed from a whole batch, which is not possible with missing "
            "values: pass pv.nn.Normal('learned')"
        )
    prior = StandardNormal(latent_dim)
    width = input_shape(likelihood, (amount("data_dim", data_dim, lowest=1),))[0]
    encoder = MLP(width + data_dim, posterior.num_outputs(latent_dim), hidden=hidden, activation=activation)
    decoder = MLP(latent_dim, likelihood.num_outputs(data_dim), hidden=tuple(hidden)[::-1], activation=activation)
    seen = nn.Sequential(BesideMask(likelihood.input_layer()), encoder, posterior)
    return MissingDataVAE(seen, nn.Sequential(decoder, likelihood), prior)


def mlp_conditional_vae(
    data_dim: int,
    condition_dim: int,
    latent_dim: int,
    *,
    likelihood: Head,
    posterior: Head | None = None,
    hidden: Sequence[int] = (400,),
    activation: Activation = nn.ReLU,
) -> ConditionalVAE:
    """Build a `ConditionalVAE` for vectors x (B, X) given vectors y (B, C); the prior does not depend on y.

    :param data_dim: X.
    :param condition_dim: C; labels are passed one-hot.
    :param latent_dim: D.
    :returns: a `ConditionalVAE`, untrained and in train mode.
    :raises OptionError: as in `mlp_vae`, which has the other parameters.

    Example::

        vae = pv.mlp_conditional_vae(64, 10, latent_dim=8, likelihood=pv.nn.Binomial(16))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
        svi.step(digits, torch.nn.functional.one_hot(labels, 10))
        vae.generate(torch.eye(10))      # one digit of each kind, (10, 64)
    """
    likelihood, posterior = own_head("likelihood", likelihood, 1), own_posterior(posterior)
    prior = StandardNormal(latent_dim)
    amount("condition_dim", condition_dim, lowest=1)
    width = input_shape(likelihood, (amount("data_dim", data_dim, lowest=1),))[0]
    encoder = MLP(width + condition_dim, posterior.num_outputs(latent_dim), hidden=hidden, activation=activation)
    decoder = MLP(
        latent_dim + condition_dim, likelihood.num_outputs(data_dim), hidden=tuple(hidden)[::-1], activation=activation
    )
    return ConditionalVAE(
        Concatenated(nn.Sequential(encoder, posterior), first=likelihood.input_layer()),
        Concatenated(nn.Sequential(decoder, likelihood)),
        prior,
    )


def conv_vae(
    image_shape: Sequence[int],
    latent_dim: int,
    *,
    likelihood: Head,
    posterior: Head | None = None,
    channels: Sequence[int] = (32, 64),
    activation: Activation = nn.ReLU,
) -> VAE:
    """Build a `VAE` for images from strided convolutions: x (B, C, H, W), latents (B, D), standard normal prior.

    :param image_shape: (C, H, W).
    :param latent_dim: D.
    :param likelihood: head of the decoder with `event_dim=3`. Its `input_layer()` is applied to x before the encoder. It is
        copied, so one head can be passed to several VAEs.
    :param posterior: head of the encoder; `Normal()`, a diagonal Gaussian, unless given.
    :param channels: channels of the encoder's convolutions, each of which halves the image; the decoder has them in reverse.
    :param activation: function that returns the activation module between the layers.
    :returns: a `VAE`, untrained and in train mode.
    :raises OptionError: for images too small for that many convolutions, a dimension below 1, or a likelihood that is not a
        head for images.

    Example::

        vae = pv.conv_vae((1, 28, 28), latent_dim=20, likelihood=pv.nn.Bernoulli(event_dim=3))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        svi.step(images)                 # (B, 1, 28, 28), zeros and ones
        vae.generate(16)                 # (16, 1, 28, 28)
    """
    likelihood, posterior = own_head("likelihood", likelihood, 3), own_posterior(posterior)
    prior = StandardNormal(latent_dim)
    image_shape = widths_of("image_shape", image_shape)
    seen = input_shape(likelihood, image_shape)
    encoder = ConvNet(seen, posterior.num_outputs(latent_dim), channels=channels, activation=activation)
    image = (likelihood.num_outputs(image_shape[0]), *image_shape[1:])
    decoder = DeconvNet(latent_dim, image, channels=tuple(channels)[::-1], activation=activation)
    return VAE(nn.Sequential(likelihood.input_layer(), encoder, posterior), nn.Sequential(decoder, likelihood), prior)


def own_posterior(head: Head | None) -> Head:
    return own_head("posterior", Normal() if head is None else head, 1)


def own_head(role: str, head: Head, event_dim: int) -> Head:
    """A copy of the head, so that its parameters are not shared with another VAE that it is passed to."""
    if not isinstance(head, Head):
        raise OptionError(
            f"{role} must be a head of pyro_vae.nn, such as pv.nn.Normal(), got {type(head).__name__}: pass one, or "
            "build VAE(encoder, decoder, prior) from your modules"
        )
    if head.event_dim != event_dim:
        raise OptionError(
            f"{role} must have event_dim={event_dim} here, got {type(head).__name__} with {head.event_dim}: pass event_dim= "
            "to the head (1 for vectors and latents, 3 for images), or use mlp_vae for vectors and conv_vae for images"
        )
    return copy.deepcopy(head)


def input_shape(likelihood: Head, data_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one datum after the likelihood's input layer."""
    return tuple(likelihood.input_layer()(torch.zeros(1, *data_shape)).shape[1:])
