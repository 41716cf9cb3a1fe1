"""Time and memory of surgery at N = 60,000, and time of a diagnosis of the quickstart's VAE.

    python tests/benchmarks/latent_speed.py     # about a minute

The targets: 6 s and 1.5 GB for the first, 2 minutes for the second, on two cores that do nothing else.
"""

import resource
import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

NUM_DATA, LATENT_DIM, NUM_DRAWS = 60_000, 10, 1000


def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(LATENT_DIM), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(x.new_zeros(LATENT_DIM), 1.0).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.5).to_event(1))


def surgery():
    batches = list(torch.randn(NUM_DATA, LATENT_DIM).split(1000))
    for _ in range(3):
        wall, processor = time.perf_counter(), time.process_time()
        pv.ELBOSurgery(model, guide, num_draws=NUM_DRAWS, seed=0)(batches, progress=False)
        seconds = time.perf_counter() - wall, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"surgery: {seconds[0]:.1f} s wall, {seconds[1]:.1f} s of processors, peak {peak:.2f} GB")


def diagnosis(num_epochs=200):
    """The pair and the training of tutorials/quickstart.py."""
    pyro.set_rng_seed(0)
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    train, test = (
        DataLoader(TensorDataset(part), 100, shuffle=True)
        for part in train_test_split(pixels, test_size=360, random_state=0)
    )
    vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(128,))
    objective = pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(num_epochs * len(train) // 5))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), objective)
    for _ in range(num_epochs):
        for (x,) in train:
            svi.step(x)
    print(pv.diagnose(vae.model, vae.guide, train=train, test=test))


if __name__ == "__main__":
    warnings.simplefilter("ignore", pv.errors.SurgeryWarning)
    print(f"threads: {torch.get_num_threads()}")
    surgery()
    diagnosis()
