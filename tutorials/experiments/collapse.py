"""Posterior collapse made on purpose, and four cures: linear and cyclical annealing, free bits, aggressive training.

The data are bit strings in segments. Each segment has a hidden bit, which says whether its bits mostly repeat or mostly
alternate. The decoder writes one bit after the other and sees the last two, which explains most at once: so it learns
to do without z, although z could tell it the hidden bits. What the best model without z and the source itself reach is
known exactly.

    python tutorials/experiments/collapse.py

Prints a table, writes collapse.json beside this file and draws docs/figures/collapse.svg. `SMOKE_TEST=1` trains briefly
and writes nothing.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.ops import index_code_information

SMOKE_TEST = "SMOKE_TEST" in os.environ
FLIP = 0.1  # how often a bit does otherwise than its segment
CONTEXT = 2  # bits that the decoder sees
LATENT_DIM = 8
MI_DRAWS = 10
NUM_PARTICLES = 500
FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "collapse.svg"
RESULT = Path(__file__).with_suffix(".json")
STYLES = {
    "no cure": ("black", "-"),
    "linear annealing": ("black", "--"),
    "cyclical annealing": ("gray", "-"),
    "free bits": ("black", ":"),
    "aggressive training": ("black", "-."),
}


@dataclass(frozen=True)
class Settings:
    num_segments: int = 4
    segment_length: int = 10
    num_train: int = 10_000
    num_test: int = 2000
    batch_size: int = 100
    num_epochs: int = 40
    learning_rate: float = 0.01
    decay: float = 0.93  # of the learning rate, per epoch
    annealing_steps: int = 1000
    cycle: int = 500  # steps, of which the first half ramps beta up; four of them
    free_bits: float = 0.5  # nats per unit
    aggressive_steps: int = 60
    max_inner_steps: int = 200
    window: int = 50
    look_every: int = 50


@dataclass(frozen=True)
class Run:
    """A trained pair and what was seen on the way."""

    vae: pv.VAE
    history: pv.TrainingHistory
    looks: pv.CollapseMonitor
    collapsed_at: int | None  # the step at which the monitor first said so
    updates: int  # those of the guide alone included
    minutes: float


def draw_data(num: int, settings: Settings, seed: int) -> Tensor:
    """Bit strings (num, 1 + S L): a fair bit, then S segments that repeat or alternate, with exceptions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num, settings.num_segments, settings.segment_length)
    alternates = torch.rand(*shape[:2], 1, generator=generator) < 0.5
    changes = alternates ^ (torch.rand(shape, generator=generator) < FLIP)
    first = torch.rand(num, 1, generator=generator) < 0.5
    return (torch.cat([first, changes.flatten(1)], 1).cumsum(1) % 2).float()


def exact_log_p(x: Tensor, settings: Settings) -> dict[str, Tensor]:
    """log p(x) of the source, and of the best model that sees two bits and has no z; (B,) each."""
    changes = (x[:, 1:] != x[:, :-1]).unflatten(1, (settings.num_segments, settings.segment_length))
    count, length = changes.sum(-1), settings.segment_length
    alternating = count * math.log(1 - FLIP) + (length - count) * math.log(FLIP)
    repeating = count * math.log(FLIP) + (length - count) * math.log(1 - FLIP)
    segments = torch.logaddexp(alternating, repeating) - math.log(2)
    same = 1 - 2 * FLIP * (1 - FLIP)  # two changes or no change in a row, within a segment
    goes_on = (changes[..., 1:] == changes[..., :-1]).sum(-1)
    markov = -math.log(2) + goes_on * math.log(same) + (length - 1 - goes_on) * math.log(1 - same)
    return {"source": segments.sum(1) - math.log(2), "best without z": markov.sum(1) - math.log(2)}


class BitByBit(dist.TorchDistribution):
    """p(x | z) = prod_i p(x_i | the bits before, z): the density needs one pass of the network, a draw one per bit."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, network: "Decoder", z: Tensor) -> None:
        self.network, self.z = network, z
        super().__init__(z.shape[:-1], torch.Size([network.num_bits]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.network.logits(value, self.z)
        return -F.binary_cross_entropy_with_logits(logits, value.expand_as(logits), reduction="none").sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        x = self.z.new_zeros(torch.Size(sample_shape) + self.batch_shape + self.event_shape)
        for i in range(self.network.num_bits):
            x[..., i] = torch.bernoulli(self.network.logits(x, self.z)[..., i].sigmoid())
        return x

    def expand(self, batch_shape: Any, _instance: Any = None) -> "BitByBit":
        return BitByBit(self.network, self.z.expand(*batch_shape, -1))


class Decoder(nn.Module):
    """For each bit a small network of its own, of the bits before it and z."""

    def __init__(self, num_bits: int, width: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.num_bits = num_bits
        lag = torch.arange(num_bits)[:, None] - torch.arange(num_bits)
        self.register_buffer("sees", ((lag > 0) & (lag <= CONTEXT)).float().repeat_interleave(width, 0))
        self.of_bits = nn.Linear(num_bits, num_bits * width)
        self.of_z = nn.Sequential(nn.Linear(LATENT_DIM, hidden), nn.Tanh(), nn.Linear(hidden, num_bits * width, bias=False))
        self.out = nn.Parameter(torch.randn(num_bits, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(num_bits))

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        hidden = F.linear(x - 0.5, self.of_bits.weight * self.sees, self.of_bits.bias) + self.of_z(z)
        return (hidden.tanh().unflatten(-1, self.out.shape) * self.out).sum(-1) + self.bias

    def forward(self, z: Tensor) -> BitByBit:
        return BitByBit(self, z)


def build(num_bits: int, hidden: int = 128) -> pv.VAE:
    encoder = nn.Sequential(
        nn.Linear(num_bits, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * LATENT_DIM)
    )
    return pv.VAE(nn.Sequential(encoder, pv.nn.Normal()), Decoder(num_bits), pv.nn.StandardNormal(LATENT_DIM))


def objectives(settings: Settings) -> dict[str, Callable[[], pv.BetaTraceMeanField_ELBO]]:
    """The objective of each run. That of aggressive training is the plain one: its cure is in the order of the updates."""
    mean_field = pv.BetaTraceMeanField_ELBO
    return {
        "no cure": mean_field,
        "linear annealing": lambda: mean_field(beta=pv.LinearAnnealing(settings.annealing_steps)),
        "cyclical annealing": lambda: mean_field(beta=pv.CyclicalAnnealing(settings.cycle, 4)),
        "free bits": lambda: mean_field(free_bits=settings.free_bits),
        "aggressive training": mean_field,
    }


def train(name: str, x: Tensor, settings: Settings, seed: int = 0) -> Run:
    """Same network, same start, same number of steps; only the cure differs."""
    start = time.process_time()
    pyro.set_rng_seed(seed)
    vae, objective = build(x.shape[1]), objectives(settings)[name]()
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": settings.learning_rate}, "gamma": settings.decay}
    )
    svi = SVI(vae.model, vae.guide, optim, objective)
    loader = DataLoader(TensorDataset(x), settings.batch_size, shuffle=True)
    aggressive = pv.AggressiveTraining(svi, loader, max_inner_steps=settings.max_inner_steps, window=settings.window)
    aggressive_steps = settings.aggressive_steps if name == "aggressive training" else 0
    monitor = pv.Monitor(objective, progress=False)
    looks = pv.CollapseMonitor(vae.model, vae.guide, every=settings.look_every)
    collapsed_at = None
    for _ in range(settings.num_epochs):
        for (batch,) in monitor.watch(loader):
            if looks.num_calls < aggressive_steps:
                aggressive.step()
            else:
                svi.step(batch)
            looks(batch)
            if looks.collapsed and collapsed_at is None:
                collapsed_at = looks.num_calls
        optim.step()
    minutes = (time.process_time() - start) / 60
    return Run(vae, monitor.history(), looks, collapsed_at, objective.num_updates, minutes)


@torch.no_grad()
def mutual_information(vae: pv.VAE, x: Tensor) -> pv.Estimate:
    """Between x and z under q, by the mixture over all N data of x; at most log N."""
    q = vae.encode(x)
    values = []
    for _ in range(MI_DRAWS):
        z = q.sample()
        values.append(index_code_information(q.log_prob(z.unsqueeze(1)), len(x)))
    draws = torch.stack(values)  # (draws, N)
    monte_carlo = draws.mean(1).std() / MI_DRAWS**0.5
    return pv.Estimate(draws.mean(), monte_carlo, draws.mean(0).std() / len(x) ** 0.5)


def measure(vae: pv.VAE, x: Tensor) -> tuple[dict[str, Any], pv.Evidence]:
    loader = DataLoader(TensorDataset(x), 500)
    units = pv.ActiveUnits(vae.model, vae.guide, seed=1)(loader, progress=False)
    pyro.set_rng_seed(1)
    information = mutual_information(vae, x)
    estimator = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=NUM_PARTICLES)
    evidence = pv.evaluate(estimator, loader, progress=False, seed=1)
    return {
        "rate": numbers(units.site_kl["latent"]),
        "mutual_information": numbers(information),
        "active_units": units.num_active,
        "units_at_prior": units.num_collapsed,
        "elbo": float(evidence.elbo.mean()),
        "log_p": numbers(evidence.mean()),
        "high_pareto_k": int(evidence.doubts["tails"].sum()),  # data whose log p(x) may be too low
    }, evidence


def numbers(estimate: pv.Estimate) -> list[float]:
    """Value, Monte Carlo error, sampling error; nats."""
    return [float(estimate.value), float(estimate.std_error), float(estimate.sampling_error)]


def gain(evidence: pv.Evidence, over: pv.Evidence) -> list[float]:
    """Mean difference in log p(x) on the same data, in pairs: value, Monte Carlo error, sampling error."""
    difference = evidence.log_evidence - over.log_evidence
    monte_carlo = (evidence.std_error.square() + over.std_error.square()).sum().sqrt() / len(difference)
    return [float(difference.mean()), float(monte_carlo), float(difference.std()) / len(difference) ** 0.5]


def draw(rates: dict[str, tuple[Tensor, Tensor]], ax: plt.Axes) -> None:
    for name, (step, rate) in rates.items():
        color, style = STYLES[name]
        ax.plot(step, rate, color=color, linestyle=style, linewidth=1.2, label=name)
    ax.set(xlabel="training step", ylabel="rate, nats")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def every(history: pv.TrainingHistory, width: int = 50) -> tuple[Tensor, Tensor]:
    """Means of the rate over stretches of training, at their middle."""
    blocks = history.rate[: len(history.rate) // width * width].reshape(-1, width)
    return torch.arange(len(blocks)) * width + width / 2, blocks.mean(1)


def main() -> None:
    torch.set_num_threads(1)
    settings = Settings(num_train=400, num_test=100, num_epochs=2, look_every=1) if SMOKE_TEST else Settings()
    train_data, test = draw_data(settings.num_train, settings, 1), draw_data(settings.num_test, settings, 2)
    results: dict[str, Any] = {"settings": asdict(settings), "exact": {}, "runs": {}}
    for name, log_p in exact_log_p(test, settings).items():
        results["exact"][name] = [float(log_p.mean()), float(log_p.std()) / len(log_p) ** 0.5]
        print(f"log p(x), {name}: {results['exact'][name][0]:.3f} (sampling error {results['exact'][name][1]:.3f})")
    print(f"mutual information is at most log {len(test)} = {math.log(len(test)):.2f} nats")
    rates = {}
    for name in objectives(settings):
        run = train(name, train_data, settings)
        found, evidence = measure(run.vae, test)
        if name == "no cure":
            uncured = evidence
        else:
            found["gain"] = gain(evidence, uncured)
        seen = {"collapsed": run.looks.collapsed, "collapsed_at": run.collapsed_at}
        results["runs"][name] = {**found, **seen, "updates": run.updates, "minutes": run.minutes}
        rates[name] = every(run.history)
        print(f"{name}: {json.dumps(results['runs'][name])}", flush=True)
    figure, ax = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    draw(rates, ax)
    if not SMOKE_TEST:
        plt.rcParams.update({"svg.hashsalt": "collapse", "svg.fonttype": "none"})  # a small file, and the same each time
        figure.savefig(FIGURE, metadata={"Date": None})
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
