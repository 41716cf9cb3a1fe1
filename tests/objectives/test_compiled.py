"""Compiled objectives give what they give without compiling, on the same noise, or refuse by name.

Most cases run the traced graph without inductor (`backend="eager"`), which takes less time and has the same graph; some go
through inductor.
"""

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import CompileError, OptionError
from pyro_vae.objectives.datum_elbo import DatumELBO
from pyro_vae.ops import log_mean_exp

TRACED = {"backend": "eager"}
X, H, D = 6, 5, 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def batch(n=8, dtype=torch.float32, seed=0):
    return (torch.rand(n, X, generator=torch.Generator().manual_seed(seed)) < 0.4).to(dtype)


def networks(*between):
    encoder = nn.Sequential(nn.Linear(X, H), *between, nn.Tanh(), nn.Linear(H, 2 * D), pv.nn.Normal())
    decoder = nn.Sequential(nn.Linear(D, H), *copy.deepcopy(between), nn.Tanh(), nn.Linear(H, X), pv.nn.Bernoulli())
    return encoder, decoder


def vae(*between):
    return pv.VAE(*networks(*between), pv.nn.StandardNormal(D))


def pair_of(model):
    return model.model, model.guide


@dataclass
class Case:
    """What builds a pair, the objective, and the arguments of its calls."""

    pair: Callable[[], tuple[Any, Any]]
    objective: Callable[..., Any]
    calls: list[tuple] = field(default_factory=lambda: [(batch(),), (batch(seed=1),), (batch(5, seed=2),)])


def convolutional():
    encoder = nn.Sequential(nn.Unflatten(-1, (1, 2, 3)), nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Flatten(-3))
    decoder = nn.Sequential(nn.Linear(D, 6), nn.Unflatten(-1, (1, 2, 3)), nn.ConvTranspose2d(1, 1, 3, padding=1), nn.Flatten(-3))
    return pair_of(
        pv.VAE(
            nn.Sequential(*encoder, nn.Linear(24, 2 * D), pv.nn.Normal()),
            nn.Sequential(*decoder, pv.nn.Bernoulli()),
            pv.nn.StandardNormal(D),
        )
    )


def enumerated(side):
    """Three classes, summed out of the guide or of the model."""
    encoder, decoder = nn.Linear(X, 3), nn.Linear(3, X)
    amortised = side == "guide"

    def model(x):
        pyro.module("enumerated.decoder", decoder)
        with pyro.plate("data", len(x)):
            infer = {} if amortised else {"enumerate": "parallel"}
            c = pyro.sample("c", dist.OneHotCategorical(x.new_tensor([0.2, 0.3, 0.5])), infer=infer)
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=decoder(c) + z.unsqueeze(-1)).to_event(1), obs=x)

    def guide(x):
        pyro.module("enumerated.encoder", encoder)
        with pyro.plate("data", len(x)):
            if amortised:
                pyro.sample("c", dist.OneHotCategorical(logits=encoder(x)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(encoder(x)[..., 0], 0.5))

    return model, guide


def in_the_store(subsample=None):
    """Parameters of Pyro's store, one of them positive, and a plate that may be subsampled."""

    def model(x):
        weight = pyro.param("weight", lambda: 0.1 * torch.ones(D, X))
        with pyro.plate("data", len(x), subsample_size=subsample) as index:
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=(z @ weight.to(x.dtype))).to_event(1), obs=x[index])

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(X, D))
        scale = pyro.param("scale", 0.5 * torch.ones(D), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), subsample_size=subsample) as index:
            pyro.sample("latent", dist.Normal(x[index] @ loc.to(x.dtype), scale.to(x.dtype)).to_event(1))

    return model, guide


def global_latent(family):
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(), s).expand([X]).to_event(1), obs=x)

    return model, family(model)


def masked():
    encoder, decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)

    def model(x, mask):
        pyro.module("masked.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x, mask):
        pyro.module("masked.encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def two_latents():
    encoder, decoder = nn.Linear(X, 2), nn.Linear(2, X)

    def model(x):
        pyro.module("two.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=decoder(torch.stack([z, w], -1))).to_event(1), obs=x)

    def guide(x):
        pyro.module("two.encoder", encoder)
        with pyro.plate("data", len(x)):
            loc = encoder(x)
            pyro.sample("z", dist.Normal(loc[..., 0], 0.7))
            pyro.sample("w", dist.Normal(loc[..., 1], 0.6))

    return model, guide


def scored():
    """A draw that is not reparameterised."""
    encoder, decoder = nn.Linear(X, 1), nn.Linear(1, X)

    def model(x):
        pyro.module("scored.decoder", decoder)
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Bernoulli(logits=decoder(b.unsqueeze(-1))).to_event(1), obs=x)

    def guide(x):
        pyro.module("scored.encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=encoder(x)[..., 0]))

    return model, guide


class Bound(DatumELBO):
    """A user's own bound."""

    def bound(self, log_weight):
        return log_mean_exp(2 * log_weight, 0) / 2


MASK = torch.tensor([True, False, True, True, False, True, True, True])
halves = [(batch(),), (batch(seed=1),)]
CASES = {
    "trace": Case(lambda: pair_of(vae()), pv.BetaTrace_ELBO),
    "mean field": Case(lambda: pair_of(vae()), pv.BetaTraceMeanField_ELBO),
    "graph": Case(lambda: pair_of(vae()), pv.BetaTraceGraph_ELBO),
    "enum, guide": Case(lambda: enumerated("guide"), lambda **o: pv.BetaTraceEnum_ELBO(0.5, max_plate_nesting=1, **o)),
    "enum, model": Case(lambda: enumerated("model"), lambda **o: pv.BetaTraceEnum_ELBO(max_plate_nesting=1, **o)),
    "importance": Case(lambda: pair_of(vae()), lambda **o: pv.ImportanceWeightedELBO(num_particles=3, **o)),
    "importance, beta": Case(lambda: pair_of(vae()), lambda **o: pv.ImportanceWeightedELBO(0.5, num_particles=3, **o)),
    "dreg": Case(lambda: pair_of(vae()), lambda **o: pv.ImportanceWeightedELBO(num_particles=3, gradient="dreg", **o)),
    "stl": Case(lambda: pair_of(vae()), lambda **o: pv.ImportanceWeightedELBO(num_particles=1, gradient="stl", **o)),
    "inclusive": Case(lambda: pair_of(vae()), lambda **o: pv.InclusiveKL(num_particles=3, **o)),
    "sleep": Case(lambda: pair_of(vae()), lambda **o: pv.InclusiveKL(num_particles=3, sleep=0.5, **o)),
    "total correlation": Case(lambda: pair_of(vae()), lambda **o: pv.TotalCorrelationELBO(dataset_size=20, **o)),
    "own bound": Case(lambda: pair_of(vae()), lambda **o: Bound(num_particles=3, **o)),
    "score function": Case(scored, lambda **o: pv.BetaTrace_ELBO(0.7, **o)),
    "score function, weights": Case(scored, lambda **o: pv.ImportanceWeightedELBO(num_particles=3, **o)),
    "three particles": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTrace_ELBO(num_particles=3, **o)),
    "vectorised": Case(
        lambda: pair_of(vae()), lambda **o: pv.BetaTraceMeanField_ELBO(num_particles=3, vectorize_particles=True, **o)
    ),
    "free bits": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTraceMeanField_ELBO(0.5, free_bits=0.3, **o)),
    "capacity": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTraceMeanField_ELBO(capacity=0.3, **o)),
    "schedule": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTraceMeanField_ELBO(pv.LinearAnnealing(4), **o)),
    "beta by site": Case(two_latents, lambda **o: pv.BetaTrace_ELBO({"z": 0.3, "w": pv.LinearAnnealing(3)}, **o)),
    "tensor beta": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTrace_ELBO(torch.tensor(0.4), **o)),
    "convolutions": Case(convolutional, pv.BetaTraceMeanField_ELBO),
    "dropout": Case(lambda: pair_of(vae(nn.Dropout(0.5))), pv.BetaTraceMeanField_ELBO),
    "batch norm": Case(lambda: pair_of(vae(nn.BatchNorm1d(H))), pv.BetaTraceMeanField_ELBO),
    "the store": Case(in_the_store, lambda **o: pv.BetaTraceMeanField_ELBO(0.5, **o)),
    "subsampled": Case(lambda: in_the_store(4), lambda **o: pv.BetaTrace_ELBO(0.5, **o)),
    "subsampled, weights": Case(lambda: in_the_store(4), lambda **o: pv.ImportanceWeightedELBO(num_particles=2, **o)),
    "autoguide": Case(lambda: global_latent(AutoNormal), pv.BetaTraceMeanField_ELBO, halves),
    "joint autoguide": Case(lambda: global_latent(AutoMultivariateNormal), pv.BetaTrace_ELBO, halves),
    "masked": Case(masked, pv.BetaTraceMeanField_ELBO, [(batch(), MASK), (batch(seed=1), ~MASK)]),
}


def run(objective, pair, args, seed):
    """Loss, gradients by parameter and terms of one call under SVI's form, and the next random number."""
    pyro.set_rng_seed(seed)
    with poutine.trace(param_only=True) as seen:
        loss = objective.loss_and_grads(*pair, *args)
    leaves = {name: site["value"].unconstrained() for name, site in seen.trace.nodes.items()}
    gradients = {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return torch.as_tensor(loss), gradients, objective.terms, torch.rand(())


def assert_same(found, wanted, dtype):
    tolerance = TOLERANCE[dtype]
    largest = max(float(g.abs().max()) for g in wanted[1].values() if g is not None)
    assert set(found[1]) == set(wanted[1])
    for name, gradient in wanted[1].items():
        assert (found[1][name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=10 * tolerance, atol=10 * tolerance * largest, msg=name)
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert found[3] == wanted[3], "the random state is elsewhere"
    ours, theirs = found[2], wanted[2]
    assert ours.plates == theirs.plates and set(ours.kl) == set(theirs.kl)
    assert ours.beta == theirs.beta and type(ours.beta) is type(theirs.beta)
    scale = float(max(theirs.reconstruction.abs(), theirs.kl_sum.abs()))
    for name in ("reconstruction", "kl_sum", "elbo", "loss"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == other.dtype and one.shape == other.shape and not one.requires_grad
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale, msg=name)
    for name in theirs.kl:
        torch.testing.assert_close(ours.kl[name], theirs.kl[name], rtol=tolerance, atol=tolerance * scale, msg=name)


def built(case, dtype):
    """The pair, and a second one of the same parameters."""
    pairs = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair = case.pair()
        for program in pair:
            for module in modules(program):
                module.to(dtype)
        pairs.append(pair)
    return pairs


def modules(program):
    if isinstance(program, nn.Module):
        return [program]
    return [c.cell_contents for c in program.__closure__ or () if isinstance(c.cell_contents, nn.Module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_the_traced_graph_gives_what_the_programs_give(name, dtype):
    """Loss, gradients, terms, random state, at several calls, of other data and other shapes."""
    case = CASES[name]
    pair, _ = built(case, dtype)
    objective, eager = case.objective(compile=TRACED), case.objective()
    for number, args in enumerate([*case.calls, *case.calls]):
        args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
        if number == 0:
            run(eager, pair, args, 0)  # parameters come into being
            eager.num_updates = 0
        found = run(objective, pair, args, number)
        assert_same(found, run(eager, pair, args, number), dtype)
    assert len(objective._compiled._graphs) == len({c[0].shape for c in case.calls})
