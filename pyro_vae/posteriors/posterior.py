"""Draws from the posterior of each datum, by resampling weighted draws."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import EnumerationError, quoted
from ..evidence import OfPair
from ..kernel import INFER, Call
from ..options import amount, flag
from ..records import warn_about
from ..simulate import known_means
from .posterior_sample import PosteriorSample
from .resampling import drawn_labels, gathered, resampled
from .weighted_draws import hide, weighted_draws


@torch.no_grad()
def posterior(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 100,
    num_particles: int = 1000,
    means: bool = False,
    seed: int | None = None,
    datum_plate: str | None = INFER,
    prior_sites: Collection[str] = (),
    check_support: bool = True,
    **kwargs: Any,
) -> PosteriorSample:
    r"""Draw latents from the posterior p(z given x) of each datum, rather than from the guide.

    K draws of the proposals that `AdaptiveImportanceSampling` fits to each datum are resampled by their Pareto-smoothed
    weights. Where latents cannot be fitted, the draws come from the guide. Resampling is systematic: a draw of weight w is
    used S w times, rounded down or up. Draws may repeat, so S draws are worth no more than the effective sample size of the
    weights. `num_distinct` says how many are different. The bias falls as 1/K. For the mean of a function,
    `PosteriorExpectation` is more precise than a mean over these draws, and has an error.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites. The fits start at it.
    :param args: the model's arguments.
    :param num_samples: S, draws for each datum.
    :param num_particles: K, weighted draws from which they are resampled; at least 1,000 where latents cannot be fitted.
    :param means: also return the mean of the likelihood at each draw, by observed site: reconstructions under the posterior.
        This costs S more decoder evaluations and memory for (S, B, X) numbers.
    :param seed: fixes the noise; the caller's random state is unchanged.
    :param datum_plate: the plate of the data; needed where two plates are common to all sites.
    :param prior_sites: latent sites of the model without a counterpart in the guide, drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.
    :param kwargs: the model's keyword arguments.

    :returns: a `PosteriorSample` with `.latents` by site, (S, B, D), and the `Evidence` of the same weights. Sites that the
        guide enumerates are drawn too. The draws of different data are independent and in random order, so the first ten of
        a hundred are a sample too.
    :raises OptionError: for fewer than one draw or particle.
    :raises EnumerationError: for `means=True` where data depend on a site that only the model enumerates or draws.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.

    Reference: Rubin (1987), "A Noniterative Sampling/Importance Resampling Alternative to the Data Augmentation Algorithm",
    https://doi.org/10.2307/2289460.

    Example::

        sample = pv.posterior(model, guide, x, num_samples=200, seed=0)
        sample.latents["latent"]    # (200, B, D)
        predictive = pyro.infer.Predictive(model, posterior_samples=sample.latents)
        predictive(x)["obs"]        # downstream sites, at the same draws
    """
    num_samples = amount("num_samples", num_samples)
    num_particles = amount("num_particles", num_particles)
    means = flag("means", means)
    options: Any = {"seed": seed, "datum_plate": datum_plate, "prior_sites": prior_sites, "check_support": check_support}
    pair = OfPair(model, guide, **options)
    with pair._pair.open(args, kwargs, pair.seed) as call:
        if means:
            check_means(call)
        draws = weighted_draws(call, num_particles)
        num_all = torch.full((call.batch_size,), num_samples, device=call.device)
        index = resampled(call, draws.weights, num_samples)
        canonical = gathered(call, draws, index)
        if call.structure.guide_enumerated:
            canonical |= drawn_labels(call, canonical, num_samples)
        sample = PosteriorSample(
            latents=call.in_program_shapes(hide(canonical, draws.kept)),
            means=means_at(call, canonical, num_samples) if means else {},
            num_distinct=1 + (index.sort(0).values.diff(dim=0) != 0).sum(0) if call.structure.latents else num_all,
            num_particles=len(draws),
            evidence=draws.evidence,
        )
    warn_about(sample, stacklevel=3)
    return sample


def check_means(call: Call) -> None:
    """Raise if a likelihood depends on a site without a value."""
    missing = (*call.structure.model_enumerated, *call.structure.read_prior_sites)
    if missing:
        raise EnumerationError(
            f"means=True needs draws of {quoted(missing)}, which only the model has: let the guide enumerate or draw them"
        )


def means_at(call: Call, values: Mapping[str, Tensor], num_samples: int) -> dict[str, Tensor]:
    """The mean of each likelihood at the draws, (S, B, X), where it has one."""
    record = call.run_at(values, num_samples)
    observed = {name: site for name, site in record.items() if site.is_observed and site.value.numel()}
    each = [known_means({name: site.fns[k] for name, site in observed.items()}) for k in range(num_samples)]
    return {name: torch.stack([means[name] for means in each]) for name in each[0]}
