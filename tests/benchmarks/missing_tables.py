"""Tables with half of their numbers missing, filled in: the experiment of Mattei and Frellsen (2019) on UCI data.

python tests/benchmarks/missing_tables.py [--data iris breast_cancer] [--seeds 5] [--epochs 500]

Data of scikit-learn, standardised, half of the numbers missing completely at random. A MIWAE (Student's t, 128 hidden units)
learns from the holed table alone, and what is missing is filled in by its predictive mean. The figure is the mean squared
error of what was missing, over the seeds, each with holes of its own; 1 is about what the mean of the column has.
Published for MIWAE: .40 to .47 (iris) and .287 (breast cancer).
"""

import argparse
import time
import warnings

import pyro
import torch
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer
from torch import nn

import pyro_vae as pv

LOADERS = {"iris": load_iris, "breast_cancer": load_breast_cancer}


def holed_table(name, seed):
    """The standardised table, and the one with half of its numbers missing."""
    x = torch.as_tensor(LOADERS[name]().data).float()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return x, x.masked_fill(holes, torch.nan)


def miwae(table, args, seed):
    pyro.set_rng_seed(seed)
    likelihood = pv.nn.StudentT(df="learned")
    vae = pv.mlp_missing_vae(
        table.shape[1], args.latent, likelihood=likelihood, hidden=(args.hidden, args.hidden), activation=nn.Tanh
    )
    objective = pv.ImportanceWeightedELBO(num_particles=args.particles)
    loss = objective(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=args.lr)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(table)).split(64):
            optimizer.zero_grad()
            (loss(table[rows]) / len(rows)).backward()
            optimizer.step()
    return vae.eval()


def filled(vae, table, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return pv.impute(vae.model, vae.guide, table, num_particles=1000, seed=seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(LOADERS), choices=LOADERS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--particles", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.data:
        errors = {"MIWAE": [], "chained equations": [], "10 neighbours": []}
        for seed in range(args.seeds):
            start = time.process_time()
            x, table = holed_table(name, seed)
            result = filled(miwae(table, args, seed), table, seed)
            others = {
                "chained equations": IterativeImputer(random_state=seed, max_iter=20),
                "10 neighbours": KNNImputer(n_neighbors=10),
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                guesses = {kind: torch.as_tensor(other.fit_transform(table)).float() for kind, other in others.items()}
            holes = table.isnan()
            for kind, guess in {"MIWAE": result.mean["obs"], **guesses}.items():
                errors[kind].append((guess - x)[holes].square().mean())
            doubted = int((~result.reliable).sum())
            print(
                f"{name} seed {seed}: {errors['MIWAE'][-1]:.3f}, {doubted} of {len(x)} rows in doubt, "
                f"{time.process_time() - start:.0f} s",
                flush=True,
            )
        for kind, values in errors.items():
            values = torch.stack(values)
            print(f"{name:14} {kind:18} {values.mean():.3f} +- {values.std() / len(values) ** 0.5:.3f}", flush=True)


if __name__ == "__main__":
    main()
