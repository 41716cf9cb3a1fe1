"""A pair in training: the rehearsal finds out what it must, leaves no trace, and what it found stays true."""

import random

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, autoguide
from pyro.infer.autoguide import AutoNormalMessenger
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import BatchCouplingError, GlobalLatentError, HiddenRandomnessError, ProgramError, SiteMismatchError
from pyro_vae.kernel import LivePair


def pair_of(decoder, encoder=None, latent_dim=2, data_dim=3, register=True):
    """z ~ N(0, I), x ~ N(decoder(z), 1), functions that close over their networks."""
    encoder = nn.Linear(data_dim, 2 * latent_dim) if encoder is None else encoder

    def model(x):
        if register:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            mean = decoder(z)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(mean.ndim - z.ndim + 1), obs=x)

    def guide(x):
        if register:
            pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def executions(pair):
    return [known[3:] for known in pair._known.values()]


def objective_of(model, guide, *args, num_particles=3, gradient="standard"):
    objective = pv.ImportanceWeightedELBO(num_particles=num_particles, gradient=gradient)
    objective.loss(model, guide, *args)
    return objective, objective._pairs["guide"]


class Convolution(nn.Module):
    """A decoder that takes one batch axis and no more."""

    def __init__(self, layer=None, between=None):
        super().__init__()
        self.linear, self.layer, self.last = nn.Linear(2, 64), layer, nn.ConvTranspose2d(4, 1, 4, 2, 1)
        self.between = between

    def forward(self, z):
        h = self.linear(z).view(-1, 4, 4, 4)
        h = h if self.layer is None else self.layer(h)
        h = h if self.between is None else self.between(self, h)
        return self.last(h.relu())


def images(num_data=5):
    return 3 + torch.randn(num_data, 1, 8, 8)


def image_pair(decoder):
    return pair_of(decoder, nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))


# Layers in train mode


LAYERS = {
    "none": lambda: Convolution(),
    "batch norm": lambda: Convolution(nn.BatchNorm2d(4)),
    "dropout": lambda: Convolution(nn.Dropout(0.3)),
    "dropout of channels": lambda: Convolution(nn.Dropout2d(0.3)),
    "functional dropout": lambda: Convolution(between=lambda m, h: F.dropout(h, 0.3, training=m.training)),
    "dropout without a switch": lambda: Convolution(between=lambda m, h: F.dropout(h, 0.3)),
    "instance norm": lambda: Convolution(nn.InstanceNorm2d(4)),
    "instance norm with statistics": lambda: Convolution(nn.InstanceNorm2d(4, track_running_stats=True)),
    "random slopes": lambda: Convolution(nn.RReLU()),
}


@pytest.mark.parametrize("train_first", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_convolutions_train_with_these_layers(layer, train_first):
    """In whichever mode they were first called. Closures: the kernel cannot see their modes."""
    decoder = LAYERS[layer]().train(train_first)
    model, guide = image_pair(decoder)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pv.ImportanceWeightedELBO(num_particles=3))
    x = images()
    svi.evaluate_loss(x)
    decoder.train()
    losses = [svi.step(x) for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    decoder.eval()
    assert svi.evaluate_loss(x) > 0
    assert not decoder.training


@pytest.mark.parametrize("as_modules", [True, False])
def test_running_statistics_move_as_in_ordinary_runs(as_modules):
    """The encoder runs once per call, the decoder once per particle where a loop is needed; the rehearsal not at all."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    decoder = Convolution(nn.BatchNorm2d(4))
    model, guide = pair_of(decoder, encoder)
    if as_modules:
        model, guide = AsModule(model, decoder), AsModule(guide, encoder)
    x = images()
    with torch.no_grad():
        h = encoder[1](encoder[0](x))
        mean = 0.1 * h.mean(0)
        variance = 0.9 + 0.1 * h.var(0)
    objective = pv.ImportanceWeightedELBO(num_particles=3)
    objective.loss(model, guide, x)
    assert int(encoder[2].num_batches_tracked) == 1
    torch.testing.assert_close(encoder[2].running_mean, mean)
    torch.testing.assert_close(encoder[2].running_var, variance)
    assert int(decoder.layer.num_batches_tracked) == 3
    assert all(m.training for program in (encoder, decoder) for m in program.modules())


class AsModule(nn.Module):
    def __init__(self, function, net):
        super().__init__()
        self.function, self.net = function, net

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("num_data", [5, 8])
def test_batch_norm_is_over_the_batch_whatever_its_size(num_data):
    """With as many units as data, batch norm takes the axis of the data for that of the units, without an error."""
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model, guide = pair_of(decoder)
    x = torch.randn(num_data, 3)
    objective_of(model, guide, x)
    assert int(decoder[1].num_batches_tracked) == 3  # one run per particle
    assert decoder[1].running_mean.abs().min() > 0


def test_running_statistics_that_are_not_at_rest_yet_decide_the_same():
    """The same decoder after some training: its statistics differ by unit, and a wrong axis shows."""
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    decoder[1].running_mean.normal_()
    model, guide = pair_of(decoder)
    objective_of(model, guide, torch.randn(8, 3))
    assert int(decoder[1].num_batches_tracked) == 3


def test_a_layer_in_evaluation_mode_stays_there():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8).eval(), nn.Dropout(0.5).eval(), nn.Linear(8, 3))
    model, guide = pair_of(decoder)
    objective_of(model, guide, torch.randn(5, 3))
    assert [m.training for m in decoder] == [True, False, False, True]
    assert int(decoder[1].num_batches_tracked) == 0


# What the rehearsal found must stay true while parameters move


class Gated(nn.Module):
    """A branch behind a gate that starts at zero, as zero-initialised last layers and residual gates do."""

    def __init__(self, branch):
        super().__init__()
        self.linear, self.branch, self.gate = nn.Linear(2, 3), branch, nn.Parameter(torch.zeros(()))

    def forward(self, z):
        return self.gate * self.branch(self.linear(z))


def test_a_gate_that_opens_does_not_show_another_axis():
    """softmax(dim=1) is over the features in a plain run and over the data with a particle axis."""
    decoder = Gated(lambda h: torch.softmax(h, dim=1))
    model, guide = pair_of(decoder)
    x = torch.randn(5, 3)
    objective, _ = objective_of(model, guide, x, num_particles=4)
    decoder.gate.data.fill_(3.0)
    losses = []
    for one in (objective, pv.ImportanceWeightedELBO(num_particles=4)):
        torch.manual_seed(0)
        losses.append(one.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_gate_that_opens_does_not_couple_the_batch_unseen():
    decoder = Gated(lambda h: h - h.mean(-2, keepdim=True))
    model, guide = pair_of(decoder)
    x = torch.randn(5, 3)
    with pytest.raises(BatchCouplingError):
        objective, _ = objective_of(model, guide, x)
        decoder.gate.data.fill_(3.0)
        objective.loss(model, guide, x)


# State


def states():
    return torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()


def same_states(one, other):
    return torch.equal(one[0], other[0]) and (one[1] == other[1]).all() and one[2] == other[2]


def rehearse(model, guide, *args, **options):
    return LivePair(model, guide, **options).call(args, {})


def test_the_rehearsal_leaves_the_state_alone():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    encoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model, guide = pair_of(decoder, encoder)
    x = torch.randn(5, 3)
    model(x), guide(x)
    buffers = [b.clone() for m in (decoder, encoder) for b in m.buffers()]
    before, values = states(), {n: v.clone() for n, v in pyro.get_param_store().items()}
    checks = torch.distributions.Distribution._validate_args
    rehearse(model, guide, x)
    assert same_states(before, states())
    assert pyro.get_param_store().keys() == values.keys()
    assert all(torch.equal(v, pyro.get_param_store()[n]) for n, v in values.items())
    assert all(torch.equal(a, b) for a, b in zip(buffers, [b for m in (decoder, encoder) for b in m.buffers()], strict=True))
    assert all(m.training for net in (decoder, encoder) for m in net.modules())
    assert all(p.grad is None for net in (decoder, encoder) for p in net.parameters())
    assert torch.distributions.Distribution._validate_args == checks
    assert pyro.settings.get("validate_distributions_pyro")


@pytest.mark.parametrize("pyro_checks", [True, False])
def test_settings_of_validation_come_back_separately(pyro_checks):
    model, guide = pair_of(nn.Linear(2, 3))
    before = torch.distributions.Distribution._validate_args
    with pyro.validation_enabled(pyro_checks):
        torch.distributions.Distribution.set_default_validate_args(not pyro_checks)
        try:
            rehearse(model, guide, torch.randn(5, 3))
            assert torch.distributions.Distribution._validate_args is (not pyro_checks)
            assert pyro.settings.get("validate_distributions_pyro") is pyro_checks
        finally:
            torch.distributions.Distribution.set_default_validate_args(before)


def store_pair():
    def model(x):
        w = pyro.param("w", lambda: torch.randn(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + w.sum(), 1.0), obs=x)

    def guide(x):
        v = pyro.param("v", lambda: torch.rand(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, v))

    return model, guide


def initial(seed):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model, guide = store_pair()
    SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), pv.ImportanceWeightedELBO(num_particles=3)).step(torch.ones(4))
    return {n: v.detach().clone() for n, v in pyro.get_param_store().items()}


def test_parameters_start_from_the_seed_of_the_user():
    first, again, other = initial(1), initial(1), initial(2)
    assert first.keys() == {"w", "v"}
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    pyro.clear_param_store()
    torch.manual_seed(1)
    model, guide = store_pair()
    guide(torch.ones(4)), model(torch.ones(4))
    assert torch.equal(pyro.param("v").detach(), first["v"])  # as in Pyro: the first draw of the guide


def test_parameters_and_draws_have_noise_of_their_own():
    """A parameter drawn at random is not the noise of the first draw once more."""
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        seen.append(z)

    def guide(x):
        w = pyro.param("w", lambda: torch.randn(20))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * w, 1.0))

    pv.ImportanceWeightedELBO(num_particles=1).loss(model, guide, torch.randn(20))
    assert not torch.allclose(seen[-1].flatten(), pyro.param("w").detach())


def test_gradients_reach_the_store():
    """The guide draws z about x, so that x - z, and with it the sum of w, has mean zero at the optimum."""
    model, guide = store_pair()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pv.ImportanceWeightedELBO(num_particles=3))
    x = torch.randn(200)
    model(x)
    pyro.get_param_store()["w"] = torch.ones(3)
    for _ in range(150):
        svi.step(x)
    assert float(pyro.param("w").detach().sum()) == pytest.approx(0.0, abs=0.3)


def test_a_later_call_of_the_same_shapes_does_not_rehearse():
    """One run of the guide and one of the model, under other data and moved parameters."""
    decoder, runs = nn.Linear(2, 3), []
    decoder.register_forward_hook(lambda *_: runs.append(1))
    model, guide = pair_of(decoder)
    objective, _ = objective_of(model, guide, torch.randn(5, 3))
    decoder.weight.data.normal_()
    runs.clear()
    objective.loss_and_grads(model, guide, torch.randn(5, 3))
    assert len(runs) == 1


def test_a_lazy_autoguide_is_rehearsed_once():
    runs = []

    def model(x):
        runs.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    objective, _ = objective_of(model, guide := autoguide.AutoNormal(model), torch.randn(4))
    runs.clear()
    objective.loss(model, guide, torch.randn(4))
    assert len(runs) == 1


def test_a_number_that_changes_with_every_step_is_no_new_shape():
    """`svi.step(x, weight)` with an annealed float: one rehearsal, and nothing that grows."""
    runs = []

    def model(x, weight):
        runs.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    def guide(x, weight):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    objective, pair = objective_of(model, guide, torch.randn(4), 0.01)
    runs.clear()
    for step in range(10):
        objective.loss(model, guide, torch.randn(4), 0.1 * step + 0.02)
    assert len(pair._known) < 5
    assert len(runs) < 30


def test_another_number_of_data_is_rehearsed():
    model, guide = pair_of(nn.Linear(2, 3))
    objective, pair = objective_of(model, guide, torch.randn(5, 3))
    objective.loss(model, guide, torch.randn(2, 3))
    assert len(pair._known) == 2


def test_a_messenger_keeps_the_trace_of_the_user():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormalMessenger(model)
    x = torch.randn(4)
    guide(x)
    trace = guide.trace
    rehearse(model, guide, x)
    assert guide.trace is trace


# Refusals


def test_a_refusal_leaves_the_state_alone():
    """GlobalLatentError: random state, modes, hooks, settings and the store are as before."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(1, 1), nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(self.linear(x[:, None]))[:, 0]

    net = Net()

    def model(x):
        w = pyro.param("w", lambda: torch.randn(()))
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x) + t + w, 1.0), obs=x)

    def guide(x):
        pyro.sample("t", dist.Normal(pyro.param("v", lambda: torch.randn(())), 1.0))

    x = torch.randn(4)
    before, hooks = states(), len(torch.nn.modules.module._global_forward_pre_hooks)
    with pytest.raises(GlobalLatentError):
        rehearse(model, guide, x)
    assert same_states(before, states())
    assert all(m.training for m in net.modules())
    assert int(net.norm.num_batches_tracked) == 0
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == hooks
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("side", ["model", "guide"])
def test_an_error_of_the_program_leaves_the_state_alone(side):
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    inner_model, inner_guide = pair_of(net)

    def broken(x):
        (inner_model if side == "model" else inner_guide)(x)
        raise KeyError("mine")

    pair = (broken, inner_guide) if side == "model" else (inner_model, broken)
    x = torch.randn(4, 3)
    before = states()
    with pytest.raises(KeyError, match="mine"):
        rehearse(*pair, x)
    assert same_states(before, states())
    assert all(m.training for m in net.modules())
    assert int(net[1].num_batches_tracked) == 0
    assert torch.distributions.Distribution._validate_args


def test_hidden_randomness_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + torch.randn(()), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(HiddenRandomnessError):
        rehearse(model, guide, torch.randn(4))


def test_sites_that_do_not_fit_are_refused():
    model, _ = pair_of(nn.Linear(2, 3))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    with pytest.raises(SiteMismatchError):
        rehearse(model, guide, torch.randn(4, 3))


def test_a_rehearsal_that_failed_can_be_repeated():
    decoder = nn.Linear(2, 3)
    model, guide = pair_of(decoder)
    pair = LivePair(model, guide)
    with pytest.raises(RuntimeError):
        pair.call((torch.randn(4, 7),), {})
    assert pair.call((torch.randn(4, 3),), {}).batch_size == 4


# Handlers around a step


def test_handlers_around_a_step_do_not_see_the_rehearsal():
    model, guide = pair_of(nn.Linear(2, 3))
    x = torch.randn(4, 3)
    with pyro.poutine.trace() as tracer:
        rehearse(model, guide, x)
    assert not [n for n in tracer.trace.nodes if not n.startswith("_")]
    with pyro.poutine.trace(param_only=True) as tracer:
        pv.ImportanceWeightedELBO(num_particles=2).loss_and_grads(model, guide, x)
    assert len(tracer.trace.nodes) == 4


def test_validation_stays_on_in_a_call():
    """Only the rehearsal is without argument checks."""
    model, guide = pair_of(nn.Linear(2, 3))
    x = torch.randn(4, 3)
    objective, _ = objective_of(model, guide, x)

    def wrong(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], -torch.ones(2)).to_event(1))

    with pytest.raises(ProgramError, match="the guide fails.*scale"):
        objective.loss(model, wrong, x)


def test_parameters_that_share_their_memory_are_as_before():
    """Two modules over one tensor: the rehearsal moves it twice, and must put the first of its values back."""
    bias = torch.randn(3)
    encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)
    decoder.bias = nn.Parameter(bias)
    other = nn.Linear(2, 3)
    other.bias = nn.Parameter(bias)
    pyro.module("other", other)
    before = bias.clone()
    objective_of(*pair_of(decoder, encoder), torch.randn(5, 3))
    assert torch.equal(bias, before)
