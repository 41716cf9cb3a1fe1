"""Heads for real numbers with outliers: Laplace and Student's t."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ..errors import OptionError
from .checked import finite_numbers
from .head import Head
from .parameters import PositiveParameter
from .stirling import HALF_LOG_2PI, stirling_rest


class Laplace(Head):
    r"""Head of Laplace numbers, with a sharp peak and exponential tails: density exp(-abs(x - loc) / scale) / (2 scale).

    With a *fixed* scale, as in `Laplace(1.0)`, minus log p(x given z) is the absolute error divided by the scale, up to a
    constant.

    :param scale: the source of the scale.

        `None`
            predicted by the network for each number: `num_params` is 2, and scale = log2(1 + 2^raw) + 1e-4.
        a float
            a fixed value.
        `"learned"`
            one for all numbers, exp of the parameter `scale.log_value`.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for any other scale.

    Call it with raw numbers (..., num_params * X), first the locations. It returns a distribution with batch shape (...) and
    event shape (X,), in nats. Its `log_prob` raises `SupportError` for data of another event shape and, while Pyro's
    argument checks are on, for NaN and infinite data.

    >>> Laplace(1.0)(torch.zeros(2)).log_prob(torch.tensor([0.0, 3.0]))
    tensor(-4.3863)
    """

    def __init__(self, scale: float | str | None = None, *, event_dim: int = 1) -> None:
        super().__init__(finite_numbers("Laplace"), event_dim=event_dim)
        self.scale = PositiveParameter("scale", scale)
        self.num_params = 1 + self.scale.num_params

    def forward(self, raw: Tensor) -> Any:
        loc, *scale = self.chunks(raw)
        return self.checked(dist.Laplace(loc, self.scale(scale, loc, self.event_dim), validate_args=False))


class StudentT(Head):
    r"""Head for real numbers with outliers: Student's t with `df` degrees of freedom, with tails abs(x)^-(df + 1).

    :param df: degrees of freedom: a fixed positive number (above 2 the variance is finite), or `"learned"`: one for all
        numbers, 2 + exp of the parameter `df.log_value`.
    :param scale: the source of the scale, as in `Laplace`. It is not the standard deviation: the variance is scale^2 df /
        (df - 2).
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for any other `df` or scale.

    Call it with raw numbers (..., num_params * X), first the locations. In float32 the density is accurate for any df.
    Everything else is as in `Laplace`.

    >>> StudentT(df=4.0, scale=1.0)(torch.zeros(2)).log_prob(torch.tensor([0.0, 10.0]))
    tensor(-10.1069)
    """

    def __init__(self, df: float | str = "learned", scale: float | str | None = None, *, event_dim: int = 1) -> None:
        super().__init__(finite_numbers("StudentT"), event_dim=event_dim)
        if df is None:
            raise OptionError("df must be a positive number or 'learned', got None: the network gives no degrees of freedom")
        self.df, self.scale = PositiveParameter("df", df), PositiveParameter("scale", scale)
        self.num_params = 1 + self.scale.num_params

    def forward(self, raw: Tensor) -> Any:
        loc, *scale = self.chunks(raw)
        df = self.df((), loc, self.event_dim)
        df = df + 2 if self.df.option == "learned" else df
        return self.checked(StableStudentT(df, loc, self.scale(scale, loc, self.event_dim), validate_args=False))


class StableStudentT(TorchDistribution):
    r"""Student's t, with the difference of log-gammas in its normaliser computed without cancellation.

    That difference is -log(df / 2) / 2 to leading order, of numbers of the size of df log(df). In float32
    `torch.distributions.StudentT` is wrong by 0.005 nats at df = 1e4 and by 0.02 at 1e5, with the same sign for every number
    of a datum.
    """

    arg_constraints = {"df": constraints.positive, "loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.df, self.loc, self.scale = df, loc, scale  # not broadcast, because one df has one normaliser
        super().__init__(torch.broadcast_shapes(df.shape, loc.shape, scale.shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StableStudentT":
        new = self._get_checked_instance(StableStudentT, _instance)
        StableStudentT.__init__(new, self.df, self.loc.expand(batch_shape), self.scale, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half, distance = self.df / 2, (value - self.loc) / self.scale
        log_gammas = half * torch.log1p(1 / self.df) - 0.5 + stirling_rest(half + 0.5) - stirling_rest(half)
        return log_gammas - HALF_LOG_2PI - self.scale.log() - (half + 0.5) * torch.log1p(distance.square() / self.df)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  as in torch
        shape = self._extended_shape(sample_shape)
        normal = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        chi2 = dist.Chi2(self.df.expand(shape), validate_args=False).rsample()
        return self.loc + self.scale * normal * (self.df / chi2).sqrt()

    @property
    def mean(self) -> Tensor:
        return torch.where(self.df > 1, self.loc, torch.nan).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        finite = self.scale.square() * self.df / (self.df - 2)
        infinite = torch.where(self.df > 1, torch.inf, torch.nan).to(finite)
        return torch.where(self.df > 2, finite, infinite).expand(self.batch_shape)
