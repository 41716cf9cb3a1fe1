"""`CollapseMonitor`: it sees collapse, says so once, waits at the start, and leaves no trace in the training."""

import json
import random
import warnings

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import guide_of, one_line
from pyro.infer import SVI
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, CollapseWarning, OptionError, StructureError
from pyro_vae.latent import ActiveUnits, CollapseMonitor

DIM = 5


class Gain:
    """A pair whose guide is N(gain x, 1) in the first `num_used` units and the prior in the others."""

    def __init__(self, num_used):
        self.num_used = num_used

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x)

    def guide(self, x):
        gains = (torch.arange(DIM) < self.num_used).to(x.dtype)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(2 * x[:, None] * gains, 0.5 * gains + (1 - gains)).to_event(1))


def monitor_of(pair, **options):
    return CollapseMonitor(pair.model, pair.guide, **{"every": 1, "patience": 3, **options})


def looks(monitor, x, count=1):
    """The warnings of so many calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            monitor(x)
    assert all(w.category is CollapseWarning and w.filename == __file__ for w in caught), [str(w.message) for w in caught]
    return [str(w.message) for w in caught]


@pytest.fixture
def x():
    return torch.randn(50, generator=torch.Generator().manual_seed(0))


# --- what it says, and when ---


def test_it_waits_then_says_so_once(x):
    pair = Gain(1)
    monitor = monitor_of(pair)
    assert looks(monitor, x, 2) == [] and not monitor.collapsed
    (message,) = looks(monitor, x, 4)
    assert monitor.collapsed
    assert message.startswith("collapsed: 4 of 5 units carry less than 0.01 nats for at least 99% of the data at step 3 (1 ")
    assert "LinearAnnealing" in message and "free_bits" in message


def test_it_recovers_and_can_collapse_again(x):
    pair = Gain(1)
    monitor = monitor_of(pair)
    assert len(looks(monitor, x, 3)) == 1
    pair.num_used = 5
    assert looks(monitor, x) == [] and not monitor.collapsed
    pair.num_used = 0
    assert looks(monitor, x, 2) == [] and len(looks(monitor, x, 2)) == 1
    history = monitor.history()
    assert history.num_collapsed.tolist() == [4, 4, 4, 0, 5, 5, 5, 5]
    assert history.num_active.tolist() == [1, 1, 1, 5, 0, 0, 0, 0]


def test_a_run_of_looks_that_is_broken_does_not_count(x):
    pair = Gain(0)
    monitor = monitor_of(pair)
    for _ in range(4):
        pair.num_used = 0
        assert looks(monitor, x, 2) == []
        pair.num_used = 5
        assert looks(monitor, x) == []
    assert not monitor.collapsed


@pytest.mark.parametrize(("share", "collapses"), [(0.8, True), (0.81, False), (0.2, True), (1.0, False)])
def test_the_share_of_units(x, share, collapses):
    monitor = monitor_of(Gain(1), share=share, patience=1)
    assert len(looks(monitor, x)) == collapses == monitor.collapsed


def test_an_error_filter_leaves_the_monitor_in_order(x):
    monitor = monitor_of(Gain(0), patience=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        with pytest.raises(CollapseWarning):
            monitor(x)
    assert monitor.collapsed and looks(monitor, x) == [] and len(monitor.history()) == 2


def test_units_without_a_kl_of_their_own_go_by_their_means(x):
    """A guide with full covariance."""
    pair = Gain(0)
    scale = {"gain": 0.0}

    def family(x):
        loc = scale["gain"] * x[:, None].expand(-1, DIM)
        return dist.MultivariateNormal(loc, scale_tril=torch.eye(DIM).expand(len(x), DIM, DIM))

    monitor = CollapseMonitor(pair.model, guide_of(family), every=1, patience=1)
    assert len(looks(monitor, x)) == 1
    scale["gain"] = 1.0
    assert looks(monitor, x) == [] and not monitor.collapsed


# --- when it looks, and what it keeps ---


def test_it_looks_at_every_nth_call_only(x):
    runs = []
    pair = Gain(2)

    def model(x):
        runs.append(len(x))
        return pair.model(x)

    monitor = CollapseMonitor(model, pair.guide, every=4)
    monitor(x), monitor(x), monitor(x)
    assert runs == [] and monitor.last is None and "no measurement yet" in one_line(monitor)
    for _ in range(6):
        monitor(x)
    assert monitor.history().step.tolist() == [4, 8] and monitor.num_calls == 9


def test_the_history_holds_what_active_units_says(x):
    pair = Gain(2)
    monitor = monitor_of(pair)
    empty = monitor.history()
    assert len(empty) == 0 and empty.names == ()
    looks(monitor, x, 3)
    units = ActiveUnits(pair.model, pair.guide, num_particles=10, seed=0)([x], progress=False)
    history = monitor.history()
    assert history.names == units.names and history.kl.shape == history.fraction_at_prior.shape == (3, DIM)
    for name in ("kl", "fraction_at_prior", "variance_of_means"):
        assert torch.equal(getattr(history, name), getattr(units, name).double().expand(3, DIM)), name
        assert getattr(history, name).dtype == torch.float64
    assert torch.equal(monitor.last.kl, units.kl)
    assert json.loads(json.dumps(history.to_dict()))["step"] == [1, 2, 3]
    assert "not collapsed: 3 of 5 units" in one_line(monitor) and str(units) in str(monitor)


def test_keyword_arguments_and_other_shapes(x):
    monitor = monitor_of(Gain(2))
    monitor(x=x)
    monitor(x[:7])
    monitor(x[:1])
    assert len(monitor.history()) == 3


def test_looks_have_noise_of_their_own(x):
    """A KL that is sampled."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(5.0, torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    monitor = CollapseMonitor(model, guide_of(lambda x: dist.Normal(x, 1.0)), every=1)
    looks(monitor, x, 2)
    first, second = monitor.history().kl[:, 0]
    assert first != second


# --- in the middle of a training ---


class Layers(nn.Module):
    """A model or guide with batch norm and dropout in train mode."""

    def __init__(self, side):
        super().__init__()
        self.side = side
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.net[1].eps = 1e-3

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.side == "guide":
                pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Methods(nn.Module):
    """Pyro's tutorial style: model and guide are methods of one module, whose networks they register."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = Layers("model"), Layers("guide")

    def model(self, x):
        pyro.module("decoder", self.decoder)
        self.decoder(x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        self.encoder(x)


def as_modules():
    decoder, encoder = Layers("model"), Layers("guide")
    return decoder, encoder, (decoder, encoder)


def as_closures():
    decoder, encoder = Layers("model"), Layers("guide")

    def model(x):
        pyro.module("decoder", decoder)
        decoder(x)

    def guide(x):
        pyro.module("encoder", encoder)
        encoder(x)

    return model, guide, (decoder, encoder)


def as_methods():
    both = Methods()
    return both.model, both.guide, (both.decoder, both.encoder)


def state_of(modules):
    """Everything that a look could change."""
    store = pyro.get_param_store()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "modes": [m.training for top in modules for m in top.modules()],
        "tensors": [v.tolist() for top in modules for v in top.state_dict().values()],
        "grads": [None if p.grad is None else p.grad.tolist() for top in modules for p in top.parameters()],
        "store": {name: (id(value), value.tolist()) for name, value in store._params.items()},
        "handles": [sorted(vars(p)) for top in modules for p in top.parameters()],
        "grad mode": torch.is_grad_enabled(),
        "hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }


@pytest.mark.parametrize("make", [as_modules, as_closures, as_methods])
def test_a_look_leaves_no_trace_with_batch_norm_and_dropout_in_train_mode(make):
    model, guide, modules = make()
    modules[0].net[2].eval()  # a mode of its own, to be kept
    data = torch.randn(20, 3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    monitor = CollapseMonitor(model, guide, every=1)
    monitor(data)  # before the first step
    for _ in range(3):
        svi.step(data)
        modules[1].net[0].weight.grad = torch.ones(8, 3)
        before = state_of(modules)
        monitor(data)
        assert state_of(modules) == before
    assert monitor.history().kl.isfinite().all() and len(monitor.history()) == 4


@pytest.mark.parametrize("make", [as_modules, as_closures, as_methods])
def test_a_watched_training_is_the_same_training(make):
    def train(watch):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, modules = make()
        data = torch.randn(20, 3)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
        monitor = CollapseMonitor(model, guide, every=2)
        losses = []
        for _ in range(6):
            losses.append(svi.step(data))
            if watch:
                monitor(data)
        return losses, state_of(modules)["tensors"]

    assert train(True) == train(False)


def test_modes_and_random_state_are_put_back_after_an_error():
    model, guide, modules = as_modules()
    monitor = CollapseMonitor(model, guide, every=1)
    before = state_of(modules)
    with pytest.raises((RuntimeError, ValueError)):
        monitor(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))  # the networks take 3
    assert state_of(modules) == before
    assert monitor.last is None and len(monitor.history()) == 0


def test_the_look_is_that_of_the_pair_in_eval_mode():
    model, guide, modules = as_modules()
    data = torch.randn(20, 3)
    for _ in range(3):
        modules[1].net(data)  # running statistics of its own
    monitor = CollapseMonitor(model, guide, every=1)
    monitor(data)
    for module in modules:
        module.eval()
    units = ActiveUnits(model, guide, num_particles=10, seed=0)([data], progress=False)
    assert torch.equal(units.kl, monitor.last.kl)


def test_methods_that_ask_for_their_mode_without_being_called():
    """A module's own method with functional dropout: in eval mode too, or the kernel would refuse it."""

    class Tutorial(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                loc = nn.functional.dropout(self.layer(x), 0.5, training=self.training)
                pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    both = Tutorial()
    monitor = CollapseMonitor(both.model, both.guide, every=1)
    monitor(torch.randn(10, 3))
    assert both.training and both.layer.training


def test_a_training_that_collapses_and_one_that_does_not():
    """A VAE of data with two factors: heavy weight on the KL silences every unit, a light one does not."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(256, 2, generator=generator) @ torch.randn(2, 8, generator=generator)

    def train(beta):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        vae = pv.mlp_vae(8, latent_dim=4, likelihood=pv.nn.Normal(), hidden=(32,))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), pv.BetaTraceMeanField_ELBO(beta=beta))
        monitor = CollapseMonitor(vae.model, vae.guide, every=25, patience=3)
        messages = []
        for _ in range(250):
            svi.step(data)
            messages += looks(monitor, data)
        return monitor, messages

    monitor, messages = train(beta=100.0)
    assert monitor.collapsed and len(messages) == 1 and monitor.last.num_active == 0
    assert "4 of 4 units" in messages[0]
    monitor, messages = train(beta=0.3)
    assert not monitor.collapsed and messages == [] and monitor.last.num_active >= 2


# --- refusals ---


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"every": 1.5}, {"patience": 0}, {"share": 0.0}, {"share": 1.1}, {"seed": None}, {"num_particles": 1}],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        monitor_of(Gain(1), **options)


def test_what_is_not_callable_and_units_that_change(x):
    with pytest.raises(ArgumentError):
        CollapseMonitor(None, Gain(1).guide)

    def program(is_model):
        def run(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), len(x)), 1.0).to_event(1))
                if is_model:
                    pyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x)

        return run

    monitor = CollapseMonitor(program(True), program(False), every=1)
    monitor(x[:3])
    with pytest.raises(StructureError, match="units"):
        monitor(x[:4])
    assert len(monitor.history()) == 1
