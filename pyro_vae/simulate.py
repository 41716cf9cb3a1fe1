"""Data and latents drawn from the user's own model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernel import INFER, simulate_sites


@dataclass(frozen=True)
class Simulation:
    """One joint draw from a model.

    :ivar observed: drawn values of the observed sites by name, (B, X).
    :ivar latents: the latent values behind them by name, (B, D): exact draws from the posterior given `observed`.
    """

    observed: dict[str, Tensor]
    latents: dict[str, Tensor]


@torch.no_grad()
def simulate(
    model: Callable, *args: Any, seed: int | None = None, datum_plate: str | None = INFER, **kwargs: Any
) -> Simulation:
    """Draw latents from the prior and data from the likelihood, for as many data as the arguments hold.

    :param model: a Pyro model.
    :param args: the model's arguments; of the observed ones only the shapes matter, inputs that the model conditions on
        (a label, say) are used as they are. A model that reads its own observations elsewhere than in `obs=`
        (teacher forcing) would be conditioned on the template: have it use what `pyro.sample` returns.
    :param seed: fixes the draw and leaves the caller's random state alone.
    :param datum_plate: as everywhere; needed where two plates are common to all sites.

    :returns: a `Simulation` with `.observed` and `.latents`.

    Example::

        sim = pv.simulate(vae.model, torch.zeros(1000, 64), seed=0)
        sim.observed["obs"]     # (1000, 64)
    """
    sites = simulate_sites(model, args, kwargs, datum_plate=datum_plate, seed=seed)
    observed = {n: s.value for n, s in sites.items() if s.is_observed and not s.is_factor}
    latents = {n: s.value for n, s in sites.items() if not s.is_observed}
    return Simulation(observed=observed, latents=latents)
