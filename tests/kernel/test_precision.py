"""Particles weighed again in float64: how far they move, against programs that are float64 from the start."""

import copy
import math
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_vae as pv
from pyro_vae.float64 import InFloat64
from pyro_vae.kernel import Pair, movement
from pyro_vae.kernel.checks.agreement import values_of
from pyro_vae.kernel.checks.precision import best_and_typical, picked_values
from pyro_vae.kernel.programs import score

B, K = 5, 7
SIZE = 1e5  # of a negative binomial: lgamma of such numbers is off by about 0.05 in float32


def weigh_by_guide(call, num_particles=K):
    call.set_noise(1, 0)
    drawn = call.draw(num_particles)
    return call.weigh(drawn, call.score(call.latent_values(drawn), num_particles), num_particles)


def moved(model, guide, x, kwargs=None, **options):
    """(Movement, the weights of float32, the call) for K draws of the guide."""
    with torch.no_grad(), Pair(model, guide, **options).open((x,), kwargs or {}, 0) as call:
        weights = weigh_by_guide(call)
        before = call.cost
        found = movement(call)
        assert call.cost - before == (0 if found.shift is not None and len(found.shift) == 1 else 2)
        return found, weights, call


@contextmanager
def float64_literals():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def double(program):
    owner = copy.deepcopy(getattr(program, "__self__", program))
    return getattr(owner.double(), program.__name__) if hasattr(program, "__self__") else owner.double()


def in_double(model, guide, x, weights, **options):
    """The same particles, (P, B), weighed by copies of the programs in float64."""
    particles = best_and_typical(weights, own=True)
    with torch.no_grad(), float64_literals(), Pair(model, guide, **options).open((x.double(),), {}, 0) as call:
        records = []
        for program, record in ((call.guide, weights.guide), (call.model, weights.model)):
            values = picked_values(weights, record, particles)
            assert set(values) == set(values_of(record, weights.structure)) - set(call.layout.enumerated)
            values = {n: v.double() if v.is_floating_point() else v for n, v in values.items()}
            program.execution = "loop"
            records.append(score(program, values, len(particles)))
        return call.weigh(*records, len(particles)).log_weight, particles


def assert_moves_as_float64(model, guide, x, model64=None, guide64=None, execution=None, largest=None, **options):
    found, weights, call = moved(model, guide, x, **options)
    assert found.shift is not None, found.why
    if execution is not None:
        assert call.model.execution == execution
    after, particles = in_double(model64 or double(model), guide64 or double(guide), x, weights, **options)
    expected = after - weights.log_weight.take_along_dim(particles, 0).double()
    assert found.shift.dtype == torch.float64
    assert found.shift.shape == (2, call.batch_size)
    assert torch.allclose(found.shift, expected, rtol=0, atol=1e-9), found.shift - expected
    assert float(found.shift.abs().max()) > 0
    if largest is not None:
        assert float(found.shift.abs().max()) > largest
    return found


# --- the three executions, and everything a program may be made of ---


class Counts(nn.Module):
    """Counts whose likelihood rounds badly in float32; `variant` says what else the programs do."""

    def __init__(self, variant=""):
        super().__init__()
        self.variant = variant
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))
        self.log_size = nn.Parameter(torch.full((), math.log(SIZE)))
        self.register_buffer("shift", torch.linspace(-1, 1, 6))
        self.eval()

    def network(self, z):
        raw = self.decoder(z) + self.shift
        if self.variant == "softmax":
            return raw.softmax(1).log() + 3  # right in a plain run alone
        if self.variant == "reads a value":
            return raw if bool(z.isfinite().all()) else 0 * raw
        if self.variant == "casts":
            return (raw.float() * torch.ones(6, dtype=torch.float32)).to(torch.float32).type_as(self.shift)
        return raw

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            raw = self.network(z)
            pyro.factor("penalty", 0.3 * (raw.square().sum(-1) + 1).log())
            size = self.log_size.exp()
            pyro.sample("x", dist.NegativeBinomial(size, logits=raw - size.log()).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x / 5).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def counts(*shape):
    return torch.poisson(torch.full(shape, 4.0))


@pytest.mark.parametrize(
    "variant, execution",
    [("", "leading"), ("softmax", "vmap"), ("reads a value", "loop"), ("casts", "leading")],
)
def test_the_three_executions(variant, execution):
    net = Counts(variant)
    plain = copy.deepcopy(net).double()
    plain.variant = "" if variant == "casts" else variant
    x = counts(B, 6)
    assert_moves_as_float64(net.model, net.guide, x, plain.model, plain.guide, execution=execution, largest=0.01)


def test_integer_counts_and_one_datum():
    net = Counts()
    x = counts(1, 6)
    found, _, _ = moved(net.model, net.guide, x)
    assert found.shift.shape == (2, 1) and float(found.shift.abs().max()) > 0.01

    def model(x):
        return net.model(x.long())

    again, _, _ = moved(model, net.guide, x)
    assert torch.equal(found.shift, again.shift)


def test_one_particle():
    net = Counts()
    with torch.no_grad(), Pair(net.model, net.guide).open((counts(B, 6),), {}, 0) as call:
        weigh_by_guide(call, 1)
        assert movement(call).shift.shape == (1, B)


def test_the_whole_call_as_one_datum():
    net = Counts()
    assert_moves_as_float64(net.model, net.guide, counts(B, 6), largest=0.01, datum_plate=None)


def test_modules_in_closures_and_captured_tensors():
    """Nothing can be found from the programs themselves, and `matmul` of two dtypes raises where nothing is cast."""
    net, weight = Counts(), torch.randn(2, 6)
    net64, weight64 = copy.deepcopy(net).double(), weight.double()

    def pair(net, weight):
        def model(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(weight.new_zeros(2), 1.0).to_event(1))
                logits = z @ weight - math.log(SIZE)
                pyro.sample("x", dist.NegativeBinomial(weight.new_tensor(SIZE), logits=logits).to_event(1), obs=x)

        return model, lambda x: net.guide(x)

    before = {n: (id(p), p.dtype, p._version) for n, p in net.named_parameters()}
    assert_moves_as_float64(*pair(net, weight), counts(B, 6), *pair(net64, weight64), largest=0.01)
    assert before == {n: (id(p), p.dtype, p._version) for n, p in net.named_parameters()}
    assert len(pyro.get_param_store()) == 0


def test_parameters_of_the_store_with_constraints():
    x = counts(B, 6)
    pyro.param("loc", torch.randn(B))
    pyro.param("scale", torch.rand(B) + 0.1, constraint=dist.constraints.positive)
    store = pyro.get_param_store()
    before = {name: (id(value), value.dtype, value._version) for name, value in store._params.items()}

    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Poisson(1e4 * (0.01 * z).exp().unsqueeze(-1).expand(z.shape + (6,))).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(pyro.param("loc"), pyro.param("scale")))

    def guide64(x):
        with pyro.plate("data", B):
            loc, unconstrained = (before_values[n].double() for n in ("loc", "scale"))
            pyro.sample("z", dist.Normal(loc, unconstrained.exp()))

    before_values = {name: value.detach().clone() for name, value in store._params.items()}
    assert_moves_as_float64(model, guide, x, model, guide64)
    assert before == {name: (id(value), value.dtype, value._version) for name, value in store._params.items()}


class Parametrised(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.randn(B))
        self.scale = PyroParam(torch.rand(B) + 0.1, constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(self.loc, self.scale))


def poisson_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(1e4 * (0.01 * z).exp().unsqueeze(-1).expand(z.shape + (6,))).to_event(1), obs=x)


def test_a_pyro_module():
    assert_moves_as_float64(poisson_model, Parametrised(), counts(B, 6), poisson_model)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_autoguides(kind):
    """The second draws one vector for all data, so that its particles cannot be picked datum by datum."""
    x = 1e4 + counts(B, 6)
    guide = kind(poisson_model)
    guide(x)
    pyro.clear_param_store()  # or the second would take the parameters of the first
    guide64 = kind(poisson_model)
    with float64_literals():
        guide64(x.double())
    guide64.load_state_dict(guide.state_dict())
    pyro.clear_param_store()
    assert_moves_as_float64(poisson_model, guide, x, poisson_model, guide64)


def test_recurrent_networks():
    lstm, out = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def pair(lstm, out):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                h = lstm(z.reshape(-1, 4, 1))[0]
                rate = 1e4 * (0.01 * out(h).squeeze(-1)).exp()
                pyro.sample("x", dist.Poisson(rate.reshape(z.shape)).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

        return model, guide

    doubled = pair(copy.deepcopy(lstm).double(), copy.deepcopy(out).double())
    assert_moves_as_float64(*pair(lstm, out), 1e4 + counts(B, 4), *doubled)


# --- enumeration, masks, draws of the model ---


def switched(x, kept=None):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.3, 0.7])))
        with poutine.mask(mask=torch.ones(len(x), dtype=torch.bool) if kept is None else kept):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        rate = 1e4 * (0.01 * (z if kept is None else z * kept) + 0.001 * k).exp()
        pyro.sample("x", dist.Poisson(rate), obs=x)


def of_z(x, kept=None):
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.ones(len(x), dtype=torch.bool) if kept is None else kept):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 0.9))


def of_k_and_z(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.4, 0.6])))
        pyro.sample("z", dist.Normal(0.1 * k, 0.9))


@pytest.mark.parametrize("model, guide", [(config_enumerate(switched), of_z), (switched, config_enumerate(of_k_and_z))])
def test_enumerated_sites(model, guide):
    x = 1e4 + 100 * torch.randn(B).round()
    assert_moves_as_float64(model, guide, x, model, guide)


def test_masked_latents():
    kept = torch.tensor([True, False, True, True, False])
    model, guide = (lambda x: config_enumerate(switched)(x, kept)), (lambda x: of_z(x, kept))
    assert_moves_as_float64(model, guide, 1e4 + 100 * torch.randn(B).round(), model, guide)


def test_sites_that_the_model_draws_itself():
    """The float64 run takes their drawn values too, or it would compare other particles."""
    x = 1e4 + 100 * torch.randn(B, 3).round()
    seen = torch.tensor([[True, True, False]]).expand(B, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            rate = 1e4 * (0.01 * (z + u)).exp().unsqueeze(-1)
            pyro.sample("x", dist.Poisson(rate.expand(rate.shape[:-1] + (3,))).mask(seen).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 0.9))

    found = assert_moves_as_float64(model, guide, x, model, guide, prior_sites=["u"])
    assert float(found.shift.abs().max()) < 0.5


def test_particles_of_a_proposal_leave_the_guide_out():
    """Values that are no draws of the guide: log p(x, z) counts alone, of the highest and the median of each datum."""
    x = 1e4 + counts(B, 6)
    with torch.no_grad(), Pair(poisson_model, of_z).open((x,), {}, 0) as call:
        guide = call.draw(1)
        z = torch.linspace(-1, 1, 9).reshape(9, 1) + 0.1 * torch.randn(9, B)
        weights = call.weigh(guide, call.score({"z": z}, 9), 9)
        found = movement(call)

    def log_joint(z, x):
        rate = 1e4 * (0.01 * z).exp().unsqueeze(-1)
        return dist.Normal(torch.zeros_like(z), 1.0).log_prob(z) + dist.Poisson(rate).log_prob(x).sum(-1)

    order = log_joint(z, x).argsort(0, descending=True)[[0, 4]]
    expected = (log_joint(z.double(), x.double()) - weights.log_joint.double()).gather(0, order)
    assert torch.allclose(found.shift.sort(0).values, expected.sort(0).values, rtol=0, atol=1e-9)


def test_draws_of_the_prior_are_not_what_is_looked_at():
    with torch.no_grad(), Pair(poisson_model, of_z).open((1e4 + counts(B, 6),), {}, 0) as call:
        weights = weigh_by_guide(call)
        values, model = call.draw_prior(3)
        call.weigh(call.draw(1), model, 3)
        assert call.weighed is weights


# --- what is not known, and what needs no check ---


def test_float64_needs_no_check():
    x = 1e4 + counts(B, 6).double()
    found, _, _ = moved(poisson_model, of_z, x)
    assert torch.equal(found.shift, torch.zeros(1, B, dtype=torch.float64))


def test_a_float32_network_between_float64_data_and_densities_is_looked_at():
    """One site of float64 does not make the whole float64."""
    x = 1e4 + counts(B, 6).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            rate = 1e4 * (0.01 * z.double()).exp().unsqueeze(-1)
            pyro.sample("x", dist.Poisson(rate.expand(rate.shape[:-1] + (6,))).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 0.9))

    found, _, _ = moved(model, guide, x)
    assert found.shift.shape == (2, B) and float(found.shift.abs().max()) > 0


def via_numpy(z):
    return torch.from_numpy(z.numpy().astype("float32"))


def via_type(z):
    return z.type(torch.FloatTensor)


@pytest.mark.parametrize("through, name", [(via_numpy, "numpy"), (via_type, "type")])
def test_a_program_that_comes_back_to_float32_is_not_taken_for_checked(through, name):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(through(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 0.9))

    found, _, _ = moved(model, guide, torch.randn(B))
    assert found.shift is None and f"lower precision (in {name})" in found.why


def test_half_precision_inside_is_seen():
    """A network in bfloat16: float64 tells how far its densities are off."""
    net = nn.Linear(1, 6).bfloat16()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z.bfloat16()).float(), 0.1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 0.9).to_event(1))

    found, _, _ = moved(model, guide, torch.randn(B, 6))
    assert float(found.shift.abs().median()) > 0.05


def test_a_program_that_fails_in_float64_says_so_and_leaves_nothing_behind():
    calls = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            calls.append((z + 0).dtype)
            if calls[-1] == torch.float64:
                raise TypeError("float32 alone")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 0.9))

    found, _, _ = moved(model, guide, torch.randn(B))
    assert found.shift is None and "cannot be run in float64 (TypeError: float32 alone)" in found.why
    assert torch.get_default_dtype() == torch.float32


# --- no side effects ---


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_users_changes(fails):
    """Modules, captured tensors and distributions with cached properties, the random state, the default dtype."""
    net, captured = Counts(), dist.Bernoulli(probs=torch.rand(6))  # which computes its logits once

    def model(x):
        net.model(x)
        with pyro.plate("data", len(x)):
            pyro.sample("bits", captured.to_event(1), obs=torch.ones(len(x), 6))
        captured.entropy()
        if fails and torch.get_default_dtype() == torch.float64:
            raise RuntimeError

    x = counts(B, 6)
    tensors = [*net.parameters(), *net.buffers(), captured.probs, x]
    before = [(id(t), t.dtype, t._version, t.detach().clone(), t.requires_grad) for t in tensors]
    modes = [m.training for m in net.modules()]
    with torch.no_grad(), Pair(model, net.guide).open((x,), {}, 0) as call:
        weigh_by_guide(call)
        cached, state = {n: id(v) for n, v in vars(captured).items()}, torch.get_rng_state()
        assert "logits" in cached
        assert (movement(call).shift is None) is fails
        assert torch.equal(state, torch.get_rng_state())
        assert {n: id(v) for n, v in vars(captured).items()} == cached
    after = [(id(t), t.dtype, t._version, t.detach().clone(), t.requires_grad) for t in tensors]
    for a, b in zip(before, after, strict=True):
        assert a[:3] == b[:3] and torch.equal(a[3], b[3]) and a[4] == b[4]
    assert modes == [m.training for m in net.modules()]
    assert torch.get_default_dtype() == torch.float32


def test_a_tensor_that_is_changed_in_place_is_a_copy_of_the_users():
    counter, z = torch.zeros(3), torch.randn(3)
    with torch.no_grad(), InFloat64() as mode:
        counter.add_(1)
        counter[0] = 5
        total = counter + z
    assert torch.equal(counter, torch.zeros(3))
    assert torch.equal(total, torch.tensor([5.0, 1.0, 1.0]).double() + z.double())
    assert not mode.lowered


def test_gradients_inside_a_program_run_in_float64():
    z = torch.randn(3)
    with torch.enable_grad(), InFloat64():
        z.requires_grad_()
        (gradient,) = torch.autograd.grad((z**3).sum(), z)
    assert gradient.dtype == torch.float64 and not z.requires_grad
    assert torch.allclose(gradient, 3 * z.double() ** 2, rtol=1e-15)


class Remembers(nn.Module):
    """Assigns to itself in a forward: a buffer, a cache; and a parametrised layer does so by itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1))
        self.register_buffer("moving", torch.ones(1))
        self.cache = torch.zeros(1)

    def forward(self, z):
        self.moving = self.moving * 1.0
        self.cache = self.cache * 1.0
        return self.layer(z) + self.moving + self.cache


@pytest.mark.parametrize("train", [False, True])
def test_what_modules_assign_to_themselves_is_put_back(train):
    net = Remembers().train(train)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 0.9).to_event(1))

    net.eval()(torch.ones(1, 1))
    net.train(train)
    try:
        moved(model, guide, torch.randn(B, 1))
    except pv.errors.ArgumentError:  # power iteration in train mode moves its buffers, which is refused
        assert train
    tensors = [*net.state_dict().values(), net.cache, net.moving]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert net(torch.ones(1, 1)).dtype == torch.float32
