"""The semi-supervised VAE: the class is observed for some data and summed out for the others."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..errors import ArgumentError, described
from ..options import amount, real_number
from .checks import applied, called, drawn, num_rows
from .labels import check_classes, check_labels, checked_class_probs, checked_logits, one_hot
from .semi_supervised_programs import SemiSupervisedGuide, SemiSupervisedModel
from .vae import Networks, Part, evaluating, mean_of


class SemiSupervisedVAE(Networks):
    r"""Semi-supervised VAE, known as M2: a VAE with a class y that is observed for some of the data.

    The model is p(y) over C classes, p(z) = prior, p(x given z, y) = decoder(z, y). The guide is q(y given x) =
    classifier(x), q(z given x, y) = encoder(x, y). For a datum with a known label, and for one without::

        log p(x, y) >= E_q(z given x, y) [log p(x given z, y) + log p(y) + log p(z) - log q(z given x, y)] = L(x, y)
        log p(x) = log sum_y p(x, y) >= sum_y q(y given x) [L(x, y) - log q(y given x)]

    Kingma, Rezende, Mohamed and Welling (2014), "Semi-supervised Learning with Deep Generative Models",
    https://arxiv.org/abs/1406.5298. B data of shape X, latents of shape D; nats.

    :param classifier: module that maps x, (B, X), to a logit for each class, (B, C).
    :param encoder: module that maps x, (B, X), and y as one-hot, (..., B, C), to a distribution with batch shape (..., B)
        and event shape (D,): classes are left of the data, so x must be broadcast, as in `pyro_vae.models.Concatenated`.
    :param decoder: module that maps z, (..., B, D), and y as one-hot, (..., B, C), to a distribution with batch shape
        (..., B) and event shape X.
    :param prior: module that returns a distribution with event shape (D,), such as `pyro_vae.nn.StandardNormal`.
    :param num_classes: C, at least 2.
    :param class_probs: p(y), C positive numbers whose sum is one; uniform unless given. Not trained.
    :param alpha: weight of the classification loss, -log q(y given x), of each datum with a label. L(x, y) does not train
        the classifier on labels; this loss does. In the paper it is .1 N / N_labelled. 0 omits it.
    :raises OptionError: for a network that is not a module, or one that contains a `PyroModule`, and for numbers out of
        range.

    Call `vae.model` and `vae.guide`, and estimators built with them, with (x, y). y, (B,), has whole numbers from 0 to C -
    1, and -1 where the label is unknown; both kinds may be in one batch. Without y, all labels are unknown. The programs
    sample "y" and "latent" and observe "label" and "obs" in the plate "data". The guide enumerates "y": train with
    `BetaTraceEnum_ELBO` or Pyro's `TraceEnum_ELBO`. Where a label is known, the latent "y" is not used and uniform. Every
    datum is decoded C times. Everything else is as in `VAE`.

    The classification loss is part of the training loss only. It is not part of the bound, and evaluations leave it out and
    say so.

    When called, model and guide raise `ArgumentError` for labels of a wrong shape or type, and `SupportError` for numbers
    that are not a class.

    Example::

        vae = pv.SemiSupervisedVAE(
            classifier=nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
            encoder=pv.models.Concatenated(nn.Sequential(nn.Linear(64 + 10, 16), pv.nn.Normal())),
            decoder=pv.models.Concatenated(nn.Sequential(nn.Linear(8 + 10, 64), pv.nn.Binomial(16))),
            prior=pv.nn.StandardNormal(8),
            num_classes=10,
        )
        y = torch.where(torch.arange(len(labels)) < 50, labels, -1)     # (B,): the first fifty are known
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pv.BetaTraceEnum_ELBO(max_plate_nesting=1))
        svi.step(x, y)
        vae.classify(x).probs                                           # (B, 10)
        pv.AdaptiveImportanceSampling(vae.model, vae.guide, seed=0)(x)  # log p(x), summed over the labels
    """

    model: SemiSupervisedModel
    guide: SemiSupervisedGuide
    classifier = Part("guide")

    def __init__(
        self,
        classifier: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: nn.Module,
        num_classes: int,
        *,
        class_probs: Sequence[float] | Tensor | None = None,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        num_classes = amount("num_classes", num_classes, lowest=2)
        self.model = SemiSupervisedModel(decoder, prior, checked_class_probs(class_probs, num_classes))
        self.guide = SemiSupervisedGuide(classifier, encoder, num_classes, real_number("alpha", alpha))

    def classify(self, x: Tensor) -> TorchDistribution:
        """q(y given x): a categorical distribution with batch shape (B,) over the C classes.

        This is the guide. The posterior of the model, p(y given x), is proportional to p(x, y). For log p(x, y) call
        `pv.AutoEvidence(vae.model, vae.guide)(x, y)` with y set to one class after the other.
        """
        logits = called("classifier", self.classifier, x)
        return dist.Categorical(logits=checked_logits(logits, num_rows(x), self.guide.num_classes))

    def encode(self, x: Tensor, y: Tensor) -> TorchDistribution:
        """q(z given x, y) for known labels, (B,): a distribution with batch shape (B,) and event shape (D,)."""
        return applied("encoder", self.encoder, x, self._one_hot(y, num_rows(x)))

    def decode(self, z: Tensor, y: Tensor) -> TorchDistribution:
        """p(x given z, y) for z of shape (..., B, D) and known labels, (B,): batch shape (..., B), event shape X."""
        if not isinstance(z, Tensor) or z.ndim < 2:
            raise ArgumentError(f"z must have a row for each datum, (..., B, D), got {described(z)}: pass z[None]")
        return applied("decoder", self.decoder, z, self._one_hot(y, z.shape[-2]))

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean of the likelihood at one draw of the guide per row: (B, X) to (B, X); as `VAE.reconstruct`.

        Unknown labels are drawn from q(y given x); y, (B,), has -1 there.
        """
        with evaluating(self):
            y = self._completed(y, self.classify(x), num_rows(x))
            return mean_of(self.decode(drawn("encoder", self.encode(x, y)), y))

    def generate(self, y: Tensor) -> Tensor:
        """Draw one datum for each label, (B,): (B, X). For -1 the class is drawn from p(y). Otherwise as `VAE.generate`."""
        size = num_rows(y)
        with evaluating(self):
            y = self._completed(y, dist.Categorical(logits=self.model.class_logits).expand([size]), size)
            return drawn("decoder", self.decode(drawn("prior", self.prior(), size), y))

    def _one_hot(self, y: Any, size: int) -> Tensor:
        check_labels(y, size)
        check_classes(y, self.guide.num_classes, lowest=0)
        return one_hot(y, self.guide.num_classes).to(self.model.class_probs.dtype)

    def _completed(self, y: Any, unknown: TorchDistribution, size: int) -> Tensor:
        labels = drawn("classifier", unknown)
        if y is None:
            return labels
        check_labels(y, size)
        check_classes(y, self.guide.num_classes)
        return torch.where(y >= 0, y, labels)
