"""Bidirectional Monte Carlo: log p(x) of simulated data, from below and from above."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import LatentsError, quoted
from ..kernel import Call, padded
from ..noise import Noise
from ..ops import effective_sample_size, log_mean_exp, log_mean_exp_std_error, pareto_smooth
from ..records import ANNEALED_CHAINS, REVERSE_CHAINS
from .annealed_importance_sampling import Annealing
from .annealing import AnnealedChains
from .evidence import Evidence
from .fitted import with_search
from .meter import Meter
from .sandwich import Sandwich
from .summary import summarise

RANK_LIMIT = 6.0  # standard errors; one false alarm in 500 million runs
NEAR = 1.0  # nats of mean width


@dataclass(repr=False, eq=False, kw_only=True)
class BidirectionalMonteCarlo(AnnealedChains):
    r"""Lower and upper bounds on log p(x) of simulated data by bidirectional Monte Carlo.

    Chains of `AnnealedImportanceSampling` give the lower bound. Chains that run backwards from the latents that produced the
    data give the upper bound (Grosse, Ghahramani and Adams, 2015, https://arxiv.org/abs/1511.02543). These latents are an
    exact draw from the posterior, hence::

        log p(x) <= E[ -log 1/C sum_c 1 / w_c ],   w of the reverse chains

    **Only simulated data have an upper bound.** For real data no exact draw from the posterior is available, and a chain
    that starts elsewhere, for instance at the guide, gives no bound. For real data the two bounds only tell how well the
    same settings do on data simulated from the same model.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param latents: the latents that produced the data, by site, (B, D) each: `simulate(...).latents`.
    :param num_steps: T, temperatures after the first.
    :param num_chains: C, chains per datum, each way.
    :param num_leapfrog: gradients per transition.
    :param start: "fitted", "guide" or "prior"; the lower chains start there and the upper ones end there.
    :param schedule: "adaptive", "linear" or "sigmoid".
    :param progress: show a progress bar on runs of more than a few seconds.
    :param datum_plate: the plate of the data, as in all estimators.
    :param prior_sites: must be empty here.

    Call it with the model's arguments, with `simulate(...).observed` in place of the data. It returns a `Sandwich` for the B
    data of the call: both bounds on log p(x), in nats.

    :raises LatentsError: for latents of another shape or outside their support, and for latents that are not posterior draws
        of these data. The test is that their log p(x, z) ranks uniformly among the last states of the chains.
    :raises LocalFitError: for latents that are not continuous.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.

    Example::

        sim = pv.simulate(model, x)
        sandwich = pv.BidirectionalMonteCarlo(model, guide, latents=sim.latents)(sim.observed["obs"])
        print(sandwich)
        sandwich.width      # (B,)
    """

    latents: Mapping[str, Tensor]

    def check_options(self) -> None:
        super().check_options()
        if not isinstance(self.latents, Mapping):
            raise LatentsError(
                f"latents= must map site names to tensors, as simulate(...).latents, got {type(self.latents).__name__}"
            )
        self.latents = dict(self.latents)

    def estimate(self, call: Call) -> Sandwich:
        run = Annealing(call, self)
        start = posterior_draws(run, self.latents)
        tuned = call.cost
        meter = Meter(run)
        log_weight, acceptance, last = run.forward(meter.see)
        lower = with_search(summarise(call, log_weight, run.elbo, call.cost, ANNEALED_CHAINS), run.fitted)
        lower = replace(lower, acceptance=acceptance)
        forward = call.cost
        reverse, acceptance, first = run.reverse(start.expand(self.num_chains, -1, -1), Noise.REVERSE)
        upper = replace(upper_bound(lower, reverse, tuned + call.cost - forward), acceptance=acceptance)
        sandwich = Sandwich(replace(lower, barrier=meter.barrier(log_weight)), upper)
        check_ranks(sandwich, first.log_joint[0], last.log_joint)
        return sandwich


def posterior_draws(run: Annealing, latents: Mapping[str, Tensor]) -> Tensor:
    """The given latents as u, (1, B, D)."""
    structure = run.call.structure
    if structure.subsampled:
        raise LatentsError(
            "with a subsampled plate it is not known which data these latents belong to: call the model with all simulated "
            "data"
        )
    missing = [name for name in structure.latents if name not in latents]
    left_out = (*structure.guide_enumerated, *structure.model_enumerated, *structure.prior_sites)
    unknown = [name for name in latents if name not in (*structure.latents, *left_out)]
    if missing or unknown:
        raise LatentsError(
            f"latents= must hold the latent sites {quoted(structure.latents)}, got {quoted(latents)}: pass "
            "simulate(model, x).latents of the same model"
        )
    wrong = [
        name for name in structure.latents if not (isinstance(latents[name], Tensor) and latents[name].is_floating_point())
    ]
    if wrong:
        raise LatentsError(
            f"latents= must hold tensors of floating point, got {type(latents[wrong[0]]).__name__} for '{wrong[0]}'"
        )
    for name, shape in run.latent_shapes.items():
        if padded(latents[name], len(shape)).shape != shape:
            raise LatentsError(f"latents['{name}'] must have shape {tuple(shape)}, got {tuple(latents[name].shape)}")
    elbo = run.elbo  # of the dtype and device of the call
    values = {n: padded(latents[n].detach().to(elbo), len(shape)).unsqueeze(0) for n, shape in run.latent_shapes.items()}
    u = run.space.filled(run.space.pack(values)[0])
    bad = ~(u.isfinite().all(-1) & run.space.supports(values))[0]
    if bool(bad.any()):
        raise LatentsError(f"the latents of {int(bad.sum())} of {len(bad)} data lie outside the support of their prior")
    return u


def check_ranks(sandwich: Sandwich, given: Tensor, reached: Tensor) -> None:
    """Raise for latents that are no posterior draws: their log p(x, z), (B,), must rank uniformly among the chains, (C, B).

    The test runs only where the bounds are close, because only then are the chains near the posterior.
    """
    share = (reached < given).double().mean(0)
    spread = math.sqrt((1 + 2 / len(reached)) / 12 / len(given))  # of a mean of C chains whose chance is uniform
    score = float(share.mean() - 0.5) / spread
    if abs(score) > RANK_LIMIT and float(sandwich.width.mean()) < NEAR:
        raise LatentsError(
            f"the latents have a {'higher' if score > 0 else 'lower'} log p(x, z) than posterior draws would, by "
            f"{abs(score):.0f} standard errors: they did not produce these data under this model, so there is no upper "
            "bound. Pass simulate(model, x).latents together with its data"
        )


def upper_bound(lower: Evidence, reverse: Tensor, cost: float) -> Evidence:
    """From reverse log-weights (C, B): the mean of exp(-log w) is unbiased for 1 / p(x)."""
    smoothed, pareto_k = pareto_smooth(-reverse)
    return replace(
        lower,
        pareto_k=pareto_k,
        log_evidence=-log_mean_exp(-reverse, 0),
        std_error=log_mean_exp_std_error(-reverse),
        smoothed=-log_mean_exp(smoothed, 0),
        ess=effective_sample_size(-reverse),
        bound="upper",
        method=REVERSE_CHAINS,
        cost=cost,
    )
