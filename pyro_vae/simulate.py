"""Data drawn from the user's own model, and the user's data as the model gives them back."""

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
    """One joint draw from a model. B data, event shapes X and D.

    :ivar observed: drawn values of the observed sites by name, (B, X).
    :ivar latents: the latent values behind them by name, (B, D): exact draws from the posterior given `observed`.
    :ivar means: the mean of the likelihood at those latents by observed site, (B, X), where it has one.
    """

    observed: dict[str, Tensor]
    latents: dict[str, Tensor]
    means: dict[str, Tensor]

    def _num_rows(self) -> int:
        return num_data(self.observed)


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction(Result):
    """Data and what the model makes of one posterior draw for each. B data, event shape X.

    :ivar observed: the data by observed site, (B, X).
    :ivar means: the mean of the likelihood at one draw of the guide, (B, X), where it has one.
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
    :param args: the model's arguments; of the observed ones only the shapes matter, inputs that the model conditions on
        (a label, say) are used as they are. What is observed in the plate of the data, by `obs=` or by `pyro.condition`, is
        drawn anew; what is observed outside it is kept. A model that
        reads its own observations elsewhere than in `obs=` (teacher forcing) would be conditioned on the template: have it
        use what `pyro.sample` returns.
    :param seed: fixes the draw and leaves the caller's random state alone.
    :param datum_plate: as everywhere; needed where two plates are common to all sites.

    :returns: a `Simulation` with `.observed`, `.latents` and `.means`.

    Example::

        sim = pv.simulate(model, torch.zeros(1000, 64), seed=0)
        sim.observed["obs"]     # (1000, 64)
    """
    return simulated_data(model, args, kwargs, datum_plate=datum_plate, seed=seed)


def simulated_data(model: Callable, args: tuple, kwargs: Mapping[str, Any], **options: Any) -> Simulation:
    """By the options of `kernel.simulation`."""
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
    """Encode, draw once, decode: the mean of the likelihood at one draw of the guide per datum.

    :param model: a Pyro model.
    :param guide: its guide.
    :param args: the model's arguments.
    :param seed: fixes the draw and leaves the caller's random state alone.
    :param datum_plate: as everywhere; needed where two plates are common to all sites.
    :param prior_sites: latent sites of the model without a counterpart in the guide, drawn from the prior.

    :returns: a `Reconstruction` with `.observed` and `.means`.
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
    """Nothing is decoded from NaN: the means would be left out, as those that a likelihood does not have."""
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
        if not bool(mean.isnan().all()):  # as that of a Cauchy or of classes is
            means[name] = mean
    return means
