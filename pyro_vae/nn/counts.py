"""Heads for unbounded counts: Poisson and negative binomial, zero-inflated or not, with size factors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..errors import ArgumentError, described
from .checked import Accepts
from .count_distributions import StableNegativeBinomial, StablePoisson, ZeroInflated
from .head import Head
from .inputs import Log1p
from .likelihoods import SCORE
from .parameters import PositiveParameter, exp_link, log_link


class CountHead(Head):
    """Base class of the heads of counts: the mean is exp(raw) times a size factor, a positive number for each datum."""

    def __init__(self, head: str, num_params: int, *, event_dim: int) -> None:
        remedy = f"pass raw counts, neither normalised nor logarithms (for these use Normal or Gamma), {SCORE}"
        super().__init__(
            Accepts(head, constraints.nonnegative_integer, "whole numbers from 0 on", remedy), event_dim=event_dim
        )
        self.num_params = num_params

    def input_layer(self) -> nn.Module:
        return Log1p()

    def log_mean(self, raw: Tensor, size_factor: Tensor | None) -> Tensor:
        """log mean, (..., *event), from one chunk of the raw numbers."""
        log_mean = log_link(raw)
        if size_factor is None:
            return log_mean
        check_size_factor(size_factor, raw.shape[: raw.ndim - self.event_dim], self.accepts.head, self.event_dim)
        return log_mean + size_factor.to(log_mean.dtype).log()


class Poisson(CountHead):
    r"""Head for Poisson counts 0, 1, 2, ...: mean = variance = size_factor exp(raw).

    For raw above 10 the mean grows linearly, so that it cannot overflow. In float32, log p(x) is accurate for counts of any
    size, unlike that of `torch.distributions.Poisson`.

    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).

    Call it with raw numbers (..., X) and an optional size factor (..., 1), such as the total count of a cell divided by the
    mean total count, or an exposure time. It returns a distribution with batch shape (...) and event shape (X,), in nats.
    Its `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for data
    that are not whole numbers from 0. The input of encoders should be log(1 + x), which `input_layer()` computes. For a
    decoder with size factors see `pyro_vae.models.WithSizeFactor`.

    :raises ArgumentError: when called with size factors that are not one positive number for each datum.

    >>> head = Poisson()
    >>> head(torch.zeros(5, 3)).mean[0]
    tensor([1., 1., 1.])
    >>> head(torch.zeros(5, 3), size_factor=torch.full((5, 1), 2.0)).mean[0]
    tensor([2., 2., 2.])
    """

    def __init__(self, *, event_dim: int = 1) -> None:
        super().__init__("Poisson", 1, event_dim=event_dim)

    def forward(self, raw: Tensor, size_factor: Tensor | None = None) -> Any:
        return self.checked(StablePoisson(self.log_mean(self.chunks(raw)[0], size_factor), validate_args=False))


class NegativeBinomial(CountHead):
    r"""Head for overdispersed counts: negative binomial with mean m = size_factor exp(raw), variance m + m^2 / theta.

    theta is the inverse dispersion, as in scvi-tools; for large theta these are Poisson counts. In float32, log p(x) is
    accurate for theta from 1e-4 to 1e7; that of `torch.distributions.NegativeBinomial` is wrong by 700 nats for 2,000 counts
    at theta = 1e6.

    :param theta: the source of theta.

        `None`
            predicted by the network for each number: `num_params` is 2, and theta = exp(raw) + 1e-4.
        a float
            a fixed value.
        `"learned"`
            exp of the parameter `theta.log_value`, the same for all data.
    :param theta_shape: shape of a learned theta: (X,) for one per number of an event, such as one per gene; () for one for
        all.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for a theta that is none of these.

    Call it with raw numbers (..., num_params * X) and an optional size factor (..., 1). Everything else is as in `Poisson`.

    >>> head = NegativeBinomial("learned", theta_shape=(2000,))
    >>> fn = head(torch.zeros(5, 2000), size_factor=torch.full((5, 1), 3.0))
    >>> fn.mean[0, 0].item(), fn.variance[0, 0].item()
    (3.0, 12.0)
    """

    def __init__(self, theta: float | str | None = None, *, theta_shape: Sequence[int] = (), event_dim: int = 1) -> None:
        option = PositiveParameter("theta", theta, shape=theta_shape, link=exp_link)
        super().__init__("NegativeBinomial", 1 + option.num_params, event_dim=event_dim)
        self.theta = option

    def forward(self, raw: Tensor, size_factor: Tensor | None = None) -> Any:
        mean, *theta = self.chunks(raw)
        log_mean = self.log_mean(mean, size_factor)
        return self.checked(StableNegativeBinomial(log_mean, self.theta(theta, mean, self.event_dim), validate_args=False))


class ZeroInflatedPoisson(CountHead):
    r"""Head for zero-inflated Poisson counts: 0 with probability g = 1 / (1 + exp(-raw)), otherwise a Poisson count.

    Lambert (1992), "Zero-Inflated Poisson Regression, with an Application to Defects in Manufacturing",
    https://doi.org/10.2307/1269547.

    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).

    Call it with raw numbers (..., 2 X), first those of the means, then the logits of g. `mean` is that of the data, (1 - g)
    times the mean of the Poisson counts. Everything else is as in `Poisson`.

    >>> ZeroInflatedPoisson()(torch.zeros(4)).mean
    tensor([0.5000, 0.5000])
    """

    def __init__(self, *, event_dim: int = 1) -> None:
        super().__init__("ZeroInflatedPoisson", 2, event_dim=event_dim)

    def forward(self, raw: Tensor, size_factor: Tensor | None = None) -> Any:
        mean, gate = self.chunks(raw)
        counts = StablePoisson(self.log_mean(mean, size_factor), validate_args=False)
        return self.checked(ZeroInflated(counts, gate, validate_args=False))


class ZeroInflatedNegativeBinomial(CountHead):
    r"""Head for zero-inflated negative binomial counts: 0 with probability g = 1 / (1 + exp(-raw)).

    Lopez et al. (2018), "Deep Generative Modeling for Single-Cell Transcriptomics",
    https://doi.org/10.1038/s41592-018-0229-2.

    :param theta: the source of theta, as in `NegativeBinomial`.
    :param theta_shape: shape of a learned theta.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for a theta that is none of these.

    Call it with raw numbers (..., num_params * X): first those of the means, then those of theta if the network predicts it,
    last the logits of g. `mean` is that of the data, (1 - g) m. Everything else is as in `Poisson`.

    >>> ZeroInflatedNegativeBinomial().num_outputs(10), ZeroInflatedNegativeBinomial("learned").num_outputs(10)
    (30, 20)
    """

    def __init__(self, theta: float | str | None = None, *, theta_shape: Sequence[int] = (), event_dim: int = 1) -> None:
        option = PositiveParameter("theta", theta, shape=theta_shape, link=exp_link)
        super().__init__("ZeroInflatedNegativeBinomial", 2 + option.num_params, event_dim=event_dim)
        self.theta = option

    def forward(self, raw: Tensor, size_factor: Tensor | None = None) -> Any:
        mean, *theta, gate = self.chunks(raw)
        log_mean = self.log_mean(mean, size_factor)
        counts = StableNegativeBinomial(log_mean, self.theta(theta, mean, self.event_dim), validate_args=False)
        return self.checked(ZeroInflated(counts, gate, validate_args=False))


def check_size_factor(size_factor: Any, batch_shape: torch.Size, head: str, event_dim: int) -> None:
    ones = (1,) * event_dim
    if not isinstance(size_factor, Tensor) or size_factor.is_complex():
        raise ArgumentError(
            f"the {head} head takes size factors as a tensor, one positive number for each datum, got "
            f"{described(size_factor)}: pass torch.as_tensor(size_factor)"
        )
    found = tuple(size_factor.shape)
    rows = found[: len(found) - event_dim]
    fits = len(found) >= event_dim and found[len(rows) :] == ones
    fits = fits and all(n in (1, m) or m == 1 for n, m in zip(rows[::-1], batch_shape[::-1], strict=False))
    if not fits:  # (B,) would be broadcast along the numbers of a datum
        raise ArgumentError(
            f"the {head} head takes one size factor for each datum, shape {(*batch_shape, *ones)} or one that broadcasts to "
            f"it, got {found}: pass size_factor.reshape(-1{', 1' * event_dim})"
        )
    if torch.distributions.Distribution._validate_args:
        bad = ~((size_factor > 0) & size_factor.isfinite())
        if bool(bad.any()):
            places = bad.flatten(-event_dim).any(-1).nonzero().squeeze(-1).tolist()
            raise ArgumentError(
                f"size factors must be positive and finite, but {int(bad.sum())} of {bad.numel()} are not, in rows "
                f"{places[:10]}{' and more' if len(places) > 10 else ''}: leave out data without any counts"
            )
