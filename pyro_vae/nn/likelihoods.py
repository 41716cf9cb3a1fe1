"""Heads for data that are not arbitrary real numbers: binary, counts, classes, whole numbers, numbers in [0, 1]."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..options import amount, whole_number
from .checked import Accepts
from .distributions import FastBinomial, LogisticLevels, StableContinuousBernoulli
from .gaussian import softplus2
from .head import Head
from .inputs import OneHot, Scale

SCORE = (
    "or turn the check off with pyro.enable_validation(False) and take the result for a score. Values masked by "
    "poutine.mask must be replaced by values inside the support"
)
SMALLEST_LOGISTIC_SCALE = 1 / 32


class Bernoulli(Head):
    """Head for binary data, 0 or 1: the network gives logits.

    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).

    Call it with raw numbers (..., X). It returns a distribution with batch shape (...) and event shape (X,), in nats. Its
    `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for anything
    but 0 and 1. For grey pixels, binarise them, or use `ContinuousBernoulli`.

    >>> Bernoulli()(torch.zeros(3)).log_prob(torch.tensor([0.0, 1.0, 1.0]))
    tensor(-2.0794)
    """

    def __init__(self, *, event_dim: int = 1) -> None:
        remedy = f"binarise them, use ContinuousBernoulli for numbers in [0, 1], {SCORE}"
        super().__init__(Accepts("Bernoulli", constraints.boolean, "0 or 1", remedy), event_dim=event_dim)

    def forward(self, raw: Tensor) -> Any:
        return self.checked(dist.Bernoulli(logits=self.chunks(raw)[0], validate_args=False))


class ContinuousBernoulli(Head):
    """Head for numbers in [0, 1], such as grey pixels: density proportional to p^x (1 - p)^(1 - x).

    The network gives logits of p.

    The normalised density for data that are often used with a Bernoulli (Loaiza-Ganem and Cunningham, 2019,
    https://arxiv.org/abs/1907.06845). Its mean is not p.

    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).

    Call it with raw numbers (..., X). It returns a distribution with batch shape (...) and event shape (X,), in nats. Its
    `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for data
    outside [0, 1].

    >>> ContinuousBernoulli()(torch.zeros(3)).log_prob(torch.tensor([0.0, 0.3, 1.0]))
    tensor(0.)
    """

    def __init__(self, *, event_dim: int = 1) -> None:
        accepts = Accepts(
            "ContinuousBernoulli", constraints.unit_interval, "numbers from 0 to 1", f"scale them to [0, 1], {SCORE}"
        )
        super().__init__(accepts, event_dim=event_dim)

    def forward(self, raw: Tensor) -> Any:
        return self.checked(StableContinuousBernoulli(self.chunks(raw)[0], validate_args=False))


class Binomial(Head):
    """Head for counts of successes in n trials, 0, ..., n: the network gives logits.

    :param total_count: n, the same for all numbers.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: if `total_count` is below 1.

    Call it with raw numbers (..., X). It returns a distribution with batch shape (...) and event shape (X,), in nats. Its
    `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for anything
    but the whole numbers from 0 to n. The input of encoders should be x / n, which `input_layer()` computes.

    >>> Binomial(16)(torch.zeros(64)).log_prob(torch.full((64,), 8.0))
    tensor(-104.1729)
    """

    def __init__(self, total_count: int, *, event_dim: int = 1) -> None:
        self.total_count = whole_number("total_count", total_count, lowest=1)
        super().__init__(whole_numbers("Binomial", self.total_count), event_dim=event_dim)

    def input_layer(self) -> nn.Module:
        return Scale(1 / self.total_count)

    def forward(self, raw: Tensor) -> Any:
        return self.checked(FastBinomial(self.total_count, self.chunks(raw)[0], validate_args=False))


class Categorical(Head):
    """Head for one of C classes per number: data are class indices; the network gives C logits each, class by class.

    :param num_classes: C, the same for all numbers.
    :param event_dim: 1 for vectors (X,), 3 for images (C', H, W), for which the network gives (C * C', H, W).
    :raises OptionError: if `num_classes` is below 2.

    Call it with raw numbers (..., C * X). It returns a distribution with batch shape (...) and event shape (X,), in nats.
    Its `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for
    anything but the whole numbers from 0 to C - 1. The input of encoders should be one-hot data (..., C * X), which
    `input_layer()` computes.

    >>> Categorical(4)(torch.zeros(12)).log_prob(torch.tensor([0, 3, 1]))
    tensor(-4.1589)
    """

    def __init__(self, num_classes: int, *, event_dim: int = 1) -> None:
        self.num_params = amount("num_classes", num_classes, lowest=2)
        super().__init__(whole_numbers("Categorical", num_classes - 1), event_dim=event_dim)

    def input_layer(self) -> nn.Module:
        return OneHot(self.num_params, event_dim=self.event_dim)

    def forward(self, raw: Tensor) -> Any:
        return self.checked(dist.Categorical(logits=torch.stack(self.chunks(raw), -1), validate_args=False))


class DiscretizedLogistic(Head):
    r"""Head for whole numbers 0, ..., n - 1, such as pixel levels: a rounded logistic variable, with the tails at the edges.

    The network gives a location and a scale per number, in units of half the range::

        loc = (n - 1) / 2 (1 + raw),   scale = (n - 1) / 8 log2(1 + 2^raw) + 1/32   levels

    At a scale of 1/32 of a level, all but 2e-7 of the probability is on one level, so a smaller scale would gain nothing.
    The bound keeps gradients in the tails bounded.

    Kingma et al., 2016, https://arxiv.org/abs/1606.04934; Salimans et al., 2017 (PixelCNN++),
    https://arxiv.org/abs/1701.05517.

    :param num_levels: n, 256 for bytes.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: if `num_levels` is below 2.

    Call it with raw numbers (..., 2 X). It returns a distribution with batch shape (...) and event shape (X,), in nats. Its
    `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for anything
    but the whole numbers from 0 to n - 1. The input of encoders should be in [-1, 1], which `input_layer()` computes.

    >>> DiscretizedLogistic(256, event_dim=3)(torch.zeros(6, 32, 32)).event_shape
    torch.Size([3, 32, 32])
    """

    num_params = 2

    def __init__(self, num_levels: int = 256, *, event_dim: int = 1) -> None:
        self.num_levels = whole_number("num_levels", num_levels, lowest=2)
        super().__init__(whole_numbers("DiscretizedLogistic", num_levels - 1), event_dim=event_dim)

    def input_layer(self) -> nn.Module:
        return Scale(2 / (self.num_levels - 1), shift=-1.0)

    def forward(self, raw: Tensor) -> Any:
        loc, raw_scale = self.chunks(raw)
        half = (self.num_levels - 1) / 2
        scale = half / 4 * softplus2(raw_scale) + SMALLEST_LOGISTIC_SCALE
        return self.checked(LogisticLevels(half * (1 + loc), scale, self.num_levels, validate_args=False))


def whole_numbers(head: str, largest: int) -> Accepts:
    remedy = f"scale and round them, choose another head, {SCORE}"
    return Accepts(head, constraints.integer_interval(0, largest), f"whole numbers from 0 to {largest}", remedy)
