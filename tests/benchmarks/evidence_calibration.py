"""Do 95% intervals of log p(x) cover 95%? By population tail index of the weights, on Gaussian and skewed targets.

The targets' evidence is 1, so log p(x) = 0, and their weights are drawn directly:
    Gaussian: p = N(0, 1), q = N(0, 1 - k) in one dimension; D = 5 with a product of them, the widest at tail index k
    skewed: p = Exp(1 - k), q = Exp(1), the weights of an exponential tail; with a Gamma(3) factor, a Gamma target
The weights of all have tail index k: moments up to order 1/k are finite.

    python tests/benchmarks/evidence_calibration.py [--replicates 1000]

With `--pairs` the models and guides of `calibration_pairs.py` are run instead: guides that miss mass although their weights
look good, and guides that are only too wide. What the posterior-side check of `ImportanceSampling` finds is counted per
family and, for its false alarms, per case:

    python tests/benchmarks/evidence_calibration.py --pairs [--num-data 400] [--particles 1000] [--seed 11]
"""

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from calibration_pairs import BLIND, WIDE, all_cases
from torch import Tensor
from torch.distributions import Exponential, Gamma, Normal

from pyro_vae import ImportanceSampling
from pyro_vae.evidence import Evidence
from pyro_vae.ops import effective_sample_size, log_mean_exp, log_mean_exp_std_error, pareto_k_threshold, pareto_smooth

BANDS = (0.25, 0.35, 0.45, 0.55, 0.65)  # inside the bands below .3, .4, .5, .6 and .7


def gaussian(k: float, shape: tuple[int, int]) -> Tensor:
    p, q = Normal(0.0, 1.0), Normal(0.0, math.sqrt(1 - k))
    x = q.sample(shape)
    return p.log_prob(x) - q.log_prob(x)


def five_gaussians(k: float, shape: tuple[int, int]) -> Tensor:
    return sum((gaussian(k * part, shape) for part in (0.2, 0.4, 0.6, 0.8)), gaussian(k, shape))


def exponential(k: float, shape: tuple[int, int]) -> Tensor:
    p, q = Exponential(1 - k), Exponential(1.0)
    x = q.sample(shape)
    return p.log_prob(x) - q.log_prob(x)


def gamma(k: float, shape: tuple[int, int]) -> Tensor:
    p, q = Gamma(3.0, 1 - k), Gamma(3.0, 1.0)
    x = q.sample(shape)
    return p.log_prob(x) - q.log_prob(x)


TARGETS: dict[str, Callable[[float, tuple[int, int]], Tensor]] = {
    "Gaussian, D = 1": gaussian,
    "Gaussian, D = 5": five_gaussians,
    "exponential": exponential,
    "Gamma": gamma,
}


def covered(log_weight: Tensor) -> Tensor:
    """(B,) whether the interval of `Evidence` holds log p(x) = 0, for log-weights (K, B)."""
    smoothed, pareto_k = pareto_smooth(log_weight)
    value = log_mean_exp(log_weight, 0)
    evidence = Evidence(
        log_evidence=value,
        std_error=log_mean_exp_std_error(log_weight),
        elbo=log_weight.mean(0),
        elbo_std_error=log_weight.std(0),
        ess=effective_sample_size(log_weight),
        pareto_k=pareto_k,
        smoothed=log_mean_exp(smoothed, 0),
        bound="lower",
        num_particles=len(log_weight),
        cost=len(log_weight),
    )
    low, high = evidence.confidence_interval(0.95)
    return (low <= 0) & (high >= 0)


@dataclass
class Tally:
    """Per datum: is the tail index good, does the check doubt it, does the interval cover without and with the check?"""

    pareto_k: Tensor
    good: Tensor
    flagged: Tensor
    needless: Tensor  # flagged although the estimate lies within two stated errors of log p(x)
    alone: Tensor
    widened: Tensor
    ratio: Tensor  # of the widths of the intervals

    @classmethod
    def of(cls, evidence: Evidence, truth: Tensor) -> "Tally":
        assert evidence.second is not None, evidence.unchecked
        first = replace(evidence, second=None)
        (low, high), (_, higher) = first.confidence_interval(), evidence.confidence_interval()
        slack = 1e-5 * (1 + truth.abs())  # rounding of float32, which the check is not about
        above, below = truth >= low - slack, slack + high
        good = evidence.pareto_k <= pareto_k_threshold(evidence.num_particles)
        flagged = evidence.checks["posterior side"]
        needless = flagged & (truth <= slack + evidence.log_evidence + 2 * evidence.std_error)
        ratio = (higher - low) / (high - low)
        return cls(
            evidence.pareto_k, good, flagged, needless, above & (truth <= below), above & (truth <= slack + higher), ratio
        )

    @classmethod
    def cat(cls, parts: Sequence["Tally"]) -> "Tally":
        return cls(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))

    def band(self, low: float, high: float) -> "Tally":
        """The data with a tail index between two numbers."""
        inside = (self.pareto_k > low) & (self.pareto_k <= high)
        return Tally(*(column[inside] for column in vars(self).values()))

    def row(self, name: str) -> str:
        kept = self.good & ~self.flagged
        cells = [
            share(self.alone[self.good]),
            share(self.flagged[self.good]),
            share(self.needless[self.good]),
            f"{int(kept.sum()):,}",
            share(self.alone[kept]),
            share(self.widened[kept]),
            f"{float(self.ratio[kept].nanmedian()):.2f}" if bool(kept.any()) else "",
        ]
        return f"| {name} | {len(self.good):,} | {int(self.good.sum()):,} | " + " | ".join(cells) + " |"


HEADER = (
    "| guide or posterior | data | good k | cover, k alone | flagged | needlessly | not flagged | cover, not widened "
    "| cover, widened | median ratio of widths |\n" + "|---" * 10 + "|"
)


def share(hits: Tensor) -> str:
    return f"{float(hits.double().mean()):.1%}" if len(hits) else ""


def look_at_pairs(num_data: int, num_particles: int, seed: int, verbose: bool) -> None:
    torch.manual_seed(seed)
    families: dict[str, list[Tally]] = {}
    for i, case in enumerate(all_cases(num_data)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator = ImportanceSampling(case.model, case.guide, num_particles=num_particles, seed=1000 * seed + i)
            tally = Tally.of(estimator(case.x), case.truth)
        if not families:
            print(HEADER)
        if verbose or case.family.startswith(WIDE):
            print(tally.row(case.name), flush=True)
        families.setdefault(case.family, []).append(tally)
    print("\n" + HEADER)
    for family, tallies in families.items():
        print(Tally.cat(tallies).row(family))
    del families[BLIND]  # listed above, and left out of the sums
    missing = [t for family, tallies in families.items() if not family.startswith(WIDE) for t in tallies]
    for low, high in itertools.pairwise((-math.inf, 0.2, 0.4, 0.6, 0.7)):
        print(Tally.cat(missing).band(low, high).row(f"all that miss mass, k from {low} to {high}"))
    print(Tally.cat(missing).row("all that miss mass"))
    print(Tally.cat([t for tallies in families.values() for t in tallies]).row("all"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--num-data", type=int, default=400)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--verbose", action="store_true", help="with --pairs: every case, not only those of wide guides")
    options = parser.parse_args()
    if options.pairs:
        look_at_pairs(options.num_data, options.particles, options.seed, options.verbose)
        return
    torch.manual_seed(0)
    pooled, bands = [], {band: [] for band in BANDS}
    print(f"{'share of intervals that cover':<32}" + "".join(f"{'k = ' + str(band):>10}" for band in BANDS))
    for num_particles in (1000, 4000):
        for name, draw in TARGETS.items():
            row = []
            for band in BANDS:
                inside = covered(draw(band, (num_particles, options.replicates)).double()).double()
                row.append(float(inside.mean()))
                bands[band].append(row[-1])
                pooled.append(row[-1])
            print(f"{f'{name}, K = {num_particles}':<32}" + "".join(f"{share:>10.1%}" for share in row))
    print(f"{'all':<32}" + "".join(f"{sum(v) / len(v):>10.1%}" for v in bands.values()))
    print(f"pooled: {sum(pooled) / len(pooled):.1%} of {len(pooled) * options.replicates} intervals")


if __name__ == "__main__":
    main()
