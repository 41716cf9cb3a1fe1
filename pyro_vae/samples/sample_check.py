"""Comparison of reconstructions and samples with the data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import noise
from ..batches import ToArguments, check_loader, first_element
from ..errors import ArgumentError
from ..evaluation import OnError, over_loader
from ..evidence import Evidence, OfPair
from ..noise import Noise
from .images import checked_shape, image_shape_of
from .looks import Looks, check_shapes, joined, means_in, reconstruction, shapes_of, values_in
from .neighbours import Neighbours
from .sample_check_result import SampleCheckResult

KEPT = 20  # samples that are kept, with their nearest training data, for plots


@dataclass(repr=False, eq=False, kw_only=True)
class SampleCheck(OfPair):
    r"""Reconstruction error, sharpness and distance to the training data, which log p(x) does not measure.

    **Reconstruction error** of datum x: ``mean over its X numbers of (x - E[x | z])^2`` at one draw z of the guide, in the
    square of the data's units. It is not log p(x) and need not rank data as log p(x) does (`rank_correlation`)::

        ELBO       = E_q log p(x|z) - KL(q(z|x) to p(z))
        log p(x|z) = -X (error / (2 s^2) + log s + log(2 pi) / 2)         for a Normal of scale s

    The error does not include:

    - the scale s: log p(x|z) is largest where s^2 is the mean error, and falls without limit for other s at the same error.
      With a scale per pixel, pixels have different weights;
    - the rate, which the encoder pays in nats for a good reconstruction;
    - the volume of plausible images: the error is about one z, log p(x) about all z.

    Conversely, log p(x) does not measure how samples look: a mixture of 1 % of a model and 99 % noise loses at most log 100
    = 4.6 nats (Theis, van den Oord and Bethge, 2016, https://arxiv.org/abs/1511.01844).

    **Sharpness** of an image is the variance of its Laplacian, in the square of the data's units. The Laplacian is the sum
    of the four neighbours of a pixel minus four times the pixel, for inner pixels, with colours averaged first. A blurred
    image has less (Pech-Pacheco, Cristobal, Chamorro-Martinez and Fernandez-Valdivia, 2000,
    https://doi.org/10.1109/ICPR.2000.903548; Tolstikhin, Bousquet, Gelly and Schoelkopf, 2018,
    https://arxiv.org/abs/1711.01558). Noise has a large sharpness, so compare each row with that of the data. Means of a
    likelihood have no noise and are smoother than data.

    **Nearest neighbours**: the Euclidean distance to the nearest training datum, for the held-out data and for one sample
    per held-out datum. A sample is drawn from the model with the arguments of its datum, so with its label in a conditional
    model. If samples are distributed like data, P(sample nearer) is 1/2; above 1/2 the model copies (Meehan, Chaudhuri and
    Dasgupta, 2020, https://arxiv.org/abs/2004.05675, whose Z_U has the other sign). Samples are draws of x, not means of the
    likelihood: means are smoother than any datum, and so nearer to all training data, also without copying. Three limits:

    - draws from only the densest parts of the data are nearer too, without copying;
    - a model that copies in one region and misses another can have 1/2 (Meehan et al. test regions separately);
    - the black and white draws of a Bernoulli are far from grey data.

    :param model: any Pyro model whose data lie in one plate. Its observed sites are flattened and joined per datum, in the
        order in which it has them.
    :param guide: its guide, with the same latent sites.
    :param image_shape: (H, W) or (C, H, W) of a datum. Found automatically where one site is observed and a datum has such a
        shape, or is a flat square. Other data are not images and have no sharpness. Images are at least 4 x 4.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes every
        batch one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, drawn from the prior, for
        reconstructions too.

    Call it with a loader (any iterable of batches) of N held-out data, and `train`, a loader of M training data, which is
    iterated once, in any order. `evidence` is the `Evidence` of the held-out data **in the order of the loader**, such as
    `gaps.evidence`. `args` maps a batch of either loader to the tuple of the model's arguments; by default it takes the
    batch's first element. `progress` and `on_error` are as in `evaluate`. It returns `SampleCheckResult`.

    There is no checkpoint, because the search for neighbours needs all held-out data at once. The time is proportional to N
    M X, the memory to eight numbers for each of the N X.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        classes as observations (a squared difference of class numbers has no meaning), a likelihood without a mean, a factor
        in the model (it cannot be simulated), data of several shapes.
    :raises EnumerationError: for a latent that the model enumerates and the guide lacks: no draw to reconstruct from.
    :raises MaskError: for masked observations, between which there is no distance.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch or loader.
    :raises NonFiniteError: if a draw or a mean is NaN or infinite.
    :raises ArgumentError: if a tensor is passed as a loader, or `evidence` is not of N data.
    :raises OptionError: if `image_shape` is not a shape, or not that of the data.

    Example::

        gaps = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), test_loader)
        looks = pv.SampleCheck(vae.model, vae.guide)(test_loader, train=train_loader, evidence=gaps.evidence)
        print(looks)
        looks.reconstruction_error, looks.sample_distance      # (N,)
    """

    image_shape: Sequence[int] | None = None

    def check_options(self) -> None:
        if self.image_shape is not None:
            self.image_shape = checked_shape(self.image_shape)

    @torch.no_grad()
    def __call__(
        self,
        loader: Iterable[Any],
        *,
        train: Iterable[Any],
        args: ToArguments = first_element,
        evidence: Evidence | None = None,
        progress: bool = True,
        on_error: OnError = "raise",
    ) -> SampleCheckResult:
        check_loader(train)
        name = type(self).__name__
        options: Any = {"of": self, "seed": self.seed, "progress": progress, "on_error": on_error}
        looks = Looks.cat(over_loader(self._look, loader, args, title=f"{name}, held-out", **options))
        check_evidence(evidence, looks)
        image_shape = image_shape_of(looks.shapes, self.image_shape)
        num_data = len(looks.data)
        neighbours = Neighbours(torch.cat([looks.sample_draws, looks.data]))

        def compare(*arguments: Any, **named: Any) -> tuple[int, int]:
            with self._pair.open(arguments, named, self.seed) as call:
                values = values_in(reconstruction(call), call.layout)
                check_shapes(shapes_of(values), looks.shapes)
                neighbours.add(joined(values), noise.batch_number)
                return noise.batch_number, len(values[0])

        sizes = over_loader(compare, train, args, title=f"{name}, training data", **options)
        neighbours.merge()
        sample_distance, data_distance = neighbours.distance.to(looks.reconstruction_means.dtype).split(num_data)
        closest = sample_distance.argsort(stable=True)[:KEPT]
        return SampleCheckResult(
            reconstruction_error=(looks.data - looks.reconstruction_means).square().mean(1),
            log_evidence=None if evidence is None else evidence.log_evidence,
            sharpness=None if image_shape is None else looks.sharpness(image_shape),
            sample_distance=sample_distance,
            data_distance=data_distance,
            nearest=neighbours.index(sizes)[:num_data],
            closest=closest,
            closest_samples=looks.sample_draws[closest],
            closest_train=neighbours.rows[closest],
            image_shape=image_shape,
            num_train=sum(size for _, size in sizes),
            support_checked=self._pair.check_support,
        )

    def _look(self, *arguments: Any, **named: Any) -> "Looks":
        with self._pair.open(arguments, named, self.seed) as call:
            reconstructed = reconstruction(call)
            call.set_noise(Noise.SIMULATION, 0)
            simulated = call.simulate()
            values = values_in(reconstructed, call.layout)
            return Looks(
                data=joined(values),
                reconstruction_means=joined(means_in(reconstructed, call.layout)),
                sample_means=joined(means_in(simulated, call.layout)),
                sample_draws=joined(values_in(simulated, call.layout)),
                shapes=shapes_of(values),
                index=call.index,
            )


def check_evidence(evidence: Evidence | None, looks: Looks) -> None:
    if evidence is None:
        return
    if not isinstance(evidence, Evidence):
        raise ArgumentError(f"evidence must be a record of log p(x), as gaps.evidence, got {type(evidence).__name__}")
    if len(evidence) != len(looks.data):
        raise ArgumentError(
            f"evidence is of {len(evidence)} data, the loader has {len(looks.data)}: pass the record of the same data in "
            "the same order (pv.evaluate over the same loader, not shuffled)"
        )
    if evidence.index is not None and looks.index is not None and not torch.equal(evidence.index, looks.index):
        raise ArgumentError(
            "the plate of the data has other data in the evidence than here: pass whole batches to the model, or use "
            "subsample="
        )
