"""Check of an estimator on data simulated from the user's model, for which log p(x) has bounds on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..noise import kept_random_state, seed_torch
from ..records import warn_about
from .adaptive_importance_sampling import AdaptiveImportanceSampling
from .bidirectional_monte_carlo import BidirectionalMonteCarlo
from .estimator import OfPair, check_builder
from .evidence import Evidence
from .paths import Start
from .self_check_result import SelfCheckResult
from .simulated_arguments import check_data_option, simulate_data

Observed = dict[str, torch.Tensor]


@dataclass(repr=False, eq=False, kw_only=True)
class SelfCheck(OfPair):
    r"""Check whether an estimator is right for a model, on simulated data with lower and upper bounds on log p(x).

    Data are drawn from the model, so their latents are exact posterior draws and log p(x) has an upper bound too
    (`BidirectionalMonteCarlo`). This is the only check that finds a proposal which misses a mode. Such a proposal has good
    weights and a good Pareto k, but estimates that are too low; the reverse chains start in all modes.

    The result holds for data simulated from the model. Where the model fits badly, real data differ from these.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param evidence: the estimator to check: a callable (model, guide) that gives one, such as
        ``functools.partial(pv.ImportanceSampling, num_particles=5000)``.
    :param data: function from the simulated values by observed site to the model's arguments. By default they replace the
        arguments that the sites observed.
    :param num_steps: T, the steps of the chains.
    :param num_chains: C, the chains in each direction.
    :param start: the start of the lower chains: "fitted", "guide" or "prior".
    :param progress: show a progress bar on chains of more than a few seconds.
    :param seed: fixes the noise of the simulation and the chains; the caller's random state is unchanged.
    :param datum_plate: the plate of the data, as in all estimators.
    :param prior_sites: must be empty here.

    Call it with the model's arguments; only the shapes of the observed ones are used. It returns a `SelfCheckResult` for as
    many simulated data, B, in nats. With a hundred data or more it finds a missed mode that holds a fifth of the mass.

    :raises ArgumentError: if no argument, or more than one, holds what a site observed, and `data` is not given.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.

    References: Grosse, Ancha and Roy, 2016, https://arxiv.org/abs/1606.02275.

    Example::

        check = pv.SelfCheck(model, guide, evidence=functools.partial(pv.ImportanceSampling, num_particles=5000))(x[:100])
        print(check.verdict())
    """

    evidence: Callable[[Callable, Callable], Callable[..., Evidence]] = AdaptiveImportanceSampling
    data: Callable[[Observed], tuple[Any, ...]] | None = None
    num_steps: int = 200
    num_chains: int = 16
    start: Start = "fitted"
    progress: bool = True

    def check_options(self) -> None:
        self._sandwich({})  # raises on bad options
        check_builder(self.evidence)
        check_data_option(self.data)

    def _sandwich(self, latents: Mapping[str, torch.Tensor]) -> BidirectionalMonteCarlo:
        names = {field.name for field in fields(BidirectionalMonteCarlo)} - {"latents"}
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}
        return BidirectionalMonteCarlo(**options, latents=latents)

    def __call__(self, *args: Any, **kwargs: Any) -> SelfCheckResult:
        sites, args, kwargs = self._simulate(args, kwargs)
        latents = {n: s.value for n, s in sites.items() if not (s.is_observed or s.is_fixed)}
        sandwich = self._sandwich(latents)(*args, **kwargs)
        with nullcontext() if self.seed is None else kept_random_state():
            if self.seed is not None:
                seed_torch(self.seed)  # for an estimator without a seed
            evidence = self.evidence(self.model, self.guide)(*args, **kwargs)
        result = SelfCheckResult(evidence, sandwich)
        warn_about(result, stacklevel=2)
        return result

    def _simulate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...], dict]:
        """The drawn sites, and the model's arguments that hold them."""
        with torch.no_grad(), self._pair.open(args, kwargs, self.seed) as call:
            options: Any = {"datum_plate": self.datum_plate, "seed": self.seed, "fixed": call.fixed}
        return simulate_data(self.model, args, kwargs, self.data, **options)
