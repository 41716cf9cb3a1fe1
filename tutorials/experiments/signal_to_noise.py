"""Signal-to-noise of the gradients of the importance-weighted bound: the toy of Rainforth et al. (2018, arXiv 1802.04537).

z ~ N(m, I), x|z ~ N(z, I) and the guide N(Ax + b, 2/3 I) in 20 dimensions, each parameter moved off its optimum (A = I/2,
b = m/2) by N(0, 0.01^2). The gradient by A is the one by b times x, so b stands for the encoder; m stands for the model.

    python tutorials/experiments/signal_to_noise.py

Prints a table and draws docs/figures/signal_to_noise.svg. `SMOKE_TEST=1` takes few replicates and leaves the figure alone.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv

VARIANCE = 2 / 3
NUM_PARTICLES = (1, 4, 16, 64, 256)
GRADIENTS = ("standard", "dreg", "stl")
SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_REPLICATES = dict.fromkeys(GRADIENTS, 20_000) | {"standard": 200_000}  # whose signal is the smallest
if SMOKE_TEST:
    NUM_REPLICATES = dict.fromkeys(GRADIENTS, 200)
FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "signal_to_noise.svg"
BLOCKS = 20


class Toy:
    """One datum x and parameters; `error` is how far the guide's mean is from that of the posterior, (D,)."""

    def __init__(self, dim: int = 20, offset: float = 0.01, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.m = normal(dim)
        self.weight = torch.eye(dim, dtype=torch.float64) / 2 + offset * normal(dim, dim)
        self.b = self.m / 2 + offset * normal(dim)
        self.x = self.m + math.sqrt(2) * normal(dim)
        self.error = self.weight @ self.x + self.b - (self.x + self.m) / 2

    def gradients(self, gradient: str, num_particles: int, num_replicates: int) -> tuple[Tensor, Tensor]:
        """Replicates of the gradient of the bound by b and by m, (R, D) each.

        Replicates are copies of x in one batch: each has draws of its own, and here a b and an m of its own as well, so
        that one backward pass gives all their gradients.
        """
        rows = min(num_replicates, max(100, 40_000 // num_particles))
        b, m = (p.expand(rows, -1).clone().requires_grad_() for p in (self.b, self.m))
        x, shift = self.x.expand(rows, -1), self.weight @ self.x

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(m, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(shift + b, math.sqrt(VARIANCE)).to_event(1))

        bound = pv.ImportanceWeightedELBO(num_particles=num_particles, gradient=gradient)
        found = []
        for _ in range(math.ceil(num_replicates / rows)):
            loss = bound.differentiable_loss(model, guide, x)
            found.append(torch.autograd.grad(-loss, [b, m]))
        of_guide, of_model = (torch.cat(parts)[:num_replicates] for parts in zip(*found, strict=True))
        return of_guide, of_model


@dataclass
class Measured:
    """A value with its standard error."""

    value: float
    std_error: float

    def __str__(self) -> str:
        return f"{self.value:.5f} +- {self.std_error:.5f}"


def mean_square_ratio(total: Tensor, squares: Tensor, num: int) -> Tensor:
    """Mean over parameters of (mean / std)^2, less what noise adds to the square of a mean."""
    mean = total / num
    variance = (squares / num - mean.square()) * num / (num - 1)
    return (mean.square() / variance - 1 / num).mean()


def signal_to_noise(gradients: Tensor) -> Measured:
    """Root mean square over the D parameters of |mean| / std over R replicates; its error by the jackknife over blocks."""
    blocks = gradients[: len(gradients) // BLOCKS * BLOCKS].reshape(BLOCKS, -1, gradients.shape[-1])
    sums, squares, num = blocks.sum(1), blocks.square().sum(1), blocks.shape[0] * blocks.shape[1]
    value = mean_square_ratio(sums.sum(0), squares.sum(0), num)
    without = num - blocks.shape[1]
    left_out = torch.stack(
        [mean_square_ratio(sums.sum(0) - s, squares.sum(0) - q, without) for s, q in zip(sums, squares, strict=True)]
    )
    error = ((left_out - left_out.mean()).square().sum() * (BLOCKS - 1) / BLOCKS).sqrt()
    root = value.clamp(min=0).sqrt()
    return Measured(float(root), float(error / (2 * root)) if root > 0 else math.inf)


def relative_mean(gradients: Tensor, error: Tensor) -> Measured:
    """The mean gradient by b along the way to the posterior, in units of the distance: 2 is that of the ELBO."""
    along = gradients @ -error / error.square().sum()
    return Measured(float(along.mean()), float(along.std()) / math.sqrt(len(along)))


def slope(points: dict[int, Measured]) -> Measured:
    """Of log SNR over log K, by least squares with the errors of the points."""
    x = torch.tensor([math.log(k) for k in points])
    y = torch.tensor([math.log(max(p.value, 1e-12)) for p in points.values()])
    weight = torch.tensor([(p.value / p.std_error) ** 2 for p in points.values()])
    x = x - (weight * x).sum() / weight.sum()
    spread = (weight * x.square()).sum()
    return Measured(float((weight * x * y).sum() / spread), float(spread.rsqrt()))


def draw(lines: dict[str, dict[int, Measured]], ax: plt.Axes) -> None:
    styles = {"standard": "o-", "dreg": "s--", "stl": "^:", "model": "D-."}
    labels = {"stl": "stl (biased for K > 1)", "model": "gradient of the model"}
    for name, points in lines.items():
        values = [p.value for p in points.values()]
        errors = [2 * p.std_error for p in points.values()]
        ax.errorbar(
            list(points), values, errors, fmt=styles[name], color="black", markerfacecolor="white", markersize=5, capsize=2,
            label=labels.get(name, name),
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="particles K", ylabel="signal-to-noise of one gradient")
    ax.set_xticks(NUM_PARTICLES, [str(k) for k in NUM_PARTICLES])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def main() -> None:
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    toy = Toy()
    lines: dict[str, dict[int, Measured]] = {name: {} for name in (*GRADIENTS, "model")}
    print(f"distance of the guide's mean from the posterior's {float(toy.error.norm()):.4f}; replicates {NUM_REPLICATES}")
    print("gradient        K   SNR                   mean / distance (2 is the ELBO's)")
    for name in GRADIENTS:
        for k in NUM_PARTICLES:
            of_guide, of_model = toy.gradients(name, k, NUM_REPLICATES[name])
            lines[name][k] = signal_to_noise(of_guide)
            print(f"{name:10s} {k:6d}   {lines[name][k]}   {relative_mean(of_guide, toy.error)}", flush=True)
            if name == "standard":
                lines["model"][k] = signal_to_noise(of_model)
    for k in NUM_PARTICLES:
        print(f"model      {k:6d}   {lines['model'][k]}")
    for name, points in lines.items():
        large = {k: p for k, p in points.items() if k >= 16}
        print(f"slope of log SNR over log K, {name}: {slope(points)}, from K = 16 on {slope(large)}")
    figure, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    draw(lines, ax)
    if not SMOKE_TEST:
        plt.rcParams.update(
            {"svg.hashsalt": "signal_to_noise", "svg.fonttype": "none"}
        )  # a small file, and the same each time
        figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
