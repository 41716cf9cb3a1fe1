"""Gaussian heads: for encoders, and for real-valued data with a scale from the network, given, learned or optimal."""

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import full_under_autocast
from ..errors import ArgumentError, OptionError
from ..options import amount, is_real, plain_float
from .checked import finite_numbers
from .distributions import CheckedMultivariateNormal
from .head import Family, Head
from .shared_scale import BATCHES, shared_scale

SMALLEST_SCALE = 1e-4


def softplus2(raw: Tensor) -> Tensor:
    """log2(1 + 2^raw) in one operation: 1 at 0 with slope 1/2, as exp(raw / 2) has, but for large `raw` it grows like it.

    exp does as long as the numbers of a network stay small. Early in training, on data that are not standardised, they do
    not: at raw = 50 the KL term of the scale exp(raw / 2) is 1e21, and Adam's second moment overflows float32 for good.
    """
    return F.softplus(raw, beta=math.log(2), threshold=40)  # torch's 20 leaves an error of 2e-9, float64 has better


def positive(raw: Tensor) -> Tensor:
    """A scale from any number, bounded away from 0: else the density of a constant pixel would have no bound."""
    return softplus2(raw) + SMALLEST_SCALE


class Normal(Head):
    r"""Independent normal numbers: N(loc, scale^2), for encoders and for real-valued data.

    :param scale: whose the scale is.

        `None`
            the network's, per number: `num_params` is 2, and scale = log2(1 + 2^raw) + 1e-4 (standardise data whose noise
            may be smaller than that).
        a float
            given.
        `"learned"`
            one for all numbers, `exp(log_scale)` of the parameter `log_scale`.
        `"optimal"`
            one for all numbers, the best there is: scale^2 is the mean squared error (sigma-VAE; Rybkin, Daniilidis and
            Levine, 2021, https://arxiv.org/abs/2006.13202). In train mode, `log_prob` takes the mean over all that it is
            given: batch, particles and event. That makes the density of a datum depend on its batch, so it is for training
            alone. In eval mode, and in train mode where gradients are off (`torch.no_grad`, `SVI.evaluate_loss`), the head
            is a plain Normal with the scale that it kept in its buffer `variance`: the average over training batches, the
            last about ten counting most. Call `.eval()` before anything but training; the estimators of `pyro_vae` refuse
            the head in train mode (`BatchCouplingError`). What `poutine.mask` leaves out counts in the mean all the same:
            use `"learned"` there.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for a scale that is none of these.

    Called with raw numbers (..., num_params * X), returns a distribution with batch shape (...) and event shape (X,), in
    nats. Its `log_prob` raises `SupportError` for data of another event shape and, while Pyro's argument checks are on, for
    NaN and infinite data.

    >>> head = Normal()
    >>> head.num_outputs(20), head(torch.zeros(5, 40)).event_shape
    (40, torch.Size([20]))
    >>> Normal("learned")(torch.zeros(5, 20)).event_shape
    torch.Size([20])
    """

    def __init__(self, scale: float | str | None = None, *, event_dim: int = 1) -> None:
        super().__init__(finite_numbers("Normal"), event_dim=event_dim)
        if is_real(scale):
            scale = plain_float(scale)
        known = scale is None or isinstance(scale, str) and scale in ("learned", "optimal")
        if not (0 < scale < math.inf if isinstance(scale, float) else known):
            raise OptionError(f"scale must be None, a positive number, 'learned' or 'optimal', got {scale!r}")
        self.num_params = 2 if scale is None else 1
        self.option = scale
        self.couples_batch = scale == "optimal"  # in train mode; the kernel refuses to evaluate it there
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        if scale == "optimal":
            self.variance: Tensor
            self.num_batches: Tensor
            self.register_buffer("variance", torch.ones(()))
            self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, raw: Tensor) -> Any:
        chunks = self.chunks(raw)
        if self.option is None:
            return self.checked(dist.Normal(chunks[0], positive(chunks[1]), validate_args=False))
        scale = self.scale
        scale = scale if isinstance(scale, Tensor) else chunks[0].new_full((), scale)  # exact in any dtype, as no buffer is
        keep = self.keep if self.couples_batch and self.training else None
        return shared_scale(chunks[0], scale, self.event_dim, self.accepts, keep)

    @property
    def scale(self) -> Any:
        """The one scale of all numbers: the float given, a tensor () if learned or optimal; `None` from the network."""
        if self.option == "learned":
            return self.log_scale.exp()
        return self.variance.sqrt() if self.option == "optimal" else self.option

    @torch.no_grad()
    def keep(self, variance: Tensor) -> None:
        """Average the optimum of one more training batch into the buffer."""
        self.num_batches += 1
        self.variance += (variance - self.variance) / self.num_batches.clamp(max=BATCHES)


class MultivariateNormal(Family):
    r"""A normal vector with full covariance, N(loc, L L^T), mostly for encoders.

    The network gives D numbers for loc, D for the diagonal of L (made positive as in `Normal`) and D (D - 1) / 2 for what
    is below it, row by row.

    :raises ArgumentError: when called, if no D fits the width of the raw numbers.

    Called with raw numbers (..., D (D + 3) / 2), returns a distribution with batch shape (...) and event shape (D,), in
    nats. Its KL to `StandardNormal` is analytic.

    >>> head = MultivariateNormal()
    >>> head.num_outputs(20), head(torch.zeros(5, 230)).event_shape
    (230, torch.Size([20]))
    """

    def num_outputs(self, event_size: int) -> int:
        event_size = amount("event_size", event_size)
        return event_size * (event_size + 3) // 2

    def forward(self, raw: Tensor) -> Any:
        self.check_raw(raw)
        raw = full_under_autocast(raw)
        width = raw.shape[-1]
        dim = (math.isqrt(9 + 8 * width) - 3) // 2
        if dim < 1 or self.num_outputs(dim) != width:
            raise ArgumentError(
                f"the MultivariateNormal head needs D (D + 3) / 2 numbers for D latents, got shape {tuple(raw.shape)}: let "
                "the network's last layer have head.num_outputs(D) outputs"
            )
        loc, diagonal, below = raw.split([dim, dim, width - 2 * dim], -1)
        # Entries of L are picked from [diagonal, below, 0]: nothing is written in place, which torch.vmap would refuse.
        rows, columns = torch.tril_indices(dim, dim, offset=-1, device=raw.device)
        picks = torch.full((dim, dim), width - dim, device=raw.device)
        picks[rows, columns] = torch.arange(dim, width - dim, device=raw.device)
        picks.diagonal().copy_(torch.arange(dim, device=raw.device))
        entries = torch.cat([positive(diagonal), below, torch.zeros_like(raw[..., :1])], -1)
        return CheckedMultivariateNormal(loc, scale_tril=entries[..., picks], validate_args=False)
