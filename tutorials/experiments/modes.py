"""Mode-seeking against mass-covering: one Gaussian guide for a posterior with two modes, fitted in both directions.

    z ~ N(0.3, 2^2),    x = z^2 + N(0, 1),    observed x = 4

The posterior has modes near +2 and -2. KL(q to p), what the ELBO minimises, is large wherever q has mass and p has little,
so the fit sits on one mode. KL(p to q) is large the other way round, so the fit covers both, and what lies between them: it
has the mean and the variance of the posterior. The masses beside each mode are compared with the posterior's, by quadrature,
with both KLs beside them. All fits start at N(2, 0.3^2), on one mode. (A Gaussian that starts wide may stay astride
both under the ELBO too: there it has a local optimum, 3 nats lower.)

`InclusiveKL` is fitted twice. With a broad proposal it finds both modes; with the guide itself as the proposal it weighs the
draws of a guide that has never seen the other mode, and stays.

    python tutorials/experiments/modes.py [FIGURE]

Writes modes.png beside this file, unless told otherwise, and prints the table. SMOKE_TEST=1 makes a short run of it.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor

import pyro_vae as pv

NUM_STEPS = 100 if "SMOKE_TEST" in os.environ else 1500
PRIOR_MEAN, PRIOR_SCALE, NOISE, X = 0.3, 2.0, 1.0, 4.0
MODES, RADIUS, START = (-2.0, 2.0), 1.0, (2.0, 0.3)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(PRIOR_MEAN).expand(len(x)), PRIOR_SCALE))
        pyro.sample("x", dist.Normal(z.square(), NOISE), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", x.new_tensor(START[0]))
    scale = pyro.param("scale", x.new_tensor(START[1]), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc.expand(len(x)), scale))


def broad(x: Tensor) -> None:
    """The proposal: the prior, wider."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_tensor(PRIOR_MEAN).expand(len(x)), 1.5 * PRIOR_SCALE))


def fit(objective: pyro.infer.ELBO) -> tuple[float, float]:
    """Location and scale of the guide."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / NUM_STEPS)})
    svi = SVI(model, guide, optimizer, objective)
    x = torch.tensor([X], dtype=torch.float64)
    for _ in range(NUM_STEPS):
        svi.step(x)
    return pyro.param("loc").item(), pyro.param("scale").item()


def posterior(z: Tensor) -> Tensor:
    """Its density on an even grid that covers it, (Z,)."""
    log_joint = dist.Normal(PRIOR_MEAN, PRIOR_SCALE).log_prob(z) + dist.Normal(z.square(), NOISE).log_prob(torch.tensor(X))
    return log_joint.softmax(0) / (z[1] - z[0])


def masses(z: Tensor, density: Tensor) -> list[float]:
    """Within RADIUS of each mode, and elsewhere."""
    step = float(z[1] - z[0])
    near = [float(density[(z - mode).abs() < RADIUS].sum()) * step for mode in MODES]
    return [*near, float(density.sum()) * step - sum(near)]


def kl(z: Tensor, q: Tensor, p: Tensor) -> float:
    """KL(q to p) of two densities on the grid."""
    return max(0.0, float(torch.xlogy(q, q / p.clamp_min(1e-300)).sum() * (z[1] - z[0])))


def curves(z: Tensor) -> dict[str, Tensor]:
    """The density of the posterior and of both fits, (Z,) each."""
    objectives: dict[str, Callable] = {
        "exclusive: KL(q to p), BetaTrace_ELBO": lambda: pv.BetaTrace_ELBO(
            num_particles=50, vectorize_particles=True, max_plate_nesting=1
        ),
        "inclusive: KL(p to q), broad proposal": lambda: pv.InclusiveKL(num_particles=500, proposal=broad),
        "inclusive, own draws": lambda: pv.InclusiveKL(num_particles=500),
    }
    fits = {name: fit(make()) for name, make in objectives.items()}
    return {"posterior": posterior(z)} | {name: dist.Normal(*fitted).log_prob(z).exp() for name, fitted in fits.items()}


def draw(z: Tensor, densities: dict[str, Tensor], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    colors = {"posterior": "0.35", "exclusive": "C0", "inclusive": "C3", "inclusive, own draws": "C1"}
    for name, density in densities.items():
        left, right, _ = masses(z, density)
        color = colors[name.split(":")[0]]
        style = ":" if "own" in name else "-"
        axes.plot(z, density, style, color=color, label=f"{name}\nmass {left:.2f} left, {right:.2f} right", linewidth=1.8)
        if name == "posterior":
            axes.fill_between(z, density, color=color, alpha=0.15, linewidth=0)
    for mode in MODES:
        axes.axvspan(mode - RADIUS, mode + RADIUS, color="0.95", zorder=-1)
    axes.set(xlim=(-5.5, 5.5), ylim=(0, None), xlabel="z", ylabel="density")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    densities = curves(z)
    print(
        f"{'':40s} {'left mode':>10s} {'right mode':>10s} {'elsewhere':>10s} {'mean':>7s} {'sd':>6s} "
        f"{'KL(q,p)':>9s} {'KL(p,q)':>9s}"
    )
    p = densities["posterior"]
    for name, density in densities.items():
        weight = density / density.sum()
        mean = float((weight * z).sum())
        stddev = math.sqrt(float((weight * (z - mean).square()).sum()))
        near = " ".join(f"{mass:10.4f}" for mass in masses(z, density))
        print(f"{name:40s} {near} {mean:7.3f} {stddev:6.3f} {kl(z, density, p):9.3f} {kl(z, p, density):9.3f}")
    draw(z, densities, Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("modes.png"))


if __name__ == "__main__":
    main()
