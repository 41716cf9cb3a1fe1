"""Numbers of the literature beside ours, under two minutes on two cores: the tables of docs/published.md.

python tests/benchmarks/published.py [DATA]

DATA is the folder that docs/accuracy.md describes; without it the two published VAEs are left out.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from evidence_bdmc import load
from gaps import ConvVAE
from missing_tables import filled, holed_table, miwae
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor

import pyro_vae as pv

ROW = 4831  # of the test images: the target of the samplers that docs/published.md cites


@contextmanager
def timed() -> Iterator[Callable[[], str]]:
    start = time.process_time()
    yield lambda: f"{time.process_time() - start:.0f} s of a core"


def conv_vae(data: Path) -> None:
    vae = ConvVAE(data / "conv_vae" / "model.npz")
    images = np.unpackbits(np.load(data / "binarized_mnist.npz")["test"], axis=1)
    x = torch.from_numpy(images[ROW : ROW + 1]).float()
    print(f"conv_vae, test image {ROW}: log p(x); published SMC -109.98 to -110.00, DDS -110.01 to -110.04")
    estimators = {
        "ImportanceSampling, K = 2,000": pv.ImportanceSampling(vae.model, vae.guide, num_particles=2000, seed=0),
        "AdaptiveImportanceSampling, K = 3,000": pv.AdaptiveImportanceSampling(
            vae.model, vae.guide, num_particles=3000, seed=0
        ),
        "AutoEvidence, tolerance 0.01": pv.AutoEvidence(vae.model, vae.guide, tolerance=0.01, seed=0),
        "AnnealedImportanceSampling, 250 x 16": pv.AnnealedImportanceSampling(
            vae.model, vae.guide, num_steps=250, num_chains=16, seed=0, progress=False
        ),
    }
    for name, estimator in estimators.items():
        with timed() as taken:
            result = estimator(x)
        doubts = ", ".join(reason for reason, flags in result.doubts.items() if bool(flags.any())) or "none"
        print(
            f"  {name:<40}{float(result.log_evidence):9.3f} +- {float(result.std_error):.3f}, doubts: {doubts}; "
            f"cost {result.cost:,.0f}, {taken()}",
            flush=True,
        )


def bdmc(data: Path) -> None:
    vae, _ = load(data)
    simulated = np.load(data / "bdmc" / "sim64.npz")
    x, z = (torch.tensor(simulated[name][:16], dtype=torch.float) for name in ("x", "z"))
    with timed() as taken:
        sandwich = pv.BidirectionalMonteCarlo(
            vae.model, vae.guide, latents={"latent": z}, num_steps=100, num_chains=4, seed=0, progress=False
        )(x)
    print(
        "BDMC model, 16 simulated images: sandwich of log p(x); the reference code: width 2.67 at 80,000 gradients each way"
    )
    print(
        f"  lower {sandwich.lower.mean().with_error()}, upper {sandwich.upper.mean().with_error()}, "
        f"width {sandwich.mean_width().with_error()}; {sandwich.lower.cost / 3:,.0f} gradients each way, {taken()}",
        flush=True,
    )


def regressions() -> None:
    """Logistic regressions, weights and intercept N(0, 1): one log p(y), all weights shared."""
    print("Bayesian logistic regressions: log p(y), beside a sequential Monte Carlo sampler written with NumPy alone")
    cancer, wine = load_breast_cancer(), load_wine()
    tables = {"breast cancer": (cancer.data, cancer.target), "wine, first class": (wine.data, wine.target == 0)}
    for name, (features, labels) in tables.items():
        features = (features - features.mean(0)) / features.std(0)
        design = np.column_stack([np.ones(len(features)), features])
        with timed() as taken:
            runs = np.array([sequential_monte_carlo(design, labels.astype(float), seed) for seed in range(4)])
        print(f"  {name}, {design.shape[1]} weights, {len(design)} rows")
        print(f"    sequential Monte Carlo, 4 runs{runs.mean():14.3f} +- {runs.std(ddof=1) / 2:.3f}; {taken()}")
        pair = regression(torch.from_numpy(design), torch.from_numpy(labels).double())
        options = {"datum_plate": None, "num_particles": 2000, "seed": 0}
        for made in (pv.ImportanceSampling, pv.AdaptiveImportanceSampling):
            with timed() as taken:
                result = made(pair.model, pair.guide, **options)(*pair.args)
            doubts = ", ".join(reason for reason, flags in result.doubts.items() if bool(flags.any())) or "none"
            print(
                f"    {made.__name__:<30}{float(result.log_evidence):14.3f} +- {float(result.std_error):.3f}, "
                f"doubts: {doubts}; {taken()}",
                flush=True,
            )


def regression(design: Tensor, labels: Tensor) -> SimpleNamespace:
    def model(design: Tensor, labels: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(design.new_zeros(design.shape[1]), 1.0).to_event(1))
        with pyro.plate("rows", len(labels)):
            pyro.sample("y", dist.Bernoulli(logits=(weights.unsqueeze(-2) * design).sum(-1)), obs=labels)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(model, init_scale=0.1)
    svi = SVI(
        model, guide, pv.FusedOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO(num_particles=4, vectorize_particles=False)
    )
    for _ in range(1000):
        svi.step(design, labels)
    return SimpleNamespace(model=model, guide=guide, args=(design, labels))


def sequential_monte_carlo(design: np.ndarray, labels: np.ndarray, seed: int, size: int = 2000) -> float:
    """log p(y) by tempering from the prior to the posterior, with random-walk Metropolis moves."""
    rng = np.random.default_rng(seed)
    dim, signs = design.shape[1], 2 * labels - 1

    def log_likelihood(w: np.ndarray) -> np.ndarray:
        return -np.logaddexp(0, -(w @ design.T) * signs).sum(1)

    w = rng.standard_normal((size, dim))
    scores, temperature, total = log_likelihood(w), 0.0, 0.0
    while temperature < 1:
        step = next_step(scores, 1 - temperature)
        log_weights = step * scores
        total += np.logaddexp.reduce(log_weights) - math.log(size)
        temperature += step
        weights = np.exp(log_weights - log_weights.max())
        chosen = rng.choice(size, size, p=weights / weights.sum())
        w, scores = w[chosen], scores[chosen]
        root = np.linalg.cholesky(np.cov(w.T) + 1e-9 * np.eye(dim)) * 2.38 / math.sqrt(dim)
        for _ in range(25):
            moved = w + rng.standard_normal(w.shape) @ root.T
            new = log_likelihood(moved)
            ratio = temperature * (new - scores) + 0.5 * ((w**2).sum(1) - (moved**2).sum(1))
            accepted = np.log(rng.random(size)) < ratio
            w[accepted], scores[accepted] = moved[accepted], new[accepted]
    return total


def next_step(scores: np.ndarray, most: float) -> float:
    """The step in temperature that leaves half of the effective sample size."""
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        weights = np.exp(middle * (scores - scores.max()))
        low, high = (middle, high) if weights.sum() ** 2 / (weights**2).sum() > len(scores) / 2 else (low, middle)
    return most if high == most else high


def tables_with_holes() -> None:
    options = SimpleNamespace(latent=10, hidden=128, particles=20, lr=1e-3, epochs=500)
    print("MIWAE, half of iris missing: mean squared error; published .40 to .47")
    with timed() as taken:
        errors = []
        for seed in range(2):
            x, table = holed_table("iris", seed)
            guess = filled(miwae(table, options, seed), table, seed).mean["obs"]
            errors.append(float((guess - x)[table.isnan()].square().mean()))
    print(f"  {', '.join(f'{error:.3f}' for error in errors)} (seeds 0, 1); {taken()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    data = parser.parse_args().data
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    if data is not None:
        conv_vae(data)
        bdmc(data)
    regressions()
    tables_with_holes()
    print(f"{time.perf_counter() - start:.0f} s in all, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
