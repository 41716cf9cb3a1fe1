"""How often the 95% intervals of the mean hold the truth where `evaluate` stops by `tolerance`.

The pair is linear and Gaussian, z ~ N(0, 1) in 2 dimensions and x given z ~ N(A z, 0.25) in 10, the guide its posterior with
scales 1.2 times as large, so that log p(x) of each datum and its mean over the population are known. Every run draws data
anew and stops where it will; the last row goes over 500 data without a tolerance. The estimates, of 100 particles, come
from one call for all data of a run, and are handed to `evaluate` in batches of 20. Two intervals:

- population: the mean +- 1.96 `sampling_error`, for the mean over the population;
- these data: `mean_confidence_interval`, for the mean of log p(x) over the data that were used.

    python tests/benchmarks/early_stop_coverage.py
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402

import pyro_vae as pv  # noqa: E402

LATENTS, WIDTH, NOISE = 2, 10, 0.5
BATCH, FIXED, MOST = 20, 500, 1000
A = torch.randn(WIDTH, LATENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PRECISION = torch.eye(LATENTS, dtype=torch.float64) + A.T @ A / NOISE**2
MARGINAL = MultivariateNormal(torch.zeros(WIDTH, dtype=torch.float64), A @ A.T + NOISE**2 * torch.eye(WIDTH))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENTS), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ A.T, NOISE).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    covariance = 1.44 * torch.linalg.inv(PRECISION)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(x @ A @ torch.linalg.inv(PRECISION) / NOISE**2, covariance))


def runs(seed: int, tolerances: list[float | None]) -> list[tuple[int, bool, bool]]:
    """For each tolerance how many data were used, and whether each interval holds its truth."""
    torch.manual_seed(seed)
    x = MARGINAL.sample((MOST,))
    whole = pv.ImportanceSampling(model, guide, num_particles=100, seed=seed)(x)
    return [one_run(x, whole, tolerance) for tolerance in tolerances]


def one_run(x: Tensor, whole: pv.Evidence, tolerance: float | None) -> tuple[int, bool, bool]:
    places = torch.arange(MOST if tolerance else FIXED).split(BATCH)
    found = pv.evaluate(whole.select, places, args=lambda place: (place,), tolerance=tolerance, progress=False)
    assert len(found) < MOST
    mean, truth = found.mean(), -float(MARGINAL.entropy())
    low, high = found.mean_confidence_interval()
    used = float(MARGINAL.log_prob(x[: len(found)]).mean())
    return len(found), abs(float(mean.value) - truth) <= 1.96 * float(mean.sampling_error), low <= used <= high


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.2, 0.15, 0.1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tolerances = [*options.tolerances, None]
    found = [runs(seed, tolerances) for seed in range(options.runs)]
    print(f"{options.runs} runs\n{'tolerance':>9} {'data used':>12} {'population':>15} {'these data':>15}")
    for tolerance, column in zip(tolerances, zip(*found, strict=True), strict=True):
        sizes = sorted(size for size, *_ in column)
        used = f"{sizes[len(sizes) // 20]} to {sizes[-1 - len(sizes) // 20]}"
        shares = [sum(one[place] for one in column) / len(column) for place in (1, 2)]
        shown = [f"{share:.3f} +- {math.sqrt(share * (1 - share) / len(column)):.3f}" for share in shares]
        print(f"{tolerance or 'none':>9} {used:>12} {shown[0]:>15} {shown[1]:>15}")


if __name__ == "__main__":
    main()
