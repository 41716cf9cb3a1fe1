"""Closed forms and exact sums: what every estimator of this package is judged by.

Three families where ``log p(x)`` is known: the linear-Gaussian model, models with few discrete latents
(enumeration) and models with one or two continuous latents (quadrature). Everything is in nats. Shapes: ``B``
data, ``D`` latent dimensions, ``X`` data dimensions, ``N`` quadrature nodes. Nothing here knows Pyro; use
float64 where digits count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.distributions import LowRankMultivariateNormal as LowRankNormal

# numpy's Gauss-Hermite weights leave the range of float64 from 360 nodes on.
MAX_QUADRATURE_NODES = 300


@dataclass(frozen=True)
class LinearGaussianGaps:
    """How far the ELBO of a Gaussian guide is from ``log p(x)``: tensors ``(B,)``, nats, none negative.

    ``inference = log p(x) - L[q] = amortization + approximation``, with ``amortization = L[q*] - L[q]`` and
    ``approximation = log p(x) - L[q*]``; ``q*`` is the best guide per datum in the family of ``q``.
    """

    amortization: Tensor
    approximation: Tensor
    inference: Tensor


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    r"""Probabilistic PCA, the linear VAE: ``p(z) = N(0, I_D)``, ``p(x|z) = N(W z + b, s^2 I_X)``.

    Tipping and Bishop (1999, https://doi.org/10.1111/1467-9868.00196); as a VAE, Lucas et al. (2019,
    https://arxiv.org/abs/1911.02469). All results are differentiable in the parameters and in ``x``.

    :param weight: ``W``, shape ``(X, D)``.
    :param bias: ``b``, shape ``(X,)``.
    :param variance: ``s^2``, a positive tensor without dimensions.
    :raises ValueError: if the shapes do not fit together or the variance is not positive.

    >>> model = LinearGaussian(torch.tensor([[1.0], [2.0]]), torch.zeros(2), torch.tensor(0.5))
    >>> x = torch.tensor([[1.0, 1.0]])
    >>> model.log_evidence(x), model.elbo(x, model.posterior(x))
    (tensor([-2.7073]), tensor([-2.7073]))
    """

    weight: Tensor
    bias: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(field.shape) for field in (self.weight, self.bias, self.variance)]
        if self.weight.dim() != 2 or shapes[1:] != [shapes[0][:1], ()]:
            raise ValueError(
                "LinearGaussian expects weight (X, D), bias (X,) and a variance without dimensions, "
                f"but got shapes {shapes}. Lay the weight out as torch.nn.Linear(D, X) does."
            )
        if not bool(self.variance > 0):
            raise ValueError(
                f"LinearGaussian expects a positive variance, but got {float(self.variance)}. "
                "It is the squared standard deviation of the noise."
            )

    @classmethod
    def fit(cls, x: Tensor, latent_dim: int, variance: float | Tensor | None = None) -> LinearGaussian:
        r"""Maximum likelihood fit to ``x`` of shape ``(B, X)`` (Tipping and Bishop 1999, section 3.2).

        With the eigenvalues ``l_1 >= l_2 >= ...`` and eigenvectors ``U`` of the biased covariance of ``x``:
        ``s^2 = mean(l_{D+1}, ..., l_X)`` unless ``variance`` fixes it, and ``W = U_D (L_D - s^2 I)^{1/2}``
        with a zero column wherever ``l_j <= s^2``. The columns of ``W`` are orthogonal, so that a diagonal
        guide is exact.

        :raises ValueError: if ``x`` is not a matrix, if ``latent_dim`` is not in ``1..X`` (``1..X-1`` with a
            free variance), or if the data leave a free variance at zero.

        >>> model = LinearGaussian.fit(torch.eye(3), latent_dim=1)
        >>> model.weight.shape, round(model.variance.item(), 4)
        (torch.Size([3, 1]), 0.1667)
        """
        eigenvalues, eigenvectors = _principal_axes(x)
        noise = _noise_variance(eigenvalues, latent_dim, variance)
        scale = (eigenvalues[:latent_dim] - noise).clamp(min=0.0).sqrt()
        return cls(eigenvectors[:, :latent_dim] * scale, x.mean(0), noise)

    @staticmethod
    def max_log_likelihood(x: Tensor, latent_dim: int, variance: float | Tensor | None = None) -> Tensor:
        r"""Mean ``log p(x)`` per datum at the maximum of the likelihood, a tensor without dimensions.

        ``-1/2 [X ln 2 pi + sum_{j in A} (1 + ln l_j) + (X - |A|) ln s^2 + sum_{j not in A} l_j / s^2]`` with
        ``A = {j <= D: l_j > s^2}``; arguments and errors as in `fit`.

        >>> LinearGaussian.max_log_likelihood(torch.eye(3), latent_dim=1)
        tensor(-1.9158)
        """
        eigenvalues = _principal_axes(x)[0]
        noise = _noise_variance(eigenvalues, latent_dim, variance)
        used = (torch.arange(len(eigenvalues), device=x.device) < latent_dim) & (eigenvalues > noise)
        terms = torch.where(used, 1 + eigenvalues.clamp(min=noise).log(), noise.log() + eigenvalues / noise)
        return -0.5 * (len(eigenvalues) * math.log(2 * math.pi) + terms.sum())

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""``log N(x; b, W W' + s^2 I)``: ``x`` ``(B, X)`` gives ``(B,)``."""
        noise = self.variance.expand(self._data(x).shape[-1])
        return LowRankNormal(self.bias, self.weight, noise).log_prob(x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        r"""``p(z|x) = N(M^-1 W'(x - b), s^2 M^-1)`` with ``M = W'W + s^2 I``; batch shape ``(B,)``."""
        return self.beta_posterior(x, 1.0)

    def beta_posterior(self, x: Tensor, beta: float | Tensor) -> MultivariateNormal:
        r"""The Gaussian that maximises ``E_q log p(x|z) - beta KL(q || p(z))``, batch shape ``(B,)``.

        It is proportional to ``p(z) p(x|z)^(1/beta)``: covariance ``(I + W'W / (beta s^2))^-1``, mean that
        times ``W'(x - b) / (beta s^2)``; the posterior of a model with noise ``beta s^2``. Rates and
        distortions along ``beta`` trace the rate-distortion curve, of slope ``dD/dR = -beta`` (Alemi et al.
        2018, https://arxiv.org/abs/1711.00464).

        :raises ValueError: if ``beta`` is not positive.
        """
        if not bool(torch.as_tensor(beta) > 0):
            raise ValueError(f"beta_posterior expects beta > 0, but got {beta}. At 0 there is no optimum.")
        tempered = beta * self.variance
        precision = self._precision(tempered)
        projected = (self._data(x) - self.bias) @ self.weight / tempered
        mean = torch.linalg.solve(precision, projected.unsqueeze(-1)).squeeze(-1)
        return MultivariateNormal(mean, precision_matrix=precision)

    def optimal_diagonal(self, x: Tensor) -> Independent:
        r"""The diagonal Gaussian of the highest ELBO: the posterior mean, variances ``s^2 / M_jj``.

        They are the posterior's conditional variances, below its marginal ones unless ``M`` is diagonal.
        """
        mean = self.posterior(x).mean
        scale = self._precision(self.variance).diagonal().rsqrt()
        return Independent(Normal(mean, scale.expand_as(mean)), 1)

    def rate(self, q: Distribution) -> Tensor:
        r"""``KL(q || N(0, I)) = 1/2 [tr S + m'm - D - ln|S|]`` of ``q = N(m, S)``, of its batch shape.

        :raises ValueError: if ``q`` is neither an ``Independent`` of ``Normal`` nor a (low-rank)
            ``MultivariateNormal`` over the ``D`` latent dimensions.
        """
        mean, root = self._moments(q)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * (root.square().sum((-2, -1)) + mean.square().sum(-1) - mean.shape[-1] - log_det)

    def distortion(self, x: Tensor, q: Distribution) -> Tensor:
        r"""``-E_q log p(x|z) = 1/2 [X ln 2 pi s^2 + (|x - b - W m|^2 + tr W S W') / s^2]``, shape ``(B,)``.

        ``q = N(m, S)`` as in `rate`.
        """
        mean, root = self._moments(q)
        error = (self._data(x) - self.bias - mean @ self.weight.mT).square().sum(-1)
        spread = (self.weight @ root).square().sum((-2, -1))
        return 0.5 * (x.shape[-1] * (2 * math.pi * self.variance).log() + (error + spread) / self.variance)

    def elbo(self, x: Tensor, q: Distribution) -> Tensor:
        r"""``-(distortion + rate)``, shape ``(B,)``, never above `log_evidence`; ``q`` as in `rate`."""
        return -(self.distortion(x, q) + self.rate(q))

    def approximation_gap(self) -> Tensor:
        r"""``1/2 [sum_j ln M_jj - ln|M|]``, what diagonal guides cannot reach: one number for all data."""
        precision = self._precision(self.variance)
        root: Tensor = torch.linalg.cholesky(precision)
        return 0.5 * precision.diagonal().log().sum() - root.diagonal().log().sum()

    def gaps(self, x: Tensor, q: Distribution) -> LinearGaussianGaps:
        r"""Splits ``log p(x) - L[q]`` after Cremer et al. (2018, https://arxiv.org/abs/1801.03558).

        ``q`` as in `rate`. Its family is diagonal for an ``Independent``, else full: no approximation gap.

        >>> model = LinearGaussian(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2), torch.tensor(1.0))
        >>> gaps = model.gaps(torch.ones(1, 2), Independent(Normal(torch.zeros(1, 2), torch.ones(1, 2)), 1))
        >>> gaps.amortization, gaps.approximation, gaps.inference
        (tensor([1.3041]), tensor([0.0912]), tensor([1.3953]))
        """
        inference = self.log_evidence(x) - self.elbo(x, q)
        gap = self.approximation_gap() if isinstance(q, Independent) else torch.zeros_like(self.variance)
        approximation = gap.expand_as(inference)
        return LinearGaussianGaps(inference - approximation, approximation, inference)

    def _precision(self, variance: Tensor) -> Tensor:
        identity = torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        return identity + self.weight.mT @ self.weight / variance

    def _data(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != len(self.bias):
            raise ValueError(
                f"LinearGaussian expects data of shape (B, {len(self.bias)}), but got {tuple(x.shape)}. "
                "Flatten each datum to one row."
            )
        return x

    def _moments(self, q: Distribution) -> tuple[Tensor, Tensor]:
        """Mean ``(..., D)`` and lower-triangular root of the covariance ``(..., D, D)``."""
        latent_dim = self.weight.shape[1]
        if tuple(q.event_shape) == (latent_dim,):
            if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
                return q.base_dist.loc, torch.diag_embed(q.base_dist.scale)
            if isinstance(q, (MultivariateNormal, LowRankNormal)):
                return q.loc, q.scale_tril
        raise ValueError(
            f"LinearGaussian expects a Gaussian guide of event shape {(latent_dim,)}, but got a "
            f"{type(q).__name__} of {tuple(q.event_shape)}. Pass Independent(Normal(loc, scale), 1) or a "
            "MultivariateNormal."
        )


def collapsed(x: Tensor, latent_dim: int, variance: float | Tensor, beta: float | Tensor = 1.0) -> Tensor:
    r"""Which latent dimensions the best linear VAE of noise ``variance`` leaves unused: bool ``(D,)``.

    Dimension ``j``, in order of falling eigenvalue ``l_j`` of the biased covariance of ``x`` ``(B, X)``, is
    collapsed (``q(z_j|x) = p(z_j)``, zero weights) exactly where ``l_j <= beta variance``: in the beta-ELBO a
    fixed noise acts like ``beta`` times itself, and the best weights are those of ``LinearGaussian.fit(x,
    latent_dim, beta * variance)`` (Lucas et al. 2019, https://arxiv.org/abs/1911.02469).

    :raises ValueError: as in `LinearGaussian.fit`.

    >>> collapsed(torch.diag(torch.tensor([4.0, 2.0, 1.0])), latent_dim=2, variance=1.0)
    tensor([False,  True])
    """
    eigenvalues = _principal_axes(x)[0]
    return eigenvalues[:latent_dim] <= _noise_variance(eigenvalues, latent_dim, beta * variance)


def scalar_posterior(x: Tensor, w: float | Tensor, s: float | Tensor) -> Normal:
    r"""Posterior of ``z ~ N(0, 1)`` given ``x|z ~ N(w z, s^2)``, batched like ``x``.

    ``N(w x / (w^2 + s^2), s^2 / (w^2 + s^2))``, the conjugate normal update (Bishop 2006, equation 2.116).

    >>> scalar_posterior(torch.tensor(1.0), w=1.0, s=1.0).mean
    tensor(0.5000)
    """
    total = torch.as_tensor(w**2 + s**2, dtype=x.dtype, device=x.device)
    return Normal(w * x / total, s / total.sqrt())


def enumerate_log_joint(log_joint: Callable[..., Tensor], supports: Sequence[Tensor]) -> Tensor:
    r"""Calls ``log_joint(z_1, ..., z_n)`` once, on all combinations of values of ``n`` discrete latents.

    ``supports[i]`` ``(S_i, *event_i)`` lists the values of latent ``i``, which arrive with their own axis:
    ``(1, ..., S_i, ..., 1, 1, *event_i)``, ``n`` axes of latents, then one of data. The log joint must
    broadcast over them and return ``(S_1, ..., S_n, B)``, nats; that goes to `enumerate_log_evidence`.

    :raises ValueError: if the log joint returns another shape.

    >>> coin, x = torch.tensor([0.0, 1.0]), torch.tensor([0.3, 2.0])
    >>> log_joint = lambda z: Normal(z, 1.0).log_prob(x) - math.log(2)
    >>> enumerate_log_evidence(enumerate_log_joint(log_joint, [coin]), 1)
    tensor([-1.0589, -1.9107])
    """
    num_latents = len(supports)
    values = [
        support.reshape((1,) * i + support.shape[:1] + (1,) * (num_latents - i) + support.shape[1:])
        for i, support in enumerate(supports)
    ]
    result = log_joint(*values)
    sizes = tuple(len(support) for support in supports)
    if tuple(result.shape[:-1]) != sizes:
        raise ValueError(
            f"enumerate_log_joint expects a log joint of {sizes} + (B,), but got {tuple(result.shape)}. "
            "Sum over the dimensions of each datum, and let the axes of the latents broadcast."
        )
    return result


def enumerate_log_evidence(log_joint: Tensor, num_latents: int = 1) -> Tensor:
    r"""``log sum_z p(x, z)`` over ``num_latents`` leading axes: ``(S_1, ..., S_n, B)`` gives ``(B,)``, nats.

    :raises ValueError: if there are fewer axes than latents.

    >>> enumerate_log_evidence(torch.tensor([[0.1, 0.2], [0.3, 0.4]]).log())
    tensor([-0.9163, -0.5108])
    """
    if not 1 <= num_latents <= log_joint.dim():
        raise ValueError(
            f"enumerate_log_evidence expects a log joint with an axis per latent, here {num_latents}, and at "
            f"least one, but got shape {tuple(log_joint.shape)}. Build it with enumerate_log_joint."
        )
    return log_joint.logsumexp(tuple(range(num_latents)))


def quadrature_log_evidence(
    log_joint: Callable[[Tensor], Tensor],
    num_latents: int,
    num_nodes: int = 200,
    loc: Tensor | None = None,
    scale: Tensor | None = None,
    chunk_size: int = 10_000,
) -> Tensor:
    r"""``log int p(x, z) dz`` over one or two continuous latents by Gauss-Hermite quadrature: ``(B,)``, nats.

    ``(sqrt(2) scale)^D sum_i w_i exp(t_i^2) p(x, z_i)`` with ``z_i = loc + sqrt(2) scale t_i``, summed in
    logs; nodes ``t`` and weights ``w`` of Golub and Welsch (1969,
    https://doi.org/10.1090/S0025-5718-69-99647-1), centred per datum as in Liu and Pierce (1994,
    https://doi.org/10.1093/biomet/81.3.624).

    The nodes lie about ``pi / sqrt(num_nodes)`` of a ``scale`` apart and must resolve the posterior: with 200
    and the default ``N(0, 1)`` a Gaussian posterior of standard deviation 0.3 still comes out to 1e-8, one of
    0.1 does not. Centre sharper ones at ``loc`` with a ``scale`` near, better above, theirs, and check that
    more nodes change nothing.

    :param log_joint: takes ``z`` of shape ``(N, 1, D)``, or ``(N, B, D)`` if centred, and returns ``(N, B)``.
    :param num_latents: ``D``.
    :param num_nodes: nodes per dimension, so that ``N = num_nodes ** D``.
    :param loc: centre ``(B, D)``, zero by default. ``z`` has its dtype and device; else float64 on the CPU.
    :param scale: width ``(B, D)``, positive, one by default.
    :param chunk_size: nodes per call of ``log_joint``, to bound its memory.
    :raises ValueError: for other numbers of latents, over 300 nodes, or a result of the wrong shape.

    >>> x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    >>> log_joint = lambda z: (Normal(0, 1).log_prob(z) + Normal(z, 1.0).log_prob(x.unsqueeze(-1))).sum(-1)
    >>> quadrature_log_evidence(log_joint, 1)  # N(0, 2)
    tensor([-1.3280, -2.2655], dtype=torch.float64)
    """
    if num_latents not in (1, 2):
        raise ValueError(
            f"quadrature_log_evidence expects 1 or 2 latent dimensions, but got {num_latents}. "
            "The nodes grow like num_nodes ** D: use an importance-sampling or annealed estimator instead."
        )
    if not 1 <= num_nodes <= MAX_QUADRATURE_NODES:
        raise ValueError(
            f"quadrature_log_evidence expects num_nodes in 1..{MAX_QUADRATURE_NODES}, but got {num_nodes}. "
            "Where that is too coarse, pass loc and scale of the posterior."
        )
    points, point_weights = np.polynomial.hermite.hermgauss(num_nodes)
    t = torch.cartesian_prod(*[torch.from_numpy(points)] * num_latents).reshape(-1, 1, num_latents)
    log_w = torch.from_numpy(np.log(point_weights) + points**2 + 0.5 * math.log(2))
    log_w = torch.cartesian_prod(*[log_w] * num_latents).reshape(-1, 1, num_latents).sum(-1)

    loc = t.new_zeros(1, num_latents) if loc is None else loc
    scale = torch.ones_like(loc) if scale is None else scale.to(loc)
    z = loc + math.sqrt(2) * scale * t.to(loc)
    values = torch.cat([log_joint(chunk) for chunk in z.split(chunk_size)])
    if values.dim() != 2 or len(values) != len(z) or z.shape[1] not in (1, values.shape[1]):
        raise ValueError(
            f"quadrature_log_evidence expects a log joint (N, B) for z {tuple(z.shape)}, but got "
            f"{tuple(values.shape)}. Sum over the dimensions of datum and latent, not over nodes or data."
        )
    return (values + log_w.to(loc)).logsumexp(0) + scale.log().sum(-1)


def _principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors (in columns) of the biased covariance of ``x`` ``(B, X)``."""
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"expected data (B, X), but got {tuple(x.shape)}. Flatten each datum to one row.")
    centred = x - x.mean(0)
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.mT @ centred / len(x))
    return eigenvalues.flip(-1).clamp(min=0.0), eigenvectors.flip(-1)


def _noise_variance(eigenvalues: Tensor, latent_dim: int, variance: float | Tensor | None) -> Tensor:
    largest = len(eigenvalues) - (variance is None)
    if not 1 <= latent_dim <= largest:
        raise ValueError(
            f"expected latent_dim in 1..{largest} for data (B, {len(eigenvalues)}), but got {latent_dim}. "
            "A free variance needs one dimension left over: fix it with variance=, or use fewer latents."
        )
    if variance is None:
        noise = eigenvalues[latent_dim:].mean()
    else:
        # The dtype is said outright: as_tensor alone would round a float to float32 first.
        noise = torch.as_tensor(variance, dtype=eigenvalues.dtype, device=eigenvalues.device)
    if not bool(noise > 0):
        raise ValueError(
            f"expected a positive noise variance, but got {float(noise)}. If it was estimated, the data lie "
            "in a subspace of latent_dim dimensions: fix variance=, or use fewer latents."
        )
    return noise
