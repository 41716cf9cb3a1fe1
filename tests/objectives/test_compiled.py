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
from pyro.infer import SVI
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
    """What builds a pair, the objective, and the arguments of its calls.

    Each shape and each dtype is a graph of its own, which takes half a second to trace.
    """

    pair: Callable[[], tuple[Any, Any]]
    objective: Callable[..., Any]
    calls: list[tuple] = field(default_factory=lambda: [(batch(),), (batch(seed=1),)])


def convolutional():
    encoder = nn.Sequential(nn.Unflatten(-1, (1, 2, 3)), nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Flatten(-3))
    decoder = nn.Sequential(
        nn.Linear(D, 6), nn.Unflatten(-1, (1, 2, 3)), nn.ConvTranspose2d(1, 1, 3, padding=1), nn.Flatten(-3)
    )
    return pair_of(
        pv.VAE(
            nn.Sequential(*encoder, nn.Linear(24, 2 * D), pv.nn.Normal()),
            nn.Sequential(*decoder, pv.nn.Bernoulli()),
            pv.nn.StandardNormal(D),
        )
    )


def sequences():
    """Steps of which some are padding, and a guide whose draws depend on earlier ones."""
    head = pv.nn.Normal()
    return pair_of(
        pv.MarkovVAE(
            pv.nn.StandardNormal(D),
            nn.Sequential(nn.Linear(D, 2 * D), head),
            nn.Sequential(nn.Linear(D, 3), pv.nn.Bernoulli()),
            pv.nn.BackwardGRU(3, H),
            pv.models.Concatenated(nn.Sequential(nn.Linear(D + H, 2 * D), head)),
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


def recurrent():
    """An LSTM over two steps."""
    rnn, encoder, decoder = nn.LSTM(D, 4, batch_first=True), nn.Linear(4, 2 * D), nn.Linear(D, X)

    def model(x):
        pyro.module("recurrent.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("recurrent.rnn", rnn)
        pyro.module("recurrent.encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(rnn(x.unflatten(-1, (2, D)))[0][:, -1]).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


class Bound(DatumELBO):
    """A user's own bound."""

    def bound(self, log_weight):
        return log_mean_exp(2 * log_weight, 0) / 2


MASK = torch.tensor([True, False, True, True, False, True, True, True])
ragged = [(batch(seed=seed).reshape(8, 2, 3), torch.tensor([1, 2] * 4)) for seed in (0, 1)]
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
        lambda: pair_of(vae()),
        lambda **o: pv.BetaTraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1, **o),
    ),
    "free bits": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTraceMeanField_ELBO(0.5, free_bits=0.3, **o)),
    "capacity": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTraceMeanField_ELBO(capacity=0.3, **o)),
    "schedule": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTraceMeanField_ELBO(pv.LinearAnnealing(4), **o)),
    "beta by site": Case(two_latents, lambda **o: pv.BetaTrace_ELBO({"z": 0.3, "w": pv.LinearAnnealing(3)}, **o)),
    "tensor beta": Case(lambda: pair_of(vae()), lambda **o: pv.BetaTrace_ELBO(torch.tensor(0.4), **o)),
    "convolutions": Case(convolutional, pv.BetaTraceMeanField_ELBO),
    "recurrent": Case(recurrent, pv.BetaTraceMeanField_ELBO),
    "dropout": Case(lambda: pair_of(vae(nn.Dropout(0.5))), pv.BetaTraceMeanField_ELBO),
    "batch norm": Case(lambda: pair_of(vae(nn.BatchNorm1d(H))), pv.BetaTraceMeanField_ELBO),
    "the store": Case(in_the_store, lambda **o: pv.BetaTraceMeanField_ELBO(0.5, **o)),
    "subsampled": Case(lambda: in_the_store(4), lambda **o: pv.BetaTrace_ELBO(0.5, **o)),
    "subsampled, weights": Case(lambda: in_the_store(4), lambda **o: pv.ImportanceWeightedELBO(num_particles=2, **o)),
    "autoguide": Case(lambda: global_latent(AutoNormal), pv.BetaTraceMeanField_ELBO),
    "joint autoguide": Case(lambda: global_latent(AutoMultivariateNormal), pv.BetaTrace_ELBO),
    "sequences, inclusive": Case(sequences, lambda **o: pv.InclusiveKL(num_particles=3, **o), ragged),
    "batch norm and dropout": Case(lambda: pair_of(vae(nn.BatchNorm1d(H), nn.Dropout(0.5))), pv.BetaTraceMeanField_ELBO),
    "masked": Case(masked, pv.BetaTraceMeanField_ELBO, [(batch(), MASK), (batch(seed=1), ~MASK)]),
}

# One case for each way of computing a loss, and for each kind of weight and parameter: the others run in float64 alone.
IN_BOTH = [
    "trace",
    "mean field",
    "graph",
    "enum, guide",
    "enum, model",
    "importance",
    "dreg",
    "inclusive",
    "total correlation",
    "own bound",
    "score function",
    "schedule",
    "beta by site",
    "tensor beta",
    "batch norm and dropout",
    "subsampled",
    "joint autoguide",
]


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
            torch.testing.assert_close(
                found[1][name], gradient, rtol=10 * tolerance, atol=10 * tolerance * largest, msg=name
            )
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


OF_ONE_SHAPE = [pytest.param(name, torch.float64, [], id=f"{name}, float64") for name in CASES]
OF_TWO_SHAPES = [
    pytest.param(name, torch.float32, [(batch(5, seed=2),)], id=f"{name}, float32, two shapes") for name in IN_BOTH
]


@pytest.mark.parametrize(("name", "dtype", "more"), [*OF_ONE_SHAPE, *OF_TWO_SHAPES])
def test_the_traced_graph_gives_what_the_programs_give(name, dtype, more):
    """Loss, gradients, terms, random state, at several calls, of other data and, in float32, another shape."""
    case = CASES[name]
    calls = [*case.calls, *more]
    pair, _ = built(case, dtype)
    objective, eager = case.objective(compile=TRACED), case.objective()
    for number, args in enumerate([*calls, *calls]):
        args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
        if number == 0:
            run(eager, pair, args, 0)  # parameters come into being
            eager.num_updates = 0
        found = run(objective, pair, args, number)
        assert_same(found, run(eager, pair, args, number), dtype)
    assert len(objective._compiled._graphs) == len({c[0].shape for c in calls})


# Training


def trained(pair, objective, batches, form):
    """Train for some steps. The parameters by name and the losses."""
    pyro.set_rng_seed(3)
    if form == "svi":
        svi = SVI(*pair, pyro.optim.Adam({"lr": 1e-2}), objective)
        return [svi.step(*args) for args in batches]
    loss = objective(*pair)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    losses = []
    for objective.num_updates, args in enumerate(batches):
        optimizer.zero_grad()
        value = loss(*args)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


TRAINED = [
    "mean field",
    "schedule",
    "enum, guide",
    "dreg",
    "convolutions",
    "batch norm and dropout",
    "the store",
    "autoguide",
]


@pytest.mark.parametrize("form", ["svi", "module"])
@pytest.mark.parametrize("name", TRAINED)
def test_training_goes_the_same_way(name, form):
    case = CASES[name]
    if form == "module" and not isinstance(case.pair()[0], nn.Module):
        pytest.skip("functions are no modules")
    batches = [case.calls[0], *case.calls, case.calls[0]]
    results = []
    for options in ({}, {"compile": TRACED}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair = case.pair()
        losses = trained(pair, case.objective(**options), batches, form)
        held = [m for program in pair for m in modules(program)]
        state = [v.detach().clone() for m in held for v in m.state_dict().values()]
        state += [v.detach().clone() for v in pyro.get_param_store()._params.values()]
        results.append((losses, state))
    (losses, state), (compiled_losses, compiled_state) = results
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert len(state) == len(compiled_state) > 0
    for wanted, found in zip(state, compiled_state, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


INDUCTOR = ["dreg", "enum, guide", "batch norm and dropout"]


@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor_gives_what_the_programs_give(name):
    case = CASES[name]
    pair, _ = built(case, torch.float32)
    objective, eager = case.objective(compile=True), case.objective()
    for number, args in enumerate([case.calls[0]] * 3):
        if number == 0:
            run(eager, pair, args, 0)
            eager.num_updates = 0
        found = run(objective, pair, args, number)
        assert_same(found, run(eager, pair, args, number), torch.float32)
    assert len(objective._compiled._graphs) == 1


def test_statistics_of_norms_move_as_without_compiling():
    case = CASES["batch norm"]
    pairs = built(case, torch.float32)
    for pair, options in zip(pairs, ({}, {"compile": TRACED}), strict=True):
        objective = case.objective(**options)
        for _ in range(3):
            run(objective, pair, (batch(),), 0)
    ours, theirs = ([b for program in pair for b in program.buffers()] for pair in pairs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert any(int(b) == 3 for b in ours if b.dtype == torch.int64)


def test_gradients_add_up_and_are_scaled():
    pair = pair_of(vae())
    loss, eager = pv.BetaTrace_ELBO(compile=TRACED)(*pair), pv.BetaTrace_ELBO()(*pair)
    x = batch()
    grads = []
    for module in (eager, loss):
        module.zero_grad()
        for seed in (0, 1):
            pyro.set_rng_seed(seed)
            (0.5 * module(x)).backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    for wanted, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    value = loss(x)
    value.backward()
    with pytest.raises(CompileError, match="backward"):
        value.backward()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_have_memory_of_their_own(backend):
    """Where a gradient is the data, one number for all, or the same as that of another parameter."""
    a, b = nn.Parameter(torch.zeros(X)), nn.Parameter(torch.zeros(X))
    offset = nn.Parameter(torch.zeros(4))

    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("linear", (x * (a + b)).sum() + offset.sum())

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    objective, x = pv.BetaTrace_ELBO(compile={"backend": backend}), torch.arange(float(X))
    for _ in range(3):
        for leaf in (a, b, offset):
            leaf.grad = None
        objective.loss_and_grads(model, guide, x)
        for leaf, wanted in ((a, -x), (b, -x), (offset, -torch.ones(4))):
            torch.testing.assert_close(leaf.grad, wanted)
            assert leaf.grad.stride() == leaf.stride()
            leaf.grad.zero_()
        assert torch.equal(x, torch.arange(float(X)))


def test_without_gradients_nothing_is_compiled():
    pair = pair_of(vae())
    objective = pv.BetaTrace_ELBO(compile=TRACED)
    with torch.no_grad():
        assert not objective(*pair)(batch()).requires_grad
    objective.loss(*pair, batch())
    assert objective._compiled._graphs == [] and objective.num_updates == 0


# What is traced, and when


def counted():
    """A pair that counts the runs of its model."""
    encoder, decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)
    runs = []

    def model(x):
        runs.append(len(x))
        pyro.module("counted.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("counted.encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, runs


def test_the_model_runs_while_it_is_traced_and_checked_and_never_else():
    """A first run, one to be held against, one that is traced; then again at the second, tenth and hundredth call."""
    model, guide, runs = counted()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), pv.BetaTraceMeanField_ELBO(compile=TRACED))
    expected = {1: 3, 2: 1, 10: 1}
    for call in range(1, 13):
        runs.clear()
        svi.step(batch())
        assert len(runs) == expected.get(call, 0), call
        assert svi.loss_and_grads.__self__.terms.plates == {"data": 8}
        assert len(runs) == expected.get(call, 0), "terms took a second run"


@pytest.mark.parametrize("change", ["mode", "frozen", "replaced", "attribute", "closure", "particles", "store"])
def test_a_change_is_traced_again(change):
    """And what was before is not, where it comes back."""
    model = vae(nn.Dropout(0.5))
    pair, factor, x = pair_of(model), 1.0, batch()
    if change == "closure":

        def guided(x):
            with poutine.scale(scale=factor):
                model.guide(x)

        def modelled(x):
            with poutine.scale(scale=factor):
                model.model(x)

        pair = modelled, guided
    objective, eager = pv.BetaTrace_ELBO(compile=TRACED), pv.BetaTrace_ELBO()
    run(objective, pair, (x,), 0)
    if change == "mode":
        model.eval()
    elif change == "frozen":
        model.decoder[0].bias.requires_grad_(False)
    elif change == "replaced":
        model.decoder[0].bias = nn.Parameter(torch.ones(H))
    elif change == "attribute":
        model.decoder[1].p = 0.1
    elif change == "closure":
        factor = 2.0
    elif change == "particles":
        objective.num_particles = eager.num_particles = 2
    elif change == "store":
        pyro.clear_param_store()
    for seed in (1, 2):
        assert_same(run(objective, pair, (x,), seed), run(eager, pair, (x,), seed), torch.float32)
    kept = change not in ("replaced", "store")
    assert len(objective._compiled._graphs) == (1 + kept)


def test_a_number_for_beta_changes_without_a_trace():
    model, guide, runs = counted()
    objective, eager = pv.BetaTrace_ELBO(0.5, compile=TRACED), pv.BetaTrace_ELBO()
    for number, beta in enumerate([0.5, 0.25, torch.tensor(0.1), 2.0]):
        objective.beta = eager.beta = beta
        args = (model, guide), (batch(),), number
        assert_same(run(objective, *args), run(eager, *args), torch.float32)
    assert len(objective._compiled._graphs) == 1


def test_keyword_arguments_and_trees():
    def model(data, *, weight):
        net = pyro.param("net", torch.zeros(D, X))
        with pyro.plate("data", len(data["x"])):
            z = pyro.sample("latent", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ net, weight).to_event(1), obs=data["x"])

    def guide(data, *, weight):
        loc = pyro.param("loc", torch.zeros(D))
        with pyro.plate("data", len(data["x"])):
            pyro.sample("latent", dist.Normal(loc, 1.0).to_event(1))

    objective, eager = pv.BetaTrace_ELBO(compile=TRACED), pv.BetaTrace_ELBO()
    for seed, weight in enumerate([1.0, 1.0, 2.0]):
        args = model, guide, {"x": batch(seed=seed)}
        pyro.set_rng_seed(seed)
        found = objective.loss_and_grads(*args, weight=weight)
        pyro.set_rng_seed(seed)
        assert found == pytest.approx(eager.loss_and_grads(*args, weight=weight), rel=1e-6)
    assert len(objective._compiled._graphs) == 2


def test_copies_have_no_graphs_and_work():
    pair = pair_of(vae())
    objective = pv.TotalCorrelationELBO(dataset_size=20, compile=TRACED)
    run(objective, pair, (batch(),), 0)
    for copied in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert copied._compiled._graphs == [] and copied.terms is None
        assert copied._compiled.options == objective._compiled.options
        assert_same(run(copied, pair, (batch(),), 1), run(objective, pair, (batch(),), 1), torch.float32)
        assert copied.decomposition.total_correlation == objective.decomposition.total_correlation
    module = copy.deepcopy(objective(*pair))
    module(batch()).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_nothing_is_left_behind():
    """No fake tensors in modules, the random state moves as without, Pyro's settings stay."""
    model = vae(nn.BatchNorm1d(H))
    model.decoder[0].register_forward_hook(lambda module, args, output: vars(module).update(seen=output))
    pair = pair_of(model)
    objective = pv.BetaTrace_ELBO(compile=TRACED)
    settings = pyro.settings.get()
    run(objective, pair, (batch(),), 0)
    seen = vars(model.decoder[0]).get("seen")
    assert seen is None or type(seen) is torch.Tensor
    assert all(type(t) in (torch.Tensor, nn.Parameter) for m in pair for t in m.state_dict(keep_vars=True).values())
    assert pyro.settings.get() == settings


# Refusals, and that their remedies work


def step_with(model, guide=None, objective=pv.BetaTrace_ELBO, compile=TRACED):
    return objective(compile=compile).loss_and_grads(model, guide or counted()[1], batch())


def reading(how):
    decoder = nn.Linear(D, X)

    def model(x):
        pyro.module("reading.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            logits = decoder(z)
            if how == "if" and logits.sum() > 0:
                logits = 2 * logits
            elif how == "numpy":
                logits = logits + float(x.detach().numpy().mean())
            elif how == "list":
                logits = logits + max(x[0].tolist())
            elif how == "where":
                logits = torch.where(logits.sum() > 0, 2 * logits, logits)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    return model


@pytest.mark.parametrize(
    ("how", "line"), [("if", "logits.sum\\(\\) > 0"), ("numpy", "numpy\\(\\)"), ("list", "tolist\\(\\)")]
)
def test_values_that_are_read(how, line):
    with pytest.raises(CompileError, match=f"`.*{line}.*`.*test_compiled.py.*compile=False"):
        step_with(reading(how))
    step_with(reading("where"))
    step_with(reading(how), compile=False)


def test_random_numbers_of_python():
    decoder = nn.Linear(D, X)

    def model(x, noise=None):
        pyro.module("random.decoder", decoder)
        noise = random.random() if noise is None else noise
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z) + noise).to_event(1), obs=x)

    guide = counted()[1]
    with pytest.raises(CompileError, match="at call 1 .*random numbers of Python or NumPy.*compile=False"):
        pv.BetaTrace_ELBO(compile=TRACED).loss_and_grads(model, guide, batch())
    pv.BetaTrace_ELBO().loss_and_grads(model, guide, batch())
    argument = pv.BetaTrace_ELBO(compile=TRACED)
    argument.loss_and_grads(model, lambda x, noise: guide(x), batch(), torch.tensor(random.random()))


def test_a_hidden_change_is_seen_at_a_later_call():
    shift = {"now": 0.0}
    decoder = nn.Linear(D, X)

    def model(x):
        pyro.module("shift.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z) + shift["now"]).to_event(1), obs=x)

    objective, guide = pv.BetaTrace_ELBO(compile=TRACED), counted()[1]
    for _ in range(5):
        objective.loss_and_grads(model, guide, batch())
    shift["now"] = 1.0
    with pytest.raises(CompileError, match="at call 10 "):
        for _ in range(5):
            objective.loss_and_grads(model, guide, batch())
    assert objective._compiled._graphs == []


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.runs = nn.Linear(D, X), 0

    def forward(self, x):
        self.runs += 1
        pyro.module("counter", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0 + self.runs).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def test_attributes_that_change_in_a_run():
    with pytest.raises(CompileError, match="Counter.runs changes.*compile=False"):
        step_with(Counter())


def test_handlers_around_a_step():
    model, guide, _ = counted()
    objective = pv.BetaTrace_ELBO(compile=TRACED)
    with poutine.scale(scale=0.5), pytest.raises(CompileError, match="ScaleMessenger.*around the programs"):
        objective.loss_and_grads(model, guide, batch())
    scaled = poutine.scale(model, 0.5), poutine.scale(guide, 0.5)
    found, eager = run(objective, scaled, (batch(),), 0), run(pv.BetaTrace_ELBO(), scaled, (batch(),), 0)
    assert_same(found, eager, torch.float32)


def test_arguments_that_cannot_be_inputs():
    model, guide, _ = counted()
    objective = pv.BetaTrace_ELBO(compile=TRACED)
    x = batch().requires_grad_()
    with pytest.raises(CompileError, match=r"x.detach\(\)"):
        objective.loss_and_grads(model, guide, x)
    objective.loss_and_grads(model, guide, x.detach())
    with pytest.raises(CompileError, match=r"torch.as_tensor\(x\)"):
        objective.loss_and_grads(model, guide, batch().numpy())


def test_decaying_baselines():
    decoder = nn.Linear(1, X)

    def model(x):
        pyro.module("decaying.decoder", decoder)
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Bernoulli(logits=decoder(b.unsqueeze(-1))).to_event(1), obs=x)

    def guide(x):
        q = pyro.param("q", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=q), infer={"baseline": {"use_decaying_avg_baseline": True}})

    with pytest.raises(CompileError, match="compile=False"):
        step_with(model, guide, objective=pv.BetaTraceGraph_ELBO)
    step_with(model, guide, objective=pv.BetaTraceGraph_ELBO, compile=False)


def test_draws_followed_by_their_provenance():
    model, guide = scored()
    with pytest.raises(CompileError, match="use BetaTrace_ELBO or ImportanceWeightedELBO.*compile=False"):
        step_with(model, guide, objective=pv.BetaTraceGraph_ELBO)
    step_with(model, guide)
    step_with(model, guide, objective=pv.BetaTraceGraph_ELBO, compile=False)


def test_what_inductor_cannot_compile():
    """Indexing by a mask is traced, with a shape that depends on values."""
    decoder = nn.Linear(D, X)

    def model(x):
        pyro.module("indexing.decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z) + z[z > 0].sum()).to_event(1), obs=x)

    with pytest.raises(CompileError, match="traced, but torch cannot compile it: DynamicOutputShape.*compile=False"):
        step_with(model, compile=True)
    step_with(model, compile=False)


def test_autocast_is_another_graph():
    pair, x = pair_of(vae()), batch()
    objective, eager = pv.BetaTraceMeanField_ELBO(compile=TRACED), pv.BetaTraceMeanField_ELBO()
    for seed, enabled in enumerate([False, True, True]):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_same(run(objective, pair, (x,), seed), run(eager, pair, (x,), seed), torch.float32)
    assert len(objective._compiled._graphs) == 2


def test_too_many_shapes():
    model, guide, _ = counted()
    objective = pv.BetaTrace_ELBO(compile={**TRACED, "max_graphs": 2})
    for n in (3, 4, 3):
        objective.loss_and_grads(model, guide, batch(n))
    with pytest.raises(CompileError, match=r"2 compiled steps.*\(4, 6\).*max_graphs.*compile=False"):
        objective.loss_and_grads(model, guide, batch(5))


def test_no_compiler(monkeypatch):
    from torch._inductor import exc

    def nothing(*args, **kwargs):
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr("torch._inductor.compile", nothing)
    with pytest.raises(CompileError, match=r"apt install g\+\+.*'backend': 'eager'.*compile=False"):
        step_with(counted()[0], compile=True)
    step_with(counted()[0], compile=TRACED)


@pytest.mark.parametrize(
    "compile", ["yes", 1, {"speed": 3}, {"backend": "aot"}, {"max_graphs": 0}, {"backend": "eager", "mode": "default"}]
)
def test_bad_options(compile):
    with pytest.raises(OptionError, match="compile"):
        pv.BetaTrace_ELBO(compile=compile)


# What an attack found: state that a graph would not move, values that it would keep for ever.


class Stateful(nn.Module):
    """A model with something beside its parameters; `change` is called with it and the data in each run."""

    def __init__(self, change):
        super().__init__()
        self.decoder = nn.Linear(2, 4)
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("count", torch.tensor(1.0))
        self.other, self.calls, self.change = torch.zeros(4), 0, change

    def model(self, x):
        pyro.module("stateful", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            shift = self.change(self, x)
            pyro.sample("x", dist.Normal(self.decoder(z) + shift, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))


def reassigned(self, x):
    self.ema = 0.9 * self.ema + 0.1 * x.mean(0)
    return self.ema


def other_memory(self, x):
    self.ema.data = 0.9 * self.ema + 0.1 * x.mean(0)
    return self.ema


def counting(self, x):
    self.calls += 1
    return float(self.calls)


def not_registered(self, x):
    self.other.mul_(0.9).add_(0.1 * x.mean(0))
    return self.other


def read(self, x):
    return self.count.item()


def as_float(self, x):
    return float(self.count)


STATE = {
    "a buffer replaced": (reassigned, "M?.*ema changes in a run"),
    "other memory": (other_memory, r"buffer\.copy_"),
    "a counter": (counting, "calls changes in a run"),
    "no buffer": (not_registered, "register it as a buffer"),
    "item": (read, r"reads one.*no \.item\(\)"),
    "float": (as_float, "reads one"),
}


@pytest.mark.parametrize("name", STATE)
def test_state_that_a_graph_would_not_move_is_refused(name):
    change, message = STATE[name]
    pyro.clear_param_store()
    pair = Stateful(change)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({}), pv.BetaTrace_ELBO(compile={"backend": "eager"}))
    with pytest.raises(CompileError, match=message):
        svi.step(torch.ones(3, 4))
    assert pair.ema.device.type == "cpu" and bool(pair.ema.isfinite().all())


def test_the_remedy_a_buffer_changed_in_place():
    def in_place(self, x):
        self.ema.mul_(0.9).add_(0.1 * x.mean(0))
        return self.ema

    ends = []
    for compiled in (False, {"backend": "eager"}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pair = Stateful(in_place)
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({}), pv.BetaTrace_ELBO(compile=compiled))
        for _ in range(12):
            svi.step(torch.ones(3, 4))
        ends.append(pair.ema.clone())
    assert torch.allclose(*ends)


def test_a_call_without_gradients_has_a_graph_of_its_own():
    pyro.clear_param_store()
    pair = Stateful(lambda self, x: 0.0)
    objective = pv.BetaTrace_ELBO(compile={"backend": "eager"})
    with torch.no_grad():
        objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))
    assert pair.decoder.weight.grad is None
    objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))
    assert pair.decoder.weight.grad is not None


def test_hooks_on_parameters_are_refused_also_later():
    pyro.clear_param_store()
    pair = Stateful(lambda self, x: 0.0)
    objective = pv.BetaTrace_ELBO(compile={"backend": "eager"})
    objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))
    handle = pair.decoder.weight.register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(CompileError, match="has a hook: remove it"):
        objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))
    handle.remove()
    objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))


def test_what_changes_unseen_is_found_within_a_hundred_calls():
    """A variable that only a helper reads changes after the last of the first checks."""
    pyro.clear_param_store()
    config = {"shift": 0.0}
    pair = Stateful(lambda self, x: config["shift"])
    objective = pv.BetaTrace_ELBO(compile={"backend": "eager"})
    with pytest.raises(CompileError, match="at call 200 of a compiled step"):
        for i in range(250):
            config["shift"] = 0.0 if i < 120 else 1.0
            objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))


def test_a_layer_that_comes_later_trains():
    pyro.clear_param_store()

    def layers(self, x):
        return sum((layer(x) for layer in self.more), torch.zeros(4))

    pair = Stateful(layers)
    pair.more = nn.ModuleList()
    objective = pv.BetaTrace_ELBO(compile={"backend": "eager"})
    objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))
    pair.more.append(nn.Linear(4, 4))
    objective.loss_and_grads(pair.model, pair.guide, torch.ones(3, 4))
    assert pair.more[0].weight.grad is not None


def stateless(scale=1.0):
    return Stateful(lambda self, x: scale)


def eager_and_compiled(pair, beta, calls):
    """Losses of the same calls on the same noise; `calls` are functions of the objective."""
    found = []
    for compiled in (False, {"backend": "eager"}):
        pyro.clear_param_store()
        objective = pv.BetaTrace_ELBO(beta=beta, compile=compiled)
        pyro.set_rng_seed(0)
        found.append([call(objective, *pair) for call in calls])
    return found


def loss_at(beta):
    def call(objective, model, guide):
        objective.beta = beta
        return objective.loss_and_grads(model, guide, torch.ones(3, 4))

    return call


@pytest.mark.parametrize("betas", [(0.5, torch.tensor(0.1), 0.5), (1.0, 0.0, 1.0, 0.5), (0, 1, 0)])
def test_a_beta_that_comes_back_is_not_the_one_in_between(betas):
    pair = stateless()
    eager, compiled = eager_and_compiled((pair.model, pair.guide), 0.3, [loss_at(beta) for beta in betas])
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_each_pair_has_a_graph_of_its_own():
    one, other = stateless(0.0), stateless(3.0)

    def of(model, guide):
        return lambda objective, *pair: objective.loss_and_grads(model, guide, torch.ones(3, 4))

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 2.0).to_event(1))

    calls = [of(one.model, one.guide), of(other.model, one.guide), of(one.model, wide), of(one.model, one.guide)]
    eager, compiled = eager_and_compiled((None, None), 1.0, calls)
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_parameters_of_the_store_that_come_into_being_again():
    def model(x):
        shift = pyro.param("shift", lambda: torch.zeros(4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(shift, 1.0).to_event(1), obs=x)

    guide = stateless().guide
    objective = pv.BetaTrace_ELBO(compile={"backend": "eager"})
    for _ in range(2):
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), objective)
        for _ in range(5):
            svi.step(torch.ones(3, 4))
        assert bool((pyro.param("shift") > 0.3).all())
