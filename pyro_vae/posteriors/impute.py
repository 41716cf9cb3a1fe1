"""Imputation: missing values given the observed ones."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import EnumerationError, StructureError, quoted
from ..evidence import OfPair
from ..kernel import INFER, Call
from ..noise import Noise
from ..options import amount
from ..records import FEW, warn_about
from .function import Function
from .imputation import Imputation
from .likelihoods import Likelihoods, Moments
from .posterior_expectation import average, centre_of, doubts_of
from .resampling import drawn_labels, gathered, resampled
from .weighted_draws import WeightedDraws, weighted_draws
from .weighted_mean import WeightedMean

DRAWS = 5  # noise block


@torch.no_grad()
def impute(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 1000,
    num_draws: int = 0,
    seed: int | None = None,
    datum_plate: str | None = INFER,
    prior_sites: Collection[str] = (),
    check_support: bool = True,
    **kwargs: Any,
) -> Imputation:
    r"""Impute missing values: their mean and standard deviation for each datum, given its observed part o::

        E[x given o] ~ sum_k w_k E[x given z_k]
        Var[x given o] ~ sum_k w_k (Var[x given z_k] + (E[x given z_k] - E[x given o])^2)

    z_k and w_k are the draws and Pareto-smoothed weights of `PosteriorExpectation`, from proposals fitted to p(z given o).
    The stated error of a mean is its Monte Carlo error; it does not include errors of the model. Fill in the mean for the
    smallest squared error. For other uses (a regression on the table, a correlation, classes) use draws, which keep the
    spread of missing values: multiple imputation.

    A number is missing where it is NaN (`MissingDataVAE`, `NanMaskedNormal`), and where it is masked (`fn.mask`,
    `poutine.mask`, `obs_mask`), whatever its value. `docs/missing_data.md` explains these ways. The likelihood may be of any
    kind. For one without a mean, such as a categorical one, the mean is NaN and draws are needed.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites. The fits start at it.
    :param args: the model's arguments.
    :param num_particles: K, weighted draws for each datum; at least 1,000 where latents cannot be fitted.
    :param num_draws: S, the number of imputed data sets to draw, for S more decoder evaluations.
    :param seed: fixes the noise; the caller's random state is unchanged.
    :param datum_plate: the plate of the data; needed where two plates are common to all sites.
    :param prior_sites: latent sites of the model without a counterpart in the guide, drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.
    :param kwargs: the model's keyword arguments.

    :returns: an `Imputation`, by observed site: `.mean`, which is x with missing values filled in, `.stddev`, `.std_error`,
        `.draws`. The data axis is first, (B, X), also where it is not in the model.
    :raises OptionError: for a number of particles below one, or of draws below zero.
    :raises MaskError: where masks depend on draws of the latents.
    :raises EnumerationError: where data depend on a site that only the model enumerates or draws.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        and, with `num_draws=0`, for a likelihood without a mean.
    :raises InvalidDataError: for NaN that is not masked, values outside the support, an empty batch.

    Reference: Mattei and Frellsen (2019), "MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets",
    https://arxiv.org/abs/1812.02633.

    Example::

        table = torch.tensor([[0.3, -0.2], [0.9, torch.nan], [torch.nan, torch.nan]])
        vae = pv.mlp_missing_vae(2, latent_dim=1, likelihood=pv.nn.Normal(0.5))    # and train it
        result = pv.impute(vae.model, vae.guide, table, num_draws=20, seed=0)
        result.mean["obs"]       # (B, X), the table, filled in
        result.stddev["obs"]     # (B, X), how far what is missing may be from that
        result.draws["obs"]      # (20, B, X), twenty tables
    """
    num_particles, num_draws = amount("num_particles", num_particles), amount("num_draws", num_draws, lowest=0)
    options: Any = {"seed": seed, "datum_plate": datum_plate, "prior_sites": prior_sites, "check_support": check_support}
    pair = OfPair(model, guide, **options)
    with pair._pair.open(args, kwargs, pair.seed) as call:
        check_depends(call)
        likelihoods = Likelihoods(call)
        if not num_draws:
            check_means(likelihoods)
        function = Function(call, likelihoods.moments)
        draws = weighted_draws(call, num_particles)
        average_of = WeightedMean(centre_of(function, draws), len(draws), draws.num_origins)
        average(function, draws, average_of, may_be_nan=True)
        drawn = imputed_draws(call, likelihoods, draws, num_draws) if num_draws else {}
        imputation = record_of(call, likelihoods, draws, average_of, drawn)
    warn_about(imputation, stacklevel=3)
    return imputation


def check_depends(call: Call) -> None:
    """Raise if a likelihood depends on a site without a value."""
    lacking = (*call.structure.model_enumerated, *call.structure.read_prior_sites)
    if lacking:
        raise EnumerationError(
            f"missing values depend on {quoted(lacking)}, which only the model has: let the guide enumerate or draw them"
        )


def check_means(likelihoods: Likelihoods) -> None:
    """Raise for likelihoods without a mean if no draws are requested: all results would be NaN."""
    holes = [likelihoods.has_mean[name][missing] for name, missing in likelihoods.missing.items() if bool(missing.any())]
    if holes and not bool(torch.cat(holes).any()):
        raise StructureError(
            f"the likelihood of {quoted(likelihoods.missing)} has no mean to fill in, like that of classes: pass "
            "num_draws=1 or more and use the draws"
        )


def imputed_draws(call: Call, likelihoods: Likelihoods, draws: WeightedDraws, num_draws: int) -> dict[str, Tensor]:
    index = resampled(call, draws.weights, num_draws)
    latents = gathered(call, draws, index)
    if call.structure.guide_enumerated:
        latents |= drawn_labels(call, latents, num_draws)
    call.set_noise(Noise.POSTERIOR, DRAWS)
    return likelihoods.drawn(latents, num_draws)


def record_of(
    call: Call, likelihoods: Likelihoods, draws: WeightedDraws, average_of: WeightedMean, drawn: Mapping[str, Tensor]
) -> Imputation:
    exact = not call.structure.latents
    columns = average_of.mean
    variance = torch.zeros_like(columns) if exact else average_of.variance
    pareto_k = average_of.pareto_k(draws.evidence.pareto_k)
    flags = {} if exact else doubts_of(average_of, draws, pareto_k, False)
    means, errors = likelihoods.split(columns), likelihoods.split(variance.sqrt())
    doubts = {reason: likelihoods.split(each) for reason, each in flags.items()}
    unknown = likelihoods.unknown(draws.kept) if draws.kept else {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("mean", "stddev", "std_error", "in_doubt", "draws")}
    for name, holes in likelihoods.missing.items():
        observed = likelihoods.observed[name]
        dtype = observed.dtype if observed.is_floating_point() else draws.evidence.log_evidence.dtype
        nowhere = torch.zeros_like(holes)
        filled = partial(fill, holes=holes, unknown=unknown.get(name, nowhere))
        mean, second = means[name]
        parts["mean"][name] = filled(mean.to(dtype), observed.to(dtype))
        parts["stddev"][name] = filled(likelihoods.stddev(name, mean, second).to(dtype), 0.0)
        parts["std_error"][name] = filled(errors[name][0].to(dtype), 0.0)
        parts["in_doubt"][name] = torch.stack([nowhere, *(each[name][0] & holes for each in doubts.values())]).any(0)
        if drawn:
            parts["draws"][name] = filled(drawn[name].to(dtype), observed.to(dtype))
    return Imputation(
        missing=likelihoods.missing,
        evidence=draws.evidence,
        num_particles=len(draws),
        cost=call.cost,
        checks={reason: many(each, likelihoods.missing) for reason, each in doubts.items()},
        **parts,
    )


def fill(numbers: Tensor, seen: Tensor | float, *, holes: Tensor, unknown: Tensor) -> Tensor:
    return torch.where(holes, numbers.masked_fill(unknown, math.nan), seen)


def many(flags: Moments, missing: Mapping[str, Tensor]) -> Tensor:
    """(B,), whether more than a few of the missing values of a datum are flagged."""
    counts = [[n.reshape(len(n), -1).sum(1) for n in (flags[name][0] & holes, holes)] for name, holes in missing.items()]
    flagged, number = (torch.stack(each).sum(0) for each in zip(*counts, strict=True))
    return flagged > FEW * number
