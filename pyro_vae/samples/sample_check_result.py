"""The record of reconstruction error, sharpness and nearest neighbours."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..records import Result, page, to_plain
from .ranks import Statistic, probability_below, rank_correlation


@dataclass(frozen=True, eq=False, repr=False)
class SampleCheckResult(Result):
    """Reconstruction error, sharpness and neighbours of N held-out data and N samples, as returned by `SampleCheck`.

    X numbers per datum.

    :ivar reconstruction_error: (N,) mean squared difference between a datum and the mean of the likelihood at one draw of
        the guide, per number of the datum, in the square of the data's own units.
    :ivar log_evidence: (N,) log p(x) of the same data, nats; `None` where none was passed.
    :ivar sharpness: variance of the Laplacian of N images each, (N,), in the square of the data's units: of the held-out
        `"data"`, of `"reconstruction_means"`, of `"sample_means"` (the likelihood's mean at a draw of the prior) and of
        `"sample_draws"`; `None` where the data are not images.
    :ivar sample_distance: (N,) Euclidean distance of each sample draw to its nearest training datum, in units of the data.
    :ivar data_distance: (N,) the same of each held-out datum.
    :ivar nearest: (N,) the index of the training datum nearest to each sample, in the order of `train`.
    :ivar closest: (n,) the samples with the smallest distances, smallest first, n at most 20.
    :ivar closest_samples: (n, X) those samples.
    :ivar closest_train: (n, X) the training datum nearest to each of them.
    :ivar image_shape: (H, W) or (C, H, W) of the X numbers, or `None` where they are not an image.
    :ivar num_train: M, the training data.
    :ivar support_checked: `False` when values outside the likelihood's support were allowed: `log_evidence` is then a score.

    Example::

        looks = pv.SampleCheck(vae.model, vae.guide)(test_loader, train=train_loader)
        looks.probability_nearer, looks.verdict()
    """

    _hidden = ("closest", "closest_samples", "closest_train", "image_shape")

    reconstruction_error: Tensor
    log_evidence: Tensor | None
    sharpness: Mapping[str, Tensor] | None
    sample_distance: Tensor
    data_distance: Tensor
    nearest: Tensor
    closest: Tensor
    closest_samples: Tensor
    closest_train: Tensor
    image_shape: tuple[int, ...] | None
    num_train: int
    support_checked: bool = True

    def __len__(self) -> int:
        return len(self.reconstruction_error)

    def rank_correlation(self) -> Statistic:
        """Spearman's correlation of log p(x) and minus the reconstruction error over the N data, with its sampling error.

        It is 1 if data with smaller errors always have larger log p(x). The error is the spread of the influence of single
        data, without assumptions about the distribution; it is right with about 50 data or more. Noise of the draws and of
        log p(x) makes the value smaller. NaN without log p(x), and with fewer than 4 data.
        """
        error = -self.reconstruction_error.double()
        missing = error * math.nan
        return rank_correlation(error, missing if self.log_evidence is None else self.log_evidence.double())

    def probability_nearer(self) -> Statistic:
        """P(a sample is nearer to the training data than a held-out datum is), ties counted half, with its sampling error.

        1/2 if samples are distributed like data. The error is for these training data.
        """
        return probability_below(self.sample_distance.double(), self.data_distance.double())

    @property
    def z_score(self) -> float:
        """`probability_nearer` minus 1/2, in sampling errors; NaN for one datum."""
        nearer = self.probability_nearer()
        return float((nearer.value - 0.5) / nearer.sampling_error)

    @property
    def num_known(self) -> int:
        """The number of held-out data that are exactly equal to a training datum."""
        return int((self.data_distance == 0).sum())

    @property
    def doubts(self) -> dict[str, str]:
        """ "memorised": samples are nearer to the training data than held-out data, by more than a 95% interval allows."""
        if self.unchecked or not self.probability_nearer().confidence_interval()[0] > 0.5:
            return {}
        return {"memorised": self.verdict()}

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not checked, by reason."""
        if len(self) < 2:
            return {"memorised": "one datum"}
        if self.num_known > len(self) / 2:
            return {"memorised": f"{self.num_known} of the {len(self)} held-out data are themselves in the training data"}
        return {}

    @property
    def reliable(self) -> bool:
        """Whether there is no doubt at all."""
        return not self.doubts

    def mean_sharpness(self) -> dict[str, Statistic]:
        """The mean of each kind of sharpness over its N images, with its sampling error; empty where there are no images."""
        return {name: Statistic.mean_of(values.double()) for name, values in (self.sharpness or {}).items()}

    def verdict(self) -> str:
        """One sentence about memorising, from the 95% interval of `probability_nearer`."""
        nearer, size = self.probability_nearer(), len(self)
        if size < 2:
            return "No verdict from one datum."
        if self.unchecked:
            return f"No verdict: {self.unchecked['memorised']}."
        low, high = nearer.confidence_interval()
        number = f"probability {float(nearer.value):.3f} +- {float(nearer.sampling_error):.3f} (sampling error)"
        if low > 0.5:
            return (
                "Memorised, or drawn from the densest parts of the data alone: samples are nearer to the training data than "
                f"held-out data are, with {number}."
            )
        if high < 0.5:
            return (
                "Not memorised as a whole: samples are farther from the training data than held-out data are, nearer with "
                f"{number}."
            )
        return (
            f"No sign of memorising at N = {size}: samples are nearer to the training data than held-out data are with "
            f"{number}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field, and what is computed from them, as plain Python, for JSON."""
        return {
            **to_plain(self),
            "mean_sharpness": {name: to_plain(mean) for name, mean in self.mean_sharpness().items()},
            "rank_correlation": to_plain(self.rank_correlation()),
            "probability_nearer": to_plain(self.probability_nearer()),
            "z_score": self.z_score,
            "verdict": self.verdict(),
            "doubts": self.doubts,
            "unchecked": self.unchecked,
            "reliable": self.reliable,
        }

    def __str__(self) -> str:
        title = f"{len(self)} held-out data, as many samples, {self.num_train} training data"
        lines = [f"{title:<52}{'value':>12}{'sampling error':>16}"]
        lines.append(row("reconstruction error, square of the data's units", Statistic.mean_of(self.reconstruction_error)))
        if self.log_evidence is None:
            lines.append("log p(x): not given")
        else:
            name = "log p(x)" if self.support_checked else "score (values outside the support)"
            lines.append(row(f"{name}, nats", Statistic.mean_of(self.log_evidence)))
            lines.append(row("rank correlation of log p(x) and minus the error", self.rank_correlation()))
        if self.sharpness is None:
            lines.append("sharpness: the data are not images (see image_shape=)")
        else:
            lines.append("sharpness, variance of the Laplacian")
            names = {"data": "held-out data"}
            for name, mean in self.mean_sharpness().items():
                lines.append(row(f"  {names.get(name, name.replace('_', ' '))}", mean))
        lines.append("distance to the nearest training datum")
        lines.append(row("  sample draws", Statistic.mean_of(self.sample_distance)))
        lines.append(row("  held-out data", Statistic.mean_of(self.data_distance)))
        lines.append(row(f"P(sample nearer), z = {self.z_score:.1f} against 1/2", self.probability_nearer()))
        if self.num_known:
            lines.append(f"{self.num_known} held-out data are themselves in the training data.")
        return page([*lines, self.verdict()])


def row(name: str, number: Statistic) -> str:
    return f"{name:<52}{float(number.value):>12.4g}{float(number.sampling_error):>16.2g}"
