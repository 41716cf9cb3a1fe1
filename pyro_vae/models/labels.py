"""Labels that are known for some of the data: whole numbers, and -1 where unknown."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ..errors import ArgumentError, OptionError, StructureError, SupportError, described, listed

UNKNOWN = -1


class KnownLabels(TorchDistribution):
    """Distribution of the labels of data: a class where `known` is true, and -1 with probability one elsewhere.

    :param logits: log p(y), (C,).
    :param known: (B,), whether the label of a datum is known.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, logits: Tensor, known: Tensor) -> None:
        self.logits, self.known = logits, known
        super().__init__(known.shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.integer_interval(UNKNOWN, len(self.logits) - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "KnownLabels":
        return KnownLabels(self.logits, self.known.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn = dist.Categorical(logits=self.logits).sample(self._extended_shape(sample_shape))
        return torch.where(self.known, drawn, UNKNOWN)

    def log_prob(self, value: Tensor) -> Tensor:
        if torch.distributions.Distribution._validate_args and not value.is_meta:
            check_classes(value, len(self.logits))
        hit = one_hot(value, len(self.logits))
        log_p = torch.where(hit, self.logits, 0.0).sum(-1)
        return torch.where(hit.any(-1) == self.known, log_p, -torch.inf)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot labels, (..., C) bool; -1 gives a row of False.

    Unlike `torch.nn.functional.one_hot`, it reads no value into Python.
    """
    return labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)


def label_or_latent(y: Tensor | None, logits: Tensor, **options: Any) -> Tensor:
    """The known label, otherwise the latent "y"; (..., B) or a shape that broadcasts to it.

    A datum with a known label has a "y" too, because all data share one site. This "y" is not used, and it is uniform in the
    model and in the guide, so it adds nothing to log p(x, y) or to the ELBO.
    """
    if y is None:
        return sampled(logits, options)
    known = y >= 0
    return torch.where(known, y, sampled(torch.where(known.unsqueeze(-1), 0.0, logits), options))


def sampled(logits: Tensor, options: dict[str, Any]) -> Tensor:
    y: Tensor = pyro.sample("y", dist.Categorical(logits=logits), **options)
    return y


def check_labels(y: Any, num_rows: int) -> None:
    """Raise unless there is one label for each row; values are not read."""
    fits = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if not fits or y.shape != (num_rows,):
        raise ArgumentError(
            f"y must be the labels of {num_rows} data as whole numbers, a tensor ({num_rows},) with -1 where a label is "
            f"unknown, got {described(y)}: pass y.long(), of one-hot labels y.argmax(-1)"
        )


def check_classes(labels: Tensor, num_classes: int, lowest: int = UNKNOWN) -> None:
    outside = (labels < lowest) | (labels >= num_classes)
    if bool(outside.any()):
        unknown = " and -1 where unknown" if lowest == UNKNOWN else " and all known here"
        remedy = "" if lowest == UNKNOWN else ", and put vae.classify(x).probs.argmax(-1) where one is unknown"
        raise SupportError(
            f"labels must be whole numbers from 0 to {num_classes - 1},{unknown}, but {int(outside.sum())} of "
            f"{labels.numel()} are not, in data {listed(outside)} ({int(labels.min())} to {int(labels.max())}): number "
            f"the classes from 0{remedy}"
        )


def checked_logits(logits: Any, num_rows: int, num_classes: int) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape != (num_rows, num_classes):
        raise StructureError(
            f"the classifier must return a number for each class, a tensor of floats ({num_rows}, {num_classes}), got "
            f"{described(logits)}: end it with nn.Linear(width, {num_classes})"
        )
    return logits.log_softmax(-1)


def checked_class_probs(probs: Any, num_classes: int) -> Tensor:
    if probs is None:
        return torch.full((num_classes,), 1 / num_classes)
    try:
        found = torch.as_tensor(probs, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty(0)
    if found.shape != (num_classes,) or not bool((found > 0).all()) or abs(float(found.sum()) - 1) > 1e-4:
        raise OptionError(
            f"class_probs must be None or {num_classes} positive numbers whose sum is one, got {described(probs)}: pass "
            "counts / counts.sum()"
        )
    return found / found.sum()
