"""Mixture, VampPrior and flow: their densities against sums and changes of variables by hand, and in a VAE by quadrature."""

import copy
import io
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from nn_helpers import F64
from pyro.distributions import transforms as T
from pyro.infer import SVI
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import OptionError

pytestmark = pytest.mark.filterwarnings("ignore:ConditionalAutoRegressiveNN input_dim = 1")

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))


def encoder(latent_dim):
    return nn.Sequential(nn.Linear(5, 2 * latent_dim), pv.nn.Normal())


def mixture(latent_dim):
    return pv.nn.MixturePrior(latent_dim, 3)


def vamp(latent_dim):
    return pv.nn.VampPrior(encoder(latent_dim), X[:4].clone())


def flow(latent_dim):
    first, second = (T.affine_autoregressive(latent_dim, hidden_dims=[8]) for _ in range(2))
    between = [T.permute(latent_dim, torch.arange(latent_dim).flip(0))] if latent_dim > 1 else []
    return pv.nn.FlowPrior(latent_dim, [first, *between, second])


def spline(latent_dim):
    return pv.nn.FlowPrior(latent_dim, [T.spline_autoregressive(latent_dim, hidden_dims=[8])])


PRIORS = {"mixture": mixture, "vamp": vamp, "flow": flow, "spline": spline}


def made(name, latent_dim, seed=0):
    """A prior that is not at its symmetric start."""
    torch.manual_seed(seed)
    prior = PRIORS[name](latent_dim)
    with torch.no_grad():
        for param in prior.parameters():
            param += 0.3 * torch.randn_like(param)
    return prior


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_the_density_integrates_to_one(name, latent_dim):
    prior = made(name, latent_dim).double()
    line = torch.linspace(-12, 12, 20_001 if latent_dim == 1 else 801, dtype=F64)
    points = torch.cartesian_prod(*[line] * latent_dim).reshape(-1, latent_dim)
    total = prior().log_prob(points).detach().exp().sum() * (line[1] - line[0]) ** latent_dim
    assert float(total) == pytest.approx(1, abs=3e-3 if name == "spline" else 1e-4)  # splines have corners


@pytest.mark.parametrize("name", PRIORS)
def test_draws_have_the_density(name):
    """Mean and second moment by importance sampling from a wide normal. Each is beyond 4.4 errors in 1e-5 of runs."""
    prior = made(name, 2)()
    torch.manual_seed(3)
    wide = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 4.0), 1)
    z, drawn = wide.sample((100_000,)), prior.sample((20_000,))
    weights = (prior.log_prob(z) - wide.log_prob(z)).exp()
    for power in (1, 2):
        terms, moments = weights.unsqueeze(-1) * z**power, drawn**power
        error = (terms.var(0) / len(terms) + moments.var(0) / len(moments)).sqrt()
        assert ((terms.mean(0) - moments.mean(0)).abs() < 4.4 * error).all()


def test_a_mixture_is_the_sum_of_its_components():
    prior = made("mixture", 3)
    z = torch.randn(7, 3)
    scales = torch.log2(1 + 2**prior.raw_scale) + 1e-4
    parts = [dist.Normal(loc, scale).log_prob(z).sum(-1) for loc, scale in zip(prior.loc, scales, strict=True)]
    wanted = (torch.stack(parts) + prior.logits.log_softmax(0).unsqueeze(-1)).logsumexp(0)
    torch.testing.assert_close(prior().log_prob(z), wanted)


@pytest.mark.parametrize("bounds", [None, (0, 16), (-1.0, 1.0)])
def test_a_vamp_prior_is_the_mean_over_its_pseudo_inputs(bounds):
    torch.manual_seed(0)
    low, high = bounds or (-3, 3)
    start = low + (high - low) * torch.rand(4, 5)
    start[0] = low  # at the bound, where a sigmoid would be infinitely far
    prior = pv.nn.VampPrior(encoder(2), start, bounds=bounds)
    assert (prior.pseudo_inputs - start).abs().max() < 0.0101 * (high - low)
    z = torch.randn(7, 2)
    wanted = torch.stack([prior.encoder(u).log_prob(z) for u in prior.pseudo_inputs]).logsumexp(0) - math.log(4)
    torch.testing.assert_close(prior().log_prob(z), wanted)
    prior().log_prob(z).sum().backward()
    assert all(param.grad.abs().max() > 0 for param in prior.parameters())
    with torch.no_grad():
        prior.raw_inputs += 100 * torch.randn_like(prior.raw_inputs)
    if bounds:
        assert (prior.pseudo_inputs >= low).all() and (prior.pseudo_inputs <= high).all()


def test_a_flow_prior_is_a_change_of_variables():
    prior = made("flow", 3)
    z = torch.randn(7, 3)
    point, log_det = z, torch.zeros(7)
    for transform in prior.transforms:
        image = transform(point)
        log_det = log_det + transform.log_abs_det_jacobian(point, image).reshape(7, -1).sum(-1)
        point = image
    wanted = dist.Normal(0.0, 1.0).log_prob(point).sum(-1) + log_det
    torch.testing.assert_close(prior().log_prob(z), wanted)
    jacobian = torch.autograd.functional.jacobian(lambda one: push(prior, one), z[0])
    torch.testing.assert_close(log_det[0], jacobian.det().abs().log())


def push(prior, point):
    for transform in prior.transforms:
        point = transform(point)
    return point


@pytest.mark.parametrize("name", PRIORS)
def test_it_trains_in_a_vae_whose_evidence_is_that_of_quadrature(name):
    torch.manual_seed(0)
    shared = encoder(1)
    prior = pv.nn.VampPrior(shared, X[:4].clone()) if name == "vamp" else PRIORS[name](1)
    vae = pv.VAE(shared, nn.Sequential(nn.Linear(1, 5), pv.nn.Normal(0.7)), prior)
    before = [param.detach().clone() for param in prior.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), pv.BetaTraceMeanField_ELBO())
    losses = [svi.step(X) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert sum(not torch.equal(*both) for both in zip(before, prior.parameters(), strict=True)) >= len(before) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=1000, seed=0)(X[:6])
    line = torch.linspace(-12, 12, 4001).unsqueeze(-1)
    log_joint = prior().log_prob(line) + vae.decode(line.unsqueeze(1)).log_prob(X[:6]).T
    wanted = log_joint.logsumexp(-1) + math.log(24 / 4000)
    good = found.reliable
    assert good.sum() >= 4
    assert ((found.log_evidence - wanted).abs() < 5 * found.std_error + 0.01)[good].all()


@pytest.mark.parametrize("name", PRIORS)
def test_the_rate_is_that_of_quadrature(name):
    """KL(q to p) of a sampled KL, averaged over draws: within 4.4 errors, beyond which 1e-5 of runs are."""
    torch.manual_seed(0)
    shared = encoder(1)
    prior = pv.nn.VampPrior(shared, X[:4].clone()) if name == "vamp" else made(name, 1)
    vae = pv.VAE(shared, nn.Sequential(nn.Linear(1, 5), pv.nn.Normal(0.7)), prior)
    q = vae.encode(X[:6])
    line = torch.linspace(-12, 12, 8001).reshape(-1, 1, 1)
    log_q, log_p = q.log_prob(line), prior().log_prob(line)
    wanted = (log_q.exp() * (log_q - log_p)).sum(0) * 24 / 8000
    objective = pv.BetaTrace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(1)
    objective.loss(vae.model, vae.guide, X[:6])
    found = objective.terms.per_datum().kl["latent"]
    draws = q.sample((20_000,))
    error = (q.log_prob(draws) - prior().log_prob(draws)).var(0).mean().div(6 * 2000).sqrt()
    assert error < 0.02
    assert abs(found - wanted.mean()) < 4.4 * error + 1e-3


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state"])
def test_copies_have_the_density_and_learn_on(name, copied):
    prior, z = made(name, 2), torch.randn(5, 2)
    if copied == "deepcopy":
        other = copy.deepcopy(prior)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(prior))
    else:
        file, other = io.BytesIO(), made(name, 2, seed=9)
        torch.save(prior.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other().log_prob(z), prior().log_prob(z))
    other().log_prob(z).sum().backward()
    assert all(param.grad is not None for param in other.parameters())
    assert all(param.grad is None for param in prior.parameters())


@pytest.mark.parametrize("name", PRIORS)
def test_it_follows_types(name):
    """Draws of an autoregressive flow are left out: Pyro inverts it in float32."""
    prior = made(name, 2).double()
    assert prior().log_prob(torch.zeros(2, dtype=F64)).dtype == F64
    if name in ("mixture", "vamp"):
        assert prior().sample().dtype == F64
    assert made(name, 2)().event_shape == (2,)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: pv.nn.MixturePrior(2, 0), "num_components"),
        (lambda: pv.nn.MixturePrior(0, 2), "latent_dim"),
        (lambda: pv.nn.VampPrior(encoder(2), torch.zeros(4, 5, dtype=torch.long)), r"\(4, 5\) torch.int64"),
        (lambda: pv.nn.VampPrior(encoder(2), torch.zeros(5)), r"\(5,\) torch.float32"),
        (lambda: pv.nn.VampPrior(encoder(2), 20), "got int"),
        (lambda: pv.nn.VampPrior(encoder(2), torch.zeros(4, 5), bounds=(1, 0)), r"got \(1, 0\)"),
        (lambda: pv.nn.VampPrior(encoder(2), torch.zeros(4, 5), bounds=1), "got 1"),
        (lambda: pv.nn.VampPrior(encoder(2), torch.full((4, 5), 2.0), bounds=(0, 1)), "got 2 to 2"),
        (lambda: pv.nn.FlowPrior(2, []), r"got \[\]"),
        (lambda: pv.nn.FlowPrior(2, T.spline(2)), "got Spline"),
        (lambda: pv.nn.FlowPrior(2, [nn.Linear(2, 2)]), "got Linear"),
    ],
    ids=[f"case {i}" for i in range(11)],
)
def test_what_is_refused(make, says):
    with pytest.raises(OptionError, match=says):
        make()
