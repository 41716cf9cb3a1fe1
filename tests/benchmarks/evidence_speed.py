"""Log-evidence of 100 data at K = 1,000 with a 50-400-784 decoder: ours against hand-written PyTorch and bare matmuls.

One thread, round-robin in one process; prints medians and their ratios, for each also with `torch.compile` and in bfloat16.
Then annealed chains, without the fits before them, against the gradients that they take; and how time and memory grow with
K, and with N over a loader. With the path of a Python that has JAX, the same sum jitted there, in a process of its own.

    python tests/benchmarks/evidence_speed.py [--rounds 15] [--jax python_with_jax]
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.evidence.annealing import Annealing

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


def weigh(vae: VAE, x: torch.Tensor, eps: torch.Tensor, loc: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    z = loc + raw.exp() * eps
    logits = vae.decoder(z)
    log_lik = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    return log_lik + (-0.5 * z**2 + 0.5 * eps**2 + raw).sum(-1)


@torch.no_grad()
def by_hand(vae: VAE, x: torch.Tensor, chunk: int, weigh=weigh) -> torch.Tensor:
    loc, raw = vae.encoder(x).chunk(2, -1)
    parts = [weigh(vae, x, torch.randn(chunk, N, D), loc, raw) for _ in range(K // chunk)]
    return torch.cat(parts).logsumexp(0) - math.log(K)


@torch.no_grad()
def bare(vae: VAE, z: torch.Tensor, chunk: int) -> None:
    """The two matrix products of the decoder and nothing else."""
    first, second = vae.decoder[0].weight.T, vae.decoder[2].weight.T
    for _ in range(K // chunk):
        (z[:chunk] @ first) @ second


def in_bfloat16(estimator, x: torch.Tensor):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return estimator(x)


@torch.no_grad()
def gradients_alone(vae: VAE, x: torch.Tensor, num_chains: int, number: int) -> None:
    """So many gradients of the log joint of some chains, and nothing else."""
    for _ in range(number):
        z = torch.randn(num_chains, N, D, requires_grad=True)
        with torch.enable_grad():
            logits = vae.decoder(z)
            log_lik = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum()
            torch.autograd.grad(log_lik - 0.5 * z.square().sum(), z)


@torch.enable_grad()
def decoder_alone(vae: VAE, num_chains: int, number: int) -> None:
    """So many passes of the decoder forward and backward, without a likelihood."""
    for _ in range(number):
        z = torch.randn(num_chains, N, D, requires_grad=True)
        logits = vae.decoder(z)
        torch.autograd.grad(logits, z, torch.ones_like(logits))


def chains_against_gradients(vae: VAE, x: torch.Tensor, rounds: int) -> None:
    num_steps, num_chains = 60, 16
    options = {"num_steps": num_steps, "num_chains": num_chains, "progress": False}
    estimator = pv.AnnealedImportanceSampling(vae.model, vae.guide, seed=0, **options)
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        chains = Annealing(call, estimator)
        runs = {
            "chains": chains.forward,
            "gradients": lambda: gradients_alone(vae, x, num_chains, num_steps + 1),
            "decoder": lambda: decoder_alone(vae, num_chains, num_steps + 1),
        }
        median = medians(runs, rounds)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            chains.forward()
    own = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    largest = sorted(own, key=lambda name: -own[name])[:14]
    print("share of the chains: " + ", ".join(f"{name} {own[name] / sum(own.values()):.1%}" for name in largest))
    print(
        f"{num_steps} transitions of {num_chains} chains take {median['chains'] / median['gradients']:.2f} times their "
        f"gradients of log p(x, z) by hand, {median['chains'] / median['decoder']:.2f} times the decoder alone"
    )


def medians(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each run, round-robin, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def jitted(python: str, rounds: int) -> tuple[str, float]:
    """JAX's version, and the median seconds of its jitted sum. JAX has no other work beside it on this core."""
    command = [python, str(Path(__file__).with_name("jax_evidence.py")), str(K)]
    out = subprocess.run(command, input="go\n" * rounds, capture_output=True, text=True, check=True).stdout
    versions, *seconds = out.splitlines()
    return versions, statistics.median(map(float, seconds))


def in_a_process(call: str) -> tuple[float, float]:
    """Seconds and peak resident memory, MiB, of a fresh process."""
    code = f"import runpy; runpy.run_path({__file__!r})['evaluate_once']({call})"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, memory = map(float, out.split())
    return seconds, memory


def setting() -> tuple[VAE, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return VAE(), torch.rand(N, X).bernoulli()


def evaluate_once(num_particles: int, num_data: int) -> None:
    vae, _ = setting()
    x = torch.rand(num_data, X).bernoulli()
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=num_particles, check=False, seed=0)
    loader = DataLoader(TensorDataset(x), min(num_data, N))
    estimator(x[:10])  # structure and execution are found out
    start = time.perf_counter()
    pv.evaluate(estimator, loader, progress=False, seed=0)
    seconds = time.perf_counter() - start
    peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(seconds, float(peak[0].split()[1]) / 1024)  # ru_maxrss would be that of the parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--jax", help="a Python with jax")
    options = parser.parse_args()
    rounds = options.rounds
    warnings.simplefilter("ignore")
    vae, x = setting()
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=K, seed=0)
    plain = pv.ImportanceSampling(vae.model, vae.guide, num_particles=K, check=False, seed=0)
    z = torch.randn(K, N, D)
    runs = {"ours": lambda: plain(x), "with its check": lambda: estimator(x), "bfloat16": lambda: in_bfloat16(plain, x)}
    for chunk in (20, 50, 100):
        runs[f"by hand, {chunk}"] = lambda c=chunk: by_hand(vae, x, c)
        runs[f"bare, {chunk}"] = lambda c=chunk: bare(vae, z, c)
    compiled = torch.compile(weigh)
    runs["compiled by hand, 20"] = lambda: by_hand(vae, x, 20, compiled)
    median = medians(runs, rounds)
    for name, value in median.items():
        print(f"{name:<22}{1000 * value:8.1f} ms")
    hand = min(v for n, v in median.items() if n.startswith("by hand"))
    matmul = min(v for n, v in median.items() if n.startswith("bare"))
    if options.jax:
        versions, seconds = jitted(options.jax, rounds)
        print(f"ours / {versions}, jitted, {1000 * seconds:.1f} ms: {median['ours'] / seconds:.3f}")
    print(f"ours / best hand-written {median['ours'] / hand:.3f}   ours / best bare products {median['ours'] / matmul:.3f}")
    exact, rough = plain(x), in_bfloat16(plain, x)
    moved = (rough.log_evidence - exact.log_evidence).abs()
    flagged = int(rough.doubts["precision"].sum())
    print(f"bfloat16 moves log p(x) by up to {float(moved.max()):.2f} nats; {flagged} of {N} doubted for precision")
    chains_against_gradients(vae, x, max(rounds // 3, 1))
    for num_particles, num_data in ((1000, 10), (10_000, 10), (100_000, 10), (100, 100), (100, 1000), (100, 10_000)):
        seconds, memory = in_a_process(f"{num_particles}, {num_data}")
        each = 1e6 * seconds / num_particles / num_data
        print(
            f"K = {num_particles:<7} N = {num_data:<6} {each:6.2f} us per weight, peak memory {memory:.0f} MiB", flush=True
        )


if __name__ == "__main__":
    main()
