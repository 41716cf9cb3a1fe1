"""`BetaTraceMeanField_ELBO` of guides that draw in another order than the model: value, gradient and terms, exactly."""

import copy
import itertools
import pickle
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from chain_helpers import PRIOR, Chain
from objective_helpers import NORMAL, script, signs
from pair_helpers import F64
from pyro.infer import SVI, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.objectives.traces import kl_formulas

X = torch.linspace(-2.0, 2.0, 4, dtype=F64)
K = 4  # particles whose noise for three latents is uncorrelated and of mean square one: expectations are exact
ORDERS = list(itertools.permutations(PRIOR))
every_chain = pytest.mark.parametrize("chain", [Chain(order, reads) for order in ORDERS for reads in (True, False)])


def exact(chain, objective, vectorize=True):
    """Loss and gradient over noise that makes them expectations. The first call finds out what has a formula."""
    objective.loss(chain.model, chain.guide, X)
    with script(signs(3, (len(X),)), vectorize, NORMAL):
        loss = objective.differentiable_loss(chain.model, chain.guide, X)
    return loss, torch.autograd.grad(loss, chain.parameters, materialize_grads=True)


def assert_same(found, truth, chain):
    loss, gradient = found
    assert torch.allclose(loss, truth, atol=1e-10)
    wanted = torch.autograd.grad(truth, chain.parameters, materialize_grads=True)
    for ours, theirs in zip(gradient, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("vectorize", (True, False))
@every_chain
def test_loss_gradient_and_terms(chain, vectorize):
    objective = pv.BetaTraceMeanField_ELBO(num_particles=K, vectorize_particles=vectorize, max_plate_nesting=1)
    assert_same(exact(chain, objective, vectorize), chain.loss(X), chain)
    parts, fit = chain.kl(X)
    assert torch.allclose(objective.terms.elbo, -chain.loss(X), atol=1e-10)
    assert torch.allclose(objective.terms.reconstruction, fit.sum(), atol=1e-10)
    for name, part in parts.items():
        assert torch.allclose(objective.terms.kl[name], part.sum(), atol=1e-10), name


@every_chain
def test_betas_by_site(chain):
    betas = {"z1": 0.5, "z2": 2.0, "z3": 3.0}
    objective = pv.BetaTraceMeanField_ELBO(betas, num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    parts, fit = chain.kl(X)
    truth = sum(betas[name] * part.sum() for name, part in parts.items()) - fit.sum()
    assert_same(exact(chain, objective), truth, chain)


@pytest.mark.parametrize("per", ("dimension", "site"))
@every_chain
def test_free_bits(chain, per):
    """Floors on either side of each part, a part below zero included: max(floor, part)."""
    for factor in (0.7, 1.3):
        parts, fit = chain.kl(X)
        means = {name: part.mean().item() for name, part in parts.items()}
        floors = {name: factor * abs(mean) for name, mean in means.items()}
        objective = pv.BetaTraceMeanField_ELBO(
            free_bits=floors, free_bits_per=per, num_particles=K, vectorize_particles=True, max_plate_nesting=1
        )
        costs = [part.sum() if means[n] > floors[n] else len(X) * floors[n] for n, part in parts.items()]
        assert_same(exact(chain, objective), sum(costs) - fit.sum(), chain)


@every_chain
def test_capacity(chain):
    objective = pv.BetaTraceMeanField_ELBO(
        capacity=0.3, capacity_weight=2.0, num_particles=K, vectorize_particles=True, max_plate_nesting=1
    )
    parts, fit = chain.kl(X)
    truth = 2.0 * (sum(part.sum() for part in parts.values()) - 0.3 * len(X)).abs() - fit.sum()
    assert_same(exact(chain, objective), truth, chain)


def test_the_class_of_pyro_is_off_by_nats():
    """What the tests above would not notice if the formulas were used all the same."""
    chain = Chain(("z3", "z2", "z1"))
    with pytest.warns(UserWarning, match="mean field restriction"):
        theirs = TraceMeanField_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1).loss(
            chain.model, chain.guide, X
        )
    assert abs(theirs - chain.loss(X).item()) > 1.0


def test_draws_by_chance():
    """Without scripted noise, a single particle. False alarm: 5 numbers at 4.5 errors."""
    chain = Chain(("z3", "z2", "z1"))
    objective = pv.BetaTraceMeanField_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    runs = []
    for _ in range(20):
        loss = objective.differentiable_loss(chain.model, chain.guide, X)
        gradient = torch.autograd.grad(loss, chain.parameters)
        runs.append(torch.cat([loss.detach()[None], *(g.reshape(-1) for g in gradient)]))
    truth = chain.loss(X)
    wanted = torch.cat([truth[None], *(g.reshape(-1) for g in torch.autograd.grad(truth, chain.parameters))])
    found = torch.stack(runs)
    errors = found.std(0) / len(runs) ** 0.5
    assert float(errors.max()) < 0.2
    assert bool(((found.mean(0) - wanted).abs() <= 6 * errors).all())  # Student's t with 19 degrees: as 4.5 of a normal


def test_nothing_is_run_where_the_order_is_the_same():
    with mock.patch.object(kl_formulas, "depends_on_own_draw", side_effect=AssertionError):
        chain = Chain()
        pv.BetaTraceMeanField_ELBO().loss(chain.model, chain.guide, X)
        vae = pv.mlp_vae(4, 2, likelihood=pv.nn.Bernoulli(), hidden=(8,))
        pv.BetaTraceMeanField_ELBO().loss(vae.model, vae.guide, torch.rand(3, 4).round())


def test_programs_are_followed_once():
    """Again for arguments of another shape, and for another pair."""
    chain, other = Chain(("z3", "z2", "z1")), Chain(("z3", "z2", "z1"), reads=False)
    objective = pv.BetaTraceMeanField_ELBO()
    with mock.patch.object(kl_formulas, "depends_on_own_draw", wraps=kl_formulas.depends_on_own_draw) as follow:
        for _ in range(3):
            objective.loss(chain.model, chain.guide, X)
        assert follow.call_count == 1
        objective.loss(chain.model, chain.guide, X[:3])
        assert follow.call_count == 2
        objective.loss(other.model, other.guide, X[:3])
        assert follow.call_count == 3


def test_the_first_loss_is_the_second():
    """Following a program uses up no noise, and leaves norms, modes and parameters as they were."""
    chain = Chain(("z3", "z2", "z1"))
    norm = torch.nn.BatchNorm1d(1, dtype=F64)

    def guide(x):
        chain.guide(norm(x[:, None])[:, 0])

    objective = pv.BetaTraceMeanField_ELBO()
    losses = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        losses.append(objective.loss(chain.model, guide, X))
    assert losses[0] == losses[1]
    assert int(norm.num_batches_tracked) == 2 and norm.training


def test_copies_hold_no_programs():
    chain = Chain(("z3", "z2", "z1"))
    objective = pv.BetaTraceMeanField_ELBO()
    objective.loss(chain.model, chain.guide, X)
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        pyro.set_rng_seed(0)
        loss = other.loss(chain.model, chain.guide, X)
        pyro.set_rng_seed(0)
        assert loss == objective.loss(chain.model, chain.guide, X)


def test_a_two_layer_vae_trained_from_the_bottom_up():
    """SVI finds the exact posterior of data that say nothing, where the loss is -log p(x). Formulas led elsewhere."""

    def model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Normal(torch.zeros_like(x), 1.0))
            h1 = pyro.sample("h1", dist.Normal(h2, 1.0))
            pyro.sample("x", dist.Normal(0.0 * h1, 1.0), obs=x)

    def guide(x):
        s1, s2 = (pyro.param(n, torch.tensor(1.0, dtype=F64), constraint=dist.constraints.positive) for n in ("s1", "s2"))
        w = pyro.param("w", torch.tensor(0.0, dtype=F64))
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Normal(torch.zeros_like(x), s1))
            pyro.sample("h2", dist.Normal(w * h1, s2))

    objective = pv.BetaTraceMeanField_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), objective)
    for _ in range(300):
        svi.step(X)
    truth = -dist.Normal(0.0, 1.0).log_prob(X).sum()
    with torch.no_grad():
        pyro.set_rng_seed(1)
        found = torch.tensor([objective.loss(model, guide, X) for _ in range(50)], dtype=F64)
    assert abs(pyro.param("s1").item() - 2**0.5) < 0.1 and abs(pyro.param("w").item() - 0.5) < 0.05
    assert abs(found.mean() - truth) < 0.1


@pytest.mark.parametrize(
    "options",
    [{}, {"free_bits": 0.0}, {"free_bits": 0.2, "free_bits_per": "dimension"}, {"free_bits": 0.2, "free_bits_per": "site"}],
)
@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_prior_with_an_axis_of_size_one_more(options, event_dim):
    """As where it reads one element of a plate inside the datum. The KL is above the floor, so that it does not count."""
    shape = (3,) + (2,) * event_dim
    x = torch.tensor([0.5, -0.3, 1.0], dtype=F64)

    def model(x):
        with pyro.plate("data", 3, dim=-1):
            prior = dist.Normal(torch.zeros(1, *shape, dtype=F64), 1.0).to_event(event_dim)
            pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F64), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Normal(torch.full(shape, 2.0, dtype=F64), 0.5).to_event(event_dim))

    each = 0.5 * (0.25 + 4 - 1) - torch.tensor(0.5).log()
    truth = 3 * 2**event_dim * each - dist.Normal(0.0, 1.0).log_prob(x).sum()
    found = pv.BetaTraceMeanField_ELBO(max_plate_nesting=2, **options).loss(model, guide, x)
    assert found == pytest.approx(float(truth))
