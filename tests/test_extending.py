"""The examples of docs/extending.md: each against a closed form, in use, and with what it refuses."""

import importlib.util
import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    SIGMAS,
    assert_near,
    exact_pair,
    guide_of,
    linear_gaussian,
    make_evidence,
    model_of,
    posterior_moments,
    quiet,
    scaled_family,
)
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import EnumerationError, StructureError, SupportError
from pyro_vae.kernel import Pair
from pyro_vae.objectives.datum_elbo import DatumELBO
from pyro_vae.ops import log_mean_exp, log_mean_exp_std_error
from pyro_vae.proposals import GaussianProposal, LatentSpace, MixtureProposal, proposal_log_weights
from pyro_vae.proposals.mixture import PRIOR_SHARE

DOCS = Path(__file__).parents[1] / "docs"
FILES = sorted((DOCS / "examples").glob("extending_*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RenyiBound = load("extending_bound").RenyiBound
MixtureSampling = load("extending_estimator").MixtureSampling
plot_elbos = load("extending_plot").plot_elbos
Weibull = load("extending_head").Weibull
LM, X = linear_gaussian()
ALPHAS = (-1.0, 0.0, 0.5, 2.0)


def test_the_page_shows_each_file():
    shown = re.findall(r"^```\{literalinclude\} examples/(\S+)$", (DOCS / "extending.md").read_text(), re.M)
    assert sorted(shown) == [path.name for path in FILES]


# The bound


def renyi_divergence(q, p, alpha):
    """D_alpha(q || p) of two Gaussians (van Erven and Harremoes, 2014, https://arxiv.org/abs/1206.2459, section 2)."""
    between = alpha * p.covariance_matrix + (1 - alpha) * q.covariance_matrix
    distance = torch.linalg.solve(between, (q.mean - p.mean).unsqueeze(-1)).squeeze(-1)
    quadratic = (distance * (q.mean - p.mean)).sum(-1)
    log_dets = between.logdet() - (1 - alpha) * q.covariance_matrix.logdet() - alpha * p.covariance_matrix.logdet()
    return alpha / 2 * quadratic + log_dets / (2 * (1 - alpha))


def near_posterior():
    """A guide that is a little off, and its distribution: a posterior mean shifted and a covariance that is larger."""
    moments = posterior_moments(LM)

    def family(x):
        loc, root = moments(x)
        return dist.MultivariateNormal(loc + 0.1, scale_tril=1.1 * root)

    return guide_of(family), family(X)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_particles", [1, 7])
def test_the_bound_of_an_exact_guide_is_log_p(alpha, num_particles):
    loss = RenyiBound(alpha, num_particles=num_particles).loss(*exact_pair(LM), X)
    assert loss == pytest.approx(-float(LM.log_evidence(X).sum()), abs=1e-10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_bound_is_its_formula_and_tends_to_the_divergence_of_renyi(alpha):
    """The same draws by hand, to rounding; and 20,000 of them within 4.5 standard errors of log p(x) - D_alpha."""
    model, (guide, q) = model_of(LM), near_posterior()
    objective = RenyiBound(alpha, num_particles=20_000)
    objective.loss(model, guide, X)  # rehearsed
    torch.manual_seed(1)
    loss = objective.loss(model, guide, X)
    torch.manual_seed(1)
    z = q.expand((20_000, len(X))).rsample()
    log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_joint = log_joint + dist.Normal(z @ LM.weight.T + LM.bias, LM.variance.sqrt()).log_prob(X).sum(-1)
    powers = (1 - alpha) * (log_joint - q.log_prob(z))
    bound = log_mean_exp(powers, 0) / (1 - alpha)
    assert loss == pytest.approx(-float(bound.sum()), abs=1e-8)
    truth = LM.log_evidence(X) - renyi_divergence(q, LM.posterior(X), alpha)
    assert_near(bound, truth, log_mean_exp_std_error(powers) / abs(1 - alpha), largest_error=0.01)
    above = LM.log_evidence(X) - truth
    assert bool(((above > 0) if alpha > 0 else (above < 0) if alpha < 0 else (above.abs() < 1e-9)).all())


def test_the_bound_is_that_of_importance_weights_at_zero():
    model, (guide, _) = model_of(LM), near_posterior()
    losses = []
    for objective in (RenyiBound(0.0, num_particles=5), pv.ImportanceWeightedELBO(num_particles=5)):
        objective.loss(model, guide, X)
        torch.manual_seed(2)
        losses.append(objective.loss(model, guide, X))
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


class Shifted(nn.Module):
    """A guide N(m(x) + b, exp(s)^2) around the posterior mean of orthogonal weights, which it reaches at b = 0."""

    def __init__(self, lm):
        super().__init__()
        self.moments = posterior_moments(lm)
        self.shift = nn.Parameter(torch.full((2,), 0.7, dtype=F64))
        self.log_scale = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x):
        pyro.module("shifted", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))

    def q(self, x):
        return dist.Normal(self.moments(x)[0] + self.shift, self.log_scale.exp()).to_event(1)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_bound_trains_a_guide_to_the_posterior_under_svi(alpha):
    lm = pv.exact.LinearGaussian.fit(X, 2, 0.5)
    guide = Shifted(lm)
    before = lm.gaps(X, guide.q(X)).inference.mean().item()
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.98})
    svi = SVI(model_of(lm), guide, optimizer, RenyiBound(alpha, num_particles=5))
    for _ in range(250):
        svi.step(X)
        optimizer.step()
    after = lm.gaps(X, guide.q(X)).inference.mean().item()
    assert before > 1 and after < 0.02, (before, after)


class Switch(nn.Module):
    """c ~ Bernoulli(.3), x ~ N(c, 1); the guide draws c with one logit for all data."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.4, dtype=F64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def forward(self, x):
        pyro.module("switch", self)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=self.logit))

    def gradient(self, bound, x, num_particles):
        """Of the expected loss for one datum, by all draws of all particles."""
        draws = torch.cartesian_prod(*[torch.arange(2, dtype=F64)] * num_particles).reshape(-1, num_particles).T  # (K, 2^K)
        q, p = dist.Bernoulli(logits=self.logit), dist.Bernoulli(x.new_tensor(0.3))
        log_weight = p.log_prob(draws) + dist.Normal(draws, 1.0).log_prob(x) - q.log_prob(draws)
        expected = (q.log_prob(draws).sum(0).exp() * bound(log_weight)).sum()
        return float(torch.autograd.grad(-expected, self.logit)[0])


@pytest.mark.parametrize("num_particles", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_the_gradient_of_a_discrete_guide_is_that_of_all_its_draws(alpha, num_particles):
    """40 calls of 5,000 like data: within 4.5 standard errors of the mean, which are at most .01."""
    guide, x = Switch(), torch.full((5000,), 1.3, dtype=F64)
    objective = RenyiBound(alpha, num_particles=num_particles)
    truth = guide.gradient(objective.bound, x[0], num_particles)
    found = []
    for _ in range(40):
        guide.logit.grad = None
        objective.loss_and_grads(guide.model, guide, x)
        found.append(guide.logit.grad / len(x))
    found = torch.stack(found)
    assert_near(
        found.mean(0, True), torch.tensor([truth], dtype=F64), found.std(0, keepdim=True) / 40**0.5, largest_error=0.01
    )


@pytest.mark.parametrize("num_particles", [1, 5])
def test_the_gradients_of_any_draws_are_those_of_importance_weights_at_zero(num_particles):
    """Discrete draws that depend on others with a path, and a latent that the model draws itself."""
    names = ("loc", "logit", "slope", "rate")
    parameters = {n: nn.Parameter(torch.tensor(0.3 + i / 5, dtype=F64)) for i, n in enumerate(names)}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            c = pyro.sample("c", dist.Bernoulli(logits=z))
            own = pyro.sample("own", dist.Bernoulli(logits=parameters["rate"] * z))
            pyro.sample("x", dist.Normal(z + c - own, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(parameters["loc"] * x, 0.7))
            pyro.sample("c", dist.Bernoulli(logits=parameters["logit"] + parameters["slope"] * z))

    class Zero(RenyiBound):
        def __init__(self, **options):
            DatumELBO.__init__(self, **options)
            self.power = 1

    gradients = []
    for kind in (Zero, pv.ImportanceWeightedELBO):
        objective = kind(num_particles=num_particles, prior_sites=["own"])
        objective.loss(model, guide, X[:, 0])  # rehearsed
        torch.manual_seed(3)
        loss = objective.differentiable_loss(model, guide, X[:, 0])
        gradients.append(torch.stack(torch.autograd.grad(loss, list(parameters.values()))))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert bool((gradients[0] != 0).all())


class Forgetful(DatumELBO):
    """Autograd alone, as a bound was written before: the gradient of the logit was -.109 where +.132 is right."""

    def _loss_and_surrogate(self, model, guide, args, kwargs):
        call = self._call(model, guide, args, kwargs)
        weights, scale = self._weigh(call, call.draw(self.num_particles))
        loss = -(log_mean_exp(weights.log_weight, 0) * scale).sum()
        return loss.detach(), loss


def test_a_bound_that_forgets_the_score_function_is_refused():
    guide, x = Switch(), X[:, 0]
    objective = Forgetful(num_particles=2)
    for call in (objective.loss_and_grads, objective.differentiable_loss):
        with pytest.raises(StructureError, match=r"'c' are not reparam.*Forgetful has no score.*bound\(log_weight\)"):
            call(guide.model, guide, x)
    assert math.isfinite(objective.loss(guide.model, guide, x))  # which has no gradient
    guide.eval().logit.requires_grad_(False)  # Pyro warns of it in train mode
    objective.loss_and_grads(guide.model, guide, x)  # nor is there any to be wrong here
    reparameterised = model_of(LM), near_posterior()[0]
    objective.loss_and_grads(*reparameterised, X)


def test_a_bound_that_forgets_what_the_model_draws_is_refused():
    rate = nn.Parameter(torch.tensor(0.2, dtype=F64))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            own = pyro.sample("own", dist.Bernoulli(logits=rate))
            pyro.sample("x", dist.Normal(z - own, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.7))

    with pytest.raises(StructureError, match="'own' are not reparam"):
        Forgetful(num_particles=2, prior_sites=["own"]).loss_and_grads(model, guide, X[:, 0])


@pytest.mark.parametrize("kind", [RenyiBound(0.5), Forgetful(num_particles=2)])
def test_no_bound_takes_enumeration_in_the_guide(kind):
    guide = Switch()
    with pytest.raises(EnumerationError, match="the guide enumerates 'c'"):
        kind.loss(guide.model, pyro.infer.config_enumerate(guide), X[:, 0])


def test_an_objective_without_a_bound_says_so():
    with pytest.raises(NotImplementedError, match=r"define bound\(log_weight\)"):
        DatumELBO(num_particles=2).loss(model_of(LM), near_posterior()[0], X)


# The head


def test_the_head_is_scipys_integrates_to_one_and_has_the_moments_of_the_formula():
    raw = torch.tensor([[0.5, 1.5, -1.0, 2.0]], dtype=F64)
    fn = Weibull()(raw).base_dist
    scale, concentration = (torch.nn.functional.softplus(chunk) + 0.1 for chunk in raw.chunk(2, -1))
    logs = torch.linspace(-90, 10, 20_001, dtype=F64)
    x = logs.exp().reshape(-1, 1, 1)
    p = fn.log_prob(x)
    expected = stats.weibull_min.logpdf(x.numpy(), concentration.numpy(), scale=scale.numpy())
    torch.testing.assert_close(p, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    weights = p.exp() * x * (100 / 20_000)
    torch.testing.assert_close(weights.sum(0), torch.ones(1, 2, dtype=F64), rtol=0, atol=1e-9)
    mean = scale * torch.lgamma(1 + 1 / concentration).exp()
    torch.testing.assert_close((weights * x).sum(0), mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(fn.mean, mean)


def test_the_head_stands_far_out_raw_numbers():
    for raw in ([0.0, 20.0], [50.0, -50.0], [-50.0, -50.0]):
        raw = torch.tensor(raw, requires_grad=True)
        fn = Weibull()(raw)
        log_prob = fn.log_prob(torch.tensor([1.5]))
        assert bool(log_prob.isfinite()) and fn.expand((4,)).sample().shape == (4, 1)
        (gradient,) = torch.autograd.grad(log_prob, raw)
        assert bool(gradient.isfinite().all())


def test_the_head_trains_in_a_vae():
    scale = torch.where(torch.arange(40) % 2 == 0, 1.0, 8.0).unsqueeze(-1).expand(40, 5)  # two kinds of data
    x = dist.Weibull(scale, 2.0).sample()
    vae = pv.mlp_vae(5, 2, likelihood=Weibull(), hidden=(16,))
    torch.testing.assert_close(vae.encoder[0](x), x.log())
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), pv.BetaTraceMeanField_ELBO())
    losses = [svi.step(x) for _ in range(200)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    with quiet():
        gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=100, seed=0)(x)
    assert bool(gaps.log_evidence.isfinite().all())


def test_evidence_under_the_head_is_that_of_quadrature():
    vae = pv.mlp_vae(5, 1, likelihood=Weibull(), hidden=(16,)).double()  # untrained: posteriors are smooth
    x = torch.tensor([[0.3, 1.0, 0.1, 3.0, 2.0], [0.01, 0.2, 5.0, 0.5, 1.0]], dtype=F64)
    truth = pv.ExactEvidence(vae.model, vae.guide)(x).log_evidence
    estimate = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=2000, seed=0)(x)
    assert_near(estimate.log_evidence, truth, estimate.std_error, largest_error=0.02)


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
def test_the_head_refuses_what_are_no_waiting_times(bad):
    with pytest.raises(SupportError, match="Weibull head takes positive numbers"):
        Weibull()(torch.zeros(1, 4)).log_prob(torch.tensor([[1.0, bad]]))


# The estimator


@pytest.mark.parametrize("num_particles", [2, 30, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimator_of_an_exact_guide_is_log_p(num_particles, seed):
    with quiet():
        evidence = MixtureSampling(*exact_pair(LM), num_particles=num_particles, seed=seed)(X)
    torch.testing.assert_close(evidence.log_evidence, LM.log_evidence(X), rtol=0, atol=1e-10)
    assert evidence.bound == "consistent" and evidence.cost == num_particles


def test_the_estimator_of_a_wrong_guide_is_near_log_p_with_an_honest_error():
    """Within 4.5 standard errors; and over 100 replicates the spread is the error that is stated, within a third."""
    pair = model_of(LM), guide_of(scaled_family(LM, 0.6, 0.3))  # its own weights have infinite variance
    evidence = MixtureSampling(*pair, num_particles=10_000, seed=0)(X)
    assert_near(evidence.log_evidence, LM.log_evidence(X), evidence.std_error, largest_error=0.03)
    with quiet():
        runs = [MixtureSampling(*pair, num_particles=1000, seed=seed)(X[:2]) for seed in range(100)]
    values = torch.stack([run.log_evidence for run in runs])
    stated = torch.stack([run.std_error for run in runs]).mean(0)
    assert bool((values.std(0) / stated - 1).abs().max() < SIGMAS / (2 * 100) ** 0.5)
    torch.testing.assert_close(evidence.elbo, LM.elbo(X, scaled_family(LM, 0.6, 0.3)(X)), rtol=0, atol=0.2)


def test_the_estimator_with_the_prior_as_guide_is_importance_sampling_from_it():
    prior = guide_of(lambda x: dist.Normal(x.new_zeros(2), 1.0).expand((len(x), 2)).to_event(1))
    with quiet():
        evidence = MixtureSampling(model_of(LM), prior, num_particles=5000, seed=0)(X)
    assert_near(evidence.log_evidence, LM.log_evidence(X), evidence.std_error, largest_error=0.1)


def test_a_share_of_the_prior_bounds_the_weights():
    """p(x, z) / r(z) <= max_z p(x|z) / share, here for a fit that is far off and too narrow."""
    with torch.no_grad(), Pair(*exact_pair(LM)).open((X,), {}, 0) as call:
        drawn = call.draw(2)
        space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 2))
        posterior = LM.posterior(X)
        far = GaussianProposal(posterior.mean + 3, 0.1 * posterior.scale_tril)
        log_weight = proposal_log_weights(space, MixtureProposal.of(far), 1000)
    best = torch.linalg.lstsq(LM.weight, (X - LM.bias).T).solution.T
    highest = dist.Normal(best @ LM.weight.T + LM.bias, LM.variance.sqrt()).log_prob(X).sum(-1)
    assert bool((log_weight.amax(0) <= highest - math.log(PRIOR_SHARE) + 1e-9).all())
    assert bool((log_weight.amax(0) > highest - math.log(PRIOR_SHARE) - 1).any())  # the bound is no idle one


def test_the_estimator_leaves_nothing_behind():
    x = X.float()
    vae = pv.mlp_vae(4, 2, likelihood=pv.nn.Normal(1.0))
    pyro.get_param_store()["mine"] = torch.ones(2)
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    random_state = torch.get_rng_state()
    with quiet():
        first, second = (MixtureSampling(vae.model, vae.guide, num_particles=50, seed=3)(x) for _ in range(2))
    assert torch.equal(first.log_evidence, second.log_evidence)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    assert vae.training and all(p.grad is None for p in vae.parameters())


def test_the_estimator_refuses_what_has_no_density_at_draws_of_the_prior():
    model = model_of(LM)
    guide = AutoNormal(model, create_plates=lambda x: pyro.plate("data", len(x), dim=-1))
    guide(X)
    with pytest.raises(StructureError, match="let the guide sample the latents"):
        MixtureSampling(model, guide, num_particles=10)(X)

    model, guide = exact_pair(LM)
    with pytest.raises(StructureError, match="unmasked"):
        MixtureSampling(pyro.poutine.mask(model, mask=torch.arange(len(X)) > 0), guide, num_particles=10)(X)


# The picture


def test_the_picture_holds_all_data_and_draws_where_it_is_told():
    evidence = make_evidence([-3.0, -2.0, -1.0])
    ax = plt.subplots()[1]
    assert plot_elbos(evidence, ax) is ax
    points = ax.lines[0].get_xydata()
    assert points.tolist() == [[-3.0, -4.0], [-2.0, -3.0], [-1.0, -2.0]]
    other = plot_elbos(evidence)
    assert other is not ax and other.get_title() == "3 data"
    plt.close("all")
