"""Simulation of data from the model, and reconstruction of data."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError, quoted
from .kernel import INFER, Pair, Record, simulation
from .noise import Noise
from .records import Result


@dataclass(frozen=True, eq=False, repr=False)
class Simulation(Result):
    """A joint draw from a model, as returned by `simulate`. B data, event shapes X and D.

    :ivar observed: drawn values of the observed sites by name, (B, X).
    :ivar latents: the latent values that produced them, by name, (B, D): exact draws from the posterior given `observed`.
    :ivar means: the mean of the likelihood at those latents by observed site, (B, X), where it has one.

    Example::

        sim = pv.simulate(model, torch.zeros(1000, 64), seed=0)
        sim.observed["obs"], sim.latents["latent"]      # (1000, 64), (1000, D)
    """

    observed: dict[str, Tensor]
    latents: dict[str, Tensor]
    means: dict[str, Tensor]

    def _num_rows(self) -> int:
        return num_data(self.observed)


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction(Result):
    """Data and their reconstructions from one draw of the guide, as returned by `reconstruct`. B data, event shape X.

    :ivar observed: the data by observed site, (B, X).
    :ivar means: the mean of the likelihood at one draw of the guide, (B, X), where it has one.

    Example::

        result = pv.reconstruct(model, guide, x, seed=0)
        result.observed["obs"], result.means["obs"]     # (B, X) each
    """

    observed: dict[str, Tensor]
    means: dict[str, Tensor]

    def _num_rows(self) -> int:
        return num_data(self.observed)


def num_data(observed: Mapping[str, Tensor]) -> int:
    """B, of values (B, X) by site."""
    return max((len(value) for value in observed.values() if value.ndim), default=0)


@torch.no_grad()
def simulate(
    model: Callable, *args: Any, seed: int | None = None, datum_plate: str | None = INFER, **kwargs: Any
) -> Simulation:
    """Draw latents from the prior and data from the likelihood, for as many data as the arguments hold.

    :param model: a Pyro model.
    :param args: the model's arguments; of the observed ones only the shapes are used; inputs that the model conditions on,
        such as a label, are used as they are. Sites that are observed in the plate of the data, by `obs=` or by
        `pyro.condition`, are drawn anew; those outside it are not. A model that reads its observations elsewhere than in
        `obs=` (teacher forcing) would be conditioned on the given values: it must use the values that `pyro.sample` returns.
    :param seed: fixes the draw; the caller's random state is unchanged.
    :param datum_plate: the plate of the data; needed where two plates are common to all sites.

    :returns: a `Simulation` with `.observed`, `.latents` and `.means`.

    Example::

        sim = pv.simulate(model, torch.zeros(1000, 64), seed=0)
        sim.observed["obs"]     # (1000, 64)
    """
    return simulated_data(model, args, kwargs, datum_plate=datum_plate, seed=seed)


def simulated_data(model: Callable, args: tuple, kwargs: Mapping[str, Any], **options: Any) -> Simulation:
    """A simulation with the options of `kernel.simulation`."""
    sites = simulation(model, args, kwargs, **options)[1]
    latents = {n: s.value for n, s in sites.items() if not (s.is_observed or s.is_fixed)}
    observed = {n: s for n, s in sites.items() if s.is_observed and not (s.is_factor or s.is_fixed)}
    means = known_means({n: s.fn for n, s in observed.items()})
    return Simulation(observed={n: s.value for n, s in observed.items()}, latents=latents, means=means)


@torch.no_grad()
def reconstruct(
    model: Callable,
    guide: Callable,
    *args: Any,
    seed: int | None = None,
    datum_plate: str | None = INFER,
    prior_sites: Collection[str] = (),
    **kwargs: Any,
) -> Reconstruction:
    """Reconstruct data: the mean of the likelihood at one draw of the guide per datum.

    :param model: a Pyro model.
    :param guide: its guide.
    :param args: the model's arguments.
    :param seed: fixes the draw; the caller's random state is unchanged.
    :param datum_plate: the plate of the data; needed where two plates are common to all sites.
    :param prior_sites: latent sites of the model without a counterpart in the guide, drawn from the prior.

    :returns: a `Reconstruction` with `.observed` and `.means`.

    Example::

        result = pv.reconstruct(model, guide, x, seed=0)
        result.means["obs"]     # (B, X)
    """
    pair = Pair(model, guide, datum_plate=datum_plate, prior_sites=prior_sites, check_support=False)
    with pair.open(args, kwargs, seed) as call:
        call.set_noise(Noise.GUIDE, 0)
        record = call.reconstruct()
    check_draws(record)
    observed = {n: s for n, s in record.items() if s.is_observed and s.value.numel()}  # a factor has an empty value
    means = known_means({n: s.fns[0] for n, s in observed.items()})
    return Reconstruction(observed={n: s.value for n, s in observed.items()}, means=means)


def check_draws(record: Record) -> None:
    """Raise for NaN draws: their means would be left out like those of a likelihood without a mean."""
    drawn = {n: s.value for n, s in record.items() if not s.is_observed and s.value.is_floating_point()}
    bad = [name for name, value in drawn.items() if not bool(value.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"the guide drew NaN or infinite values for {quoted(bad)}: look for NaN in the arguments or parameters, and for "
            "a scale that is NaN or infinite"
        )


def known_means(likelihoods: Mapping[str, Any]) -> dict[str, Tensor]:
    means = {}
    for name, fn in likelihoods.items():
        try:
            mean = fn.mean
        except NotImplementedError:
            continue  # a flow
        if not bool(mean.isnan().all()):  # like the mean of a Cauchy or a Categorical
            means[name] = mean
    return means
