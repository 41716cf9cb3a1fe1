"""`AutoEvidence` against fixed budgets: the share of data above the tolerance, doubts and cost, on published VAEs.

python tests/benchmarks/auto_evidence.py ../shared/data [--only bdmc conv readme] [--tolerance .05] [--fixed 2000 4000 8000]

With `--reference 20000`, "cover" is the share of 95% intervals, of data without a doubt, that hold log p(x) by so many
weights.
"""

import argparse
import functools
import time
import warnings
from pathlib import Path

from evidence_bdmc import load
from gaps import ConvVAE, readme_pair
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv


def coverage(record: pv.Evidence, reference: pv.Evidence) -> float:
    """The share of 95% intervals that hold the reference, each widened by the error of the reference."""
    low, high = record.confidence_interval(0.95)
    slack = 1.96 * reference.std_error
    held = (low - slack <= reference.log_evidence) & (reference.log_evidence <= high + slack)
    return float(held[record.reliable & reference.reliable].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--fixed", type=int, nargs="*", default=[500, 2000, 4000, 8000])
    parser.add_argument("--every", type=int, default=20, help="one in so many test images of the published VAE")
    parser.add_argument("--reference", type=int, help="weights of a reference for the coverage")
    parser.add_argument("--only", nargs="*", default=["bdmc", "conv", "readme"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    conv = options.data / "conv_vae" / "model.npz"
    pairs = {
        "bdmc": lambda: load(options.data, options.every),
        "conv": lambda: (ConvVAE(conv), load(options.data, 200)[1]),
        "readme": readme_pair,
    }
    estimators = {f"{k} weights": functools.partial(pv.AdaptiveImportanceSampling, num_particles=k) for k in options.fixed}
    estimators["AutoEvidence"] = functools.partial(pv.AutoEvidence, tolerance=options.tolerance)
    columns = "model, estimator, cost, seconds, above the tolerance, of them without a doubt, worst error, in doubt, cover"
    print(f"| {columns.replace(',', ' |')} |")
    for name in options.only:
        vae, x = pairs[name]()
        loader = DataLoader(TensorDataset(x), 250)
        reference = None
        if options.reference:
            estimator = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=options.reference)
            reference = pv.evaluate(estimator, loader, progress=False, seed=1)
        for title, make in estimators.items():
            start = time.perf_counter()
            record = pv.evaluate(make(vae.model, vae.guide), loader, progress=False, seed=0)
            above = record.std_error > options.tolerance
            print(
                f"| {name}, {len(x)} data | {title} | {record.cost:.0f} | {time.perf_counter() - start:.0f} | "
                f"{float(above.float().mean()):.1%} | {float((above & record.reliable).float().mean()):.1%} | "
                f"{float(record.std_error.max()):.3f} | {float((~record.reliable).float().mean()):.1%} | "
                f"{'' if reference is None else f'{coverage(record, reference):.1%}'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
