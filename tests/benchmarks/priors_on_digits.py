"""Four priors on the digits of scikit-learn: log p(x) of held-out data, compared datum by datum.

The same encoder, decoder and training under each prior: standard normal, a learned mixture, a VampPrior and a flow. Log p(x)
is that of `AutoEvidence` to 0.1 nats; `pv.compare` says which can be told apart.

    python tests/benchmarks/priors_on_digits.py
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import pyro
import torch
from pyro.distributions import transforms as T
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyro_vae as pv  # noqa: E402

DIM, NUM_COMPONENTS = 8, 30


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1500], x[1500:]


def pair(prior: str, x: torch.Tensor) -> pv.VAE:
    likelihood = pv.nn.Binomial(16)
    encoder = nn.Sequential(likelihood.input_layer(), pv.nn.MLP(64, 2 * DIM, hidden=(128,)), pv.nn.Normal())
    decoder = nn.Sequential(pv.nn.MLP(DIM, 64, hidden=(128,)), likelihood)
    flow = [T.affine_autoregressive(DIM, hidden_dims=[64]), T.permute(DIM, torch.arange(DIM).flip(0))]
    flow += [T.affine_autoregressive(DIM, hidden_dims=[64])]
    priors = {
        "standard": lambda: pv.nn.StandardNormal(DIM),
        "mixture": lambda: pv.nn.MixturePrior(DIM, NUM_COMPONENTS),
        "vamp": lambda: pv.nn.VampPrior(encoder, x[:NUM_COMPONENTS].clone(), bounds=(0, 16)),
        "flow": lambda: pv.nn.FlowPrior(DIM, flow),
    }
    return pv.VAE(encoder, decoder, priors[prior]())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=300)
    num_epochs = parser.parse_args().epochs
    warnings.simplefilter("ignore")
    train, test = digits()
    loader = DataLoader(TensorDataset(train), 100, shuffle=True)
    evidence = {}
    for prior in ("standard", "mixture", "vamp", "flow"):
        start = time.perf_counter()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = pair(prior, train)
        optim = pv.FusedOptim(torch.optim.Adam, {"lr": 2e-3})
        svi = SVI(vae.model, vae.guide, optim, pv.BetaTraceMeanField_ELBO())
        best = pv.EarlyStopping(vae.model, vae.guide, [test[:100]], every=150, patience=8, seed=0)
        for epoch in range(num_epochs):
            for (x,) in loader:
                svi.step(x)
            if best((epoch + 1) * len(loader)):
                break
        best.restore_best()
        vae.eval()
        held_out = DataLoader(TensorDataset(test[100:]), 100)  # not those that training was stopped by
        evidence[prior] = pv.evaluate(pv.AutoEvidence(vae.model, vae.guide, tolerance=0.1), held_out, seed=0, progress=False)
        doubts = int((~evidence[prior].reliable).sum())
        seconds = time.perf_counter() - start
        print(
            f"{prior}: {epoch + 1} epochs, log p(x) {evidence[prior].mean()}, {doubts} in doubt, {seconds:.0f} s", flush=True
        )
    print(pv.compare(evidence))


if __name__ == "__main__":
    main()
