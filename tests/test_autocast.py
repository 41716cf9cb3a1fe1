"""`torch.autocast` around a call reaches the networks alone: all densities are those of float32 parameters.

The reference casts what its networks give to float32 by hand. Both then have the same numbers, gradients and draws.
"""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from pyro.distributions.distribution import COERCIONS
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.autocast import full
from pyro_vae.nn import Bernoulli, Categorical, DiscretizedLogistic, MultivariateNormal, Normal

WIDTH, DIM, NUM_DATA = 60, 3, 7
OBJECTIVES = {
    "trace": pv.BetaTrace_ELBO,
    "graph": pv.BetaTraceGraph_ELBO,
    "mean-field": pv.BetaTraceMeanField_ELBO,
    "enumerated": pv.BetaTraceEnum_ELBO,
    "importance-weighted": lambda **options: pv.ImportanceWeightedELBO(num_particles=3, **options),
    "inclusive": lambda **options: pv.InclusiveKL(num_particles=3, **options),
    "total correlation": lambda **options: pv.TotalCorrelationELBO(dataset_size=100, **options),
}
ESTIMATORS = {
    "importance": lambda *pair: pv.ImportanceSampling(*pair, num_particles=200, seed=0),
    "adaptive": lambda *pair: pv.AdaptiveImportanceSampling(*pair, num_particles=200, seed=0),
    "annealed": lambda *pair: pv.AnnealedImportanceSampling(*pair, num_chains=20, num_steps=10, seed=0),
    "gaps": lambda *pair: pv.InferenceGaps(*pair, num_particles=200, seed=0),
}


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Full(nn.Module):
    def forward(self, raw):
        return raw.float()


class Program(nn.Module):
    def __init__(self, function, **networks):
        super().__init__()
        self.function = function
        for name, network in networks.items():
            setattr(self, name, network)

    def forward(self, *args):
        self.function(self, *args)


def network(width_in, width_out, cast):
    return nn.Sequential(nn.Linear(width_in, 8), nn.Tanh(), nn.Linear(8, width_out), Full() if cast else nn.Identity())


def real_valued(cast):
    """Normals whose scale is a number, which would take the precision of their means."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 0.2).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x), 0.3).to_event(1))

    return Program(model, decode=network(DIM, WIDTH, cast)), Program(guide, encode=network(WIDTH, DIM, cast))


def with_matrices(cast):
    """A prior and a guide of full covariance, and a likelihood of low rank: draws and densities multiply matrices."""
    factor = torch.linspace(0.1, 0.9, WIDTH).unsqueeze(-1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.MultivariateNormal(torch.zeros(DIM), 0.3 + torch.eye(DIM))
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.LowRankMultivariateNormal(self.decode(z), factor, torch.full((WIDTH,), 0.1)), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.encode(x), scale_tril=(0.3 * torch.eye(DIM) + 0.05).tril()))

    return Program(model, decode=network(DIM, WIDTH, cast)), Program(guide, encode=network(WIDTH, DIM, cast))


def with_classes(cast):
    """Classes, whose logits are normalised when the distribution is made."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1))
            logits = self.decode(z).reshape(*z.shape[:-1], WIDTH // 5, 5)
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x[:, : WIDTH // 5].abs().long().clamp(max=4))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x), 0.3).to_event(1))

    return Program(model, decode=network(DIM, WIDTH, cast)), Program(guide, encode=network(WIDTH, DIM, cast))


def with_a_coin(cast):
    """A class that is summed out, by a product of matrices in Pyro's arithmetic."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("z", dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(torch.eye(3)[c]), 0.9).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.classify(x)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(self.encode(x), 0.3).to_event(1))

    networks = {"classify": network(WIDTH, 3, cast), "encode": network(WIDTH, DIM, cast)}
    return Program(model, decode=network(3, WIDTH, cast)), Program(guide, **networks)


PAIRS = {"numbers": real_valued, "matrices": with_matrices, "classes": with_classes, "coin": with_a_coin}


def made(pair, cast):
    torch.manual_seed(0)
    return pair(cast)


def data():
    return 2 * torch.randn(NUM_DATA, WIDTH, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(objective, pair, x):
    module = objective(*pair)
    pyro.set_rng_seed(3)
    with bfloat16():
        loss = module(x)
    loss.backward()
    return loss.detach(), [param.grad for param in module.parameters()]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_those_of_densities_in_float32(objective, pair):
    if (objective, pair) == ("total correlation", "matrices"):
        pytest.skip("it takes guides of independent dimensions alone")
    if (pair == "coin") != (objective == "enumerated"):
        pytest.skip("one sums a class out, the other has none")
    found, wanted = (loss_and_gradients(OBJECTIVES[objective](), made(PAIRS[pair], cast), data()) for cast in (False, True))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one is not None and one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("objective", ["trace", "mean-field", "importance-weighted"])
def test_a_loss_differs_from_that_without_autocast_by_what_the_networks_lose(objective):
    """It is not that of float32 throughout: the networks do run in half precision. But it is near it."""
    rough = loss_and_gradients(OBJECTIVES[objective](), made(real_valued, False), data())[0]
    pyro.set_rng_seed(3)
    exact = OBJECTIVES[objective]()(*made(real_valued, False))(data()).detach()
    assert 1e-7 < abs(rough - exact) / exact < 2e-2


def test_a_first_step_has_the_gradient_of_later_ones():
    """The checks of a first call run without gradients: weights cast there must not be taken for those of the step."""
    pair, x = made(real_valued, False), data()
    objective = pv.ImportanceWeightedELBO(num_particles=3)
    first = loss_and_gradients(objective, pair, x)[1]
    first = [gradient.clone() for gradient in first]
    for program in pair:
        program.zero_grad()
    second = loss_and_gradients(objective, pair, x)[1]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("objective", ["trace", "mean-field", "importance-weighted"])
def test_a_traced_step_has_the_numbers_of_an_eager_one(objective):
    eager = loss_and_gradients(OBJECTIVES[objective](), made(real_valued, False), data())
    traced = OBJECTIVES[objective](compile={"backend": "eager"})
    pair = made(real_valued, False)
    loss_and_gradients(traced, pair, data())
    for program in pair:
        program.zero_grad()
    again = loss_and_gradients(traced, pair, data())
    torch.testing.assert_close(again[0], eager[0])
    for one, other in zip(again[1], eager[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pair", ["numbers", "matrices"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_are_those_of_densities_in_float32(name, pair):
    found = []
    for cast in (False, True):
        programs = made(PAIRS[pair], cast)
        with bfloat16(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a guide without training
            record = ESTIMATORS[name](*programs)(data()[:3])
        found.append(record.evidence.log_evidence if name == "gaps" else record.log_evidence)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


def test_what_networks_lose_under_autocast_is_measured_and_stated():
    """The second look in float64 is without autocast: where half precision moves log p(x), the datum is in doubt."""
    pair = made(real_valued, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a guide without training
        estimate = pv.ImportanceSampling(*pair, num_particles=100, seed=0)
        exact = estimate(data())
        with bfloat16():
            rough = estimate(data())
    assert not exact.doubts["precision"].any()
    assert rough.doubts["precision"][(rough.log_evidence - exact.log_evidence).abs() > 1].all()
    assert rough.doubts["precision"].sum() >= NUM_DATA // 2


CLOSED = {
    "normal": lambda loc: dist.Normal(loc, 0.3).to_event(1),
    "laplace": lambda loc: dist.Laplace(loc, 0.3).to_event(1),
    "Student t": lambda loc: dist.StudentT(3.0, loc, 0.3).to_event(1),
    "log-normal": lambda loc: dist.LogNormal(loc, 0.3).to_event(1),
    "affine flow": lambda loc: dist.TransformedDistribution(
        dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1), [T.AffineTransform(loc, loc, event_dim=1)]
    ),
    "classes": lambda loc: dist.OneHotCategorical(logits=loc),
    "Dirichlet": lambda loc: dist.Dirichlet(loc.abs()),
    "mixture": lambda loc: dist.MixtureSameFamily(dist.Categorical(logits=loc), dist.Normal(loc, 0.3)),
    "full covariance": lambda loc: dist.MultivariateNormal(loc, torch.eye(WIDTH)),
    "low rank": lambda loc: dist.LowRankMultivariateNormal(loc, loc.unsqueeze(-1), loc.abs()),
    "Student t vector": lambda loc: dist.MultivariateStudentT(3.0, loc, torch.eye(WIDTH)),
    "hidden Markov": lambda loc: dist.GaussianHMM(
        dist.MultivariateNormal(loc[:2], torch.eye(2)),
        torch.eye(2).expand(4, 2, 2),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        torch.eye(2),
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_draws_and_densities_of_a_site_are_in_float32(name):
    """Whatever distribution a program makes of what a network gives in half precision, drawn and scored by Pyro."""
    loc = torch.linspace(-1, 1, WIDTH).bfloat16()

    def program(loc):
        return pyro.sample("x", CLOSED[name](loc))

    pyro.set_rng_seed(4)
    value = program(loc.float())
    conditioned = pyro.condition(program, {"x": value})
    with bfloat16():
        found = pv.BetaTrace_ELBO().loss(conditioned, lambda p: None, loc)
    wanted = -float(CLOSED[name](loc.float()).log_prob(value).sum())
    assert found == pytest.approx(wanted, rel=1e-6)


class Conditional(nn.Module):
    """A guide by a flow whose network reads an embedding in half precision."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(WIDTH, 4)
        self.flow = T.conditional_affine_autoregressive(DIM, 4, hidden_dims=[8])

    def forward(self, x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)
            flow = self.flow.condition(self.embed(x))
            pyro.sample("z", dist.TransformedDistribution(base.expand([len(x)]), [flow]))


@pytest.mark.parametrize("objective", ["trace", "mean-field", "importance-weighted"])
def test_a_flow_that_runs_a_network_in_its_density_keeps_autocast(objective):
    model, _ = made(real_valued, False)
    torch.manual_seed(2)
    loss, gradients = loss_and_gradients(OBJECTIVES[objective](), (model, Conditional()), data())
    assert loss.isfinite() and all(gradient is not None for gradient in gradients)


HEADS = {
    "normal": (Normal(), 2),
    "given scale": (Normal(0.2), 1),
    "learned scale": (Normal("learned"), 1),
    "classes": (Categorical(3), 3),
    "levels": (DiscretizedLogistic(16), 2),
    "binary": (Bernoulli(), 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_give_densities_in_float32_to_any_objective(name):
    """To Pyro's own as well, which knows nothing of autocast."""
    head, width = HEADS[name]
    raw = torch.linspace(-2, 2, 5 * width)
    value = torch.ones(5)
    with bfloat16():
        found = head(raw.bfloat16()).log_prob(value)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head(raw.bfloat16().float()).log_prob(value), rtol=1e-6, atol=0)


def test_a_full_covariance_head_draws_in_float32():
    raw = torch.linspace(-1, 1, 20)
    with bfloat16():
        torch.manual_seed(0)
        fn = MultivariateNormal()(raw.bfloat16())
        value = fn.rsample()
    torch.manual_seed(0)
    wanted = MultivariateNormal()(raw.bfloat16().float()).rsample()
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)


def test_a_network_in_half_precision_without_autocast_gets_half_precision():
    assert Normal()(torch.zeros(4, dtype=torch.bfloat16)).base_dist.loc.dtype == torch.bfloat16


def test_svi_trains_under_autocast():
    pair, x = made(real_valued, False), data()

    def registered(program, x):
        pyro.module(program.function.__name__, program)(x)

    pyro.clear_param_store()
    svi = SVI(*(partial(registered, program) for program in pair), pyro.optim.Adam({"lr": 3e-2}), pv.BetaTrace_ELBO())
    with bfloat16():
        losses = [svi.step(x) for _ in range(100)]
    assert losses[-1] < losses[0] - 1000


@pytest.mark.parametrize(
    "call", [lambda *pair: pv.BetaTrace_ELBO().loss(*pair, data()), lambda *pair: pv.ImportanceSampling(*pair)(data())]
)
def test_nothing_is_left_behind(call):
    model, guide = made(real_valued, False)
    before = list(COERCIONS)

    def broken(x):
        raise RuntimeError("broken")

    with bfloat16(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a guide without training
        call(model, guide)
        with pytest.raises(pv.errors.ProgramError, match="broken"):
            call(broken, guide)
        assert before == COERCIONS and torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert dist.Normal(torch.zeros(2, dtype=torch.bfloat16), 1.0).loc.dtype == torch.bfloat16


def test_a_program_that_runs_under_autocast_alone_is_taken():
    """It casts a tensor itself, so that it fails where the checks run without autocast."""
    model, guide = made(real_valued, False)
    layer = nn.Linear(WIDTH, DIM)

    def encode(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x.bfloat16()), 0.3).to_event(1))

    pair = model, Program(encode, encode=layer)
    loss, gradients = loss_and_gradients(OBJECTIVES["importance-weighted"](), pair, data())
    assert loss.isfinite() and all(gradient is not None for gradient in gradients)
    with bfloat16(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a guide without training
        assert pv.ImportanceSampling(*pair, num_particles=10, seed=0)(data()).log_evidence.isfinite().all()


def test_pyro_alone_is_not_changed():
    """What this file is about: Pyro's own loss of the same program has densities in half precision."""
    found, wanted = [], []
    for cast, losses in ((False, found), (True, wanted)):
        pair = made(real_valued, cast)
        pyro.set_rng_seed(3)
        with bfloat16(), torch.no_grad():
            losses.append(Trace_ELBO().loss(*pair, data()))
    assert found[0] != pytest.approx(wanted[0], rel=1e-5)


def test_transforms_that_were_inverted_before():
    """A transform and its inverse hold each other: casting went round and round, for every guide that keeps transforms."""
    x = torch.tensor([0.5, -2.0])
    exp = T.ExpTransform()
    assert full(exp) is exp and full(exp.inv) is exp.inv and full(exp) is exp
    affine = T.AffineTransform(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(3.0, dtype=torch.bfloat16))
    composed = T.ComposeTransform([affine, exp])
    for transform, wanted in ((affine, 3 * x + 1), (composed, (3 * x + 1).exp())):
        assert transform.inv is not None  # and is kept
        made = full(transform)
        torch.testing.assert_close(made(x), wanted)
        for inverse in (made.inv, full(transform.inv)):
            assert inverse(wanted).dtype == torch.float32
            torch.testing.assert_close(inverse(wanted), x)
    assert full(affine).loc.dtype == torch.float32 and affine.loc.dtype == torch.bfloat16
