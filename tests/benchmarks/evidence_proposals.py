"""Proposals of `AdaptiveImportanceSampling` at equal total cost, beside moment matching, which was tried and left out.

python tests/benchmarks/evidence_proposals.py [../shared/data] [--costs 500 1000 2500] [--replicates 10]

Prints a Markdown table: errors against quadrature or closed forms (on BDMC the mean itself, with its spread over seeds), the
share of data more than 0.15 nats off, ESS, and the share of data whose Pareto k is above threshold. Cost counts everything,
fits and search included.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence import fitted
from pyro_vae.noise import Noise
from pyro_vae.ops import pareto_smooth
from pyro_vae.proposals import GaussianProposal, LatentSpace, MixtureProposal, proposal_log_weights

F64 = torch.float64
PILOT_SHARE = 0.2


@dataclass(frozen=True)
class Case:
    name: str
    dim: int
    model: Callable
    guide: Callable
    x: Tensor
    truth: Tensor | None


def normal_case(name: str, mean: Callable, prior_scale: float, x: Tensor, guide_loc: Callable, guide_scale: float) -> Case:
    """z ~ N(0, prior_scale^2), x ~ N(mean(z), 0.5^2)."""
    dim = guide_loc(x).shape[-1]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), prior_scale).to_event(1))
            pyro.sample("x", dist.Normal(mean(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(guide_loc(x), guide_scale).to_event(1))

    if dim <= 2:
        return Case(name, dim, model, guide, x, pv.ExactEvidence(model, guide, seed=0)(x).log_evidence)
    # The first latent is squared, the others are observed as they are: one integral by a sum, the rest in closed form.
    grid = torch.linspace(-8 * prior_scale, 8 * prior_scale, 100_001, dtype=F64)
    first = dist.Normal(0.0, prior_scale).log_prob(grid) + dist.Normal(grid.square(), 0.5).log_prob(x[:, :1])
    rest = dist.Normal(0.0, math.sqrt(prior_scale**2 + 0.25)).log_prob(x[:, 1:]).sum(-1)
    return Case(name, dim, model, guide, x, first.logsumexp(-1) + math.log(16 * prior_scale / 100_000) + rest)


def gamma_case() -> Case:
    x = torch.arange(12, dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(1.5), 0.7))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(((x + 1.5) / 1.7).log() - 0.1, (x + 1).rsqrt()))

    return Case("Gamma-Poisson", 1, model, guide, x, dist.GammaPoisson(x.new_tensor(1.5), x.new_tensor(0.7)).log_prob(x))


def tanh_case() -> Case:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(*s, generator=generator, dtype=F64) for s in ((2, 6), (6, 5)))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(4, logits=torch.tanh(z @ first) @ second).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))

    x = pv.simulate(model, torch.zeros(20, 5, dtype=F64), seed=0).observed["x"]
    return Case("tanh decoder, D = 2", 2, model, guide, x, pv.ExactEvidence(model, guide, seed=0)(x).log_evidence)


def first_squared(z: Tensor) -> Tensor:
    return torch.cat([z[..., :1].square(), z[..., 1:]], -1)


def two_mode_case(dim: int) -> Case:
    generator = torch.Generator().manual_seed(dim)
    rest = torch.randn(10, dim - 1, generator=generator, dtype=F64)
    x = torch.cat([torch.linspace(1, 9, 10, dtype=F64).unsqueeze(-1), rest], -1)
    return normal_case(
        f"two modes, D = {dim}", first_squared, 1.5, x, lambda x: torch.cat([x[:, :1].sqrt(), x[:, 1:]], -1), 0.4
    )


def cases() -> list[Case]:
    line = torch.linspace(-1.5, 1.5, 10, dtype=F64).unsqueeze(-1)
    linear = normal_case("linear-Gaussian, D = 1", lambda z: z, 1.0, 2 * line, lambda x: 0 * x, 1.0)
    banana = normal_case(
        "banana, D = 2", lambda z: z[..., 1:] - z[..., :1].square() + 1, 1.0, line, lambda x: x.new_zeros(len(x), 2), 0.7
    )
    return [linear, gamma_case(), tanh_case(), banana, *(two_mode_case(dim) for dim in (1, 2, 5, 10))]


def bdmc_case(data: Path) -> Case:
    sys.path.insert(0, str(Path(__file__).parent))
    from evidence_bdmc import load

    vae, x = load(data, every=100)
    return Case("BDMC test[::100]", 50, vae.model, vae.guide, x, None)


def moment_matched(
    space: LatentSpace, proposal: MixtureProposal, num_particles: int, watch: Callable[[Tensor, Tensor], None] | None
) -> Tensor:
    """A fifth of the draws re-estimates mean and covariance from smoothed weights, and is not used again."""
    fitted = proposal.components[0]
    size = round(PILOT_SHARE * num_particles)
    space.call.set_noise(Noise.SEARCH, 0)
    u = proposal.draw(size)
    log_joint, log_prior = space.log_joint_and_prior(u)
    smoothed, _ = pareto_smooth(log_joint - proposal.log_prob_with_prior(u, log_prior, 0.02))
    weights = smoothed.softmax(0)
    ess = 1 / weights.square().sum(0)
    trust = (ess / (ess + space.dim + 2)).unsqueeze(-1)
    mean = torch.einsum("kb,kbd->bd", weights, u)
    covariance = torch.einsum("kb,kbi,kbj->bij", weights, u - mean, u - mean)
    covariance = trust.unsqueeze(-1) * covariance + (1 - trust.unsqueeze(-1)) * fitted.tril @ fitted.tril.mT
    tril, failed = torch.linalg.cholesky_ex(covariance)
    matched = GaussianProposal(trust * mean + (1 - trust) * fitted.loc, tril)
    trusted = (failed == 0) & (ess > 2 * space.dim)
    return proposal_log_weights(space, MixtureProposal.of(matched.where(trusted, fitted)), num_particles - size, watch)


def estimate(case: Case, proposal: str, num_particles: int, num_gradients: int, seed: int) -> pv.Evidence:
    fitted.proposal_log_weights = moment_matched if proposal == "moment matching" else proposal_log_weights
    name = "gaussian" if proposal == "moment matching" else proposal
    options = {"num_particles": num_particles, "num_gradients": num_gradients, "proposal": name, "seed": seed}
    return pv.AdaptiveImportanceSampling(case.model, case.guide, **options)(case.x)


def row(case: Case, proposal: str, cost: int, replicates: int) -> str:
    num_gradients = max(8, min(round(0.17 * cost), 40 + 5 * case.dim))
    searched = proposal == "mixture" or (proposal == "auto" and case.dim <= fitted.SEARCHED_DIM)
    trial = estimate(case, proposal, 100, num_gradients, 0).cost - 100 - 10 * searched
    num_particles = int((cost - trial) / (1.1 if searched else 1.0))
    if num_particles < 100:
        return f"| {case.name} | {cost:,} | {proposal} | too little is left for 100 weights | | | | |"
    results = [estimate(case, proposal, num_particles, num_gradients, seed) for seed in range(replicates)]
    value, ess = (torch.stack([getattr(r, name).double() for r in results]) for name in ("log_evidence", "ess"))
    tails = torch.stack([r.doubts["tails"].double() for r in results])
    figures = f"{float(ess.mean()):.0f} | {float(ess.min()):.0f} | {float(tails.mean()):.1%} |"
    if case.truth is None:
        mean, error = float(value.mean()), float(value.mean(1).std()) / replicates**0.5
        return f"| {case.name} | {results[0].cost:,} | {proposal} | {mean:.4f} +- {error:.4f} | | {figures}"
    off = value - case.truth
    rms, far = float(off.square().mean().sqrt()), float((off.abs() > 0.15).double().mean())
    return f"| {case.name} | {results[0].cost:,} | {proposal} | {rms:.3f} | {far:.0%} | {figures}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--costs", type=int, nargs="*", default=[500, 1000, 2500])
    parser.add_argument("--replicates", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
    print("| posterior | cost | proposal | RMS error | off by > 0.15 | ESS | smallest | k high |\n" + "|---" * 8 + "|")
    for case in [*cases(), *([bdmc_case(options.data)] if options.data else [])]:
        for cost in options.costs:
            for proposal in ("gaussian", "student", "moment matching", "mixture", "auto"):
                if proposal == "auto" and case.dim <= fitted.SEARCHED_DIM:
                    continue  # the same as the mixture
                print(row(case, proposal, cost, 2 if case.truth is None else options.replicates), flush=True)


if __name__ == "__main__":
    main()
