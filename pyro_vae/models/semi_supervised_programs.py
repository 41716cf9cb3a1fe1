"""The Pyro programs of the semi-supervised VAE."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .checks import checked_network, num_rows
from .labels import KnownLabels, check_labels, checked_logits, label_or_latent, one_hot
from .parameters import Program, announce
from .programs import observe, sample_rows


class SemiSupervisedModel(Program):
    """y ~ Categorical, observed as "label" where it is known; z ~ prior(); x ~ decoder(z, y)."""

    class_probs: Tensor

    def __init__(self, decoder: nn.Module, prior: nn.Module, class_probs: Tensor) -> None:
        super().__init__("model")
        self.decoder = checked_network("decoder", decoder)
        self.prior = checked_network("prior", prior)
        self.register_buffer("class_probs", class_probs)

    @property
    def class_logits(self) -> Tensor:
        """log p(y), (C,), normalised in the precision of the call."""
        return self.class_probs.log().log_softmax(-1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        announce(self)
        size, class_logits = num_rows(x), self.class_logits
        with pyro.plate("data", size):
            if y is not None:
                check_labels(y, size)
                y = pyro.sample("label", KnownLabels(class_logits, y >= 0), obs=y)
            y = label_or_latent(y, class_logits)
            z, rows = sample_rows("latent", "prior", self.prior(), (), (size,))
            batch_shape = torch.broadcast_shapes(rows, y.shape, (size,))
            classes = one_hot(y, len(class_logits)).to(class_logits.dtype)
            observe(x, self.decoder(z, classes.expand(*y.shape[:-1], size, -1)), batch_shape)


class SemiSupervisedGuide(Program):
    """y ~ classifier(x), enumerated; z ~ encoder(x, y); and the classification loss."""

    def __init__(self, classifier: nn.Module, encoder: nn.Module, num_classes: int, alpha: float) -> None:
        super().__init__("guide")
        self.classifier = checked_network("classifier", classifier)
        self.encoder = checked_network("encoder", encoder)
        self.num_classes, self.alpha = num_classes, alpha

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        announce(self)
        size = num_rows(x)
        logits = checked_logits(self.classifier(x), size, self.num_classes)
        with pyro.plate("data", size):
            if y is not None:
                check_labels(y, size)
                self._add_loss(torch.where(one_hot(y, self.num_classes), logits, 0.0).sum(-1))
            y = label_or_latent(y, logits, infer={"enumerate": "parallel"})
            classes = one_hot(y, self.num_classes).to(logits.dtype)
            posterior = self.encoder(x, classes.expand(*y.shape[:-1], size, -1))
            sample_rows("latent", "encoder", posterior, torch.broadcast_shapes(y.shape, (size,)), (size,))

    def _add_loss(self, log_q: Tensor) -> None:
        """Add alpha times -log q(y given x) of known labels, (B,), to the loss of objectives; evaluations leave it out."""
        if self.alpha:
            # with False, Pyro's objectives would take it for a score
            loss = dist.Unit(-self.alpha * log_q, has_rsample=True)
            marks: Any = {"is_auxiliary": True, "is_loss": True}
            pyro.sample("classification", loss, obs=loss.sample(), infer=marks)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, alpha={self.alpha:g}"
