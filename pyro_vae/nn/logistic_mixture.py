"""A head for whole numbers with several peaks: a mixture of rounded logistic variables."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..options import whole_number
from .distributions import LogisticLevels
from .gaussian import softplus2
from .head import Head
from .inputs import Scale
from .likelihoods import SMALLEST_LOGISTIC_SCALE, whole_numbers


class DiscretizedLogisticMixture(Head):
    r"""Head for whole numbers 0, ..., n - 1, such as pixel levels: a mixture of C rounded logistic variables each.

    The network gives C logits of the weights, C locations and C scales per number, in the units of `DiscretizedLogistic`. If
    its raw number is 0, component c has its location in the middle of the c-th of C equal parts of the range, so that
    components start at different locations::

        loc = (n - 1) / 2 (1 + (2 c + 1) / C - 1 + raw),   c = 0, ..., C - 1

    Given the latents, the numbers are independent. So are the channels of a pixel, which are dependent in PixelCNN++.

    Salimans et al., 2017 (PixelCNN++), https://arxiv.org/abs/1701.05517.

    :param num_levels: n, 256 for bytes.
    :param num_components: C. With C = 1 it is `DiscretizedLogistic`. Memory and time grow with C.
    :param event_dim: 1 for vectors (X,), 3 for images (C', H, W).
    :raises OptionError: if `num_levels` is below 2 or `num_components` below 1.

    Call it with raw numbers (..., 3 C X). It returns a distribution with batch shape (...) and event shape (X,), in nats.
    Its `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for
    anything but the whole numbers from 0 to n - 1. The input of encoders should be in [-1, 1], which `input_layer()`
    computes.

    >>> head = DiscretizedLogisticMixture(256, num_components=5, event_dim=3)
    >>> head.num_outputs(3), head(torch.zeros(45, 32, 32)).event_shape
    (45, torch.Size([3, 32, 32]))
    """

    def __init__(self, num_levels: int = 256, *, num_components: int = 5, event_dim: int = 1) -> None:
        self.num_levels = whole_number("num_levels", num_levels, lowest=2)
        self.num_components = whole_number("num_components", num_components, lowest=1)
        super().__init__(whole_numbers("DiscretizedLogisticMixture", num_levels - 1), event_dim=event_dim)
        self.num_params = 3 * self.num_components

    def input_layer(self) -> nn.Module:
        return Scale(2 / (self.num_levels - 1), shift=-1.0)

    def forward(self, raw: Tensor) -> Any:
        chunks, count = self.chunks(raw), self.num_components
        logits, loc, raw_scale = (torch.stack(chunks[i * count : (i + 1) * count], -1) for i in range(3))
        half = (self.num_levels - 1) / 2
        middle = (2 * torch.arange(count, dtype=loc.dtype, device=loc.device) + 1) / count
        scale = half / 4 * softplus2(raw_scale) + SMALLEST_LOGISTIC_SCALE
        levels = LogisticLevels(half * (middle + loc), scale, self.num_levels, validate_args=False)
        weights = dist.Categorical(logits=logits, validate_args=False)
        return self.checked(LevelsMixture(weights, levels, validate_args=False))


class LevelsMixture(dist.MixtureSameFamily):
    """Pyro's mixture, with a support that is discrete and has its values."""

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return self.component_distribution.support
