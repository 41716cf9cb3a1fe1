"""Aggressive training against a loop written by hand: who moves, when it stops, what it leaves alone."""

import random
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_helpers import F64, Program, numbers, tensor
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.infer.util import zero_grads
from pyro.optim import Adam, StepLR
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import EmptyBatchError, OptionError

BATCHES = list(numbers(12, seed=5).split(4))
LR = {"lr": 0.05, "betas": (0.8, 0.9)}


def pair():
    """A scalar latent, weight and bias in the model, an affine guide; float64."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(p.weight * z + p.bias, 0.7), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(p.gain * x + p.center, p.log_scale.exp()))

    return Program(model, weight=1.2, bias=0.4), Program(guide, gain=0.1, center=-0.3, log_scale=-0.5)


def make(objective=None, optim=None, batches=BATCHES, programs=None, **options):
    model, guide = programs or pair()
    svi = SVI(model, guide, optim or Adam(LR), pv.BetaTrace_ELBO() if objective is None else objective)
    return model, guide, svi, pv.AggressiveTraining(svi, batches, **options)


def values(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(num_inner, num_steps, objective, batches=BATCHES):
    """The same updates with two torch optimisers; every step of the guide and of the model takes the next batch."""
    model, guide = pair()
    pyro.set_rng_seed(1)
    of_guide, of_model = (torch.optim.Adam(module.parameters(), **LR) for module in (guide, model))
    queue = [batches[i % len(batches)] for i in range(num_steps * (num_inner + 1))]
    losses = []
    for i, x in enumerate(queue):
        for module in (model, guide):
            module.zero_grad(set_to_none=True)
        losses.append(objective.loss_and_grads(model, guide, x))
        (of_model if i % (num_inner + 1) == num_inner else of_guide).step()
    return values(model, guide), losses[num_inner :: num_inner + 1]


@pytest.mark.parametrize("cls", [pv.BetaTrace_ELBO, pv.BetaTraceMeanField_ELBO, pv.ImportanceWeightedELBO, pv.InclusiveKL])
def test_equals_a_loop_by_hand(cls):
    """Bitwise but for the fusing of optimisers: parameters, losses, and so the optimiser state of each side."""
    model, guide, _, aggressive = make(cls(), max_inner_steps=3, window=10)
    pyro.set_rng_seed(1)
    losses = [aggressive.step() for _ in range(4)]
    found = values(model, guide)
    wanted, wanted_losses = by_hand(3, 4, cls())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tensor(losses), tensor(wanted_losses), rtol=1e-12, atol=1e-12)
    assert aggressive.num_inner_steps == 3 and all(type(loss) is float for loss in losses)


def test_one_side_moves_at_a_time_with_its_own_optimiser_state():
    model, guide, svi, aggressive = make(max_inner_steps=2)
    aggressive.step()
    assert {float(svi.optim.get_state()[n]["state"][0]["step"]) for n in names(guide)} == {2.0}
    assert {float(svi.optim.get_state()[n]["state"][0]["step"]) for n in names(model)} == {1.0}
    for of_guide, still, moving in ((True, model, guide), (False, guide, model)):
        before, own = values(still), values(moving)
        state = svi.optim.get_state()
        state = {n: {k: torch.as_tensor(v).clone() for k, v in state[n]["state"][0].items()} for n in names(still)}
        aggressive._update(((BATCHES[0],), {}), of_guide)
        assert same(before, values(still)) and not any(torch.equal(a, b) for a, b in zip(own, values(moving), strict=True))
        for name, was in state.items():
            now = svi.optim.get_state()[name]["state"][0]
            assert all(torch.equal(torch.as_tensor(now[k]), v) for k, v in was.items())
        assert all(p.grad is None or not p.grad.any() for p in (*model.parameters(), *guide.parameters()))


def names(program):
    return [f"{program.name}$$${name}" for name, _ in program.named_parameters()]


def test_weight_decay_and_momentum_do_not_move_the_side_that_rests():
    """A zero gradient alone would: the optimiser is not to be called at all."""
    model, guide, _, aggressive = make(optim=Adam({**LR, "weight_decay": 0.5}), max_inner_steps=1)
    aggressive.step()
    still = values(model)
    for _ in range(3):
        aggressive._update(((BATCHES[0],), {}), of_guide=True)
    assert same(still, values(model))


def test_svi_goes_on_where_it_left():
    """After it, `svi.step` is the plain one: nothing is left in the gradients, moments of Adam are kept."""
    model, guide, svi, aggressive = make(max_inner_steps=2)
    aggressive.step()
    svi.step(BATCHES[0])
    state = svi.optim.get_state()
    assert {float(state[n]["state"][0]["step"]) for n in names(guide)} == {3.0}
    assert {float(state[n]["state"][0]["step"]) for n in names(model)} == {2.0}


# When it stops


def scripted(losses, **options):
    """A run whose losses of the guide are these; returns how many it took."""
    _, _, svi, aggressive = make(**options)
    aggressive.step()  # finds the sides
    script = iter(losses)
    with mock.patch.object(svi, "loss_and_grads", lambda *args: (Trace_ELBO().loss_and_grads(*args), next(script))[1]):
        aggressive.step()
    return aggressive.num_inner_steps


@pytest.mark.parametrize(
    ("losses", "window", "limit", "steps"),
    [
        ([5.0, 4.0, 3.0, 3.0, 0.0], 1, 100, 4),  # equal is no fall
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0], 1, 6, 6),
        ([5.0, 5.0, 4.0, 4.0, 3.0, 5.0, 0.0], 2, 100, 6),
        ([1.0, 9.0, 1.0, 8.0, 1.0, 9.0, 0.0], 2, 100, 6),  # single losses may rise
        ([1.0, 2.0, 3.0, 0.0], 4, 3, 3),  # the window is never full
        ([1.0, 0.0], 10, 1, 1),
        ([float("inf"), 3.0, 2.0, 2.0, 0.0], 1, 100, 1),  # infinite at once: no fall from infinity
    ],
)
def test_stops_when_the_mean_over_the_window_no_longer_falls(losses, window, limit, steps):
    assert scripted(losses, window=window, max_inner_steps=limit) == steps


def test_a_loss_that_is_not_a_number_stops_the_inner_loop():
    """It never falls again, so the guide is not to be driven on for all of max_inner_steps."""
    assert scripted([float("nan")] * 50, window=2, max_inner_steps=40) <= 4


def test_the_guide_catches_up_and_the_steps_grow_fewer():
    """A loss without noise (analytic KL, linear decoder and many particles): at first long, at the end one window or two."""
    objective = pv.BetaTraceMeanField_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    _, _, _, aggressive = make(objective, batches=[numbers(64, seed=5)], max_inner_steps=200, window=5)
    counts = []
    for _ in range(30):
        aggressive.step()
        counts.append(aggressive.num_inner_steps)
    assert counts[0] >= 20
    assert sum(counts[-5:]) / 5 <= 15


# Batches


def test_goes_through_the_loader_again_and_again():
    seen = []
    model, guide = pair()

    def watched(x):
        seen.append(x)
        model(x)

    pyro.module(model.name, model)
    _, _, _, aggressive = make(programs=(watched, guide), objective=Trace_ELBO(), max_inner_steps=4)
    aggressive.step(), aggressive.step()
    assert len(seen) == 10
    assert all(x is BATCHES[i % 3] for i, x in enumerate(seen))


def test_a_shuffling_loader_is_shuffled_anew():
    loader = DataLoader(TensorDataset(torch.arange(8.0, dtype=F64)), batch_size=8, shuffle=True)
    seen = []
    aggressive = make(batches=loader, args=lambda b: (seen.append(b[0]), b[0])[1:], max_inner_steps=3)[-1]
    aggressive.step()
    assert len(seen) == 4 and not all(torch.equal(seen[0], x) for x in seen[1:])


@pytest.mark.parametrize("batches", [[], DataLoader(TensorDataset(torch.zeros(0, 2)))], ids=["list", "loader"])
def test_an_empty_loader_is_refused_each_time(batches):
    aggressive = make(batches=batches)[-1]
    for _ in range(2):
        with pytest.raises(EmptyBatchError, match="no batch"):
            aggressive.step()


def test_an_error_in_a_batch_does_not_end_the_training():
    """Ctrl-C while a batch is loaded, say; the next call goes on."""
    fail = [True]

    def args(x):
        if fail.pop() if fail else False:
            raise KeyboardInterrupt
        return (x,)

    aggressive = make(args=args, max_inner_steps=1)[-1]
    with pytest.raises(KeyboardInterrupt):
        aggressive.step()
    assert isinstance(aggressive.step(), float)


@pytest.mark.parametrize("batches", [iter(BATCHES), (x for x in BATCHES)], ids=["iterator", "generator"])
def test_an_iterator_is_refused(batches):
    with pytest.raises(OptionError, match="iterator"):
        make(batches=batches)


def test_batches_with_labels_and_other_arguments():
    model, guide = pair()
    loader = DataLoader(TensorDataset(numbers(8), torch.arange(8)), batch_size=4)
    assert isinstance(make(batches=loader, max_inner_steps=1)[-1].step(), float)
    two = (lambda x, y: model(x + y), lambda x, y: guide(x + y))
    assert isinstance(make(programs=two, batches=loader, args=tuple, max_inner_steps=1)[-1].step(), float)


@pytest.mark.parametrize("option", ["max_inner_steps", "window"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_counts_that_make_no_sense(option, value):
    with pytest.raises(OptionError, match=option):
        make(**{option: value})


# Which side a parameter is on


def shared_pair(how):
    """A VAE as one module, registered in different ways; `both` is read by model and guide."""
    net = nn.ModuleDict({"enc": nn.Linear(1, 2), "dec": nn.Linear(1, 1)}).double()

    def model(x):
        pyro.module("vae" if how == "model registers all" else "dec", net if how == "model registers all" else net["dec"])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(net["dec"](z[..., None])[..., 0], 0.7), obs=x)

    def guide(x):
        pyro.module("vae" if how == "guide registers all" else "enc", net if how == "guide registers all" else net["enc"])
        loc, log_scale = net["enc"](x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return net, model, guide


def test_a_guide_that_registers_everything_is_refused_and_nothing_is_left():
    """No parameter has moved, no gradient waits for the next step of SVI."""
    net, model, guide = shared_pair("guide registers all")
    aggressive = make(programs=(model, guide))[-1]
    before = values(net)
    for _ in range(2):
        with pytest.raises(OptionError, match="guide uses all parameters"):
            aggressive.step()
    assert same(before, values(net))
    assert all(p.grad is None or not p.grad.any() for p in net.parameters()), "gradients would go into the next svi.step"


def test_a_model_that_registers_everything_does_not_move_the_guide():
    """The same tensors under two names, `vae$$$enc.weight` and `enc$$$weight`: they are the guide's."""
    net, model, guide = shared_pair("model registers all")
    aggressive = make(programs=(model, guide), max_inner_steps=1)[-1]
    aggressive.step()
    before, own = values(net["enc"]), values(net["dec"])
    aggressive._update(((BATCHES[0],), {}), of_guide=False)
    assert not same(own, values(net["dec"]))
    assert same(before, values(net["enc"]))


def test_a_parameter_of_both_sides_is_the_guides():
    model, guide = pair()

    def shifted(x):
        shift = pyro.param("shift", tensor(0.1))
        model(x - shift)

    def guided(x):
        guide(x - pyro.param("shift", tensor(0.1)))

    aggressive = make(programs=(shifted, guided), max_inner_steps=1)[-1]
    aggressive.step()
    before = pyro.param("shift").detach().clone()
    aggressive._update(((BATCHES[0],), {}), of_guide=False)
    assert torch.equal(before, pyro.param("shift").detach())
    aggressive._update(((BATCHES[0],), {}), of_guide=True)
    assert not torch.equal(before, pyro.param("shift").detach())


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger])
def test_guides_made_from_the_model(auto):
    """A guide that is a messenger runs the model too; the parameters of the model are not the guide's for that."""
    x = numbers(4)
    model, _ = pair()
    guide = auto(model) if auto is not AutoNormalMessenger else AutoNormalMessenger(model, amortized_plates=())
    aggressive = make(programs=(model, guide), objective=pv.BetaTrace_ELBO(), batches=[x], max_inner_steps=2)[-1]
    aggressive.step()
    before = values(model)
    aggressive._update(((x,), {}), of_guide=True)
    assert same(before, values(model))
    aggressive._update(((x,), {}), of_guide=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


# Whatever SVI takes


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(),
        TraceGraph_ELBO(),
        TraceMeanField_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        RenyiELBO(alpha=0.0, num_particles=3),
        ReweightedWakeSleep(num_particles=3),
        pv.BetaTraceGraph_ELBO(),
        pv.BetaTraceEnum_ELBO(strict_enumeration_warning=False),
        pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(10)),
        pv.ImportanceWeightedELBO(gradient="dreg"),
        pv.InclusiveKL(num_particles=5, sleep=0.5),
        Trace_ELBO().differentiable_loss,
    ],
    ids=lambda o: type(o).__name__,
)
def test_any_objective(objective):
    model, guide, _, aggressive = make(objective, max_inner_steps=2)
    before = values(model, guide)
    loss = aggressive.step()
    assert type(loss) is float and np.isfinite(loss)
    assert not any(torch.equal(a, b) for a, b in zip(before, values(model, guide), strict=True))


def test_a_learning_rate_that_follows_a_schedule():
    optim = StepLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "step_size": 1, "gamma": 0.1})
    aggressive = make(optim=optim, max_inner_steps=2)[-1]
    assert isinstance(aggressive.step(), float)


def test_num_updates_counts_those_of_the_guide_too():
    objective = pv.BetaTrace_ELBO(beta=pv.LinearAnnealing(100))
    aggressive = make(objective, max_inner_steps=4)[-1]
    aggressive.step()
    assert objective.num_updates == 5
    aggressive.step()
    assert objective.num_updates == 10 and objective.terms.beta == pytest.approx(0.09)


# What it leaves alone


def test_draws_as_many_numbers_as_its_updates_do():
    """To find out whose parameters are whose costs no draw, of torch, numpy or Python."""

    def model(x):
        pair_model(x)

    def guide(x):
        random.random(), np.random.rand()
        pair_guide(x)

    states = []
    for by_svi in (False, True):
        pyro.set_rng_seed(3)
        pair_model, pair_guide = pair()
        _, _, svi, aggressive = make(programs=(model, guide), objective=Trace_ELBO(), max_inner_steps=2)
        if by_svi:
            for x in BATCHES:
                svi.step(x)
        else:
            aggressive.step()
        states.append((torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()))
    assert torch.equal(states[0][0], states[1][0])
    assert np.array_equal(states[0][1], states[1][1]) and states[0][2] == states[1][2]


def test_batch_norm_sees_each_batch_once():
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
        model, _ = pair()

        def guide(x):
            pyro.module("net", net)
            loc, log_scale = net(x[:, None]).unbind(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()))

        return net, (model, guide)

    net, programs = build()
    make(programs=programs, objective=Trace_ELBO(), max_inner_steps=2)[-1].step()
    assert int(net[1].num_batches_tracked) == 3


def test_handlers_around_it_see_the_parameters_as_those_of_svi():
    """`poutine.trace` around a step, as SVI.step allows."""
    aggressive = make(max_inner_steps=1)[-1]
    with poutine.trace(param_only=True) as seen:
        aggressive.step()
    assert len(seen.trace.nodes) == 5
    zero_grads({site["value"].unconstrained() for site in seen.trace.nodes.values()})


def test_constrained_parameters():
    def model(x):
        noise = pyro.param("noise", tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x):
        scale = pyro.param("scale", tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, scale))

    aggressive = make(programs=(model, guide), max_inner_steps=1)[-1]
    aggressive.step()
    noise, scale = pyro.param("noise").item(), pyro.param("scale").item()
    assert noise != 0.7 and scale != 0.5
    aggressive._update(((BATCHES[0],), {}), of_guide=True)
    assert pyro.param("noise").item() == noise and pyro.param("scale").item() != scale
