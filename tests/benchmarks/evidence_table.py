"""Sandwiches and annealed importance sampling on a published VAE: the table of docs/evidence.md, costs beside figures.

Needs the pretrained 784-200-200-50 model, its 64 simulated images and binarised MNIST, which are not part of the repository.

    python tests/benchmarks/evidence_table.py path/to/data [--threads 2] [--quick]

A cost is in gradients per image (three decoder evaluations each), fit, pilot and all else included.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from evidence_bdmc import load
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv


def sandwiches(vae: torch.nn.Module, data: Path, quick: bool) -> None:
    simulated = np.load(data / "bdmc" / "sim64.npz")
    x, z = (torch.tensor(simulated[name], dtype=torch.float) for name in ("x", "z"))
    columns = f"{'gradients':>10} {'lower':>20} {'upper':>20} {'width':>19} {'acceptance':>11}"
    print(f"{'sandwich, 64 simulated images':<36}{columns}")
    settings = [
        ("fitted", "adaptive", 100, 4),
        ("fitted", "linear", 100, 4),
        ("fitted", "adaptive", 250, 16),
        ("fitted", "linear", 250, 16),
        ("fitted", "sigmoid", 250, 16),
        ("guide", "adaptive", 1000, 4),
        ("guide", "linear", 1000, 4),
        ("prior", "adaptive", 1000, 4),
        ("prior", "sigmoid", 1000, 4),
        ("prior", "linear", 1000, 4),
    ]
    for start, schedule, num_steps, num_chains in settings[:2] if quick else settings:
        for seed in (0, 1) if start == "fitted" else (0,):
            begin = time.perf_counter()
            sandwich = pv.BidirectionalMonteCarlo(
                vae.model,
                vae.guide,
                latents={"latent": z},
                num_steps=num_steps,
                num_chains=num_chains,
                start=start,
                schedule=schedule,
                seed=seed,
                progress=False,
            )(x)
            width = sandwich.mean_width()
            print(
                f"{f'{start}, {schedule}, {num_steps} x {num_chains}, seed {seed}':<36}{sandwich.lower.cost / 3:>10.0f} "
                + " ".join(
                    f"{float(end.mean().value):>10.4f} +- {float(end.mean().std_error):.4f}"
                    for end in (sandwich.lower, sandwich.upper)
                )
                + f" {float(width.value):>9.4f} +- {float(width.std_error):.4f}"
                + f" {float(sandwich.lower.acceptance.mean()):>11.2f} {time.perf_counter() - begin:>4.0f} s",
                flush=True,
            )


def real_images(vae: torch.nn.Module, x: torch.Tensor, quick: bool) -> None:
    loader = DataLoader(TensorDataset(x), 125)
    estimators = {
        "adaptive, 1,000 evaluations": pv.AdaptiveImportanceSampling(
            vae.model, vae.guide, num_particles=469, num_gradients=170, seed=0
        ),
        "adaptive, 2,500 evaluations": pv.AdaptiveImportanceSampling(
            vae.model, vae.guide, num_particles=1609, num_gradients=290, seed=0
        ),
        "AIS, 200 x 16": pv.AnnealedImportanceSampling(vae.model, vae.guide, num_steps=200, seed=0, progress=False),
        "AIS, 600 x 16": pv.AnnealedImportanceSampling(vae.model, vae.guide, num_steps=600, seed=1, progress=False),
    }
    print(f"\n{'500 test images':<36}{'evaluations':>12} {'log p(x), lower bound':>22} {'k above threshold':>18}")
    for name, estimator in list(estimators.items())[:2] if quick else estimators.items():
        begin = time.perf_counter()
        evidence = pv.evaluate(estimator, loader, progress=False)
        mean = evidence.mean()
        print(
            f"{name:<36}{evidence.cost:>12.0f} {float(mean.value):>12.4f} +- {float(mean.std_error):.4f} "
            f"{float(evidence.doubts['tails'].float().mean()):>17.1%} {time.perf_counter() - begin:>5.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
    vae, test = load(options.data)
    sandwiches(vae, options.data, options.quick)
    real_images(vae, test, options.quick)


if __name__ == "__main__":
    main()
