"""Every public entrance that takes a pair, and a correct small call of it; `bad.py` has what is put in the places."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

NUM_DATA, DATA_DIM = 4, 3


class Linear(nn.Module):
    """A pair with parameters in single precision, as a user writes it: z ~ N(0, 1), x ~ N(w z + b, 1)."""

    def __init__(self, data_dim: int = DATA_DIM, latent: str = "z") -> None:
        super().__init__()
        self.encoder, self.decoder, self.latent = nn.Linear(data_dim, 2), nn.Linear(2, data_dim), latent
        for number, parameter in enumerate(self.parameters()):
            parameter.data = torch.linspace(-0.5, 0.7, parameter.numel()).reshape(parameter.shape) * (1 + 0.1 * number)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample(self.latent, dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample(self.latent, dist.Normal(self.encoder(x), 0.8).to_event(1))


class Classes(nn.Module):
    """A pair whose latent is a class, for what sums over all values."""

    def __init__(self, data_dim: int = DATA_DIM, latent: str = "z") -> None:
        super().__init__()
        self.encoder, self.decoder, self.latent = nn.Linear(data_dim, 2), nn.Linear(2, data_dim), latent

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample(self.latent, dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.decoder.weight.T[z] + self.decoder.bias, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample(self.latent, dist.Categorical(logits=self.encoder(x)), infer={"enumerate": "parallel"})


def data() -> torch.Tensor:
    """(4, 3), whole numbers so that integer data are the same data."""
    return torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 1.0], [1.0, 1.0, 0.0], [-1.0, 2.0, 1.0]])


FACTORS = torch.tensor([[0], [1], [0], [1]])
Call = Callable[..., Any]


@dataclass(frozen=True)
class Entrance:
    """A correct small call: `call(model, guide, data)`.

    :ivar group: the column of the table.
    :ivar over_loader: whether `data` is a loader; otherwise it is the argument of the model.
    :ivar pair: what makes model and guide.
    :ivar leaves: whether it trains: then parameters, and the random state, are the caller's own.
    :ivar reads: whether it reads the data, and not only how many there are.
    :ivar costly: whether a right answer takes seconds; then only what is refused is put in.
    """

    name: str
    group: str
    call: Call
    over_loader: bool = False
    pair: type = Linear
    leaves: bool = False
    reads: bool = True
    costly: bool = False


FEW: dict[str, Any] = {"num_particles": 4, "seed": 0}
OF_CALL = ("args", "progress", "checkpoint", "on_error", "factors", "labels")  # options of a call, not of what is called
CHAINS: dict[str, Any] = {"num_steps": 3, "num_chains": 2, "seed": 0, "start": "prior", "progress": False}


def built(make: Callable[..., Any], **fixed: Any) -> Call:
    """Build an estimator and call it on the data."""
    return lambda model, guide, x, **options: make(model, guide, **{**fixed, **options})(x)


def built_over_loader(make: Callable[..., Any], **fixed: Any) -> Call:
    """The same over a loader; what the call itself has options for goes there."""

    def call(model, guide, loader, **options):
        of_call = {"progress": False, **taken_out(options, OF_CALL)}
        return make(model, guide, **{**fixed, **options})(loader, **of_call)

    return call


def taken_out(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: options.pop(name) for name in list(options) if name in names}


def two_way(model, guide, x, **options):
    latents = {"z": torch.tensor([[0.0, 1.0], [-1.0, 0.5], [0.3, 0.2], [1.0, -1.0]])}
    return pv.BidirectionalMonteCarlo(model, guide, **{**CHAINS, "latents": latents, **options})(x)


def step(make: Callable[..., Any], **fixed: Any) -> Call:
    """One step of training."""

    def call(model, guide, x, **options):
        objective = make(**{**fixed, **options})
        with pyro.poutine.block():
            torch.manual_seed(0)
            return pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), objective).step(x)

    return call


def looked_at(model, guide, x, **options):
    monitor = pv.CollapseMonitor(model, guide, **{"num_particles": 4, "every": 1, **options})
    monitor(x)
    return monitor.history() if callable(monitor.history) else monitor.history


def factors_of(batch):
    """One factor for each datum, of whatever came as a batch."""
    x = batch.get("x") if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return FACTORS[: len(x)] if isinstance(x, torch.Tensor) and x.ndim else FACTORS


def informed(model, guide, loader, **options):
    return built_over_loader(pv.MutualInformationGap, **FEW)(model, guide, loader, **{"factors": factors_of, **options})


def stopped(model, guide, loader, **options):
    stopping = pv.EarlyStopping(model, guide, loader, **{"num_particles": 4, "every": 1, **options})
    stopping.look(0)
    return stopping.history() if callable(stopping.history) else stopping.history


def samples(model, guide, loader, **options):
    of_call = {"train": loader, "progress": False, **taken_out(options, (*OF_CALL, "evidence"))}
    return pv.SampleCheck(model, guide, **{"seed": 0, **options})(loader, **of_call)


def refitted(model, guide, loader, **options):
    options = {"num_epochs": 1, "num_particles": 4, "seed": 0, "progress": False, **options}
    return pv.refit_guide(model, guide, loader, pyro.optim.SGD({"lr": 0.0}), test=loader, **options)


def swept(model, guide, loader, **options):
    options = {"num_epochs": 1, "seed": 0, "progress": False, "evidence": few_weights, **options}
    return pv.beta_sweep(lambda beta: (model, guide), loader, options.pop("betas", [1.0]), **options)


few_weights = functools.partial(pv.ImportanceSampling, num_particles=4, check=False)


def diagnosed(model, guide, loader, **options):
    options = {"num_data": 4, "num_particles": 4, "seed": 0, "progress": False, "evidence": few_weights, **options}
    return pv.diagnose(model, guide, train=loader, test=loader, **options)


def expected(model, guide, x, **options):
    return pv.PosteriorExpectation(model, guide, lambda z: z["z"].sum(-1), **{**FEW, **options})(x)


def posterior_draws(model, guide, x, **options):
    return pv.posterior(model, guide, x, **{"num_samples": 2, **FEW, **options})


def imputed(model, guide, x, **options):
    return pv.impute(model, guide, x, **{"num_draws": 1, **FEW, **options})


def evaluated(model, guide, loader, **options):
    return pv.evaluate(few_weights(model, guide), loader, **{"seed": 0, "progress": False, **options})


def left_out(model, guide, x, **options):
    """Latents shared by all data: theta beside the pair's own."""

    def with_theta(program):
        if not callable(program) or isinstance(program, nn.Module):
            return program

        def run(x):
            pyro.sample("theta", dist.Normal(0.0, 1.0))
            program(x)

        return run

    options = {"num_draws": 4, "seed": 0, "proposal": "guide", **options}
    return pv.LeaveOneOut(with_theta(model), with_theta(guide), **options)(x)


def aggressively(model, guide, loader, **options):
    svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), pv.BetaTrace_ELBO())
    torch.manual_seed(0)
    training = pv.AggressiveTraining(svi, loader, **{"max_inner_steps": 1, "window": 1, **options})
    return training.step()


ENTRANCES = [
    Entrance("ImportanceSampling", "log p(x)", built(pv.ImportanceSampling, **FEW)),
    Entrance("AdaptiveImportanceSampling", "log p(x)", built(pv.AdaptiveImportanceSampling, num_gradients=2, **FEW)),
    Entrance("AnnealedImportanceSampling", "log p(x)", built(pv.AnnealedImportanceSampling, **CHAINS)),
    Entrance("AutoEvidence", "log p(x)", built(pv.AutoEvidence, tolerance=1.0, max_cost=1000, seed=0)),
    Entrance("BidirectionalMonteCarlo", "log p(x)", two_way),
    Entrance("ExactEvidence", "log p(x)", built(pv.ExactEvidence, seed=0), pair=Classes),
    Entrance("SelfCheck", "log p(x)", built(pv.SelfCheck, evidence=few_weights, **CHAINS)),
    Entrance("InferenceGaps", "gaps, expectations, ranks", built(pv.InferenceGaps, evidence=few_weights, **FEW)),
    Entrance(
        "PosteriorExpectation",
        "gaps, expectations, ranks",
        expected,
    ),
    Entrance("GuideCalibration", "gaps, expectations, ranks", built(pv.GuideCalibration, **FEW)),
    Entrance("LeaveOneOut", "gaps, expectations, ranks", left_out),
    Entrance(
        "posterior",
        "gaps, expectations, ranks",
        posterior_draws,
    ),
    Entrance("impute", "gaps, expectations, ranks", imputed),
    Entrance("simulate", "draws", lambda m, g, x, **o: pv.simulate(m, x, **{"seed": 0, **o}), reads=False),
    Entrance("reconstruct", "draws", lambda m, g, x, **o: pv.reconstruct(m, g, x, **{"seed": 0, **o})),
    Entrance("traverse", "draws", lambda m, g, x, **o: pv.traverse(m, g, x, **{"seed": 0, "num_steps": 2, **o})),
    Entrance("manifold", "draws", lambda m, g, x, **o: pv.manifold(m, g, x, **{"seed": 0, "num_steps": 2, **o})),
    Entrance("BetaTrace_ELBO", "objectives", step(pv.BetaTrace_ELBO), leaves=True),
    Entrance("BetaTraceGraph_ELBO", "objectives", step(pv.BetaTraceGraph_ELBO), leaves=True),
    Entrance("BetaTraceMeanField_ELBO", "objectives", step(pv.BetaTraceMeanField_ELBO), leaves=True),
    Entrance("BetaTraceEnum_ELBO", "objectives", step(pv.BetaTraceEnum_ELBO), pair=Classes, leaves=True),
    Entrance("ImportanceWeightedELBO", "objectives", step(pv.ImportanceWeightedELBO, num_particles=4), leaves=True),
    Entrance("InclusiveKL", "objectives", step(pv.InclusiveKL, num_particles=4), leaves=True),
    Entrance("TotalCorrelationELBO", "objectives", step(pv.TotalCorrelationELBO, dataset_size=100), leaves=True),
    Entrance("CollapseMonitor", "training", looked_at),
    Entrance("evaluate", "evaluate, diagnose", evaluated, True),
    Entrance("ActiveUnits", "latents, samples", built_over_loader(pv.ActiveUnits, **FEW), True),
    Entrance("AggregatedPosterior", "latents, samples", built_over_loader(pv.AggregatedPosterior, seed=0), True),
    Entrance("ELBOSurgery", "latents, samples", built_over_loader(pv.ELBOSurgery, **FEW), True),
    Entrance(
        "MutualInformationGap",
        "latents, samples",
        informed,
        True,
    ),
    Entrance(
        "RateDistortion",
        "latents, samples",
        built_over_loader(pv.RateDistortion, num_steps=3, num_chains=2, betas=[1.0], seed=0),
        True,
    ),
    Entrance("SampleCheck", "latents, samples", samples, True),
    Entrance("AggressiveTraining", "training", aggressively, True, leaves=True),
    Entrance("EarlyStopping", "training", stopped, True, leaves=True),
    Entrance("beta_sweep", "training", swept, True, leaves=True),
    Entrance("refit_guide", "training", refitted, True, leaves=True, costly=True),
    Entrance("diagnose", "evaluate, diagnose", diagnosed, True, costly=True),
]
