"""Do 95% intervals of log p(x) cover 95%? By population tail index of the weights, on Gaussian and skewed targets.

The targets' evidence is 1, so log p(x) = 0, and their weights are drawn directly:
    Gaussian: p = N(0, 1), q = N(0, 1 - k) in one dimension; D = 5 with a product of them, the widest at tail index k
    skewed: p = Exp(1 - k), q = Exp(1), the weights of an exponential tail; with a Gamma(3) factor, a Gamma target
The weights of all have tail index k: moments up to order 1/k are finite.

    python tests/benchmarks/evidence_calibration.py [--replicates 1000]
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Exponential, Gamma, Normal

from pyro_vae.estimates import Evidence
from pyro_vae.ops import effective_sample_size, log_mean_exp, log_mean_exp_std_error, pareto_smooth

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=1000)
    options = parser.parse_args()
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
