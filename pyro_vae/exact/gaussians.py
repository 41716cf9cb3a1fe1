"""Gaussian distributions of latents: the posterior of one number, and mean and covariance of a guide."""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from .arguments import check_floats, check_like, kind_of


def scalar_posterior(x: Tensor, w: float | Tensor, s: float | Tensor) -> Normal:
    r"""Posterior of ``z ~ N(0, 1)`` given ``x|z ~ N(w z, s^2)``, batched like ``x``.

    ``N(w x / (w^2 + s^2), s^2 / (w^2 + s^2))``, the conjugate normal update (Bishop 2006, equation 2.116).

    >>> scalar_posterior(torch.tensor(1.0), w=1.0, s=1.0).mean
    tensor(0.5000)
    """
    check_floats("x", x)
    for name, value in (("w", w), ("s", s)):
        check_like(name, value, x)
    if not bool((torch.as_tensor(s) > 0).all()):
        raise ValueError(f"expected a positive s, but got {s}. It is the standard deviation of the noise.")
    total = torch.as_tensor(w**2 + s**2, dtype=x.dtype, device=x.device)
    return Normal(w * x / total, s / total.sqrt())


def mean_and_root(q: Distribution, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Mean ``(..., D)`` and lower-triangular root of the covariance ``(..., D, D)`` of a Gaussian guide.

    :raises ValueError: if ``q`` is neither an ``Independent`` of ``Normal`` nor a (low-rank) ``MultivariateNormal`` over the
        ``D`` latent dimensions.
    """
    if not isinstance(q, Distribution):
        raise TypeError(
            f"LinearGaussian expects a Gaussian guide as a distribution, but got {kind_of(q)}. Pass Independent(Normal(loc, "
            "scale), 1) or a MultivariateNormal."
        )
    if tuple(q.event_shape) == (latent_dim,):
        if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
            return q.base_dist.loc, torch.diag_embed(q.base_dist.scale)
        if isinstance(q, (MultivariateNormal, LowRankMultivariateNormal)):
            return q.loc, q.scale_tril
    raise ValueError(
        f"LinearGaussian expects a Gaussian guide of event shape {(latent_dim,)}, but got a {type(q).__name__} of "
        f"{tuple(q.event_shape)}. Pass Independent(Normal(loc, scale), 1) or a MultivariateNormal."
    )
