"""A sample from the aggregated posterior q(z), and as many draws of the prior."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..batches import ToArguments, check_to_arguments, first_element
from ..errors import ArgumentError, NonFiniteError, StructureError, quoted
from ..evaluation import over_loader
from ..evidence import OfPair
from ..kernel import Call, Record, Structure
from ..noise import Noise
from ..options import check_function
from .latent_sample import LatentSample
from .means import free_sites, posterior_mean
from .per_unit import by_unit, present_units, unit_names
from .refusals import refuse_without_draws, warn_if_coarse


@dataclass(repr=False, eq=False, kw_only=True)
class AggregatedPosterior(OfPair):
    r"""A sample from the aggregated posterior, and as many draws from the prior to compare it with::

        q(z) = 1/N sum_n q(z | x_n)     one draw of q(z | x_n) for each datum
        p(z)                            one draw for each datum

    A model generates from p(z), but its decoder was trained on q(z). The two are equal if the guide is the exact posterior
    and the model is the distribution of the data. Where p(z) has mass and q(z) has none (a hole), the decoder was never
    trained. A unit with the same q(z|x) for all data carries no information. Makhzani, Shlens, Jaitly, Goodfellow and Frey
    (2015, https://arxiv.org/abs/1511.05644) named q(z); Rosca, Lakshminarayanan and Mohamed (2018,
    https://arxiv.org/abs/1802.06847) measured such mismatches. `ELBOSurgery` measures the distance between the two in nats.

    A unit is one number of one latent site. Values are those of the constrained latents; that of a Categorical is the index
    of its class. The prior is that of the model given its arguments. If it depends on a label, the draws are those for the
    labels of the data.

    :param model: any Pyro model whose data lie in one plate. Enumerated latents are drawn and are not units.
    :param guide: its guide, with the same latent sites.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes every
        batch one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide. They are not units.
    :param check_support: raise on observations outside the support of their likelihood, although no number here depends on
        them.

    Call it with a loader (any iterable of batches). `args` maps a batch to the tuple of the model's arguments or to a dict
    of keywords; by default it takes the batch's first element. `labels` maps a batch to one number per datum, a tensor (B,),
    which is only stored in the record. `progress` shows a progress bar. It returns `LatentSample`.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        and for latents whose shapes differ from batch to batch.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch or loader.
    :raises NonFiniteError: if a draw is NaN or infinite.
    :raises ArgumentError: if a tensor is passed as the loader, or `labels` returns anything but one number per datum.

    Example::

        loader = DataLoader(TensorDataset(x, y), 100)
        sample = pv.AggregatedPosterior(vae.model, vae.guide)(loader, labels=lambda batch: batch[1])
        print(sample)
        pv.plots.plot_aggregated_posterior(sample)
    """

    draws_rather: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(
        self,
        loader: Iterable[Any],
        *,
        args: ToArguments = first_element,
        progress: bool = True,
        labels: Callable[[Any], Tensor] | None = None,
    ) -> LatentSample:
        check_to_arguments(args)
        if labels is not None:
            check_function("labels", labels, "a function from a batch to the labels of its data, or None")
        last: list[Tensor] = []  # the labels of the current batch
        # by id; the structure is kept, so that its id is not used again
        free: dict[int, tuple[Structure, frozenset[str]]] = {}

        def arguments(batch: Any) -> Any:
            if labels is not None:
                last[:] = [labels(batch)]
            return args(batch)

        def sample(*arguments: Any, **named: Any) -> tuple[LatentSample, list[Tensor]]:
            with self._pair.open(arguments, named, self.seed) as call:
                if labels is not None:
                    check_labels(last[0], call.batch_size)
                guide = draw_guide(call)
                structure = call.structure
                if id(structure) not in free:
                    free[id(structure)] = structure, free_sites(call, guide)
                return sample_of_batch(call, guide, free[id(structure)][1]), list(last)

        found = over_loader(sample, loader, arguments, seed=self.seed, progress=progress, of=self)
        batches, of_batches = zip(*found, strict=True)
        return joined(batches, [found for labels in of_batches for found in labels])


def draw_guide(call: Call) -> Record:
    """One draw of the guide, with distributions in the shapes in which they were written."""
    refuse_without_draws(call)
    call.one_by_one()
    warn_if_coarse(call)
    call.set_noise(Noise.GUIDE, 0)
    return call.draw_latents(1)


def sample_of_batch(call: Call, guide: Record, free: Collection[str]) -> LatentSample:
    """:param free: the sites whose means are computed."""
    latents = call.structure.latents
    call.set_noise(Noise.SIMULATION, 0)
    prior, model = call.draw_prior(1)
    weights = call.weigh(guide, model, 1)
    draws, means, priors, masks = [], [], [], []
    names: list[str] = []
    for name in latents:
        to_units = partial(by_unit, site=guide[name], layout=call.layout)
        draws.append(as_float(to_units(guide[name].value[0])))
        priors.append(as_float(to_units(prior[name][0])))
        mean = posterior_mean(name, guide, model[name].fns[0]) if name in free else None
        means.append(torch.full_like(draws[-1], torch.nan) if mean is None else as_float(to_units(mean)))
        masks.append(present_units(guide[name], weights))
        names += unit_names(name, draws[-1].shape[1])
    present = torch.cat(masks, 1)
    sides = {"draws": torch.cat(draws, 1), "means": torch.cat(means, 1), "prior": torch.cat(priors, 1)}
    check_finite(sides["draws"], sides["prior"], present, names)
    analytic = (sides["means"].isfinite() | ~present).all(0)
    sides = {side: torch.where(present, values, torch.nan) for side, values in sides.items()}
    return LatentSample(**sides, names=tuple(names), analytic=analytic)


def as_float(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.to(torch.get_default_dtype())


def joined(batches: Sequence[LatentSample], labels: Sequence[Tensor]) -> LatentSample:
    """All data in their order. A unit without a known mean in some batch has the draws in place of means in all."""
    names = batches[0].names
    if any(batch.names != names for batch in batches):
        raise StructureError(
            "the latents differ in their shapes from batch to batch, so they have no common aggregated posterior: pass data "
            "of one shape"
        )
    draws, means, prior = (torch.cat([getattr(batch, side) for batch in batches]) for side in ("draws", "means", "prior"))
    analytic = torch.stack([batch.analytic for batch in batches]).all(0)
    means = torch.where(analytic, means, draws)
    return LatentSample(draws, means, prior, names, analytic, torch.cat(list(labels)) if labels else None)


def check_labels(labels: Any, batch_size: int) -> None:
    if not isinstance(labels, Tensor) or labels.shape != (batch_size,):
        came = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ArgumentError(
            f"labels must map a batch to one number per datum, a tensor of shape ({batch_size},), got {came}: write "
            "labels=lambda batch: batch[1]"
        )


def check_finite(draws: Tensor, prior: Tensor, present: Tensor, names: Sequence[str]) -> None:
    for side, values in (("guide", draws), ("prior", prior)):
        bad = (~values.isfinite() & present).any(0).tolist()
        if any(bad):
            units = quoted(name for name, is_bad in zip(names, bad, strict=True) if is_bad)
            raise NonFiniteError(
                f"draws of the {side} are NaN or infinite in {units}: look for NaN in the arguments or parameters, or for a "
                "scale that overflows"
            )
