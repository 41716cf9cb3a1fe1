"""KL(p to q) against loops by hand on the same draws, quadrature, enumeration and closed forms.

Where gradients are random, every datum of a call is one replicate with parameters of its own: one call gives their mean and
its standard error. Such tests fail by chance with probability 7e-6 per number (4.5 standard errors), and bound the error.
"""

import copy
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_helpers import F64, Program, assert_close, numbers, tensor
from pair_helpers import SIGMAS, assert_near, exact_pair, linear_gaussian
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.optim import Adam
from torch import nn
from torch.nn.functional import logsigmoid

import pyro_vae as pv
from pyro_vae.errors import AuxiliarySiteError, EnumerationError, GlobalLatentError, OptionError, StructureError

NOISE = 0.7


def data(x):
    return pyro.plate("data", len(x))


def normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale).square() - torch.as_tensor(scale, dtype=F64).log() - 0.5 * math.log(2 * math.pi)


def line(plate=data):
    """z ~ N(0, 1), x ~ N(weight z + bias, NOISE^2); the model notes down the z it was last run at."""

    def model(p, x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            p.seen, p.size = z.detach(), len(x)
            pyro.sample("x", dist.Normal(p.weight * z + p.bias, NOISE), obs=x)

    return Program(model, weight=1.2, bias=0.4)


def affine(plate=data, gain=0.1, center=-0.3, log_scale=-0.5):
    def guide(p, x):
        with plate(x):
            pyro.sample("z", dist.Normal(p.gain * x + p.center, p.log_scale.exp()))

    return Program(guide, gain=gain, center=center, log_scale=log_scale)


def replicated(loc, log_scale, num_data):
    """A Gaussian guide with parameters of its own for every datum."""

    def guide(p, x):
        with data(x):
            pyro.sample("z", dist.Normal(p.loc, p.log_scale.exp()))

    return Program(guide, loc=torch.full((num_data,), loc), log_scale=torch.full((num_data,), log_scale))


def log_joint(model, x, z):
    return normal(z, 0.0, 1.0) + normal(x, model.weight * z + model.bias, NOISE)


def log_line(guide, x, z):
    return normal(z, guide.gain * x + guide.center, guide.log_scale.exp())


def posterior(x, weight=1.2, bias=0.4, noise=NOISE):
    precision = 1 + weight**2 / noise**2
    return weight * (x - bias) / noise**2 / precision, precision**-0.5


def by_hand(log_p, log_q, log_r, sleep=0.0):
    """Surrogate and loss of densities (K, B) at given draws, in loops over data and particles."""
    loss, surrogate = 0.0, 0.0
    p, q, r = (log_density.detach() for log_density in (log_p, log_q, log_r))
    for b in range(log_p.shape[1]):
        weights = [float((p[k, b] - r[k, b]).exp()) for k in range(len(log_p))]
        total = sum(weights)
        log_evidence = math.log(total / len(weights))
        kl = sum(w / total * float(p[k, b] - q[k, b]) for k, w in enumerate(weights)) - log_evidence
        loss += (1 - sleep) * kl - log_evidence
        for k, w in enumerate(weights):
            surrogate = surrogate - w / total * (log_p[k, b] + (1 - sleep) * log_q[k, b])
    return surrogate, loss


def gradients(*programs):
    return {f"{i}.{n}": w.grad for i, program in enumerate(programs) for n, w in program.named_parameters()}


def run(objective, model, guide, *args):
    """Value and gradients of one call, the programs rehearsed."""
    objective.loss(model, guide, *args)
    for program in (model, guide):
        program.zero_grad(set_to_none=True)
    value = objective.loss_and_grads(model, guide, *args)
    return value, {n: torch.zeros(()) if g is None else g.clone() for n, g in gradients(model, guide).items()}


def assert_by_hand(found, surrogate, loss, *programs):
    value, grads = found
    named = [(f"{i}.{n}", w) for i, program in enumerate(programs) for n, w in program.named_parameters()]
    wanted = torch.autograd.grad(surrogate, [w for _, w in named], allow_unused=True, materialize_grads=True)
    assert value == pytest.approx(float(loss), rel=1e-10, abs=1e-10)
    for (name, _), grad in zip(named, wanted, strict=True):
        torch.testing.assert_close(
            grads[name].expand_as(grad), grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# The gradient, on the same draws


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("num_data", [1, 4])
def test_equals_a_loop_by_hand(num_particles, num_data):
    x, model, guide = numbers(num_data), line(), affine()
    found = run(pv.InclusiveKL(num_particles=num_particles), model, guide, x)
    z = model.seen
    assert z.shape == (num_particles, num_data)
    log_q = log_line(guide, x, z)
    assert_by_hand(found, *by_hand(log_joint(model, x, z), log_q, log_q), model, guide)


@pytest.mark.parametrize("num_particles", [1, 6])
def test_with_a_proposal_equals_a_loop_by_hand(num_particles):
    x, model, guide, proposal = numbers(4), line(), affine(), affine(gain=0.3, center=0.5, log_scale=0.2)
    found = run(pv.InclusiveKL(num_particles=num_particles, proposal=proposal), model, guide, x)
    z = model.seen
    densities = log_joint(model, x, z), log_line(guide, x, z), log_line(proposal, x, z)
    assert_by_hand(found, *by_hand(*densities), model, guide)
    assert all(p.grad is None for p in proposal.parameters())


def test_a_guide_in_two_layers_learns_through_no_draw():
    """log q(z2 | z1) depends on z1; d log q does not run on through it into q(z1)."""

    def model(p, x):
        with data(x):
            one = pyro.sample("one", dist.Normal(p.start.expand(len(x)), 1.0))
            two = pyro.sample("two", dist.Normal(p.weight * one, 1.0))
            p.seen = one.detach(), two.detach()
            pyro.sample("x", dist.Normal(one + two, NOISE), obs=x)

    def guide(p, x):
        with data(x):
            one = pyro.sample("one", dist.Normal(p.gain * x, p.log_scale.exp()))
            pyro.sample("two", dist.Normal(p.slope * one * x, p.log_scale.exp()))

    x = numbers(3)
    model, guide = Program(model, start=0.3, weight=0.8), Program(guide, gain=0.4, slope=0.6, log_scale=-0.3)
    found = run(pv.InclusiveKL(num_particles=5), model, guide, x)
    one, two = model.seen
    log_p = normal(one, model.start, 1.0) + normal(two, model.weight * one, 1.0) + normal(x, one + two, NOISE)
    scale = guide.log_scale.exp()
    log_q = normal(one, guide.gain * x, scale) + normal(two, guide.slope * one * x, scale)
    assert_by_hand(found, *by_hand(log_p, log_q, log_q), model, guide)


def test_discrete_and_continuous_latents_together():
    def model(p, x):
        with data(x):
            c = pyro.sample("c", dist.Categorical(logits=p.logits.expand(len(x), 3)))
            z = pyro.sample("z", dist.Normal(p.centers[c], 1.0))
            p.seen = c, z.detach()
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(p, x):
        with data(x):
            c = pyro.sample("c", dist.Categorical(logits=x[:, None] * p.logits))
            pyro.sample("z", dist.Normal(p.centers[c] + x, p.log_scale.exp()))

    x = numbers(4)
    model = Program(model, logits=[0.0, 0.3, -0.2], centers=[-1.0, 0.0, 2.0])
    guide = Program(guide, logits=[0.2, -0.4, 0.1], centers=[-0.5, 0.2, 0.7], log_scale=-0.2)
    found = run(pv.InclusiveKL(num_particles=8), model, guide, x)
    c, z = model.seen
    prior = model.logits.log_softmax(-1)[c] + normal(z, model.centers[c], 1.0)
    class_logits = (x[:, None] * guide.logits).log_softmax(-1).expand(8, 4, 3)
    log_q = class_logits.gather(-1, c[..., None])[..., 0] + normal(z, guide.centers[c] + x, guide.log_scale.exp())
    assert_by_hand(found, *by_hand(prior + normal(x, z, NOISE), log_q, log_q), model, guide)


def test_what_is_masked_does_not_count():
    on_z, on_x = torch.tensor([True, False, True]), torch.tensor([True, False, False])

    def model(p, x):
        with data(x):
            with poutine.mask(mask=on_z):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0))
            p.seen = z.detach()
            with poutine.mask(mask=on_x):
                pyro.sample("x", dist.Normal(p.weight * z, NOISE), obs=x)

    def guide(p, x):
        with data(x), poutine.mask(mask=on_z):
            pyro.sample("z", dist.Normal(p.gain * x, p.log_scale.exp()))

    x, model, guide = numbers(3), Program(model, weight=1.2), Program(guide, gain=0.3, log_scale=-0.4)
    found = run(pv.InclusiveKL(num_particles=6), model, guide, x)
    z = model.seen
    log_p = on_z * normal(z, 0.0, 1.0) + on_x * normal(x, model.weight * z, NOISE)
    log_q = on_z * normal(z, guide.gain * x, guide.log_scale.exp())
    assert_by_hand(found, *by_hand(log_p, log_q, log_q), model, guide)


def mixture(x_of=lambda z, c: z + 3 * c):
    """c is summed out in the model, z is drawn."""

    def model(p, x):
        with data(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            p.seen, p.size = z.detach(), len(x)
            c = pyro.sample("c", dist.Bernoulli(logits=p.logit.expand(len(x))), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(x_of(z, c), NOISE), obs=x)

    return Program(model, logit=0.4)


def test_what_the_model_sums_out():
    x, model, guide = numbers(3), mixture(), affine()
    found = run(pv.InclusiveKL(num_particles=5), model, guide, x)
    z = model.seen
    parts = logsigmoid(-model.logit) + normal(x, z, NOISE), logsigmoid(model.logit) + normal(x, z + 3, NOISE)
    log_q = log_line(guide, x, z)
    log_p = normal(z, 0.0, 1.0) + torch.logaddexp(*parts)
    assert_by_hand(found, *by_hand(log_p, log_q, log_q), model, guide)


def test_what_the_guide_enumerates_is_refused():
    def model(x):
        with data(x):
            c = pyro.sample("c", dist.Bernoulli(tensor(0.4)))
            pyro.sample("x", dist.Normal(c, NOISE), obs=x)

    def guide(x):
        with data(x):
            pyro.sample("c", dist.Bernoulli(tensor(0.3)), infer={"enumerate": "parallel"})

    with pytest.raises(EnumerationError, match="enumerate it in the model only"):
        pv.InclusiveKL().loss_and_grads(model, guide, numbers(3))


def test_a_whole_call_as_one_datum():
    """A latent that all data share: refused as long as each datum is to have a weight of its own."""

    def model(p, x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        p.seen = z.detach()
        with data(x):
            pyro.sample("x", dist.Normal(p.weight * z, NOISE), obs=x)

    def guide(p, x):
        pyro.sample("z", dist.Normal(p.loc, p.log_scale.exp()))

    x, model, guide = numbers(3), Program(model, weight=0.9), Program(guide, loc=0.2, log_scale=-0.4)
    with pytest.raises(GlobalLatentError):
        pv.InclusiveKL().loss_and_grads(model, guide, x)
    found = run(pv.InclusiveKL(num_particles=6, datum_plate=None), model, guide, x)
    z = model.seen.reshape(6, 1)
    log_p = normal(z, 0.0, 1.0) + normal(x, model.weight * z, NOISE).sum(1, keepdim=True)
    log_q = normal(z, guide.loc, guide.log_scale.exp())
    assert_by_hand(found, *by_hand(log_p, log_q, log_q), model, guide)


def test_a_site_drawn_from_the_prior_trains_the_model():
    """`prior_sites`: its density is part of p(x, z), though it cancels in the weights. Many particles: near d log p(x)."""

    def model(p, x):
        with data(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            b = pyro.sample("b", dist.Bernoulli(logits=p.logit.expand(len(x))))
            pyro.sample("x", dist.Normal(z + 2 * b, NOISE), obs=x)

    def guide(x):
        with data(x):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    x, model = torch.full((4000,), 1.5, dtype=F64), Program(model, logit=0.3)
    pv.InclusiveKL(num_particles=100, prior_sites=["b"]).loss_and_grads(model, guide, x)
    scale = math.sqrt(1 + NOISE**2)
    parts = logsigmoid(model.logit) + normal(x, 2.0, scale), logsigmoid(-model.logit) + normal(x, 0.0, scale)
    (truth,) = torch.autograd.grad(-torch.logaddexp(*parts).mean(), model.logit)
    assert model.logit.grad is not None
    assert float(model.logit.grad) / len(x) == pytest.approx(float(truth), rel=0.1)


# Its mean


def replicate_mean(grad, num_data):
    return grad.mean().reshape(1), (grad.std() / math.sqrt(num_data)).reshape(1)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_without_bias_where_the_proposal_is_the_posterior(num_particles):
    """Equal weights: the mean is -E_p[d log q], closed here. 4.5 standard errors, of 2 numbers."""
    num_data, loc, log_scale = 20_000, 0.2, -0.4
    mean, stddev = posterior(tensor(0.9))

    def exact(x):
        with data(x):
            pyro.sample("z", dist.Normal(mean.expand(len(x)), stddev))

    guide, x = replicated(loc, log_scale, num_data), torch.full((num_data,), 0.9, dtype=F64)
    pv.InclusiveKL(num_particles=num_particles, proposal=exact).loss_and_grads(line(), guide, x)
    variance = math.exp(2 * log_scale)
    truth = -(mean - loc) / variance, 1 - (stddev**2 + (mean - loc) ** 2) / variance
    for grad, wanted in zip((guide.loc.grad, guide.log_scale.grad), truth, strict=True):
        assert_near(
            *(v.reshape(1) for v in (replicate_mean(grad, num_data)[0], wanted)), grad.std().reshape(1) / 141.4, 0.02
        )


def test_a_bias_of_one_over_the_particles():
    """With r = q: the mean is E_p[f] - E_r[w^2 (f - E_p f)] / K + O(1/K^2), f = -d log q, by quadrature.

    At K = 40 the bias is found with its size (4.5 standard errors and a tenth of it for the next order), at K = 4 it is
    several times larger.
    """
    num_data, loc, log_scale = 40_000, -0.1, -0.2
    x = torch.full((num_data,), 0.9, dtype=F64)
    grid = torch.linspace(-9, 9, 20_001, dtype=F64)
    q, p = normal(grid, loc, math.exp(log_scale)), normal(grid, *posterior(tensor(0.9)))
    step = grid[1] - grid[0]
    f = -(grid - loc) / math.exp(2 * log_scale)
    truth = (p.exp() * f).sum() * step
    slope = -((2 * p - q).exp() * (f - truth)).sum() * step
    found = {}
    for num_particles in (4, 40):
        guide = replicated(loc, log_scale, num_data)
        pv.InclusiveKL(num_particles=num_particles).loss_and_grads(line(), guide, x)
        (mean, error) = replicate_mean(guide.loc.grad, num_data)
        found[num_particles] = float(mean - truth), float(error)
    bias, error = found[40]
    assert error < abs(float(slope)) / 40 / 8, "blunt"
    assert abs(bias - float(slope) / 40) < SIGMAS * error + 0.1 * abs(float(slope)) / 40
    assert abs(found[4][0]) > 4 * abs(bias) and found[4][0] * bias > 0


def test_a_categorical_guide_against_enumeration():
    """Equal weights (the proposal is the posterior): the mean is softmax(logits) - p(c|x). 3 numbers."""
    num_data, logits, centers = 20_000, tensor([0.5, -0.2, 0.1]), tensor([-1.0, 0.3, 1.1])
    exact = normal(tensor(0.4), centers, NOISE).softmax(-1)

    def model(x):
        with data(x):
            c = pyro.sample("c", dist.Categorical(torch.ones(3, dtype=F64)))
            pyro.sample("x", dist.Normal(centers[c], NOISE), obs=x)

    def program(p, x):
        with data(x):
            pyro.sample("c", dist.Categorical(logits=p.logits))

    guide, proposal = Program(program, logits=logits.repeat(num_data, 1)), Program(program, logits=exact.log())
    x = torch.full((num_data,), 0.4, dtype=F64)
    loss = pv.InclusiveKL(num_particles=4, proposal=proposal).loss_and_grads(model, guide, x)
    grad = guide.logits.grad
    assert_near(grad.mean(0), logits.softmax(-1) - exact, grad.std(0) / num_data**0.5, 0.003)
    log_evidence = normal(tensor(0.4), centers, NOISE).logsumexp(-1) - math.log(3)
    kl = (exact * (exact.log() - logits.log_softmax(-1))).sum()
    assert loss / num_data == pytest.approx(float(kl - log_evidence), abs=0.02)


def test_the_model_learns_as_from_the_importance_weighted_bound():
    x, found = numbers(5), []
    for cls in (pv.InclusiveKL, pv.ImportanceWeightedELBO):
        model, guide, objective = line(), affine(), cls(num_particles=6)
        objective.loss(model, guide, x)
        pyro.set_rng_seed(3)
        value, grads = run(objective, model, guide, x)
        found.append(([g for n, g in grads.items() if n.startswith("0")], value))
    (ours, loss), (theirs, bound) = found
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    assert loss > bound, "the KL is not negative"


# The value


@pytest.mark.parametrize("num_particles", [1, 10])
@pytest.mark.parametrize("with_proposal", [False, True])
def test_is_minus_log_p_where_all_are_exact(num_particles, with_proposal):
    lm, x = linear_gaussian()
    model, guide = exact_pair(lm)
    objective = pv.InclusiveKL(num_particles=num_particles, proposal=guide if with_proposal else None)
    for value in (objective.loss(model, guide, x), objective.differentiable_loss(model, guide, x)):
        assert_close(tensor(value), -lm.log_evidence(x).sum())
    assert_close(objective.terms.elbo, lm.log_evidence(x).sum())
    assert objective.num_updates == 0


@pytest.mark.parametrize("batch", [2, 5, 20])
def test_grows_with_the_scale_of_a_subsampled_plate(batch):
    """N/B times the sum over the batch, with guide and proposal both exact; all three see the same data."""
    full_x, seen = numbers(20), []

    def plated(program):
        def subsampled(x):
            with pyro.plate("data", 20, subsample_size=batch) as index:
                seen.append(index)
                program(x[index])

        return subsampled

    def exact(x):
        pyro.sample("z", dist.Normal(*(tensor(v).expand(len(x)) for v in posterior(x))))

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(1.2 * z + 0.4, NOISE), obs=x)

    proposal = plated(exact)
    for objective in (pv.InclusiveKL(num_particles=3), pv.InclusiveKL(num_particles=3, proposal=proposal)):
        programs = plated(model), plated(exact)
        objective.loss(*programs, full_x)
        seen.clear()
        value = objective.loss(*programs, full_x)
        assert len(seen) >= 2 and all(torch.equal(index, seen[0]) for index in seen)
        log_p = normal(full_x[seen[0]], 0.4, math.sqrt(1.44 + NOISE**2))
        assert_close(tensor(value), -log_p.sum() * 20 / batch)
        assert_close(objective.terms.per_datum().elbo, log_p.mean())


def test_gradient_grows_with_the_scale_and_scale_handlers():
    x, grads = numbers(4), []
    for factor in (1.0, 3.0):
        model, guide = line(), affine()
        scaled = poutine.scale(model, factor), poutine.scale(guide, factor)
        objective = pv.InclusiveKL(num_particles=5, sleep=0.3)
        objective.loss(*scaled, x)
        pyro.set_rng_seed(3)
        grads.append((objective.loss_and_grads(*scaled, x), *gradients(model, guide).values()))
    for one, three in zip(*grads, strict=True):
        assert_close(three, 3 * one)


def test_a_datum_of_no_weight_at_all():
    """The proposal never reaches it: the loss is infinite, the gradient of the others is finite."""

    def model(x):
        with data(x):
            c = pyro.sample("c", dist.Categorical(logits=tensor([0.0, 0.0, -torch.inf]).expand(len(x), 3)))
            pyro.sample("x", dist.Normal(c.to(F64), NOISE), obs=x)

    def guide(p, x):
        with data(x):
            pyro.sample("c", dist.Categorical(logits=p.logits))

    guide = Program(guide, logits=[[0.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, 0.0]])
    loss = pv.InclusiveKL(num_particles=3).loss_and_grads(model, guide, numbers(2))
    assert loss == math.inf
    assert bool(guide.logits.grad[0].isfinite().all())


def test_a_loss_that_is_not_a_number_is_told():
    x, model, guide = numbers(3), line(), affine()
    objective = pv.InclusiveKL(num_particles=3)
    objective.loss(model, guide, x)
    model.weight.data.fill_(math.nan)
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="NaN"):
        assert math.isnan(objective.loss_and_grads(model, guide, x))


# The proposal


def test_the_prior_as_proposal():
    def prior(x):
        with data(x):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

    x, model, guide = numbers(3), line(), affine()
    found = run(pv.InclusiveKL(num_particles=20, proposal=prior), model, guide, x)
    z = model.seen
    densities = log_joint(model, x, z), log_line(guide, x, z), normal(z, 0.0, 1.0)
    assert_by_hand(found, *by_hand(*densities), model, guide)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("trained_before", [False, True])
def test_svi_does_not_train_the_proposal(decay, trained_before):
    """Not by weight decay either, nor by the momentum of an optimiser that has trained it before."""
    x, model, guide, proposal = numbers(3), line(), affine(), affine(gain=0.4)
    optim = Adam({"lr": 0.1, "weight_decay": decay})
    if trained_before:
        SVI(model, proposal, optim, pv.BetaTrace_ELBO()).step(x)
    before = [p.detach().clone() for p in (*proposal.parameters(), *guide.parameters(), *model.parameters())]
    svi = SVI(model, guide, optim, pv.InclusiveKL(num_particles=5, proposal=proposal))
    svi.step(x), svi.step(x)
    after = [p.detach() for p in (*proposal.parameters(), *guide.parameters(), *model.parameters())]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [False] * 3 + [True] * 5


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger])
def test_an_autoguide_as_proposal(auto):
    x, model, guide = numbers(3), line(), affine()
    proposal = auto(model) if auto is not AutoNormalMessenger else auto(model, amortized_plates=())
    found = run(pv.InclusiveKL(num_particles=4, proposal=proposal), model, guide, x)
    store = {n.split(".")[-2][:3] if n.endswith(".z") else n.split(".")[-1]: pyro.param(n) for n in pyro.get_param_store()}
    loc, scale = (store[k].detach() for k in (("loc", "sca") if "loc" in store and "sca" in store else ("loc", "scale")))
    z = model.seen
    densities = log_joint(model, x, z), log_line(guide, x, z), normal(z, loc, scale)
    assert_by_hand(found, *by_hand(*densities), model, guide)


# Autoguides and messengers


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
def test_an_autoguide_over_a_constrained_support(auto):
    """log q has the Jacobian of the transform; its gradient by hand: that of the Gaussian at the fixed draw."""

    def model(p, x):
        with data(x):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(len(x)), 1.0))
            p.seen = z.detach()
            pyro.sample("x", dist.Normal(p.weight * z, NOISE), obs=x)

    x, model = numbers(3), Program(model, weight=0.8)
    guide = auto(model)
    value, grads = run(pv.InclusiveKL(num_particles=5), model, guide, x)
    loc, scale = [p.detach().clone().requires_grad_() for p in list(guide.parameters())[:2]]
    positive = torch.nn.functional.softplus(scale)
    z = model.seen
    assert bool((z > 0).all())
    free = z.log()
    log_p = normal(free, 0.0, 1.0) - free + normal(x, model.weight * z, NOISE)
    log_q = normal(free, loc, positive) - free
    surrogate, loss = by_hand(log_p, log_q, log_q)
    assert value == pytest.approx(loss, abs=1e-9)
    wanted = torch.autograd.grad(surrogate, [model.weight, loc])
    assert_close(grads["0.weight"], wanted[0])
    assert_close(next(g for n, g in grads.items() if n.startswith("1") and "loc" in n), wanted[1])


@pytest.mark.parametrize("options", [{"proposal": affine()}, {"sleep": 0.5}, {"sleep": 1}])
def test_autoguides_have_no_density_elsewhere(options):
    model = line()
    with pytest.raises(AuxiliarySiteError, match="log q at latents that the guide did not draw"):
        pv.InclusiveKL(num_particles=3, **options).loss_and_grads(model, AutoNormal(model), numbers(3))


@pytest.mark.parametrize("options", [{}, {"proposal": affine()}])
def test_a_guide_that_is_a_messenger(options):
    x, model = numbers(3), line()
    guide = AutoNormalMessenger(model, amortized_plates=())
    value, _ = run_messenger(pv.InclusiveKL(num_particles=5, **options), model, guide, x)
    assert math.isfinite(value)
    assert all(pyro.param(n).unconstrained().grad is not None for n in ("locs.z", "scales.z"))


def run_messenger(objective, model, guide, x):
    objective.loss(model, guide, x)
    return objective.loss_and_grads(model, guide, x), model.seen


# Sleep


def noted(guide):
    """The guide, and the data that it was given, call by call."""
    seen = []

    def program(*args):
        seen.append(args)
        return guide(*args)

    return program, seen


@pytest.mark.parametrize("sleep", [0.3, 1, 1.0])
def test_asleep_by_hand(sleep):
    """The model learns as without sleep; the guide from both, on the data that it dreamt."""
    x, model, guide = numbers(4), line(), affine()
    watched, seen = noted(guide)
    objective = pv.InclusiveKL(num_particles=5, sleep=sleep)
    objective.loss(model, watched, x)
    before = []
    inner = model.function

    def keep(p, x):
        inner(p, x)
        before.append(p.seen)

    model.function = keep
    guide.zero_grad(), model.zero_grad()
    seen.clear()
    value = objective.loss_and_grads(model, watched, x)
    awake = next(z for z in before if z.shape == (5, 4))
    dreamt_z = next(z for z in before if z.numel() == 4).reshape(4)
    dreamt_x = seen[-1][0]
    assert dreamt_x is not x and dreamt_x.shape == x.shape and not dreamt_x.requires_grad
    log_q = log_line(guide, x, awake)
    surrogate, loss = by_hand(log_joint(model, x, awake), log_q, log_q, sleep=sleep)
    asleep = -log_line(guide, dreamt_x, dreamt_z).sum()
    found = value, {n: g.clone() for n, g in gradients(model, guide).items()}
    assert_by_hand(found, surrogate + sleep * asleep, loss + sleep * float(asleep.detach()), model, guide)


def test_asleep_in_expectation():
    """-E_p(x,z)[d log q(z|x)] of an affine guide, in closed form: 3 numbers, 4.5 standard errors."""
    num_data, gain, center, log_scale = 20_000, 0.3, -0.2, -0.3
    weight, bias = 1.2, 0.4

    def guide(p, x):
        with data(x):
            pyro.sample("z", dist.Normal(p.gain * x + p.center, p.log_scale.exp()))

    full = (torch.full((num_data,), v) for v in (gain, center, log_scale))
    guide = Program(guide, **dict(zip(("gain", "center", "log_scale"), full, strict=True)))
    pv.InclusiveKL(num_particles=1, sleep=1).loss_and_grads(line(), guide, torch.zeros(num_data, dtype=F64))
    variance = math.exp(2 * log_scale)
    mean_x, var_x = bias, weight**2 + NOISE**2
    mean = -gain * mean_x - center  # of z - gain x - center
    var = (1 - gain * weight) ** 2 + (gain * NOISE) ** 2
    cross = weight - gain * var_x + mean * mean_x  # E[(z - gain x - center) x]
    truth = tensor([-cross / variance, -mean / variance, 1 - (var + mean**2) / variance])
    grads = torch.stack([guide.gain.grad, guide.center.grad, guide.log_scale.grad])
    assert_near(grads.mean(1), truth, grads.std(1) / num_data**0.5, 0.05)


def test_asleep_the_guide_becomes_the_posterior():
    """Closed form of the posterior; 400 steps of Adam on 500 dreams each, falling rate: within 0.02 of it."""
    model, guide = line(), affine()
    objective = pv.InclusiveKL(num_particles=1, sleep=1)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.988)
    x = torch.zeros(500, dtype=F64)
    for _ in range(400):
        optimiser.zero_grad()
        objective.loss_and_grads(model, guide, x)
        optimiser.step(), schedule.step()
    mean, stddev = posterior(tensor([0.0, 1.0]))
    wanted = tensor([mean[1] - mean[0], mean[0], math.log(stddev)])
    found = torch.stack([guide.gain, guide.center, guide.log_scale]).detach()
    assert float((found - wanted).abs().max()) < 0.02


def test_what_the_model_is_conditioned_on_stays():
    """model(x, y): y is an input; the dreams are about the same y."""

    def model(x, y):
        with data(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z + y, NOISE), obs=x)

    def guide(x, y):
        with data(x):
            pyro.sample("z", dist.Normal(0.5 * (x - y), 0.8))

    x, y = numbers(3), 100 * numbers(3, seed=2).abs()
    watched, seen = noted(guide)
    pv.InclusiveKL(num_particles=3, sleep=0.5).loss_and_grads(model, watched, x, y)
    dreamt, same = seen[-1]
    assert same is y and dreamt is not x
    assert float((dreamt - y).abs().max()) < 8


def two_sites(x, y):
    with data(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        pyro.sample("y", dist.Normal(-50 + z, NOISE), obs=y)


def test_two_observed_sites_need_to_be_told():
    def guide(x, y):
        with data(x):
            pyro.sample("z", dist.Normal(0.3 * x, 1.0))

    watched, seen = noted(guide)
    x, y = numbers(3), numbers(3, seed=1)
    with pytest.raises(OptionError, match="sleep_args"):
        pv.InclusiveKL(sleep=0.5).loss_and_grads(two_sites, watched, x, y)
    objective = pv.InclusiveKL(num_particles=3, sleep=0.5, sleep_args=lambda observed: (observed["x"], observed["y"]))
    assert math.isfinite(objective.loss_and_grads(two_sites, watched, x, y))
    assert float((seen[-1][1] + 50).abs().max()) < 9 and float(seen[-1][0].abs().max()) < 9


@pytest.mark.parametrize("how", ["flattened", "by name", "twice"])
def test_data_that_is_not_an_argument(how):
    def model(x, again=None):
        with data(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x.reshape(-1) if how == "flattened" else x)

    def guide(x, again=None):
        with data(x):
            pyro.sample("z", dist.Normal(0.3 * x.reshape(-1), 1.0))

    x = numbers(3)
    args, kwargs = {"flattened": ((x[:, None],), {}), "by name": ((), {"x": x}), "twice": ((x, x), {})}[how]
    with pytest.raises(OptionError, match="sleep_args"):
        pv.InclusiveKL(sleep=0.5).loss_and_grads(model, guide, *args, **kwargs)


@pytest.mark.parametrize("returned", [lambda x: x, lambda x: {"x": x}, lambda x: None], ids=["tensor", "dict", "None"])
def test_sleep_args_must_give_a_tuple(returned):
    """A tensor would be taken apart along its data: with one datum, without a word."""
    objective = pv.InclusiveKL(sleep=0.5, sleep_args=lambda observed: returned(observed["x"]))
    with pytest.raises(OptionError, match="sleep_args"):
        objective.loss_and_grads(line(), affine(), numbers(1))


def test_dreams_of_a_model_that_sums_out_a_site():
    """Each dream has one value of it, and as many data as the call."""
    x, model, guide = numbers(3), mixture(), affine()
    watched, seen = noted(guide)
    assert math.isfinite(pv.InclusiveKL(num_particles=4, sleep=1).loss_and_grads(model, watched, x))
    assert all(args[0].shape == (3,) for args in seen)


def test_no_dreams_of_a_factor():
    """What is simulated does not know of it, so its latents are no draws of the posterior."""

    def model(x):
        with data(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.factor("f", -z.square())
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    with pytest.raises(StructureError, match="f"):
        pv.InclusiveKL(sleep=0.5).loss_and_grads(model, affine(), numbers(3))


def test_dreams_about_a_batch_with_indices():
    """The batch and its indices are arguments: N/B scales both phases."""
    index = torch.arange(4)

    def plate(x):
        return pyro.plate("data", 20, subsample=index)

    x, pairs = numbers(4), ((line(plate), affine(plate)), (line(), affine()))
    values = []
    for model, guide in pairs:
        objective = pv.InclusiveKL(num_particles=3, sleep=0.4)
        objective.loss(model, guide, x)
        pyro.set_rng_seed(5)
        values.append((objective.loss_and_grads(model, guide, x), *gradients(model, guide).values()))
    for scaled, plain in zip(*values, strict=True):
        assert_close(scaled, 5 * plain)


def test_asleep_alone_an_infinite_wake_loss_is_no_nan():
    """The proposal draws what the guide cannot: KL(p to q) is infinite, but with sleep=1 nobody asked for it."""

    def model(x):
        with data(x):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5, 1e-300], dtype=F64)))
            pyro.sample("x", dist.Normal(torch.where(c == 2, x, c.to(F64)), 1e-2), obs=x)

    def guide(p, x):
        with data(x):
            pyro.sample("c", dist.Categorical(logits=p.logits + tensor([0.0, 0.0, -torch.inf])))

    def proposal(x):
        with data(x):
            pyro.sample("c", dist.Categorical(torch.ones(3, dtype=F64)))

    objective = pv.InclusiveKL(num_particles=50, proposal=proposal, sleep=1)
    assert math.isfinite(objective.loss_and_grads(model, Program(guide, logits=[0.0, 0.0, 0.0]), numbers(3)))


@pytest.mark.parametrize("sleep", [-0.1, 1.1, True, "1", None, math.nan])
def test_a_sleep_that_makes_no_sense(sleep):
    with pytest.raises(OptionError, match="sleep"):
        pv.InclusiveKL(sleep=sleep)


@pytest.mark.parametrize("proposal", [3, "guide", numbers(2)])
def test_a_proposal_that_is_no_program(proposal):
    with pytest.raises(ValueError, match="proposal"):
        pv.InclusiveKL(proposal=proposal).loss_and_grads(line(), affine(), numbers(3))


# As one trains with it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["svi", "module"])
@pytest.mark.parametrize("options", [{}, {"sleep": 0.5}, {"proposal": True}], ids=str)
def test_trains_a_convolutional_vae(dtype, form, options):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).to(dtype)
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (3, 1, 1)), nn.ConvTranspose2d(3, 1, 4)).to(dtype)

    def model(p, x):
        with data(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(p.net(z), 1.0).to_event(3), obs=x)

    def encode(p, x):
        loc, log_scale = p.net(x).chunk(2, -1)
        with data(x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    model, guide, proposal = Program(model), Program(encode), Program(encode)
    model.net, guide.net, proposal.net = decoder, encoder, copy.deepcopy(encoder)
    x = numbers(6, 1, 4, 4).to(dtype)
    objective = pv.InclusiveKL(num_particles=10, **{**options, **({"proposal": proposal} if "proposal" in options else {})})
    programs = [*model.parameters(), *guide.parameters()]
    before = [p.detach().clone() for p in programs]
    if form == "svi":
        svi = SVI(model, guide, Adam({"lr": 0.02}), objective)
        losses = [svi.step(x) for _ in range(30)]
        assert objective.num_updates == 30
    else:
        module = objective(model, guide)
        assert not {id(p) for p in proposal.parameters()} & {id(p) for p in module.parameters()}
        optimiser, losses = torch.optim.Adam(module.parameters(), 0.02), []
        for _ in range(30):
            optimiser.zero_grad()
            loss = module(x)
            assert loss.dtype == dtype and loss.shape == ()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert not any(torch.equal(a, b) for a, b in zip(before, programs, strict=True))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert objective.terms.elbo.dtype == dtype


class Shifted(nn.Module):
    """A proposal that can be pickled."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(tensor(0.2))

    def forward(self, x):
        with data(x):
            pyro.sample("z", dist.Normal(0.5 * x + self.shift, 0.8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_with_a_proposal_of_their_own(copied):
    x, model, guide = numbers(3), line(), affine()
    objective = pv.InclusiveKL(num_particles=4, proposal=Shifted(), sleep=0.3)
    objective.loss_and_grads(model, guide, x)
    other = copied(objective)
    assert other.num_updates == 1 and other.terms is None
    assert other.proposal is not objective.proposal
    other.loss(model, guide, x)
    values = []
    for one in (objective, other):
        pyro.set_rng_seed(2)
        values.append(one.loss(model, guide, x))
    assert values[0] == values[1]
    with torch.no_grad():
        objective.proposal.shift.fill_(5.0)
    assert float(other.proposal.shift.detach()) == 0.2
    other.load_state_dict({"num_updates": 7})
    assert other.state_dict() == {"num_updates": 7}


@pytest.mark.parametrize("with_proposal", [False, True])
def test_terms_are_of_the_guides_own_draws(with_proposal):
    """Reconstruction and KL at the guide, wherever the proposal looks: 4.5 standard errors of 20 000 data."""
    num_data, log_scale = 20_000, -0.4
    x = torch.full((num_data,), 0.9, dtype=F64)
    guide = replicated(0.2, log_scale, num_data)
    proposal = affine(center=3.0) if with_proposal else None
    objective = pv.InclusiveKL(num_particles=4, proposal=proposal)
    loss = objective.loss(line(), guide, x)
    variance = math.exp(2 * log_scale)
    kl = 0.5 * (variance + 0.04 - 1) - log_scale
    fit = -0.5 * ((0.9 - 0.4 - 0.24) ** 2 + 1.44 * variance) / NOISE**2 - math.log(NOISE) - 0.5 * math.log(2 * math.pi)
    terms = objective.terms.per_datum()
    assert set(terms.kl) == {"z"} and terms.beta == 1.0
    assert float(terms.kl["z"]) == pytest.approx(kl, abs=0.03)
    assert float(terms.reconstruction) == pytest.approx(fit, abs=0.03)
    assert_close(terms.elbo, terms.reconstruction - terms.kl_sum)
    assert float(objective.terms.loss) == pytest.approx(loss, rel=1e-12)
    assert not any(t.requires_grad for t in (terms.loss, terms.elbo, terms.reconstruction, *terms.kl.values()))


def test_a_monitor_watches_it():
    objective, x = pv.InclusiveKL(num_particles=4), numbers(8)
    svi = SVI(line(), affine(), Adam({"lr": 0.01}), objective)
    monitor = pv.Monitor(objective, num_updates=6)
    for _ in range(3):
        for batch in monitor.watch([x[:4], x[4:]]):
            svi.step(batch)
    assert len(monitor.history()) >= 1


def test_batch_norm_and_dropout_live_in_training():
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)).double()

    def guide(p, x):
        loc, log_scale = p.net(x[:, None]).unbind(-1)
        with data(x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    guide = Program(guide)
    guide.net = net
    objective = pv.InclusiveKL(num_particles=3)
    objective.loss_and_grads(line(), guide, numbers(4))
    assert int(net[1].num_batches_tracked) == 1 and net[1].training
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_evaluation_trains_nothing():
    x, model, guide = numbers(3), line(), affine()
    objective = pv.InclusiveKL(num_particles=3, proposal=affine(), sleep=0.5)
    value = SVI(model, guide, Adam({"lr": 0.1}), objective).evaluate_loss(x)
    assert math.isfinite(value) and objective.num_updates == 0
    assert all(g is None for g in gradients(model, guide).values())


# Mode-seeking against mass-covering


def parabola(x):
    """x = z^2 + noise: two modes, at +2 and -2 for x = 4."""
    with data(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 2.0))
        pyro.sample("x", dist.Normal(z.square(), 1.0), obs=x)


def masses(loc, scale):
    """Of N(loc, scale^2) beside either mode, |z - (+-2)| < 1."""
    cdf = dist.Normal(loc, scale).cdf
    return [float(cdf(tensor(m + 1.0)) - cdf(tensor(m - 1.0))) for m in (-2.0, 2.0)]


def test_exclusive_sits_on_one_mode_inclusive_covers_both():
    """Mass beside either mode. KL(p to q) is least where mean and variance are those of the posterior, by quadrature.

    Both fits start beside one mode: the ELBO has a second, lower optimum astride both.
    """
    grid = torch.linspace(-6, 6, 12_001, dtype=F64)
    p = (normal(grid, 0.0, 2.0) + normal(tensor(4.0), grid.square(), 1.0)).softmax(0)
    stddev = float((p * grid.square()).sum().sqrt())
    wide = tensor([[0.0, 3.0]])
    fits = {}

    def proposal(x):
        with data(x):
            pyro.sample("z", dist.Normal(wide[0, 0].expand(len(x)), wide[0, 1]))

    for name, objective in {
        "exclusive": pv.BetaTrace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1),
        "inclusive": pv.InclusiveKL(num_particles=200, proposal=proposal),
    }.items():

        def guide(p, x):
            with data(x):
                pyro.sample("z", dist.Normal(p.loc.expand(len(x)), p.log_scale.exp()))

        guide = Program(guide, loc=1.0, log_scale=-0.7)
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)
        for _ in range(300):
            optimiser.zero_grad()
            objective.loss_and_grads(parabola, guide, tensor([4.0]))
            optimiser.step(), schedule.step()
        fits[name] = float(guide.loc.detach()), float(guide.log_scale.detach().exp())
    left, right = masses(*fits["exclusive"])
    assert left < 1e-3 and right > 0.98
    assert fits["exclusive"][1] < 0.35
    left, right = masses(*fits["inclusive"])
    assert 0.2 < left < 0.3 and 0.2 < right < 0.3
    assert abs(fits["inclusive"][0]) < 0.1 and fits["inclusive"][1] == pytest.approx(stddev, abs=0.08)


def test_warns_of_nothing_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SVI(line(), affine(), Adam({"lr": 0.1}), pv.InclusiveKL(sleep=0.5)).step(numbers(3))
