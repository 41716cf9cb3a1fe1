"""Posteriors with several modes: estimates against exact values, and how many of the bad ones are in doubt.

`outlier`: one latent and two ways to explain a large x, for x = 2 to 60. `blocks`: four latents of two modes each, sixteen
modes together, which four parts cannot hold; as they are and coupled. `digits`: real digits under a decoder of two latents.
`heavy`: an outlier that a far latent explains, where the prior has heavy tails, or the tail of the likelihood.

    python tests/benchmarks/evidence_modes.py outlier blocks digits heavy [--seeds 5]
"""

import argparse
import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import Tensor

import pyro_vae as pv

F64 = torch.float64
BAD = 0.05  # nats, beyond three stated errors


def outlier(num_seeds: int) -> None:
    x = torch.arange(2.0, 61.0, 1.0, dtype=F64).unsqueeze(-1)

    def mean(z: Tensor) -> Tensor:
        return torch.where(z < 0, -5 * z, 4 * z)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mean(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.abs() / 4, 0.2).to_event(1))

    grid = torch.linspace(-30, 30, 600_001, dtype=F64)
    log_prior = dist.Normal(0.0, 1.0).log_prob(grid) + math.log(1e-4)
    truth = torch.stack([(log_prior + dist.Normal(mean(grid), 0.5).log_prob(v)).logsumexp(0) for v in x])
    makes: dict[str, Callable] = {
        "AdaptiveImportanceSampling": lambda seed: pv.AdaptiveImportanceSampling(model, guide, seed=seed)(x),
        "AnnealedImportanceSampling": lambda seed: pv.AnnealedImportanceSampling(model, guide, seed=seed, progress=False)(x),
        "InferenceGaps": lambda seed: pv.InferenceGaps(model, guide, seed=seed)(x).evidence,
    }
    for name, make in makes.items():
        records = [make(seed) for seed in range(1 if name == "InferenceGaps" else num_seeds)]
        off = torch.cat([r.log_evidence - truth for r in records])
        silent = (off.abs() > BAD) & torch.cat([r.reliable for r in records])
        print(f"{name}: {int(silent.sum())} of {len(off)} beyond {BAD} without a doubt, worst {float(off.abs().max()):.3f}")


def blocks(num_seeds: int) -> None:
    """x_d ~ N(|z_d|, 0.2); coupled: of the sum of z and its neighbour, a tenth of it."""
    for coupling in (0.0, 0.1):
        bad = caught = alarms = total = 0
        for seed in range(num_seeds):
            generator = torch.Generator().manual_seed(seed)
            x = 0.8 + 1.4 * torch.rand(60, 4, generator=generator, dtype=F64)

            def mean(z: Tensor, coupling: float = coupling) -> Tensor:
                return z.abs() + coupling * z.roll(1, -1)

            def model(x: Tensor, mean: Callable = mean) -> None:
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(mean(z), 0.2).to_event(1), obs=x)

            def guide(x: Tensor) -> None:
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(x, 0.3).to_event(1))

            record = pv.AdaptiveImportanceSampling(model, guide, seed=seed)(x)
            off = (record.log_evidence - exact_of_blocks(x, coupling)).abs()
            is_bad = off > BAD + 3 * record.std_error
            bad, caught = bad + int(is_bad.sum()), caught + int((is_bad & ~record.reliable).sum())
            alarms, total = alarms + int((~is_bad & ~record.reliable).sum()), total + len(x)
        found = f"{bad} of {total} bad, {caught} caught ({caught / max(bad, 1):.3f}); {alarms} others in doubt"
        print(f"blocks, coupling {coupling}: {found}")


def exact_of_blocks(x: Tensor, coupling: float) -> Tensor:
    """A sum on a grid along the ring of latents: the trace of a product of matrices, each of two neighbours."""
    axis = torch.arange(-5, 5, 0.02, dtype=F64)
    log_prior = dist.Normal(0.0, 1.0).log_prob(axis) + math.log(0.02)
    mean = axis.abs() + coupling * axis.unsqueeze(-1)  # (before, own)
    result = []
    for row in x:
        factors = [(dist.Normal(mean, 0.2).log_prob(v) + log_prior).exp() for v in row]
        result.append((factors[0] @ factors[1] @ factors[2] @ factors[3]).diagonal().sum().log())
    return torch.stack(result)


def digits(num_seeds: int) -> None:
    torch.set_default_dtype(F64)
    pyro.set_rng_seed(0)
    pixels = torch.tensor(load_digits().data)
    vae = pv.mlp_vae(64, latent_dim=2, likelihood=pv.nn.Binomial(16), hidden=(64,), activation=torch.nn.Tanh)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), pv.BetaTraceMeanField_ELBO())
    for _ in range(1000):
        svi.step(pixels[torch.randint(1500, (100,))])
    real = pixels[1500:]
    exact = pv.ExactEvidence(vae.model, vae.guide, seed=0)(real).log_evidence
    for seed in range(num_seeds):
        default = pv.AdaptiveImportanceSampling(vae.model, vae.guide, seed=seed)(real)
        chains = pv.AnnealedImportanceSampling(vae.model, vae.guide, seed=seed, progress=False)(real)
        below = default.log_evidence - chains.log_evidence
        joint = (default.std_error.square() + chains.std_error.square()).sqrt()
        words = [f"AIS below the default by 3 of its errors: {int((below > 3 * chains.std_error).sum())}"]
        words.append(f"and .05: {int((below > 3 * chains.std_error + BAD).sum())}")
        words.append(f"by 3 joint errors: {int((below > 3 * joint).sum())}")
        words.append(
            f"below the exact value by 3 of its errors: {int((exact > chains.log_evidence + 3 * chains.std_error).sum())}"
        )
        low, high = chains.confidence_interval()
        words.append(f"its intervals hold the exact value: {float(((low <= exact) & (exact <= high)).double().mean()):.3f}")
        over = exact < default.log_evidence - 3 * chains.std_error
        words.append(f"the exact value itself below the default by 3 of them: {int(over.sum())}")
        for name, record in (("default", default), ("AIS", chains)):
            off = record.log_evidence - exact
            bad = off.abs() > 3 * record.std_error + BAD
            silent = bad & record.reliable
            worst = float(off[record.reliable].abs().max())
            words.append(f"{name}: {int(bad.sum())} bad, {int(silent.sum())} without a doubt, worst of those {worst:.3f}")
        print(f"digits, seed {seed}, {len(real)} data: " + "; ".join(words), flush=True)


# Degrees of prior and likelihood, the outlier, and the slope of its mean in the latent.
OUTLIERS = ((3.0, -14.6, -0.6), (3.0, 10.0, 1.0), (3.0, 20.0, 1.0), (2.0, 40.0, 1.0), (4.0, 12.0, 1.0))


def heavy(num_seeds: int) -> None:
    """z ~ t, Cauchy, or a normal whose precision is a latent; x ~ t(0.5 + slope z, 1.4). With and without a child of z."""
    grid = torch.linspace(-400, 400, 800_001, dtype=F64)
    for prior in ("student", "cauchy", "scale"):
        for degrees, value, slope in OUTLIERS:
            tails = {"student": dist.StudentT(degrees, 0.0, 1.4), "cauchy": dist.Cauchy(0.0, 1.0)}
            log_prior = tails.get(prior, dist.StudentT(3.0, 0.0, 1.4)).log_prob(grid)
            x = torch.full((200,), value, dtype=F64)
            log_joint = log_prior + dist.StudentT(degrees, 0.5 + slope * grid, 1.4).log_prob(x[0])
            truth = log_joint.logsumexp(0) + math.log(1e-3)
            for child in (False, True):
                pair = heavy_pair(prior, degrees, slope, child)
                records = [pv.AdaptiveImportanceSampling(*pair, num_particles=1000, seed=s)(x) for s in range(num_seeds)]
                bad = torch.cat([(r.log_evidence - truth).abs() > 5 * r.std_error + 0.02 for r in records])
                silent = bad & torch.cat([r.reliable for r in records])
                name = f"{prior}, {degrees:g} degrees, x = {value:g}, child {child}"
                print(f"heavy, {name}: {int(bad.sum())} of {len(bad)} bad, {int(silent.sum())} without a doubt")


def heavy_pair(prior: str, degrees: float, slope: float, child: bool) -> tuple[Callable, Callable]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if prior == "scale":
                precision = pyro.sample("precision", dist.Gamma(x.new_tensor(1.5), 1.5))
                z = pyro.sample("z", dist.Normal(0.0, 1.4 / precision.sqrt()))
            else:
                heavy_tails = dist.Cauchy if prior == "cauchy" else dist.StudentT
                scales = (0.0, 1.0) if prior == "cauchy" else (degrees, 0.0, 1.4)
                z = pyro.sample("z", heavy_tails(x.new_tensor(scales[0]), *scales[1:]))
            if child:
                pyro.sample("child", dist.Normal(0.3 * z - 0.7, 1.4))
            pyro.sample("x", dist.StudentT(degrees, 0.5 + slope * z, 1.4), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if prior == "scale":
                pyro.sample("precision", dist.LogNormal(torch.zeros_like(x), 0.7))
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.5))
            if child:
                pyro.sample("child", dist.Normal(0.3 * z - 0.7, 1.6))

    return model, guide


PARTS: dict[str, Callable[[int], None]] = {"outlier": outlier, "blocks": blocks, "digits": digits, "heavy": heavy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.parts:
        PARTS[name](options.seeds)


if __name__ == "__main__":
    main()
