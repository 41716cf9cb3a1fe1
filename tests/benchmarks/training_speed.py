"""One training step of a VAE, with and without compile=True: ours, hand-written PyTorch, and Pyro as in its tutorial.

784-400-50 at the given batch sizes, and with --conv convolutions on 28 x 28 images. Measured round-robin in one process,
some steps of one contender at a time, as in training, where the caches hold one model. Prints the median and the fastest
step and their ratios to hand-written PyTorch. The seconds that a first step takes to compile are not in the times; the
look-up of inputs at each call is.

    python tests/benchmarks/training_speed.py [--batch 32 128 512] [--conv] [--rounds 40] [--threads 2] [--no-validation]
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

X, H, D = 784, 400, 50
LEARNING_RATE = 1e-3
Step = Callable[[], object]
CONV = False
TURN = 10  # steps at a time


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    if CONV:
        down = nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()
        up = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)
        encoder = nn.Sequential(nn.Unflatten(-1, (1, 28, 28)), *down, nn.Flatten(1), nn.Linear(1568, 2 * D))
        decoder = nn.Sequential(nn.Linear(D, 1568), nn.ReLU(), nn.Unflatten(-1, (32, 7, 7)), *up, nn.Flatten(1))
        return encoder, decoder
    encoder = nn.Sequential(nn.Linear(X, H), nn.ReLU(), nn.Linear(H, 2 * D))
    decoder = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, X))
    return encoder, decoder


def by_hand(x: torch.Tensor) -> Step:
    """Plain PyTorch: the sampled reconstruction and the analytic KL as one expression."""
    encoder, decoder = networks()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loc, log_scale = encoder(x).chunk(2, -1)
        scale = log_scale.exp()
        z = loc + scale * torch.randn_like(loc)
        distortion = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        loss = distortion + 0.5 * (loc**2 + scale**2 - 2 * log_scale - 1).sum()
        loss.backward()
        optimizer.step()

    return step


def as_module(objective: ELBO, x: torch.Tensor) -> Step:
    encoder, decoder = networks()
    vae = pv.VAE(nn.Sequential(encoder, pv.nn.Normal()), nn.Sequential(decoder, pv.nn.Bernoulli()), pv.nn.StandardNormal(D))
    loss = objective(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()

    return step


def under_svi(objective: ELBO, x: torch.Tensor, optim: Callable = pyro.optim.Adam) -> Step:
    encoder, decoder = networks()
    vae = pv.VAE(nn.Sequential(encoder, pv.nn.Normal()), nn.Sequential(decoder, pv.nn.Bernoulli()), pv.nn.StandardNormal(D))
    svi = SVI(vae.model, vae.guide, optim({"lr": LEARNING_RATE}), objective)
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


def steps_of(x: torch.Tensor) -> dict[str, Step]:
    def objective(compile: bool = False) -> ELBO:
        return pv.BetaTraceMeanField_ELBO(beta=0.5, compile=compile)

    return {
        "hand-written PyTorch, fused Adam": by_hand(x),
        "a module, fused Adam": as_module(objective(), x),
        "a module, compiled, fused Adam": as_module(objective(compile=True), x),
        "BetaTrace_ELBO as a module, fused Adam": as_module(pv.BetaTrace_ELBO(beta=0.5), x),
        "SVI, pyro.optim.Adam": under_svi(objective(), x),
        "SVI, compiled, pyro.optim.Adam": under_svi(objective(compile=True), x),
        "SVI, Trace_ELBO, pyro.optim.Adam, plain Pyro": as_in_the_tutorial(x),
    }


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step but those of the first round and the first of each turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            for turn in range(TURN):
                start = time.perf_counter()
                step()
                if number and turn:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--conv", action="store_true", help="convolutions in the place of linear layers")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-validation", action="store_true", help="as people switch it off for long runs")
    options = parser.parse_args()
    global CONV
    CONV = options.conv
    torch.set_num_threads(options.threads)
    pyro.enable_validation(not options.no_validation)
    nets = "convolutions" if CONV else f"{X}-{H}-{D}"
    validation = "off" if options.no_validation else "on"
    print(f"validation {validation}, {options.threads} threads, {options.rounds} rounds of {TURN} steps, {nets}")
    for size in options.batch:
        x = (torch.rand(size, X, generator=torch.Generator().manual_seed(1)) < 0.3).float()
        times = measure(steps_of(x), options.rounds)
        first = next(iter(times.values()))
        print(f"batch {size}: BetaTraceMeanField_ELBO, where no other is named; of hand-written: median, fastest")
        for name, t in times.items():
            median, fastest = statistics.median(t), min(t)
            ratios = f"{median / statistics.median(first):5.2f} {fastest / min(first):5.2f}"
            print(f"  {name:46s} {median:7.2f} ms, {fastest:7.2f} ms   {ratios}")


if __name__ == "__main__":
    main()
