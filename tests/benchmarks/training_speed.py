"""One training step of a 784-400-50 VAE at batch 128: ours against hand-written PyTorch and against Pyro as in its tutorial.

Measured round-robin in one process; prints the median step and its ratio to hand-written PyTorch.

    python tests/benchmarks/training_speed.py [--rounds 400] [--threads 2] [--no-validation]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv

B, X, H, D = 128, 784, 400, 50
LEARNING_RATE = 1e-3
Step = Callable[[], object]


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(X, H), nn.ReLU(), nn.Linear(H, 2 * D))
    decoder = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, X))
    return encoder, decoder


def by_hand(x: torch.Tensor) -> Step:
    """Plain PyTorch: the sampled reconstruction and the analytic KL as one expression."""
    encoder, decoder = networks()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], LEARNING_RATE, fused=True)

    def step() -> None:
        loc, log_scale = encoder(x).chunk(2, -1)
        scale = log_scale.exp()
        z = loc + scale * torch.randn_like(loc)
        distortion = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        loss = distortion + 0.5 * (loc**2 + scale**2 - 2 * log_scale - 1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def as_module(objective: ELBO, x: torch.Tensor) -> Step:
    encoder, decoder = networks()
    vae = pv.VAE(nn.Sequential(encoder, pv.nn.Normal()), nn.Sequential(decoder, pv.nn.Bernoulli()), pv.nn.StandardNormal(D))
    loss = objective(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), LEARNING_RATE, fused=True)

    def step() -> None:
        value = loss(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def under_svi(objective: ELBO, x: torch.Tensor) -> Step:
    encoder, decoder = networks()
    vae = pv.VAE(nn.Sequential(encoder, pv.nn.Normal()), nn.Sequential(decoder, pv.nn.Bernoulli()), pv.nn.StandardNormal(D))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), objective)
    return lambda: svi.step(x)


def as_in_the_tutorial(x: torch.Tensor) -> Step:
    """Pyro's own VAE tutorial: SVI, Trace_ELBO, pyro.optim.Adam."""
    encoder, decoder = networks()

    def model(x: torch.Tensor) -> None:
        pyro.module("tutorial.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), D), x.new_ones(len(x), D)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("tutorial.encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO())
    return lambda: svi.step(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-validation", action="store_true", help="as people switch it off for long runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(not options.no_validation)
    x = (torch.rand(B, X, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    steps = {
        "hand-written PyTorch, fused Adam": by_hand(x),
        "BetaTraceMeanField_ELBO as a module, fused Adam": as_module(pv.BetaTraceMeanField_ELBO(beta=0.5), x),
        "BetaTrace_ELBO as a module, fused Adam": as_module(pv.BetaTrace_ELBO(beta=0.5), x),
        "SVI + BetaTraceMeanField_ELBO + pyro.optim.Adam": under_svi(pv.BetaTraceMeanField_ELBO(beta=0.5), x),
        "SVI + Trace_ELBO + pyro.optim.Adam, plain Pyro": as_in_the_tutorial(x),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    warm = {name: t[options.rounds // 10 :] for name, t in times.items()}
    first = statistics.median(next(iter(warm.values())))
    validation = "off" if options.no_validation else "on"
    print(f"validation {validation}, {options.threads} threads, {options.rounds} rounds, batch {B}, {X}-{H}-{D}")
    for name, t in warm.items():
        print(f"{name:52s} {1e3 * statistics.median(t):6.2f} ms   {statistics.median(t) / first:5.2f} of hand-written")


if __name__ == "__main__":
    main()
