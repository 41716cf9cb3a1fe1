"""Gaps log p(x) - ELBO of guides made from the model, beside the best guide written by hand, on four models.

Every guide sees the same 2,000 simulated data in batches of 100, a network of 64 units, and Adam. Gaps are over 300 others.
log p(x) is exact.
"""

import argparse
import math
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.nn.gaussian import positive

sys.path.insert(0, str(Path(__file__).parents[1] / "guides"))
from amortized_programs import dirichlet, eight_schools, gamma_poisson, two_layers, two_layers_log_p  # noqa: E402

HIDDEN, TRAIN, TEST, BATCH = 64, 2000, 300, 100


class ByHand(nn.Module):
    """A network whose numbers the sample statements take."""

    def __init__(self, data_dim, outputs, draw):
        super().__init__()
        self.network, self.draw = pv.nn.MLP(data_dim, outputs, hidden=(HIDDEN, HIDDEN)), draw

    def forward(self, x):
        pyro.module("by_hand", self)
        self.draw(x, self.network(x))


def gamma_of(x, raw):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(positive(raw[:, 0]), positive(raw[:, 1])))


def dirichlet_of(x, raw):
    with pyro.plate("data", len(x)):
        pyro.sample("shares", dist.Dirichlet(positive(raw)))


def layers_of(x, raw):
    """Upwards, against the order of the model: q(below given x) q(top given below), the exact form."""
    loc, below, slopes, top, loc_top = raw.split([2, 3, 4, 3, 2], -1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("below", dist.MultivariateNormal(loc, scale_tril=tril(below)))
        mean = loc_top + (slopes.unflatten(-1, (2, 2)) @ z.unsqueeze(-1)).squeeze(-1)
        pyro.sample("top", dist.MultivariateNormal(mean, scale_tril=tril(top)))


def tril(raw):
    diagonal = torch.diag_embed(positive(raw[..., :2]))
    return diagonal + torch.stack([raw.new_zeros(raw.shape[:-1] + (2,)), nn.functional.pad(raw[..., 2:], (0, 1))], -2)


def schools_of(x, raw):
    """Mean and spread by a normal with full covariance, then each effect from its exact posterior given these."""
    with pyro.plate("data", len(x), dim=-2):
        mean = pyro.sample("mean", dist.Normal(raw[:, :1], positive(raw[:, 1:2])))
        log_spread = raw[:, 2:3] + raw[:, 3:4] * (mean - raw[:, :1])
        spread = pyro.sample("spread", dist.LogNormal(log_spread, positive(raw[:, 4:5])))
        precision = 1 / 4 + spread.clamp(min=1e-6) ** -2
        with pyro.plate("schools", 8, dim=-1):
            pyro.sample("effect", dist.Normal((x / 4 + mean * spread.clamp(min=1e-6) ** -2) / precision, precision.rsqrt()))


def gamma_poisson_log_p(x):
    total = x.sum(-1)
    return torch.lgamma(2 + total) - (2 + total) * math.log(6.0) - torch.lgamma(x + 1).sum(-1)


def dirichlet_log_p(x):
    return dist.DirichletMultinomial(torch.ones(4), 20, validate_args=False).log_prob(x)


def eight_schools_log_p(x):
    """By a sum over mean and spread: given these, the effects integrate to x_j ~ N(mean, spread^2 + 4)."""
    mean, spread = torch.linspace(-30, 30, 601).double(), torch.linspace(1e-4, 20, 801).double()
    prior = dist.Normal(0.0, 5.0).log_prob(mean) + dist.HalfNormal(3.0).log_prob(spread).unsqueeze(-1)
    scale = (spread**2 + 4).sqrt().unsqueeze(-1)
    log_joint = [prior + sum(dist.Normal(mean, scale).log_prob(value) for value in row) for row in x.double()]
    cell = (mean[1] - mean[0]) * (spread[1] - spread[0])
    return torch.stack([row.flatten().logsumexp(0) for row in log_joint]) + cell.log()


MODELS = {
    "Gamma-Poisson": (gamma_poisson, torch.zeros(1, 5), (2, gamma_of), gamma_poisson_log_p),
    "Dirichlet": (dirichlet, torch.full((1, 4), 5.0), (4, dirichlet_of), dirichlet_log_p),
    "two layers": (two_layers, torch.zeros(1, 2), (14, layers_of), two_layers_log_p),
    "eight schools": (eight_schools, torch.zeros(1, 8), (5, schools_of), eight_schools_log_p),
}


def train(model, guide, x, steps):
    optim = pyro.optim.ClippedAdam({"lr": 5e-3, "lrd": 0.01 ** (1 / steps), "clip_norm": 10.0})
    svi = SVI(model, guide, optim, Trace_ELBO())
    for _ in range(steps):
        svi.step(x[torch.randint(len(x), (BATCH,))])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    print("| model | guide | gap in nats | its error |\n|---|---|---|---|")
    for name in arguments.models:
        model, template, (outputs, draw), log_p = MODELS[name]
        width = template.shape[-1]
        x = pv.simulate(model, template.expand(TRAIN + TEST, -1), seed=0).observed["obs"]
        train_x, test_x = x[:TRAIN], x[TRAIN:]
        guides = {"by hand": lambda: ByHand(width, outputs, draw)}  # noqa: B023
        for family in ("diagonal", "full", "flow"):
            for conditioned in (False, True):
                guides[f"{family}{', conditioned' if conditioned else ''}"] = (
                    lambda f=family, c=conditioned: pv.AmortizedGuide(
                        model,  # noqa: B023
                        nn.Sequential(pv.nn.MLP(width, HIDDEN, hidden=(HIDDEN,)), nn.ReLU()),  # noqa: B023
                        (train_x[:BATCH],),  # noqa: B023
                        family=f,
                        conditioned=c,
                    )
                )
        truth = log_p(test_x)
        for title, make in guides.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            guide = make()
            train(model, guide, train_x, arguments.steps)
            elbo = pv.ImportanceSampling(model, guide, num_particles=99, seed=1)(test_x).elbo
            gap = truth - elbo
            print(f"| {name} | {title} | {gap.mean():.3f} | {gap.std() / len(gap) ** 0.5:.3f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
