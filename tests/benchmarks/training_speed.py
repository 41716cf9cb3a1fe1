"""One training step of a 784-400-50 VAE: ours against hand-written PyTorch, Pyro as in its tutorial, and NumPyro.

All rows of a batch size take some steps in turn, each round in another order, so that a busy machine slows all of them down;
the first step of a turn, whose caches hold another row's numbers, is not counted, nor are the seconds in which a first step
compiles. `--cpu-time` counts seconds of the processor in place of the clock's, for a machine that does other things as well.
The last row of ours has nothing but the matrix products of a step and Adam: no compiler of torch's can be below it. Prints
medians and minima, as they are and in units of hand-written PyTorch with a fused Adam. NumPyro runs in a process of its
own, which takes its step while this one waits; `--numpyro` names the Python that has it, and without one the row is left
out. `--conv` has convolutions on 28 x 28 images in the place of linear layers. Other options: `--rounds 40 --threads 1
--batches 32 128 512 --no-validation`.

    python tests/benchmarks/training_speed.py --cpu-time
"""

import argparse
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import nn

import pyro_vae as pv

X, H, D = 784, 400, 50
LEARNING_RATE = 1e-3
ADAM = {"lr": LEARNING_RATE}
BY_HAND = "hand-written PyTorch, fused Adam"
CONV = False
TURN = 10  # steps
Step = Callable[[], object]


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


def make_vae() -> pv.VAE:
    encoder, decoder = networks()
    return pv.VAE(nn.Sequential(encoder, pv.nn.Normal()), nn.Sequential(decoder, pv.nn.Bernoulli()), pv.nn.StandardNormal(D))


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


def products_alone(x: torch.Tensor) -> Step:
    """The matrix products of a step, forward and backward, into memory that is there already, and Adam."""
    encoder, decoder = networks()
    layers = [m for net in (encoder, decoder) for m in net.modules() if isinstance(m, nn.Linear)]
    params = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(params, LEARNING_RATE, fused=True)
    inputs = [torch.randn(len(x), layer.in_features) for layer in layers]
    outputs = [torch.randn(len(x), layer.out_features) for layer in layers]
    for param in params:
        param.grad = torch.randn_like(param)

    @torch.no_grad()
    def step() -> None:
        for i, (layer, a, b) in enumerate(zip(layers, inputs, outputs, strict=True)):
            torch.addmm(layer.bias, a, layer.weight.T, out=b)
            torch.mm(b.T, a, out=layer.weight.grad)
            if i:  # of the images nobody asks the gradient
                torch.mm(b, layer.weight, out=a)
        optimizer.step()

    return step


def as_module(objective: ELBO, x: torch.Tensor) -> Step:
    vae = make_vae()
    loss = objective(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()

    return step


def under_svi(objective: ELBO, optim: PyroOptim, x: torch.Tensor) -> Step:
    vae = make_vae()
    svi = SVI(vae.model, vae.guide, optim, objective)
    return lambda: svi.step(x)


def as_in_the_tutorial(optim: PyroOptim, x: torch.Tensor) -> Step:
    """Pyro's own VAE tutorial: SVI, Trace_ELBO, pyro.optim.Adam."""
    encoder, decoder = networks()
    serial = id(encoder)  # names of its own, so that rows share no parameters

    def model(x: torch.Tensor) -> None:
        pyro.module(f"tutorial.decoder{serial}", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), D), x.new_ones(len(x), D)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module(f"tutorial.encoder{serial}", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = SVI(model, guide, optim, Trace_ELBO())
    return lambda: svi.step(x)


def mean_field(compile: bool = False) -> ELBO:
    return pv.BetaTraceMeanField_ELBO(beta=0.5, compile=compile)


STEPS: dict[str, Callable[[torch.Tensor], Step]] = {
    BY_HAND: by_hand,
    "BetaTraceMeanField_ELBO as a module, fused Adam": lambda x: as_module(mean_field(), x),
    "the same, compiled": lambda x: as_module(mean_field(compile=True), x),
    "SVI + BetaTraceMeanField_ELBO + pv.FusedOptim": lambda x: under_svi(
        mean_field(), pv.FusedOptim(torch.optim.Adam, ADAM), x
    ),
    "the same SVI, compiled": lambda x: under_svi(mean_field(compile=True), pv.FusedOptim(torch.optim.Adam, ADAM), x),
    "SVI + BetaTraceMeanField_ELBO + pyro.optim.Adam": lambda x: under_svi(mean_field(), pyro.optim.Adam(ADAM), x),
    "SVI + Trace_ELBO + pyro.optim.Adam, Pyro's tutorial": lambda x: as_in_the_tutorial(pyro.optim.Adam(ADAM), x),
    "SVI + Trace_ELBO + pv.FusedOptim": lambda x: as_in_the_tutorial(pv.FusedOptim(torch.optim.Adam, ADAM), x),
    "nothing but matrix products and Adam": products_alone,
}


class NumPyro:
    """NumPyro's jitted SVI in a process of its own: one step for each line that it is sent."""

    def __init__(self, python: str, batch: int, threads: int, clock: str) -> None:
        command = [python, str(Path(__file__).with_name("numpyro_step.py")), str(batch), str(threads), clock]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self.process.stdout is not None
        self.versions = self.process.stdout.readline().strip()

    def step(self) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print("step", file=self.process.stdin)
        return float(self.process.stdout.readline())

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def has_numpyro(python: str) -> bool:
    if not shutil.which(python):
        return False
    return subprocess.run([python, "-c", "import numpyro"], capture_output=True).returncode == 0


def seconds_of(step: Step, clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def measure(batch: int, options: argparse.Namespace) -> tuple[dict[str, list[float]], str]:
    """Seconds of each step that counts, by row, and NumPyro's versions."""
    x = (torch.rand(batch, X, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    clock = getattr(time, options.clock)
    rows = {name: make for name, make in STEPS.items() if not (CONV and make is products_alone)}
    timed: dict[str, Callable[[], float]] = {name: partial(seconds_of, make(x), clock) for name, make in rows.items()}
    numpyro = NumPyro(options.numpyro, batch, options.threads, options.clock) if options.numpyro else None
    if numpyro:
        timed["NumPyro, jitted SVI + TraceMeanField_ELBO"] = numpyro.step
    times: dict[str, list[float]] = {name: [] for name in timed}
    names, order = list(timed), random.Random(0)
    for number in range(options.rounds + 1):
        order.shuffle(names)
        for name in names:
            turn = [timed[name]() for _ in range(TURN)]
            times[name] += turn[1:] if number else []
    if numpyro:
        numpyro.stop()
    return times, numpyro.versions if numpyro else ""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--no-validation", action="store_true", help="as people switch it off for long runs")
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const="process_time", default="perf_counter")
    parser.add_argument("--numpyro", default=sys.executable, help="a Python with numpyro")
    parser.add_argument("--conv", action="store_true", help="convolutions in the place of linear layers")
    options = parser.parse_args()
    global CONV
    CONV = options.conv
    if CONV or not has_numpyro(options.numpyro):
        options.numpyro = None
    torch.set_num_threads(options.threads)
    pyro.enable_validation(not options.no_validation)
    measured, versions = {}, ""
    for batch in options.batches:
        measured[batch], versions = measure(batch, options)
    nets = "convolutions" if CONV else f"{X}-{H}-{D}"
    validation = "off" if options.no_validation else "on"
    print(f"{cpu()}; Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__} {versions}")
    print(
        f"validation {validation}, {options.threads} threads, {options.rounds} rounds of {TURN} steps, {nets}, "
        f"time.{options.clock}"
    )
    print("median ms (ratio), minimum ms (ratio); ratios are to hand-written PyTorch")
    print(f"{'':54s}" + "".join(f"{f'batch {batch}':>31s}" for batch in options.batches))
    for name in measured[options.batches[0]]:
        cells = []
        for batch in options.batches:
            times, by_hand_times = measured[batch][name], measured[batch][BY_HAND]
            for figure in (statistics.median, min):
                cells.append(f"{1e3 * figure(times):8.2f} ({figure(times) / figure(by_hand_times):4.2f})")
        print(f"{name:54s}" + " ".join(cells))


if __name__ == "__main__":
    main()
