"""On scikit-learn's digits the ELBO prefers a model whose log p(x) is lower, and `compare` says so. Run by hand.

    python tests/benchmarks/compare_digits.py

Both models are trained on the same 1,400 binary digits and measured on 200 others. "plain" has 8 latents, a diagonal guide
and was trained with the importance-weighted bound, which asks little of the guide. "rich" has 3 latents, a guide with a full
covariance and was trained with the ELBO.
"""

import time
from functools import partial

import pyro
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

EPOCHS, BATCH = 60, 100


def binary_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,400 for training, 200 for testing, (B, 64)."""
    x = (torch.tensor(load_digits().data) > 7).float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1400], x[1400:1600]


def trained(vae: pv.VAE, objective: torch.nn.Module, x: torch.Tensor) -> pv.VAE:
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), objective)
    for _ in range(EPOCHS):
        for batch in x[torch.randperm(len(x))].split(BATCH):
            svi.step(batch)
    return vae


def measured() -> dict[str, pv.Gaps]:
    """The gaps of both models on the test digits."""
    pyro.set_rng_seed(0)
    train, test = binary_digits()
    start = time.perf_counter()
    make = partial(pv.mlp_vae, 64, likelihood=pv.nn.Bernoulli(), hidden=(128,))
    models = {
        "plain": trained(make(8), pv.ImportanceWeightedELBO(num_particles=30), train),
        "rich": trained(make(3, posterior=pv.nn.MultivariateNormal()), pv.BetaTrace_ELBO(), train),
    }
    print(f"trained in {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    loader = DataLoader(TensorDataset(test), batch_size=100)
    gaps = {n: pv.evaluate(pv.InferenceGaps(v.model, v.guide), loader, seed=0, progress=False) for n, v in models.items()}
    print(f"measured in {time.perf_counter() - start:.0f} s")
    return gaps


if __name__ == "__main__":
    print(pv.compare(measured()))
