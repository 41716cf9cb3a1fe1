"""Mean log p(x) of the shared BDMC model on `test[::20]` (500 images) against cost in decoder evaluations per image.

python tests/benchmarks/evidence_bdmc.py ../shared/data [--guide 5000 50000] [--seeds 0 1]
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv


class BDMCModel(nn.Module):
    """784-200-200-(50 | 50) encoder, 50-200-200-784 Bernoulli decoder, ELU, trained on static MNIST."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        state = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
        layer = lambda i: self._layer(state[f"fc{i}.weight"], state[f"fc{i}.bias"])  # noqa: E731
        self.encoder = nn.Sequential(layer(1), nn.ELU(), layer(2), nn.ELU(), layer(3))
        self.decoder = nn.Sequential(layer(4), nn.ELU(), layer(5), nn.ELU(), layer(6))

    @staticmethod
    def _layer(weight: Tensor, bias: Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 50), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_variance = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1))


def load(data: Path, every: int = 20) -> tuple[BDMCModel, Tensor]:
    images = np.unpackbits(np.load(data / "binarized_mnist.npz")["test"], axis=1)[::every]
    return BDMCModel(data / "bdmc" / "model.npz"), torch.from_numpy(images).float()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--guide", type=int, nargs="*", default=[5000])
    parser.add_argument("--costs", type=int, nargs="*", default=[500, 1000, 2500])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    options = parser.parse_args()
    vae, x = load(options.data)
    loader = DataLoader(TensorDataset(x), 250)
    warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)

    def report(label: str, estimator: object) -> None:
        start = time.perf_counter()
        result = pv.evaluate(estimator, loader, progress=False)
        mean = result.mean()
        print(
            f"{label:<34} cost {result.cost:7.0f}  log p {float(mean.value):9.4f} +- {float(mean.std_error):.4f}  "
            f"median ESS {float(result.ess.median()):6.0f}  k high {float(result.doubts['tails'].float().mean()):.3f}  "
            f"{time.perf_counter() - start:5.0f} s",
            flush=True,
        )

    for num_particles in options.guide:
        for seed in options.seeds[:1]:
            estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=num_particles, seed=seed)
            report(f"guide as it is, seed {seed}", estimator)
    for cost in options.costs:
        num_gradients = min(round(0.17 * cost), 290)
        # The rest of the budget after gradients, the guide's ELBO (20), one run that reads the supports, two in float64.
        num_particles = cost - 3 * num_gradients - 23
        for seed in options.seeds:
            estimator = pv.AdaptiveImportanceSampling(
                vae.model, vae.guide, num_particles=num_particles, num_gradients=num_gradients, seed=seed
            )
            report(f"fitted, K = {num_particles}, seed {seed}", estimator)


if __name__ == "__main__":
    main()
