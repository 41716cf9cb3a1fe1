"""The linear VAE (probabilistic PCA), with exact log p(x), posterior and rate."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..exact import LinearGaussian
from ..nn import Normal, StandardNormal
from ..options import amount
from .vae import VAE


class LinearVAE(VAE):
    r"""Linear VAE: probabilistic PCA with a Gaussian guide, for which all quantities have closed forms::

        p(z) = N(0, I_D)    p(x given z) = N(W z + b, s^2 I_X)    q(z given x) = N(V x + c, diag(t^2))

    At the optimum of the ELBO the columns of W are orthogonal, so the posterior has the same diagonal covariance for all x.
    The guide is then exact, the ELBO equals log p(x), and W spans the first principal axes (Lucas, Tucker, Grosse and
    Norouzi 2019, https://arxiv.org/abs/1911.02469; Tipping and Bishop 1999, https://doi.org/10.1111/1467-9868.00196).

    :param data_dim: X.
    :param latent_dim: D.
    :param scale: s, the standard deviation of the noise; `None` to learn it.
    :raises OptionError: for a dimension below 1, or a scale that is not a positive finite number.

    Everything else is as in `VAE`.

    Example::

        vae = pv.LinearVAE(64, 5)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
        for _ in range(2000):
            svi.step(x)
        vae.exact().log_evidence(x)                # (B,) nats
        vae.exact().gaps(x, vae.encode(x))         # how far the guide still is from the posterior
        pv.exact.LinearGaussian.max_log_likelihood(x, 5)
    """

    def __init__(self, data_dim: int, latent_dim: int, *, scale: float | None = None) -> None:
        amount("data_dim", data_dim, lowest=1)
        prior = StandardNormal(latent_dim)
        head = Normal("learned" if scale is None else scale)
        super().__init__(LinearEncoder(data_dim, latent_dim), nn.Sequential(nn.Linear(latent_dim, data_dim), head), prior)

    @torch.no_grad()
    def exact(self) -> LinearGaussian:
        """The model with its current parameters as `pyro_vae.exact.LinearGaussian`; later training does not change it."""
        weight = self.decoder.get_parameter("0.weight").clone()
        at_zero = self.decode(weight.new_zeros(weight.shape[1]))
        return LinearGaussian(weight, at_zero.mean.clone(), at_zero.variance[0])


class LinearEncoder(nn.Module):
    """N(V x + c, diag(t^2)), with one learned t for all x."""

    def __init__(self, data_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(data_dim, latent_dim)
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor) -> TorchDistribution:
        return dist.Normal(self.linear(x), self.log_scale.exp()).to_event(1)
