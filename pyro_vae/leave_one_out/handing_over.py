"""Draws and log-likelihoods in the format of ArviZ."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .smoothing import smoothed

if TYPE_CHECKING:
    from .leave_one_out_result import LeaveOneOutResult


def inference_data(record: LeaveOneOutResult, log_weights: Tensor | None, seed: int) -> Any:
    """One chain of the draws, or of as many resampled by their log-weights, (S,)."""
    arviz = imported()
    chosen = torch.arange(record.num_draws) if log_weights is None else resampled(log_weights, seed)
    groups = {
        "posterior": {name: chain(value, chosen) for name, value in record.draws.items()},
        "log_likelihood": {record.plate: chain(record.log_likelihood, chosen)},
    }
    if int(arviz.__version__.partition(".")[0]) < 1:
        return arviz.from_dict(**groups)
    return arviz.from_dict(groups)


def imported() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a warning of ArviZ about its refactoring
            import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ, which is not installed: pip install arviz") from error
    return arviz


def chain(value: Tensor, chosen: Tensor) -> Any:
    """(1, S, ...)."""
    return value.detach().cpu()[chosen].unsqueeze(0).numpy()


def resampled(log_weights: Tensor, seed: int) -> Tensor:
    """S indices resampled by weight, (S,): systematic, so that with equal weights each draw is chosen once."""
    share = smoothed(log_weights)[0].softmax(0).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    # Away from the ends of the steps, so that rounding changes no index where weights are equal.
    start = 0.25 + 0.5 * torch.rand((), generator=generator, dtype=torch.float64)
    position = (torch.arange(len(share), dtype=torch.float64) + start) / len(share)
    return torch.searchsorted(share.cumsum(0), position).clamp(max=len(share) - 1)
