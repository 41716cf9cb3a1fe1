"""ImportanceWeightedELBO: values, executions, scales, masks, beta, terms, forms, copies, structure.

Draws are scripted where a value is compared with one by hand: the same noise goes through the formulas. Gradients in the
mean have their own file, `test_iwae_gradients.py`.
"""

import copy
import gc
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from objective_helpers import (
    FORMS,
    NORMAL,
    Masks,
    Program,
    assert_close,
    gradients_of,
    hierarchical,
    masked,
    masked_coin,
    normal_kl,
    numbers,
    script,
    tensor,
    vae,
)
from objective_helpers import run as run_scripted
from pair_helpers import F64, SIGMAS, exact_pair, linear_gaussian, posterior_moments
from pyro import poutine
from pyro.infer import SVI, autoguide
from pyro.infer.autoguide import AutoNormalMessenger
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import (
    AuxiliarySiteError,
    BatchCouplingError,
    EnumerationError,
    GlobalLatentError,
    OptionError,
    StructureError,
)

GRADIENTS = ("standard", "stl", "dreg")
IWAE = pv.ImportanceWeightedELBO


def log_mean_exp(log_weight):
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def warmed(case, objective):
    """Rehearsed, so that the script is read by the call alone."""
    objective.loss(case.model, case.guide, *case.args)
    objective.num_updates = 0
    return objective


def executions(objective):
    return [known[3:] for known in objective._pairs["guide"]._known.values()]


def run(form, objective, case, **options):
    """As the helper; the script has the order in which the guide draws."""
    return run_scripted(form, objective, case, vectorize=executions(objective)[-1][0] == "leading", **options)


def draws(*shape, seed=5):
    return numbers(*shape, seed=seed)


# Values


def vae_log_weights(case, noise, beta=1.0):
    m, g, (x,) = case.model, case.guide, case.args
    z = x @ g.gain.T + g.center + g.log_scale.exp() * noise
    normal = torch.distributions.Normal
    log_q = normal(x @ g.gain.T + g.center, g.log_scale.exp()).log_prob(z).sum(-1)
    log_p = normal(tensor(0.0), tensor(1.0)).log_prob(z).sum(-1)
    return normal(z @ m.weight.T + m.bias, (0.5 * m.log_variance).exp()).log_prob(x).sum(-1) + beta * (log_p - log_q)


def by_hand(case, loss):
    parameters = case.parameters
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta", [1.0, 0.3, pv.LinearAnnealing(4, start=0.5), tensor(2.0)], ids=str)
@pytest.mark.parametrize("num_particles", [1, 2, 7])
def test_value_and_gradient_by_hand(num_particles, beta, form):
    case = vae()
    noise = draws(num_particles, 5, 2)
    case.noise = [noise]
    value, grads = run(form, warmed(case, IWAE(beta, num_particles=num_particles)), case)
    beta = beta(0) if callable(beta) and not isinstance(beta, torch.Tensor) else beta
    loss = -log_mean_exp(vae_log_weights(case, noise, beta)).sum()
    assert_close(value, loss)
    wanted = by_hand(case, loss)
    for name, grad in (grads or {}).items():
        assert_close(grad, wanted[name], name)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_particles", [1, 3, 40])
def test_an_exact_guide_gives_the_evidence_with_any_draw(num_particles, seed, gradient):
    lm, x = linear_gaussian()
    torch.manual_seed(seed)
    loss = IWAE(num_particles=num_particles, gradient=gradient).loss(*exact_pair(lm), x)
    assert abs(loss + float(lm.log_evidence(x).sum())) < 1e-10


# One program three ways: what a leading axis breaks runs under vmap, what reads a tensor runs in a loop.
WAYS = {
    "leading": lambda t: t,
    "vmap": lambda t: t.reshape(t.shape[0], -1),
    "loop": lambda t: t if float(t.detach().sum()) > -1e9 else -t,
}


def written(case, way):
    """The linear VAE whose decoder runs only in this way."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            mean = WAYS[way](z) @ p.weight.T + p.bias
            pyro.sample("x", dist.Normal(mean, (0.5 * p.log_variance).exp()).to_event(1), obs=x)

    return Program(model, **{n: w.detach() for n, w in case.model.named_parameters()})


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("way", WAYS)
def test_all_executions_give_the_same(way, gradient):
    case = vae()
    case.noise = [draws(4, 5, 2)]
    expected = run("loss_and_grads", warmed(case, IWAE(num_particles=4, gradient=gradient)), case)
    case.model = written(case, way)
    objective = warmed(case, IWAE(num_particles=4, gradient=gradient))
    assert executions(objective) == [("leading", way)]
    value, grads = run("loss_and_grads", objective, case)
    assert_close(value, expected[0])
    for name, grad in grads.items():
        assert_close(grad, expected[1][name], name)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("make", [vae, hierarchical])
def test_a_guide_in_a_loop_gives_the_same(make, gradient):
    case = make()
    sites = [(4, 5, 2)] if make is vae else [(4, 4), (4, 4)]
    case.noise = [draws(*shape, seed=i) for i, shape in enumerate(sites)]
    expected = run("loss_and_grads", warmed(case, IWAE(num_particles=4, gradient=gradient)), case)
    inner = case.guide.function
    case.guide.function = lambda p, x: inner(p, WAYS["loop"](x))
    objective = warmed(case, IWAE(num_particles=4, gradient=gradient))
    assert executions(objective)[0][0] == "loop"
    value, grads = run("loss_and_grads", objective, case)
    assert_close(value, expected[0])
    for name, grad in grads.items():
        assert_close(grad, expected[1][name], name)


@pytest.mark.parametrize("way", WAYS)
def test_an_exact_guide_gives_the_evidence_in_all_executions(way):
    case = vae()
    lm = pv.exact.LinearGaussian(*(w.detach() for w in (case.model.weight, case.model.bias, case.model.log_variance.exp())))
    moments = posterior_moments(lm)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            loc, root = moments(x)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root))

    with torch.no_grad():
        loss = IWAE(num_particles=6).loss(written(case, way), Program(guide), *case.args)
    assert abs(loss + float(lm.log_evidence(case.args[0]).sum())) < 1e-10


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_one_particle_is_the_elbo_on_the_same_seed(gradient):
    case = vae()
    results = []
    for objective in (IWAE(num_particles=1, gradient=gradient), pv.BetaTrace_ELBO()):
        objective.loss(case.model, case.guide, *case.args)
        torch.manual_seed(2)
        results.append(run_scripted("loss_and_grads", objective, case, scripted=False))
    assert_close(results[0][0], results[1][0])
    names = results[0][1] if gradient == "standard" else [n for n in results[0][1] if n.startswith("model")]
    for name in names:
        assert_close(results[0][1][name], results[1][1][name], name)


def test_the_bounds_are_ordered():
    """ELBO <= IWAE_5 <= IWAE_50 <= log p(x), 20 blocks of 200 replicates of 5 data.

    Each gap is many standard errors wide; K = 1 hits the closed form within 4.5: one number, 7e-6 false alarms.
    """
    case = vae()
    lm = pv.exact.LinearGaussian(*(w.detach() for w in (case.model.weight, case.model.bias, case.model.log_variance.exp())))
    case.guide.log_scale.data += 0.5
    x = case.args[0].repeat(200, 1)
    model = Program(lambda p, x: repeated(p, x), **{n: w.detach() for n, w in case.model.named_parameters()})
    guide = Program(lambda p, x: encoded(p, x), **{n: w.detach() for n, w in case.guide.named_parameters()})
    with torch.no_grad():
        q = dist.Normal(case.args[0] @ guide.gain.T + guide.center, guide.log_scale.exp()).to_event(1)
        elbo, evidence = float(lm.elbo(case.args[0], q).sum()), float(lm.log_evidence(case.args[0]).sum())
    means, errors = {}, {}
    for num_particles in (1, 5, 50):
        objective = IWAE(num_particles=num_particles)
        found = tensor([-objective.loss(model, guide, x) / 200 for _ in range(20)])
        means[num_particles], errors[num_particles] = float(found.mean()), float(found.std()) / math.sqrt(20)
        assert errors[num_particles] < 0.05 * (evidence - elbo)
    assert abs(means[1] - elbo) < SIGMAS * errors[1]
    assert means[1] + 5 * errors[1] < means[5] - 5 * errors[5]
    assert means[5] + 5 * errors[5] < means[50] - 5 * errors[50]
    assert means[50] < evidence + SIGMAS * errors[50]


def repeated(p, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ p.weight.T + p.bias, (0.5 * p.log_variance).exp()).to_event(1), obs=x)


def encoded(p, x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ p.gain.T + p.center, p.log_scale.exp().expand(len(x), 2)).to_event(1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_precision_is_kept(dtype, gradient):
    case = vae()
    model, guide, x = case.model.to(dtype), case.guide.to(dtype), case.args[0].to(dtype)
    for beta in (0.5, torch.tensor(0.5, dtype=F64), torch.tensor(0.5)):
        objective = IWAE(beta, num_particles=3, gradient=gradient)
        loss = objective.differentiable_loss(model, guide, x)
        assert loss.dtype == dtype and objective.terms.kl_sum.dtype == dtype and objective.terms.loss.dtype == dtype


def test_one_datum():
    case = vae(num_data=1)
    case.noise = [draws(3, 1, 2)]
    value, _ = run("loss_and_grads", warmed(case, IWAE(num_particles=3)), case)
    assert_close(value, -log_mean_exp(vae_log_weights(case, case.noise[0])).sum())


# Scales


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("full_size", [5, 20, 1000])
def test_a_subsampled_plate_scales_the_bound_outside_of_the_logarithm(full_size, gradient):
    noise = draws(3, 5, 2)
    plain = vae()
    plain.noise = [noise]
    value, grads = run("loss_and_grads", warmed(plain, IWAE(num_particles=3, gradient=gradient)), plain)
    case = vae(full_size=full_size, plate=lambda: pyro.plate("data", full_size, subsample=torch.arange(5)))
    case.noise = [noise]
    objective = warmed(case, IWAE(num_particles=3, gradient=gradient))
    scaled, scaled_grads = run("loss_and_grads", objective, case)
    assert_close(scaled, value * full_size / 5)
    for name, grad in scaled_grads.items():
        assert_close(grad, grads[name] * full_size / 5, name)
    assert objective.terms.plates == {"data": full_size}


def test_indices_drawn_inside_are_shared_and_move():
    """An exact guide: whichever data are drawn, the value is theirs, times N/B."""
    lm, x = linear_gaussian(num_data=12)
    moments, seen = posterior_moments(lm), []

    def model(x):
        with pyro.plate("data", 12, subsample_size=3) as index:
            seen.append(index)
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x[index])

    def guide(x):
        with pyro.plate("data", 12, subsample_size=3) as index:
            loc, root = moments(x[index])
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root))

    objective = IWAE(num_particles=4)
    found = set()
    for _ in range(8):
        loss = objective.loss(model, guide, x)
        assert abs(loss + 4 * float(lm.log_evidence(x[seen[-1]]).sum())) < 1e-9
        found.add(tuple(seen[-1].tolist()))
    assert len(found) > 1


def test_a_subsample_that_is_given_needs_no_loop():
    """Looking whether model and guide were given the same indices is no reading by the program."""
    case = vae(full_size=20, plate=lambda: pyro.plate("data", 20, subsample=torch.arange(5)))
    assert executions(warmed(case, IWAE(num_particles=3))) == [("leading", "leading")]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    "scale", [0.25, tensor(3.0), tensor([0.5, 1.0, 2.0, 0.1, 4.0])], ids=["number", "tensor", "per datum"]
)
def test_a_scale_around_model_and_guide_weighs_the_data(scale, gradient):
    """The model's gradient by hand; that of the guide by the gradients of single data."""
    case = vae()
    case.noise = [draws(3, 5, 2)]
    case.model.function, case.guide.function = (poutine.scale(f, scale) for f in (case.model.function, case.guide.function))
    objective = warmed(case, IWAE(num_particles=3, gradient=gradient))
    value, grads = run("loss_and_grads", objective, case)
    log_weights = vae_log_weights(case, case.noise[0])
    assert_close(value, -(scale * log_mean_exp(log_weights)).sum())
    wanted = by_hand(case, -(scale * log_mean_exp(log_weights)).sum())
    for name in grads if gradient == "standard" else [n for n in grads if n.startswith("model")]:
        assert_close(grads[name], wanted[name], name)
    assert_close(objective.terms.elbo, (scale * log_weights).sum() / 3)


@pytest.mark.parametrize("side", ["model", "guide"])
def test_different_scales_are_refused(side):
    case = hierarchical(**{f"scale_{side}": 0.5})
    with pytest.raises(StructureError, match="have another scale"):
        IWAE(num_particles=2).loss(case.model, case.guide, *case.args)


def test_a_scale_inside_a_datum_is_refused():
    def model(x):
        with pyro.plate("data", 3, dim=-2), pyro.plate("inner", 2, dim=-1), poutine.scale(scale=tensor([1.0, 2.0])):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-2), pyro.plate("inner", 2, dim=-1), poutine.scale(scale=tensor([1.0, 2.0])):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(StructureError, match="parts of one datum"):
        IWAE(num_particles=2, datum_plate="data").loss(model, guide, numbers(3, 2))


# Masks


HALF = torch.tensor([True, False, True, True])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    "masks",
    [
        Masks(whole_model=HALF, guide=HALF),
        Masks(whole_model=HALF),
        Masks(x=HALF),
        Masks(fn_x=HALF),
        Masks(fn_model=HALF, x=HALF),
        Masks(guide=HALF, x=HALF),
        Masks(fn_guide=HALF, x=HALF),
    ],
    ids=str,
)
def test_masks(masks, gradient):
    case = masked(masks)
    noise = draws(3, 4)
    case.noise = [noise]
    m, g, (x,) = case.model, case.guide, case.args
    value, grads = run("loss_and_grads", warmed(case, IWAE(num_particles=3, gradient=gradient)), case)
    z = g.loc + g.log_scale.exp() * noise
    normal = torch.distributions.Normal
    on_z = [mask for mask in (masks.whole_model, masks.guide, masks.fn_model, masks.fn_guide) if mask is not None]
    on_z = on_z[0] if on_z else torch.ones(4, dtype=torch.bool)
    kl = normal(tensor(0.0), tensor(1.0)).log_prob(z) - normal(g.loc, g.log_scale.exp()).log_prob(z)
    fit = normal(m.weight * z + m.bias, tensor(1.0)).log_prob(x)
    loss = -log_mean_exp(torch.where(HALF, fit, 0.0) + torch.where(on_z, kl, 0.0)).sum()
    assert_close(value, loss)
    wanted = by_hand(case, loss)
    for name in grads if gradient == "standard" else ["model.weight", "model.bias"]:
        assert_close(grads[name], wanted[name], name)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_is_missing_is_drawn_and_weighs_nothing(gradient):
    """`obs_mask`: the value is that of a mask over x, on the same noise of z."""
    there = torch.tensor([True, False, True, True])

    def partly(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(p.weight * z + p.bias, 1.0), obs=x, obs_mask=there)

    case = masked(Masks(x=there))
    case.noise = [draws(3, 4)]
    expected = run("loss_and_grads", warmed(case, IWAE(num_particles=3, gradient=gradient)), case)
    case.model.function = partly
    case.noise.append(draws(3, 4, seed=8))  # the missing x
    value, grads = run("loss_and_grads", warmed(case, IWAE(num_particles=3, gradient=gradient)), case)
    assert_close(value, expected[0])
    for name, grad in grads.items():
        assert_close(grad, expected[1][name], name)


def test_a_latent_drawn_from_the_prior():
    """prior_sites: u ~ N(0, 1) has no counterpart in the guide; the weight is p(x|z, u) p(z) / q(z)."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            u = pyro.sample("u", dist.Normal(p.center * z, 1.0))
            pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    case = masked(Masks())
    case.model = Program(model, center=0.4)
    noise, other = draws(3, 4), draws(3, 4, seed=8)
    case.noise = [noise, other]
    value, grads = run("loss_and_grads", warmed(case, IWAE(num_particles=3, prior_sites=["u"])), case)
    m, g, (x,) = case.model, case.guide, case.args
    normal = torch.distributions.Normal
    z = g.loc + g.log_scale.exp() * noise
    u = m.center * z + other
    log_weight = normal(z + u, tensor(1.0)).log_prob(x) + normal(tensor(0.0), tensor(1.0)).log_prob(z)
    loss = -log_mean_exp(log_weight - normal(g.loc, g.log_scale.exp()).log_prob(z)).sum()
    assert_close(value, loss)
    for name, grad in by_hand(case, loss).items():
        assert_close(grads[name], grad, name)


# Discrete sites of the model


def mixture_model(enumerate_it):
    """z ~ N(0, 1), c ~ Categorical, x ~ N(z + means[c], 1); c summed out by Pyro's mark, or by a mixture."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if enumerate_it:
                c = pyro.sample("c", dist.Categorical(logits=p.prior), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + p.means[c], 1.0), obs=x)
            else:
                parts = torch.distributions.Normal(z.unsqueeze(-1) + p.means, tensor(1.0)).log_prob(x.unsqueeze(-1))
                pyro.factor("x", (parts + p.prior.log_softmax(-1)).logsumexp(-1))

    return Program(model, prior=numbers(3, seed=1), means=numbers(3, seed=2))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_the_model_enumerates_is_summed_out(gradient):
    results = []
    for enumerate_it in (True, False):
        case = masked(Masks())
        case.model, case.noise = mixture_model(enumerate_it), [draws(3, 4)]
        results.append(run("loss_and_grads", warmed(case, IWAE(num_particles=3, gradient=gradient)), case))
    assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert_close(grad, results[1][1][name], name)


@pytest.mark.parametrize("beta", [0.5, tensor(0.5), {"z": 0.5}], ids=str)
def test_no_beta_within_the_logarithm_of_a_sum(beta):
    case = masked(Masks())
    with pytest.raises(EnumerationError, match="beta=1"):
        IWAE(beta).loss(mixture_model(True), case.guide, *case.args)


def test_enumeration_in_the_guide_is_refused():
    case = masked_coin(Masks(), infer={"enumerate": "parallel"})
    with pytest.raises(EnumerationError, match="the guide enumerates"):
        IWAE().loss(case.model, case.guide, *case.args)


# Beta by site


def hierarchical_parts(case, noise):
    m, g, (x,) = case.model, case.guide, case.args
    normal = torch.distributions.Normal
    z2 = g.g * x + g.log_t2.exp() * noise[0]
    z1 = g.h * x + g.k * z2 + g.log_t1.exp() * noise[1]
    kl2 = normal(g.g * x, g.log_t2.exp()).log_prob(z2) - normal(tensor(0.0), tensor(1.0)).log_prob(z2)
    kl1 = normal(g.h * x + g.k * z2, g.log_t1.exp()).log_prob(z1) - normal(m.a * z2, m.log_s.exp()).log_prob(z1)
    return normal(m.w * z1, tensor(1.0)).log_prob(x), kl2, kl1


@pytest.mark.parametrize("gradient", ["standard", "stl"])
def test_beta_by_site(gradient):
    case = hierarchical()
    case.noise = [draws(3, 4), draws(3, 4, seed=6)]
    objective = warmed(case, IWAE({"z2": 0.3}, num_particles=3, gradient=gradient))
    value, grads = run("loss_and_grads", objective, case)
    fit, kl2, kl1 = hierarchical_parts(case, case.noise)
    loss = -log_mean_exp(fit - 0.3 * kl2 - kl1).sum()
    assert_close(value, loss)
    wanted = by_hand(case, loss)
    for name in grads if gradient == "standard" else [n for n in grads if n.startswith("model")]:
        assert_close(grads[name], wanted[name], name)


def test_beta_of_no_site():
    case = hierarchical()
    with pytest.raises(OptionError, match="latent sites are"):
        IWAE({"z3": 0.3}).loss(case.model, case.guide, *case.args)


@pytest.mark.parametrize("call", ["loss", "loss_and_grads"])
def test_dreg_refuses_beta_by_site_whichever_way_it_is_called(call):
    case = hierarchical()
    with pytest.raises(OptionError, match="one beta"):
        getattr(IWAE({"z2": 0.3}, gradient="dreg"), call)(case.model, case.guide, *case.args)


def test_a_joint_autoguide_has_no_beta_by_site():
    def model(x):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    guide = autoguide.AutoMultivariateNormal(model)
    with pytest.raises(AuxiliarySiteError, match="jointly"):
        IWAE({"a": 0.3}, datum_plate=None).loss(model, guide, numbers(3))
    assert math.isfinite(IWAE(0.3, datum_plate=None).loss(model, guide, numbers(3)))


def test_schedules_follow_the_updates():
    case = vae()
    schedule = pv.LinearAnnealing(4, start=0.0)
    objective = IWAE(schedule, num_particles=2)
    for step in range(4):
        assert objective.num_updates == step
        objective.loss_and_grads(case.model, case.guide, *case.args)
        assert float(objective.terms.beta) == schedule(step)
        objective.loss(case.model, case.guide, *case.args)
    state = objective.state_dict()
    other = IWAE(schedule)
    other.load_state_dict(state)
    assert other.num_updates == 4


@pytest.mark.parametrize("options", [{"gradient": "iwae"}, {"num_particles": 0}, {"num_particles": 2.0}, {"beta": -1.0}])
def test_options_are_checked(options):
    with pytest.raises(OptionError):
        IWAE(**options)


# Terms


@pytest.mark.parametrize("num_particles", [1, 8])
def test_terms_by_hand(num_particles):
    case = hierarchical(plate_scale=3)
    case.noise = [draws(num_particles, 4), draws(num_particles, 4, seed=6)]
    objective = warmed(case, IWAE(0.5, num_particles=num_particles))
    value, _ = run("loss_and_grads", objective, case)
    fit, kl2, kl1 = (3 * part.mean(0).sum() for part in hierarchical_parts(case, case.noise))
    terms = objective.terms
    assert set(terms.kl) == {"z1", "z2"}
    for found, wanted in [(terms.reconstruction, fit), (terms.kl["z2"], kl2), (terms.kl["z1"], kl1)]:
        assert not found.requires_grad
        assert_close(found, wanted)
    assert_close(terms.elbo, fit - kl1 - kl2)
    assert_close(terms.loss, value)
    assert_close(terms.per_datum().loss, value / 12)
    assert terms is objective.terms


def test_terms_are_closed_forms_where_the_draws_are_in_proportion():
    """Hadamard noise: the means of quadratic terms are exact."""
    case = hierarchical()
    hand = case.hand(case.model, case.guide, *case.args)
    objective = warmed(case, IWAE(num_particles=case.num_particles))
    run("loss", objective, case)
    assert_close(objective.terms.reconstruction, hand.reconstruction)
    for name, kl in hand.kl.items():
        assert_close(objective.terms.kl[name], kl, name)


def test_the_monitor_records_it():
    case = vae()
    objective = IWAE(num_particles=3)
    monitor = pv.Monitor(objective, progress=False)
    losses = []
    for _ in monitor.watch(range(3)):
        losses.append(objective.loss_and_grads(case.model, case.guide, *case.args) / 5)
    assert monitor.history().loss == pytest.approx(losses)


# Forms, training, copies


def test_all_forms_agree_under_one_seed():
    case = vae()
    objective = warmed(case, IWAE(num_particles=3))
    svi = SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.0}), objective)
    values = []
    for form in FORMS:
        torch.manual_seed(4)
        values.append(run(form, objective, case, scripted=False)[0])
    for call in (svi.evaluate_loss, svi.step):
        torch.manual_seed(4)
        values.append(tensor(call(*case.args)))
    for value in values[1:]:
        assert_close(value, values[0])


def trained(objective, case, way, num_steps=40):
    """The last losses of a short training."""
    if way == "svi":
        case.model.registered = case.guide.registered = True
        svi = SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.03}), objective)
        return [svi.step(*case.args) for _ in range(num_steps)]
    module = objective(case.model, case.guide)
    if way == "pickled":
        module = pickle.loads(pickle.dumps(module))
    elif way == "copied":
        module = copy.deepcopy(module)
    elif way == "reloaded":
        fresh = objective(copy.deepcopy(case.model), copy.deepcopy(case.guide))
        fresh.load_state_dict(module.state_dict())
        module = fresh
    optimiser = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(num_steps):
        optimiser.zero_grad()
        loss = module(*case.args)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


class Linear(nn.Module):
    """A pair of modules that can be pickled: the linear VAE."""

    def __init__(self, side):
        super().__init__()
        self.side, self.net = side, nn.Linear(2, 3) if side == "model" else nn.Linear(3, 4)
        self.registered = False  # Pyro hangs on registered parameters what cannot be pickled

    def forward(self, x):
        if self.registered:
            pyro.module(f"linear {self.side}", self)
        with pyro.plate("data", len(x)):
            if self.side == "model":
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)
            else:
                loc, log_scale = self.net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("way", ["svi", "module", "pickled", "copied", "reloaded"])
def test_training_in_all_ways(way, gradient):
    case = vae()
    case.model, case.guide = Linear("model").double(), Linear("guide").double()
    objective = IWAE(num_particles=3, gradient=gradient)
    if way != "svi":  # copies of what was used already
        objective.loss_and_grads(case.model, case.guide, *case.args)
        case.model.zero_grad(), case.guide.zero_grad()
    losses = trained(objective, case, way)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("gradient", ["standard", "dreg"])
def test_a_convolutional_vae(gradient):
    net = pv.conv_vae((1, 8, 8), latent_dim=2, likelihood=pv.nn.Bernoulli(event_dim=3), channels=(4,))
    x = torch.bernoulli(torch.full((6, 1, 8, 8), 0.1))
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.02}), IWAE(num_particles=3, gradient=gradient))
    losses = [svi.step(x) for _ in range(25)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_nothing_keeps_the_graph_alive():
    """A node of the graph has a token, which lives as long as the node: a backward pass frees tensors, not nodes."""
    case, tokens, objectives = vae(), [], []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            ctx.token = type("Token", (), {})()
            tokens.append(weakref.ref(ctx.token))
            return weight.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    inner = case.model.function
    case.model.function = lambda p, x: inner(p, x + 0 * Watched.apply(p.weight).sum())
    for gradient in GRADIENTS:
        objectives.append(IWAE(num_particles=3, gradient=gradient))
        for _ in range(2):
            objectives[-1].loss_and_grads(case.model, case.guide, *case.args)
        objectives[-1].terms  # noqa: B018
    gc.collect()
    assert len(tokens) >= 6 and [token() for token in tokens] == [None] * len(tokens)


# Autoguides and messengers


def plain_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoDiagonalNormal, AutoNormalMessenger])
def test_lazy_autoguides_train_from_the_first_step(kind, gradient):
    x = torch.tensor([0.5, 1.5, 3.0])
    guide = kind(plain_model)
    svi = SVI(plain_model, guide, pyro.optim.Adam({"lr": 0.05}), IWAE(num_particles=4, gradient=gradient))
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_a_subsampled_autonormal():
    x = torch.linspace(0.5, 3.0, 12)

    def model(x):
        with pyro.plate("data", 12, subsample_size=4) as index:
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    svi = SVI(model, autoguide.AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), IWAE(num_particles=3))
    losses = [svi.step(x) for _ in range(200)]
    assert sum(losses[-40:]) < 0.8 * sum(losses[:40])


@pytest.mark.parametrize("kind", [autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal])
def test_joint_autoguides_weigh_the_whole_call(kind):
    x = torch.tensor([0.5, 1.5, 3.0])
    guide = kind(plain_model)
    with pytest.raises(StructureError, match="datum_plate=None"):
        IWAE().loss(plain_model, guide, x)
    for gradient in GRADIENTS:
        objective = IWAE(num_particles=3, gradient=gradient, datum_plate=None)
        assert math.isfinite(objective.loss_and_grads(plain_model, guide, x))


def test_latents_of_all_data_weigh_the_whole_call():
    """theta ~ N(0, 1), x ~ N(theta, 1) by its exact guide: log p of all data together."""
    x = numbers(4)

    def model(x):
        theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(x):
        pyro.sample("theta", dist.Normal(x.sum() / 5, 1 / math.sqrt(5)))

    with pytest.raises(GlobalLatentError):
        IWAE().loss(model, guide, x)
    evidence = dist.MultivariateNormal(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64) + 1).log_prob(x)
    assert abs(IWAE(num_particles=3, datum_plate=None).loss(model, guide, x) + float(evidence)) < 1e-10


# Numbers that are not finite


def edge_pair():
    """x uniform over (0, z): a draw below x has a weight of zero."""

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Uniform(0.0, p.w * z, validate_args=False), obs=x)

    def guide(p, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(p.loc * x, p.log_t.exp()))

    return Program(model, w=1.0), Program(guide, loc=0.3, log_t=0.1)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_weights_of_zero_leave_value_and_gradient_finite(gradient):
    model, guide = edge_pair()
    x = tensor([0.5, 1.0, 1.5])
    objective = IWAE(num_particles=12, gradient=gradient)
    loss = objective.loss_and_grads(model, guide, x)
    assert math.isfinite(loss)
    for program in (model, guide):
        assert all(bool(w.grad.isfinite()) and float(w.grad) != 0 for w in program.parameters())


def test_a_datum_without_a_usable_particle_leaves_the_gradients_of_others_alone():
    model, guide = edge_pair()
    for gradient in GRADIENTS:
        torch.manual_seed(0)
        loss = IWAE(num_particles=4, gradient=gradient).loss_and_grads(model, guide, tensor([0.2, -1.0]))
        assert loss == math.inf
        for program in (model, guide):
            assert all(bool(w.grad.isfinite()) for w in program.parameters())


@pytest.mark.parametrize("first", [True, False])
def test_data_that_are_not_numbers_warn_as_under_pyro(first):
    """In the first call and in a later one alike."""
    model, guide = Linear("model"), Linear("guide")
    bad = torch.randn(4, 3)
    bad[0, 0] = math.nan
    objective = IWAE(num_particles=2)
    with pyro.validation_enabled(False):
        if not first:
            objective.loss(model, guide, torch.randn(4, 3))
        with pytest.warns(UserWarning, match="(?i)nan"):
            objective.loss_and_grads(model, guide, bad)


# Structure


def test_a_pair_that_changes_its_sites_is_refused():
    case = vae()
    inner, extra = case.model.function, [False]

    def model(p, x):
        inner(p, x)
        if extra[0]:
            with pyro.plate("data", len(x)):
                pyro.sample("more", dist.Normal(p.bias.sum(), 1.0), obs=x[:, 0])

    case.model.function = model
    objective = IWAE(num_particles=2)
    objective.loss(case.model, case.guide, *case.args)
    extra[0] = True
    with pytest.raises(StructureError, match="sites changed"):
        objective.loss(case.model, case.guide, *case.args)


def test_another_pair_under_the_same_objective_is_looked_at_anew():
    case, other = vae(), hierarchical()
    objective = IWAE(num_particles=2)
    objective.loss(case.model, case.guide, *case.args)
    objective.loss(other.model, other.guide, *other.args)
    assert set(objective.terms.kl) == {"z1", "z2"}
    objective.loss(case.model, case.guide, *case.args)
    assert set(objective.terms.kl) == {"z"}


def test_two_objectives_share_a_pair():
    case = vae()
    case.noise = [draws(2, 5, 2)]
    objectives = [warmed(case, IWAE(num_particles=2, gradient=g)) for g in ("standard", "dreg")]
    first = [run("loss_and_grads", o, case)[0] for o in objectives]
    assert_close(*first)
    assert gradients_of(case)


def test_heads_that_couple_the_batch_are_refused():
    class Coupled(nn.Module):
        couples_batch = True

        def forward(self, z):
            return z - z.mean(-2, keepdim=True)

    head = Coupled()

    def model(p, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(head(z) @ p.weight.T, 1.0).to_event(1), obs=x)

    case = vae()
    with pytest.raises(BatchCouplingError, match="train mode"):
        IWAE().loss(Program(model, weight=case.model.weight.detach()), case.guide, *case.args)
    assert head.training


def test_kl_of_terms_is_not_the_loss():
    """beta = 0: the loss is the importance-weighted fit; the KL is still reported, and by the closed form."""
    case = masked(Masks())
    objective = warmed(case, IWAE(0.0, num_particles=2))
    with script(case.noise, True, NORMAL):
        objective.loss(case.model, case.guide, *case.args)
    assert_close(objective.terms.kl["z"], normal_kl(case.guide.loc, case.guide.log_scale.exp()).sum())
