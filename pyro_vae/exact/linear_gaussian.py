"""The linear-Gaussian model, probabilistic PCA: evidence, posterior, gaps, rate, distortion and fit in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.distributions import LowRankMultivariateNormal as LowRankNormal

from .arguments import check_floats, check_size, promoted
from .gaussians import mean_and_root
from .principal_axes import noise_variance, principal_axes


@dataclass(frozen=True)
class LinearGaussianGaps:
    """The gaps between ``log p(x)`` and the ELBO of a Gaussian guide: tensors ``(B,)``, nats, not negative.

    ``inference = log p(x) - L[q]`` is the sum of ``amortization = L[q*] - L[q]`` and ``approximation = log p(x) - L[q*]``.
    Here ``q*`` is the best member of the family of ``q`` for each datum.
    """

    amortization: Tensor
    approximation: Tensor
    inference: Tensor


@dataclass(frozen=True, eq=False)
class LinearGaussianCurve:
    """Points of a rate-distortion curve: tensors ``(P,)``, nats, means over the data.

    Along the curve ``dD/dR = -beta``. No encoder of the model is below it.
    """

    beta: Tensor
    rate: Tensor
    distortion: Tensor


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    r"""Probabilistic PCA, the linear VAE: ``p(z) = N(0, I_D)``, ``p(x|z) = N(W z + b, s^2 I_X)``.

    Tipping and Bishop (1999, https://doi.org/10.1111/1467-9868.00196); as a VAE, Lucas et al. (2019,
    https://arxiv.org/abs/1911.02469). All results are differentiable in the parameters and in ``x``.

    :param weight: ``W``, shape ``(X, D)``.
    :param bias: ``b``, shape ``(X,)``.
    :param variance: ``s^2``, a positive number or tensor without dimensions.
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
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            check_floats(name, value)
        shapes = [tuple(getattr(field, "shape", ())) for field in (self.weight, self.bias, self.variance)]
        if self.weight.dim() != 2 or shapes[1:] != [shapes[0][:1], ()]:
            raise ValueError(
                "LinearGaussian expects weight (X, D), bias (X,) and a variance without dimensions, "
                f"but got shapes {shapes}. Lay the weight out as torch.nn.Linear(D, X) does."
            )
        check_size("variance", self.variance)
        object.__setattr__(self, "variance", promoted(self.variance, self.weight))
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
        eigenvalues, eigenvectors = principal_axes(x)
        noise = noise_variance(eigenvalues, latent_dim, variance)
        scale = (eigenvalues[:latent_dim] - noise).clamp(min=0.0).sqrt()
        return cls(eigenvectors[:, :latent_dim] * scale, x.mean(0), noise)

    @classmethod
    def fit_beta(cls, x: Tensor, latent_dim: int, variance: float | Tensor, beta: float) -> LinearGaussian:
        r"""The model with noise ``variance`` that maximises the beta-ELBO of ``x`` ``(B, X)``, with the guide
        `beta_posterior`.

        The weights are those of ``fit(x, latent_dim, beta * variance)``, since ``beta`` acts like a factor of the noise
        variance (Lucas et al. 2019, https://arxiv.org/abs/1911.02469). There, with the eigenvalues ``l_j`` of the biased
        covariance and ``A = {j <= D: l_j > beta s^2}``, means over the data::

            R = 1/2 sum_{j in A} ln(l_j / (beta s^2))
            D = 1/2 [X ln 2 pi s^2 + |A| beta + sum_{j not in A} l_j / s^2]

        :raises ValueError: as in `fit`.
        """
        for name, value in (("variance", variance), ("beta", beta)):
            check_size(name, value)
        best = cls.fit(x, latent_dim, beta * variance)
        return cls(best.weight, best.bias, promoted(variance, x))

    @staticmethod
    def max_log_likelihood(x: Tensor, latent_dim: int, variance: float | Tensor | None = None) -> Tensor:
        r"""Mean ``log p(x)`` per datum at the maximum of the likelihood, a tensor without dimensions.

        ``-1/2 [X ln 2 pi + sum_{j in A} (1 + ln l_j) + (X - |A|) ln s^2 + sum_{j not in A} l_j / s^2]`` with
        ``A = {j <= D: l_j > s^2}``; arguments and errors as in `fit`.

        >>> LinearGaussian.max_log_likelihood(torch.eye(3), latent_dim=1)
        tensor(-1.9158)
        """
        eigenvalues = principal_axes(x)[0]
        noise = noise_variance(eigenvalues, latent_dim, variance)
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

        It is proportional to ``p(z) p(x|z)^(1/beta)``, the posterior of a model with noise ``beta s^2``. Its covariance is
        ``(I + W'W / (beta s^2))^-1``, and its mean is the covariance times ``W'(x - b) / (beta s^2)``. Its rates and
        distortions for all ``beta`` are the rate-distortion curve, of slope ``dD/dR = -beta`` (Alemi et al. 2018,
        https://arxiv.org/abs/1711.00464).

        :raises ValueError: if ``beta`` is not positive.
        """
        check_size("beta", beta)
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
        mean, root = mean_and_root(q, self.weight.shape[1])
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * (root.square().sum((-2, -1)) + mean.square().sum(-1) - mean.shape[-1] - log_det)

    def distortion(self, x: Tensor, q: Distribution) -> Tensor:
        r"""``-E_q log p(x|z) = 1/2 [X ln 2 pi s^2 + (|x - b - W m|^2 + tr W S W') / s^2]``, shape ``(B,)``.

        ``q = N(m, S)`` as in `rate`.
        """
        mean, root = mean_and_root(q, self.weight.shape[1])
        error = (self._data(x) - self.bias - mean @ self.weight.mT).square().sum(-1)
        spread = (self.weight @ root).square().sum((-2, -1))
        return 0.5 * (x.shape[-1] * (2 * math.pi * self.variance).log() + (error + spread) / self.variance)

    def elbo(self, x: Tensor, q: Distribution) -> Tensor:
        r"""``-(distortion + rate)``, shape ``(B,)``, never above `log_evidence`; ``q`` as in `rate`."""
        return -(self.distortion(x, q) + self.rate(q))

    def rate_distortion(self, x: Tensor, beta: Tensor) -> LinearGaussianCurve:
        r"""Rate and distortion of `beta_posterior` at every ``beta`` ``(P,)``, means over ``x`` ``(B, X)``.

        These have the least ``R + D / beta`` of any encoder, so the points are on the model's rate-distortion curve, which
        starts at the prior (``beta = inf``, rate zero). All points are of one model: models trained for each ``beta`` can be
        below the curve, see `fit_beta`.

        :raises ValueError: if ``beta`` is not a vector of positive numbers, or the data do not fit.

        >>> model = LinearGaussian(torch.tensor([[1.0], [2.0]]), torch.zeros(2), torch.tensor(0.5))
        >>> curve = model.rate_distortion(torch.tensor([[1.0, 1.0]]), torch.tensor([math.inf, 1.0]))
        >>> curve.rate, curve.distortion
        (tensor([0.0000, 0.8932]), tensor([8.1447, 1.8142]))
        """
        check_floats("beta", beta)
        if beta.dim() != 1 or not len(beta):
            raise ValueError(f"rate_distortion expects beta of shape (P,), P >= 1, but got {tuple(beta.shape)}.")
        encoders = [self.beta_posterior(x, b) for b in beta]
        rate = torch.stack([self.rate(q).mean() for q in encoders])
        return LinearGaussianCurve(beta, rate, torch.stack([self.distortion(x, q).mean() for q in encoders]))

    def approximation_gap(self) -> Tensor:
        r"""``1/2 [sum_j ln M_jj - ln|M|]``, the approximation gap of diagonal guides: one number for all data."""
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
        check_floats("data (B, X)", x)
        if x.dim() == 0 or x.shape[-1] != len(self.bias):
            raise ValueError(
                f"LinearGaussian expects data of shape (B, {len(self.bias)}), but got {tuple(x.shape)}. "
                "Flatten each datum to one row."
            )
        return x
