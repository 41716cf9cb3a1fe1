"""Gaussian heads, for encoders and for real-valued data, with a scale that is predicted, fixed, learned or optimal."""

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
    """log2(1 + 2^raw) in one operation: like exp(raw / 2), 1 with slope 1/2 at 0, but it grows linearly for large `raw`.

    exp would be enough if the numbers of a network stayed small. Early in training, on data that are not standardised, they
    do not: at raw = 50 the KL term of the scale exp(raw / 2) is 1e21, and Adam's second moment overflows in float32 and does
    not recover.
    """
    # torch's threshold of 20 has an error of 2e-9; float64 is more accurate
    return F.softplus(raw, beta=math.log(2), threshold=40)


def positive(raw: Tensor) -> Tensor:
    """A scale from any number, bounded away from 0: otherwise the density of a constant pixel would be unbounded."""
    return softplus2(raw) + SMALLEST_SCALE


class Normal(Head):
    r"""Head of independent normal numbers, N(loc, scale^2), for encoders and for real-valued data.

    :param scale: the source of the scale.

        `None`
            predicted by the network for each number: `num_params` is 2, and scale = log2(1 + 2^raw) + 1e-4. Standardise data
            whose noise may be smaller than that.
        a float
            a fixed value.
        `"learned"`
            one for all numbers, `exp(log_scale)` of the parameter `log_scale`.
        `"optimal"`
            one for all numbers, with the largest likelihood: scale^2 is the mean squared error (sigma-VAE; Rybkin,
            Daniilidis and Levine, 2021, https://arxiv.org/abs/2006.13202). In train mode, `log_prob` takes the mean over
            batch, particles and event, so the density of a datum depends on its batch. Use train mode for training only. In
            eval mode, and without gradients (`torch.no_grad`, `SVI.evaluate_loss`), the head is a plain Normal. Its scale is
            then that of the buffer `variance`: an average over training batches, mainly the last ten. Call `.eval()` before
            you evaluate; the estimators of `pyro_vae` raise for the head in train mode (`BatchCouplingError`). Numbers
            masked by `poutine.mask` count in the mean nevertheless: use `"learned"` with masks.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for any other scale.

    Call it with raw numbers (..., num_params * X). It returns a distribution with batch shape (...) and event shape (X,), in
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
        scale = scale if isinstance(scale, Tensor) else chunks[0].new_full((), scale)  # exact in any dtype, unlike a buffer
        keep = self.keep if self.couples_batch and self.training else None
        return shared_scale(chunks[0], scale, self.event_dim, self.accepts, keep)

    @property
    def scale(self) -> Any:
        """The scale of all numbers: a float if fixed, a tensor () if learned or optimal, `None` if predicted."""
        if self.option == "learned":
            return self.log_scale.exp()
        return self.variance.sqrt() if self.option == "optimal" else self.option

    @torch.no_grad()
    def keep(self, variance: Tensor) -> None:
        """Average the optimal variance of one more training batch into the buffer."""
        self.num_batches += 1
        self.variance += (variance - self.variance) / self.num_batches.clamp(max=BATCHES)


class MultivariateNormal(Family):
    r"""Head of a normal vector with full covariance, N(loc, L L^T), mainly for encoders.

    The network gives D numbers for loc, D for the diagonal of L (made positive as in `Normal`) and D (D - 1) / 2 for the
    entries below it, row by row.

    :raises ArgumentError: when called, if no D gives the width of the raw numbers.

    Call it with raw numbers (..., D (D + 3) / 2). It returns a distribution with batch shape (...) and event shape (D,), in
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
                f"the MultivariateNormal head needs D (D + 3) / 2 numbers for D latents, got shape {tuple(raw.shape)}: "
                "give the network's last layer head.num_outputs(D) outputs"
            )
        loc, diagonal, below = raw.split([dim, dim, width - 2 * dim], -1)
        # Entries of L are selected from [diagonal, below, 0], because torch.vmap does not allow writing in place.
        rows, columns = torch.tril_indices(dim, dim, offset=-1, device=raw.device)
        picks = torch.full((dim, dim), width - dim, device=raw.device)
        picks[rows, columns] = torch.arange(dim, width - dim, device=raw.device)
        picks.diagonal().copy_(torch.arange(dim, device=raw.device))
        entries = torch.cat([positive(diagonal), below, torch.zeros_like(raw[..., :1])], -1)
        return CheckedMultivariateNormal(loc, scale_tril=entries[..., picks], validate_args=False)
