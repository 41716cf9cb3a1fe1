"""The steps of `AutoEvidence`: pilots decide the work for each datum, then final draws give the estimate."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LocalFitError
from ..kernel import Call
from ..ops import MIN_PARTICLES_FOR_K
from ..proposals import proposal_log_weights
from ..records import FITTED_PROPOSALS, TO_TOLERANCE
from ..records.doubts import without_doubt
from .annealed_importance_sampling import AnnealedImportanceSampling
from .evidence import Evidence
from .fitted import Fitted, below_elbo, fit_proposals, with_search
from .importance_sampling import ImportanceSampling
from .summary import guide_draws, summarise, summed_draws

PILOT, LONGER_PILOT, FEWEST = 400, 1000, 300  # weights of the pilot; with fewer, Pareto k is too noisy
PILOT_OF_GUIDE = 1000  # weights of a pilot from the guide: the fewest for which the check by a second estimate is made
FIT_PARTICLES = 500  # the fit is that of AdaptiveImportanceSampling with this many particles
# share of the tolerance to aim at, because pilots underrate the errors of weights with heavy tails
MARGIN, MARGIN_OF_CHAINS = 0.65, 0.8
UNSURE_K, HOPELESS_K = 0.5, 1.0  # Pareto k of a pilot above which a longer pilot, or annealing, follows
SHORT_PILOT = 4  # multiples of the pilot: data that need more weights than that get a longer pilot
HIGHEST_K, MANY = 0.69, 3000  # Pareto k that is good at any number of weights; weights beyond it
CLASS = 1.5  # the numbers of weights are powers of it, so that the batch is split into few parts
CHAIN_STEPS = 20, 80  # the second where log-weights vary more
PILOT_CHAINS, MOST_VARIANCE = 32, 1.0  # of log-weights of short chains

MISSED = ("search", "below the ELBO")  # doubts that more weights cannot remove
# Some of the data, by their indices, with the record of them.
Part = tuple[Tensor, Evidence]
# From a call for some of the data, and their indices.
Estimate = Callable[[Call, Tensor], Evidence]


class Plan:
    """One call of `AutoEvidence`."""

    def __init__(self, call: Call, tolerance: float, max_cost: int) -> None:
        self.call, self.tolerance, self.max_cost = call, tolerance, max_cost
        self.target = MARGIN * tolerance
        self.fitted: Fitted | None = None
        self.elbo: Tensor
        self.missed: Tensor  # (B,), where the search has found a mode that the proposals lack
        self.extra = 0.0  # decoder evaluations, summed over data, that the records of the parts do not count
        self.can_cut = True

    def run(self) -> Evidence:
        call, before = self.call, self.call.cost
        guide, model, weights = guide_draws(call)
        self.elbo = weights.elbo
        if not call.structure.latents:  # all latents are summed out: every weight equals p(x)
            return summarise(call, weights.log_weight, self.elbo, call.cost - before, FITTED_PROPOSALS)
        everything = torch.arange(call.batch_size, device=call.device)
        try:
            guide, model = summed_draws(call, guide, model)
            self.fitted = fit_proposals(call, guide, model, self.elbo, FIT_PARTICLES, None, "auto")
            self.fitted.space.compare_parts_at(self.fitted.proposal.draw)
            parts = self.by_proposals(everything, self.weigh(call, everything, self.fitted, PILOT))
        except LocalFitError:  # discrete latents, masks that depend on draws
            self.fitted = None
            parts = self.by_guide(everything)
        return self.joined(parts, call.cost - before)

    def by_proposals(self, everything: Tensor, pilot: Evidence) -> list[Part]:
        """Longer pilots where they are needed, then fresh draws."""
        number = weights_for(pilot, self.target)
        hard = ~without_doubt(pilot.checks, pilot.elbo) | (pilot.pareto_k > UNSURE_K) | (number > SHORT_PILOT * PILOT)
        bad = torch.zeros_like(hard)
        self.missed = torch.zeros_like(hard)
        if bool(hard.any()):
            for kept, longer in self.on(everything[hard], self.weigher(LONGER_PILOT)):
                self.extra += longer.cost * len(kept)
                number[kept] = weights_for(longer, self.target)
                self.missed[kept] = longer.checks.get("search", self.missed[kept])
                missed = {reason: flags for reason, flags in longer.checks.items() if reason in MISSED}
                bad[kept] = ~(longer.pareto_k <= HOPELESS_K) | ~without_doubt(missed, longer.elbo)
        found = self.in_classes(everything[~bad], number.clamp(FEWEST, self.max_cost), self.weigher)
        return found + self.by_chains(everything[bad])

    def by_guide(self, everything: Tensor) -> list[Part]:
        pilot = self.on(everything, self.sampler(PILOT_OF_GUIDE))
        number = torch.full((len(everything),), math.inf, device=everything.device)
        for kept, record in pilot:
            self.extra += record.cost * len(kept)
            number[kept] = weights_for(record, self.target).to(number)
        return self.in_classes(everything, number.clamp(PILOT_OF_GUIDE, max(PILOT_OF_GUIDE, self.max_cost)), self.sampler)

    def in_classes(self, kept: Tensor, number: Tensor, estimate: Callable[[int], Estimate]) -> list[Part]:
        """Compute data that need about as many weights together; `number` (B,) has the number for each of all data."""
        classes = (number[kept].log() / math.log(CLASS)).ceil()
        if not self.can_cut and len(kept):
            classes = classes.amax().expand_as(classes)
        found: list[Part] = []
        for power in classes.unique():
            chosen = classes == power
            size = min(round(CLASS ** float(power)), math.ceil(float(number[kept].max())))
            found += self.on(kept[chosen], estimate(size))
        return found

    def on(self, kept: Tensor, estimate: Estimate) -> list[Part]:
        """The estimate for some of the data.

        Where the arguments cannot be cut, all data are computed and these are selected.
        """
        if not len(kept):
            return []
        if self.can_cut:
            with self.call.part(kept) as part:
                if part is not None:
                    return [(kept, estimate(part, kept))]
            self.can_cut = False
        everything = torch.arange(self.call.batch_size, device=self.call.device)
        with self.call.part(everything) as part:
            assert part is not None
            record = estimate(part, everything)
        # The other data were computed too, without use.
        return [(kept, replace(record.select(kept), cost=record.cost * len(everything) / len(kept)))]

    def weigher(self, num_particles: int) -> Estimate:
        """An estimator with weights of the fitted proposals."""

        def estimate(part: Call, kept: Tensor) -> Evidence:
            assert self.fitted is not None
            return self.weigh(part, kept, self.fitted.for_part(part, kept), num_particles)

        return estimate

    def weigh(self, part: Call, kept: Tensor, fitted: Fitted, num_particles: int) -> Evidence:
        log_weight = proposal_log_weights(fitted.space, fitted.proposal, num_particles)
        return with_search(summarise(part, log_weight, self.elbo[:, kept], part.cost, FITTED_PROPOSALS), fitted)

    def sampler(self, num_particles: int) -> Estimate:
        """An estimator with weights of draws from the guide."""

        def estimate(part: Call, kept: Tensor) -> Evidence:
            sampling: Any = ImportanceSampling(part.model.fn, part.guide.fn, num_particles=num_particles)
            return replace(sampling.estimate(part), curve=None)

        return estimate

    def by_chains(self, kept: Tensor) -> list[Part]:
        """Annealed chains; their number and length follow from a pilot of a few short chains."""
        steps, long_steps = CHAIN_STEPS
        long_steps = max(steps, min(long_steps, self.max_cost // (3 * MIN_PARTICLES_FOR_K)))
        variance = torch.zeros_like(self.elbo[0])
        for some, pilot in self.on(kept, self.annealer(steps, PILOT_CHAINS)):
            self.extra += pilot.cost * len(some)
            # The variance of log-normal weights, from the error of their mean. It falls as one over the number of steps.
            variance[some] = (PILOT_CHAINS * pilot.std_error.square()).log1p().nan_to_num(nan=math.inf)
        long = variance[kept] > MOST_VARIANCE
        found: list[Part] = []
        for chosen, length in ((kept[~long], steps), (kept[long], long_steps)):
            number = (variance * steps / length).expm1() / (MARGIN_OF_CHAINS * self.tolerance) ** 2
            number = number.clamp(MIN_PARTICLES_FOR_K, max(MIN_PARTICLES_FOR_K, self.max_cost // (3 * length)))
            found += self.in_classes(chosen, number, functools.partial(self.annealer, length))
        return found

    def annealer(self, num_steps: int, num_chains: int) -> Estimate:
        """Annealed chains from proposals fitted anew.

        Where a search for modes has already run, half of the chains start at the prior: only it can find further modes, and
        it covers heavy tails and what bends away.
        """
        assert self.fitted is not None
        with_prior = self.fitted.witnesses is not None

        def estimate(part: Call, kept: Tensor) -> Evidence:
            options: Any = {"num_steps": num_steps, "num_chains": num_chains, "progress": False}
            sampling: Any = AnnealedImportanceSampling(part.model.fn, part.guide.fn, **options)
            record = sampling.annealed(part, with_prior=with_prior)
            if not with_prior:
                return record
            # Chains that have all missed a narrow mode agree with each other, so the doubt of the search is kept.
            search = record.checks["search"] | self.missed[kept]
            return replace(record, checks={**record.checks, "search": search, "below the ELBO": below_elbo(record)})

        return estimate

    def joined(self, parts: list[Part], own_cost: float) -> Evidence:
        """The record of all data in their order."""
        common: Any = {"method": TO_TOLERANCE, "barrier": None, "tolerance": self.tolerance}
        common["stripped_scales"] = self.call.structure.stripped_scales  # N / B, where those of a part are N / b
        records = [
            replace(record, **common, particles=torch.full_like(kept, record.num_particles)) for kept, record in parts
        ]
        order = torch.cat([kept for kept, _ in parts]).argsort()
        record = Evidence.cat(records).select(order)
        return replace(record, cost=record.cost + own_cost + self.extra / len(order), index=self.call.index)


def weights_for(pilot: Evidence, target: float) -> Tensor:
    """(B,) the weights for which the error is the target, and for which the Pareto k of the pilot is no doubt."""
    number = (pilot.num_particles * (pilot.std_error / target).square()).nan_to_num(nan=math.inf)
    # standard error of k, from this many weights in the tail
    noise = (1 + pilot.pareto_k) / math.sqrt(3 * math.sqrt(pilot.num_particles))
    k = (pilot.pareto_k + noise).nan_to_num(nan=0.0)
    judged = torch.where(k < HIGHEST_K, 10 ** (1 / (1 - k.clamp(max=HIGHEST_K))), MANY)
    return torch.maximum(number, judged.to(number))
