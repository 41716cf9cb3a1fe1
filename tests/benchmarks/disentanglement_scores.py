"""What scores of disentanglement read on codes whose quality is known: MIG, SAP and tree-based DCI (needs scikit-learn).

Three independent factors of 2, 4 and 10 values, five dimensions, posteriors of standard deviation 0.1 around the codes.
SAP (Kumar, Sattigeri and Balakrishnan, 2018, https://openreview.net/forum?id=H1kG7GZAW): best less second-best test score of
one dimension, by a linear support vector machine (C = 0.01, balanced) or by squared correlation with the value as a number.
DCI (Eastwood and Williams, 2018, https://openreview.net/forum?id=By-7dz-AZ): disentanglement and completeness of the
importances of gradient-boosted trees and random forests, at the defaults of scikit-learn. The second table holds "full"
and "leave-one-out" MIG against the truth.

    python tests/benchmarks/disentanglement_scores.py [--num-data 2000] [--repeats 3]
"""

import argparse
import math
import statistics
import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.svm import LinearSVC

import pyro_vae as pv

SIZES = (2, 4, 10)
NUM_DIMENSIONS = 5
SCALE = 0.1


def codes(num_data: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Factors (N, F), and posterior means (N, D) by name: dimensions that are not mentioned know nothing."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.stack([torch.randint(size, (num_data,), generator=generator) for size in SIZES], 1)
    noise = torch.randn(num_data, NUM_DIMENSIONS, generator=generator)
    in_order, shuffled = noise.clone(), noise.clone()
    for f, size in enumerate(SIZES):
        in_order[:, f] = v[:, f]
        shuffled[:, f] = torch.randperm(size, generator=generator)[v[:, f]].to(noise.dtype)
    twice = in_order.clone()
    twice[:, 3], twice[:, 4] = v[:, 1], v[:, 2]
    found = {
        "perfect: each factor is one dimension": in_order,
        "perfect, values in another order": shuffled,
        "two of the factors in two dimensions each": twice,
        "useless: independent of the factors": noise,
    }
    return v, found


def model(x: torch.Tensor) -> None:
    """A latent as wide as x; its likelihood is read by no score."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 10.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def mig(means: torch.Tensor, v: torch.Tensor, scale: float = SCALE, aggregate: str = "full") -> float:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, scale).to_event(1))

    batches = list(zip(means.split(250), v.split(250), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.SurgeryWarning)
        found = pv.MutualInformationGap(model, guide, aggregate=aggregate, seed=0)(batches, progress=False)
    return float(found.mig.value)


def lead(scores: np.ndarray) -> float:
    """Mean over the factors of the best score less the second-best, from (D, F)."""
    ordered = np.sort(scores, 0)
    return float((ordered[-1] - ordered[-2]).mean())


def sap_linear(z: np.ndarray, v: np.ndarray) -> float:
    half = len(z) // 2

    def score(d: int, f: int) -> float:
        machine = LinearSVC(C=0.01, class_weight="balanced").fit(z[:half, d : d + 1], v[:half, f])
        return machine.score(z[half:, d : d + 1], v[half:, f])

    return lead(np.array([[score(d, f) for f in range(v.shape[1])] for d in range(z.shape[1])]))


def sap_correlation(z: np.ndarray, v: np.ndarray) -> float:
    both = np.corrcoef(z.T, v.T)[: z.shape[1], z.shape[1] :]
    return lead(both**2)


def dci(trees: type, z: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """Disentanglement and completeness: one less the entropies of the rows and columns of the importances (D, F)."""
    fitted = [trees(random_state=0).fit(z, v[:, f]).feature_importances_ for f in range(v.shape[1])]
    importance = np.stack(fitted, 1) + 1e-11

    def concentration(rows: np.ndarray) -> float:
        p = rows / rows.sum(1, keepdims=True)
        entropy = -(p * np.log(p)).sum(1) / math.log(rows.shape[1])
        return float(((1 - entropy) * rows.sum(1)).sum() / rows.sum())

    return concentration(importance), concentration(importance.T)


def scores_of_codes(num_data: int, repeats: int) -> None:
    """Mean over the repeats, and the seconds of each score."""
    columns = ("MIG", "SAP, linear", "SAP, corr.", "DCI boosted", "", "DCI forest", "")
    print(f"{num_data} data, mean of {repeats}; DCI: disentanglement, completeness")
    print(f"{'code':<44}" + "".join(f"{name:>13}" for name in columns))
    times = dict.fromkeys(columns, 0.0)
    rows: dict[str, list[list[float]]] = {}
    for seed in range(repeats):
        v, found = codes(num_data, seed)
        for name, means in found.items():
            z = (means + SCALE * torch.randn(means.shape, generator=torch.Generator().manual_seed(seed))).numpy()
            tasks = (
                lambda means=means, v=v: (mig(means, v),),
                lambda z=z, v=v: (sap_linear(z, v.numpy()),),
                lambda z=z, v=v: (sap_correlation(z, v.numpy()),),
                lambda z=z, v=v: dci(GradientBoostingClassifier, z, v.numpy()),
                lambda z=z, v=v: dci(RandomForestClassifier, z, v.numpy()),
            )
            row: list[float] = []
            for title, task in zip([c for c in columns if c], tasks, strict=True):
                start = time.perf_counter()
                row += task()
                times[title] += time.perf_counter() - start
            rows.setdefault(name, []).append(row)
    for name, found_rows in rows.items():
        print(f"{name:<44}" + "".join(f"{statistics.mean(column):>13.3f}" for column in zip(*found_rows, strict=True)))
    print(f"{'seconds':<44}" + "".join(f"{times[c] / repeats / len(rows):>13.2f}" if c else f"{c:>13}" for c in columns))


def truth(scale: float) -> float:
    """I(v; N(v, scale^2)) / H(v) of four equal values, by quadrature."""
    grid = torch.linspace(-8, 11, 200_001, dtype=torch.float64)
    density = dist.Normal(torch.arange(4.0, dtype=torch.float64), scale).log_prob(grid[:, None]).exp()
    joint = density / 4 * (density.clamp(min=1e-300) / density.mean(1, keepdim=True).clamp(min=1e-300)).log()
    return float(torch.trapezoid(joint.sum(1), grid)) / math.log(4)


def bias_of_few_data(repeats: int) -> None:
    """One dimension is a factor of four values, four know nothing."""
    print(f"\nMIG of one dimension that is a factor of 4 values beside four that know nothing, mean of {repeats}")
    print(f"{'scale':>6}{'truth':>8}" + "".join(f"{f'N = {n}':>24}" for n in (100, 1000, 5000)))
    print(f"{'':>14}" + f"{'full':>12}{'left out':>12}" * 3)
    for scale in (0.5, 0.1, 0.02):
        cells = []
        for num_data in (100, 1000, 5000):
            for aggregate in ("full", "leave-one-out"):
                runs = []
                for seed in range(repeats):
                    means = torch.randn(num_data, NUM_DIMENSIONS, generator=torch.Generator().manual_seed(seed))
                    v = torch.arange(num_data) % 4
                    means[:, 0] = v
                    runs.append(mig(means, v.unsqueeze(1), scale, aggregate))
                cells.append(statistics.mean(runs))
        print(f"{scale:>6}{truth(scale):>8.3f}" + "".join(f"{cell:>12.3f}" for cell in cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-data", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    scores_of_codes(options.num_data, options.repeats)
    bias_of_few_data(options.repeats)
