"""Principal axes of data: how many of them a linear VAE uses, and the variance left as noise."""

import torch
from torch import Tensor

from .arguments import check_floats, check_size, check_whole, promoted


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors (in columns) of the biased covariance of ``x`` ``(B, X)``."""
    check_floats("data (B, X)", x)
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"expected data (B, X), but got {tuple(x.shape)}. Flatten each datum to one row.")
    centred = x - x.mean(0)
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.mT @ centred / len(x))
    return eigenvalues.flip(-1).clamp(min=0.0), eigenvectors.flip(-1)


def noise_variance(eigenvalues: Tensor, latent_dim: int, variance: float | Tensor | None) -> Tensor:
    """The variance of the noise, checked: the given one, or the mean of the eigenvalues that are not used by a latent."""
    check_whole("latent_dim", latent_dim)
    largest = len(eigenvalues) - (variance is None)
    if not 1 <= latent_dim <= largest:
        raise ValueError(
            f"expected latent_dim in 1..{largest} for data (B, {len(eigenvalues)}), but got {latent_dim}. "
            "A free variance needs one dimension left over: fix it with variance=, or use fewer latents."
        )
    if variance is None:
        noise = eigenvalues[latent_dim:].mean()
    else:
        check_size("variance", variance)
        noise = promoted(variance, eigenvalues)
    if not bool(noise > 0):
        raise ValueError(
            f"expected a positive noise variance, but got {float(noise)}. If it was estimated, the data lie "
            "in a subspace of latent_dim dimensions: fix variance=, or use fewer latents."
        )
    return noise


def collapsed(x: Tensor, latent_dim: int, variance: float | Tensor, beta: float | Tensor = 1.0) -> Tensor:
    r"""Which latent dimensions the best linear VAE of noise ``variance`` leaves unused: bool ``(D,)``.

    Dimension ``j``, in the order of falling eigenvalues ``l_j`` of the biased covariance of ``x`` ``(B, X)``, is collapsed
    (``q(z_j|x) = p(z_j)``, zero weights) exactly where ``l_j <= beta variance``. The reason is that in the beta-ELBO a fixed
    noise variance acts like ``beta`` times itself. The best weights are those of ``LinearGaussian.fit(x, latent_dim, beta *
    variance)`` (Lucas et al. 2019, https://arxiv.org/abs/1911.02469).

    :raises ValueError: as in `LinearGaussian.fit`.

    >>> collapsed(torch.diag(torch.tensor([4.0, 2.0, 1.0])), latent_dim=2, variance=1.0)
    tensor([False,  True])
    """
    for name, value in (("variance", variance), ("beta", beta)):
        check_size(name, value)
    eigenvalues = principal_axes(x)[0]
    noise = noise_variance(eigenvalues, latent_dim, beta * variance)
    return eigenvalues[:latent_dim] <= noise
