"""Log-evidence of 100 data at K = 1,000 with a 50-400-784 decoder: ours against hand-written PyTorch and bare matmuls.

Measured round-robin in one process; prints medians of the ratios, and peak memory at K = 500 and K = 8,000.

    python tests/benchmarks/evidence_speed.py [--rounds 15]
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import nn

import pyro_vae as pv

N, K, D, H, X = 100, 1000, 50, 400, 784


class VAE(nn.Module):
    """As in Pyro's own tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(D, H), nn.Softplus(), nn.Linear(H, X))
        self.encoder = nn.Sequential(nn.Linear(X, H), nn.Softplus(), nn.Linear(H, 2 * D))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), D), x.new_ones(len(x), D)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))


@torch.no_grad()
def by_hand(vae: VAE, x: torch.Tensor, chunk: int) -> torch.Tensor:
    parts = []
    loc, raw = vae.encoder(x).chunk(2, -1)
    scale = raw.exp()
    for _ in range(K // chunk):
        eps = torch.randn(chunk, N, D)
        z = loc + scale * eps
        logits = vae.decoder(z)
        log_lik = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        log_ratio = (-0.5 * z**2 + 0.5 * eps**2 + raw).sum(-1)
        parts.append(log_lik + log_ratio)
    return torch.cat(parts).logsumexp(0) - math.log(K)


@torch.no_grad()
def bare(vae: VAE, z: torch.Tensor, chunk: int) -> None:
    """The two matrix products of the decoder and nothing else."""
    first, second = vae.decoder[0].weight.T, vae.decoder[2].weight.T
    for _ in range(K // chunk):
        (z[:chunk] @ first) @ second


def peak_memory(num_particles: int) -> float:
    """Peak resident memory, MiB, of a fresh process that evaluates at `num_particles`."""
    code = f"import runpy; runpy.run_path({__file__!r})['evaluate_once']({num_particles})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def setting() -> tuple[VAE, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    return VAE(), torch.rand(N, X).bernoulli()


def evaluate_once(num_particles: int) -> None:
    vae, x = setting()
    pv.ImportanceSampling(vae.model, vae.guide, num_particles=num_particles, seed=0)(x)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    vae, x = setting()
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=K, seed=0)
    z = torch.randn(K, N, D)
    runs = {"ours": lambda: estimator(x)}
    for chunk in (20, 50, 100):
        runs[f"by hand, {chunk}"] = lambda c=chunk: by_hand(vae, x, c)
        runs[f"bare, {chunk}"] = lambda c=chunk: bare(vae, z, c)
    times = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, value in median.items():
        print(f"{name:<14}{1000 * value:8.1f} ms")
    hand = min(v for n, v in median.items() if n.startswith("by hand"))
    matmul = min(v for n, v in median.items() if n.startswith("bare"))
    print(f"ours / best hand-written {median['ours'] / hand:.3f}   ours / best bare products {median['ours'] / matmul:.3f}")
    low, high = peak_memory(500), peak_memory(8000)
    print(f"peak memory: K = 500 {low:.0f} MiB, K = 8,000 {high:.0f} MiB, ratio {high / low:.3f}")


if __name__ == "__main__":
    main()
