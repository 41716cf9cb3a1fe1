"""DESIGN 5.8 and 5.9: a call leaves nothing behind, and its seed alone decides its draws."""

import random

import numpy
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from kernel_helpers import F64, assert_weights, exact_pair, linear_gaussian, normal, randn, tensor, weigh
from pyro.infer import SVI, Trace_ELBO, autoguide, config_enumerate
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_vae.errors import ArgumentError, HiddenRandomnessError
from pyro_vae.kernel import Pair

ZERO = tensor(0.0)


def random_states():
    return torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()


def same_states(a, b):
    return torch.equal(a[0], b[0]) and numpy.array_equal(a[1], b[1]) and a[2] == b[2]


@pytest.fixture
def linear():
    lm, x = linear_gaussian()
    return (lm, x, *exact_pair(lm))


# --- random state ---


def test_a_seed_leaves_the_random_state_alone(linear):
    _, x, model, guide = linear
    pair = Pair(model, guide)
    before = random_states()
    for _ in range(2):  # the first call, which finds the structure, and one that knows it
        weigh(None, None, x, pair=pair, seed=5)
        assert same_states(before, random_states())


def test_the_random_state_is_put_back_after_an_error(linear):
    _, x, model, guide = linear
    before = random_states()
    with pytest.raises(ValueError):
        weigh(lambda x: model(x), lambda x: guide(x[:2]), x, seed=5)
    assert same_states(before, random_states())
    with pytest.raises(KeyError), Pair(model, guide).open((x,), {}, 5):
        torch.randn(3), numpy.random.rand(), random.random()
        raise KeyError
    assert same_states(before, random_states())


def test_without_a_seed_the_random_state_decides_and_moves_on(linear):
    _, x, model, guide = linear
    pair = Pair(model, guide)
    weigh(None, None, x, pair=pair)
    torch.manual_seed(1)
    first = weigh(None, None, x, pair=pair, seed=None).values["z"]
    second = weigh(None, None, x, pair=pair, seed=None).values["z"]
    torch.manual_seed(1)
    again = weigh(None, None, x, pair=pair, seed=None).values["z"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_numpy_and_python_randomness_in_a_program_is_not_left_behind(linear):
    """Draws that do not matter for the density."""
    _, x, model, guide = linear

    def noisy(x):
        numpy.random.rand(), random.random(), torch.rand(2)
        model(x)

    before = random_states()
    weigh(noisy, guide, x)
    assert same_states(before, random_states())


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_same_seed_gives_the_same_draws_first_and_later(linear, seed):
    _, x, model, guide = linear
    pair = Pair(model, guide)
    first = weigh(None, None, x, pair=pair, seed=seed)
    other = weigh(None, None, x + 1, pair=pair, seed=seed + 1)
    second = weigh(None, None, x, pair=pair, seed=seed)
    fresh = weigh(model, guide, x, seed=seed)
    assert torch.equal(first.values["z"], second.values["z"])
    assert torch.equal(first.values["z"], fresh.values["z"])
    assert not torch.equal(first.values["z"], other.values["z"])
    assert torch.equal(first.log_weight, second.log_weight)


def test_the_same_seed_with_sites_drawn_by_the_model():
    x = randn(5)

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            u = pyro.sample("u", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(x, 1.0))

    pair = Pair(model, guide, prior_sites=["u"])
    first, second = (weigh(None, None, x, pair=pair, seed=2) for _ in range(2))
    assert torch.equal(first.model["u"].value, second.model["u"].value)


def test_streams_and_blocks_differ(linear):
    _, x, model, guide = linear
    draws = []
    with torch.no_grad(), Pair(model, guide).open((x,), {}, 0) as call:
        for stream, block in ((1, 0), (1, 1), (2, 0), (1, 0)):
            call.set_noise(stream, block)
            draws.append(call.draw(3)["z"].value)
    assert torch.equal(draws[0], draws[3])
    assert len({float(z.sum()) for z in draws}) == 3


# --- parameters ---


def test_the_parameter_store_is_the_same_and_so_are_its_tensors(linear):
    lm, x, model, _ = linear
    p = lm.posterior(x)
    pyro.param("loc", p.loc)
    pyro.param("tril", p.scale_tril, constraint=dist.constraints.lower_cholesky)
    store = pyro.get_param_store()
    before = {name: store._params[name] for name in store}
    handle = pyro.param("tril").unconstrained()

    def guide(x):
        pyro.param("new", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(pyro.param("loc"), scale_tril=pyro.param("tril")))

    assert_weights(weigh(model, guide, x), lm.log_evidence(x))
    assert set(store.keys()) == {"loc", "tril"}
    for name, value in before.items():
        assert store._params[name] is value
        assert store._param_to_name[value] == name
    assert pyro.param("tril").unconstrained() is handle
    with torch.no_grad():
        handle.add_(1.0)
    assert not torch.allclose(pyro.param("tril"), p.scale_tril)


def test_the_parameter_store_after_an_error(linear):
    _, x, model, _ = linear
    pyro.param("kept", torch.ones(2))

    def guide(x):
        pyro.param("new", torch.zeros(3))
        raise RuntimeError("no guide")

    with pytest.raises(RuntimeError, match="no guide"):
        weigh(model, guide, x)
    assert list(pyro.get_param_store().keys()) == ["kept"]


def test_parameters_trained_between_calls_are_read_afresh(linear):
    lm, x, model, _ = linear
    pyro.param("loc", torch.zeros(5, 2, dtype=F64))

    def guide(x):
        with pyro.plate("data", len(x)):
            p = lm.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(pyro.param("loc"), scale_tril=p.scale_tril))

    pair = Pair(model, guide)
    assert weigh(None, None, x, pair=pair).log_weight.std() > 0
    with torch.no_grad():
        pyro.param("loc").copy_(lm.posterior(x).loc)
    assert_weights(weigh(None, None, x, pair=pair), lm.log_evidence(x))


def test_gradients_and_parameters_are_untouched_and_training_goes_on():
    x = torch.randn(5)
    encoder = nn.Linear(1, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 1.0))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    svi.step(x)
    encoder.weight.grad = torch.full_like(encoder.weight, 7.0)
    before = [p.clone() for p in encoder.parameters()]
    identity = [id(p) for p in encoder.parameters()]
    weigh(model, guide, x)
    assert torch.equal(encoder.weight.grad, torch.full_like(encoder.weight, 7.0))
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert identity == [id(p) for p in encoder.parameters()]
    assert all(p.requires_grad for p in encoder.parameters())
    encoder.weight.grad = None
    svi.step(x)
    assert not torch.equal(before[1], encoder.bias)


def test_a_pyro_module_keeps_training_after_a_call():
    x = torch.randn(5)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.zeros(5))
            self.scale = PyroParam(torch.ones(5), constraint=dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, self.scale))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Guide()
    weigh(model, guide, x)  # before training: the store is empty and stays empty
    assert list(pyro.get_param_store().keys()) == []
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x)
    names = set(pyro.get_param_store().keys())
    unconstrained = guide.scale_unconstrained
    weigh(model, guide, x)
    assert set(pyro.get_param_store().keys()) == names
    assert guide.scale_unconstrained is unconstrained
    before = guide.scale.detach().clone()
    svi.step(x)
    assert not torch.equal(before, guide.scale.detach())


def test_an_untrained_guide_with_lazy_parameters_adds_nothing():
    x = randn(5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: x / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    assert_weights(weigh(model, guide, x), normal(x, 0.0, 2**0.5))
    assert len(pyro.get_param_store()) == 0


# --- modules ---


class Network(nn.Module):
    """A model or guide with a batch norm in eval mode and a dropout in eval mode."""

    def __init__(self, side):
        super().__init__()
        self.side = side
        self.net = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.BatchNorm1d(3, dtype=F64), nn.Dropout(0.5))
        self.extra = nn.Linear(2, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.side == "guide":
                pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


def test_module_flags_and_buffers_are_untouched():
    model, guide = Network("model"), Network("guide")
    for module in (model, guide):
        module.net.eval()  # the rest stays in train mode
    modules = [*model.modules(), *guide.modules()]
    flags = [m.training for m in modules]
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, guide)]
    weigh(model, guide, randn(5, 3))
    assert flags == [m.training for m in modules]
    for module, state in zip((model, guide), states, strict=True):
        after = module.state_dict()
        assert state.keys() == after.keys()
        assert all(torch.equal(state[k], after[k]) for k in state)


class Counter(nn.Module):
    """A buffer that every run moves."""

    def __init__(self, moves):
        super().__init__()
        self.moves = moves
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, value):
        if self.moves:
            self.runs += 1
        return value


class Counting(nn.Module):
    def __init__(self, side, moves):
        super().__init__()
        self.side, self.counter = side, Counter(moves)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.side == "guide":
                pyro.sample("z", dist.Normal(self.counter(x), 1.0))
            else:
                z = pyro.sample("z", dist.Normal(ZERO, 1.0))
                pyro.sample("x", dist.Normal(self.counter(z), 1.0), obs=x)


@pytest.mark.parametrize("moves", [(True, False), (False, True), (True, True)])
def test_buffers_that_move_are_put_back_and_named(moves):
    """The buffers of model and guide have the same name here."""
    model, guide = Counting("model", moves[0]), Counting("guide", moves[1])
    with pytest.raises(ArgumentError, match=r"Counter\.runs.*\.eval\(\)"):
        weigh(model, guide, randn(5))
    assert float(model.counter.runs) == float(guide.counter.runs) == 0


# --- settings ---


@pytest.mark.parametrize("pyro_validates", [True, False])
@pytest.mark.parametrize("torch_validates", [True, False])
def test_validation_settings_are_put_back(linear, pyro_validates, torch_validates):
    _, x, model, guide = linear
    pyro.enable_validation(pyro_validates)
    torch.distributions.Distribution.set_default_validate_args(torch_validates)
    before = pyro.settings.get()
    weigh(model, guide, x)
    assert pyro.settings.get() == before
    assert torch.distributions.Distribution._validate_args is torch_validates
    with pytest.raises(ZeroDivisionError), Pair(model, guide).open((x,), {}, 0):
        raise ZeroDivisionError
    assert pyro.settings.get() == before
    assert torch.distributions.Distribution._validate_args is torch_validates
    pyro.enable_validation(True)


def test_grad_mode_and_dtype_are_put_back(linear):
    _, x, model, guide = linear
    weigh(model, guide, x)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_a_call_inside_other_handlers_is_not_seen_by_them(linear):
    """The kernel inside a user's trace: no site of its runs is written down there."""
    lm, x, model, guide = linear

    def program():
        pyro.sample("outer", dist.Normal(0.0, 1.0))
        return weigh(model, guide, x).log_weight

    with poutine.trace() as trace:
        log_weight = program()
    assert torch.allclose(log_weight, lm.log_evidence(x).expand(4, 5))
    sites = {n for n, s in trace.trace.nodes.items() if s["type"] == "sample"}
    assert sites == {"outer"}


# --- stored traces ---


def test_the_trace_of_a_guide_messenger_is_put_back():
    x = torch.randn(5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoNormalMessenger(model)
    guide(x)
    trace = guide.trace
    nodes = {name: node.get("value") for name, node in trace.nodes.items()}
    weigh(model, guide, x)
    assert guide.trace is trace
    assert all(trace.nodes[name].get("value") is value for name, value in nodes.items())


def test_the_prototype_of_an_autoguide_is_untouched():
    x = torch.randn(5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoNormal(model)
    guide(x)
    prototype, plates = guide.prototype_trace, set(guide.plates)
    names = set(pyro.get_param_store().keys())
    weigh(model, guide, x)
    assert guide.prototype_trace is prototype
    assert guide.plates.keys() == plates
    assert set(pyro.get_param_store().keys()) == names


class Decorated(nn.Module):
    """A guide as a method under a handler: Pyro binds `self` inside the handler."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 2)).double()

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2, dtype=F64)))
            pyro.sample("x", dist.Normal(y.to(F64), 1.0), obs=x)

    @config_enumerate
    def guide(self, x):
        pyro.module("decorated", self)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.net(x[:, None])))


def test_a_method_under_a_handler_is_checked_and_isolated():
    """Its signature lacks `self`, and its modules are those of the object that it is bound to."""
    pair, x = Decorated().eval(), randn(4)
    result = weigh(pair.model, pair.guide, x)
    y = torch.arange(2, dtype=F64)[:, None]
    right = normal(x, y, 1.0).logsumexp(0) - torch.log(tensor(2.0))
    assert torch.allclose(result.log_weight, right.expand_as(result.log_weight), atol=1e-10)
    with pytest.raises(ArgumentError, match="takes"):
        weigh(pair.model, pair.guide, x, x)
    pair.train()
    with pytest.raises(HiddenRandomnessError, match="dropout"):
        weigh(pair.model, pair.guide, x)
