"""Cost and results of `InferenceGaps` on two published VAEs and on the README's.

python tests/benchmarks/gaps.py ../shared/data [--tolerance .02] [--particles 500] [--seeds 0 1]
"""

import argparse
import re
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from evidence_bdmc import load
from torch import Tensor, nn

import pyro_vae as pv

ROOT = Path(__file__).parents[2]


class ConvVAE(nn.Module):
    """The convolutional VAE of shared/data/conv_vae: 30 latents, static binarised MNIST."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.parts = nn.ParameterDict()
        for name, value in np.load(path).items():
            self.parts[name.replace(".", "_")] = nn.Parameter(torch.from_numpy(value), requires_grad=False)

    def decoder(self, z: Tensor) -> Tensor:
        p = self.parts
        h = F.linear(z, p["decoder_lin_weight"], p["decoder_lin_bias"]).reshape(-1, 7, 7, 32).permute(0, 3, 1, 2)
        h = F.relu(F.conv_transpose2d(h, p["decoder_a_weight"], p["decoder_a_bias"], stride=2)[..., :14, :14])
        h = F.relu(F.conv_transpose2d(h, p["decoder_b_weight"], p["decoder_b_bias"], stride=2)[..., :28, :28])
        h = F.conv_transpose2d(h, p["decoder_c_weight"], p["decoder_c_bias"], padding=1)
        return h.reshape(*z.shape[:-1], 784)

    def encoder(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.parts
        h = F.relu(F.conv2d(x.reshape(-1, 1, 28, 28), p["encoder_c1_weight"], p["encoder_c1_bias"], stride=2))
        h = F.relu(F.conv2d(h, p["encoder_c2_weight"], p["encoder_c2_bias"], stride=2)).permute(0, 2, 3, 1).flatten(1)

        def head(i: int) -> Tensor:
            y = F.linear(h, p[f"encoder_l{i}_weight"], p[f"encoder_l{i}_bias"])
            return F.layer_norm(y, (30,), p[f"encoder_n{i}_weight"], p[f"encoder_n{i}_bias"])

        return head(1), F.softplus(head(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 30), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


def readme_pair() -> tuple[SimpleNamespace, Tensor]:
    """The README's model and guide, trained as there."""
    code = re.findall(r"^## Example\n.*?^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[0]
    names: dict = {"__name__": "readme"}
    exec(compile(code.split("gaps = ")[0], "README.md", "exec"), names)
    return SimpleNamespace(model=names["model"], guide=names["guide"]), names["test"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--tolerance", type=float, nargs="*", default=[0.02])
    parser.add_argument("--particles", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*", default=["bdmc", "conv", "readme"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bdmc, x = load(options.data, 500)
    pairs = {"bdmc": lambda: (bdmc, x), "conv": lambda: (ConvVAE(options.data / "conv_vae" / "model.npz"), x)}
    pairs["readme"] = readme_pair
    for name in options.only:
        vae, data = pairs[name]()
        for tolerance in options.tolerance:
            for seed in options.seeds:
                gaps = pv.InferenceGaps(
                    vae.model, vae.guide, num_particles=options.particles, tolerance=tolerance, seed=seed
                )
                start = time.perf_counter()
                found = gaps(data)
                seconds = time.perf_counter() - start
                summary = found.summary().items()
                means = ", ".join(f"{n} {float(e.value):.3f} +- {float(e.std_error):.3f}" for n, e in summary)
                doubts = {n: int(flags.sum()) for n, flags in found.doubts.items() if bool(flags.any())}
                print(f"{name} tolerance {tolerance} seed {seed}: cost {found.cost:.0f}, {seconds:.1f} s", flush=True)
                print(f"    {means}; {doubts}", flush=True)


if __name__ == "__main__":
    main()
