"""Distributions that other libraries bring: flows without an inverse, flows that do not name their support."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pair_helpers import one_line

import pyro_vae as pv
from pyro_vae.errors import StructureError

X = torch.tensor([[0.3, -0.2], [1.5, 0.4]])
TRUTH = dist.Normal(0.0, math.sqrt(1.25)).log_prob(X).sum(-1)  # z ~ N(0, 1), x ~ N(z, .5)
WITHOUT_INVERSE = ["planar", "radial", "sylvester", "block_autoregressive", "polynomial", "neural_autoregressive"]


class Plain(torch.distributions.Distribution):
    """As the flows of other libraries: draws and densities, no `support`."""

    has_rsample, arg_constraints = True, {}

    def __init__(self, loc, scale):
        self.base = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
        super().__init__(self.base.batch_shape, self.base.event_shape, validate_args=False)

    def rsample(self, shape=()):
        return self.base.rsample(shape)

    def log_prob(self, z):
        return self.base.log_prob(z)

    def expand(self, shape, _instance=None):
        normal = self.base.base_dist
        return Plain(normal.loc.expand(*shape, -1), normal.scale.expand(*shape, -1))


class WithoutSupport(dist.TorchDistribution):
    """A wrapper in Pyro's own manner, whose `support` raises NotImplementedError."""

    has_rsample, arg_constraints = True, {}

    def __init__(self, fn):
        self.fn = fn
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def expand(self, shape, _instance=None):
        return WithoutSupport(self.fn.expand(shape))

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.fn.rsample(sample_shape)

    def log_prob(self, value):
        return self.fn.log_prob(value)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def flow_guide(flow, loc=0.8):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(loc * x, 0.5).to_event(1), [flow]))

    return guide


def make(name):
    torch.manual_seed(0)
    flow = getattr(T, name)(2)
    for parameter in flow.parameters():
        parameter.data.mul_(0.3)
    return flow


@pytest.mark.filterwarnings("ignore::pyro_vae.errors.UnreliableEvidenceWarning")
@pytest.mark.parametrize("name", WITHOUT_INVERSE)
def test_evidence_and_elbo_of_a_flow_without_an_inverse(name):
    """Five errors and the gate of the errors: a false alarm in 10^6. The ELBO against draws of our own."""
    flow = make(name)
    evidence = pv.ImportanceSampling(model, flow_guide(flow), num_particles=4000, seed=0)(X)
    good = ~(evidence.pareto_k > 0.5)
    assert ((evidence.log_evidence - TRUTH).abs() < 5 * evidence.std_error)[good].all()
    with torch.no_grad():
        base = 0.8 * X + 0.5 * torch.randn(20_000, 2, 2)
        z = flow(base)
        log_q = dist.Normal(0.8 * X, 0.5).log_prob(base).sum(-1) - log_det(flow, base, z)
        terms = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z, 0.5).log_prob(X).sum(-1) - log_q
    error = (evidence.elbo_std_error.square() + terms.var(0) / len(terms)).sqrt()
    assert ((evidence.elbo - terms.mean(0)).abs() < 5 * error).all()


def log_det(flow, base, z):
    found = flow.log_abs_det_jacobian(base, z)
    return found.sum(-1) if found.ndim == base.ndim else found


@pytest.mark.parametrize("name", ["planar", "block_autoregressive", "neural_autoregressive"])
def test_gaps_of_a_flow_without_an_inverse(name):
    """q* is at least as good as q, and log p(x) at least as large as L[q*], within five errors."""
    gaps = pv.InferenceGaps(model, flow_guide(make(name), loc=0.2), num_particles=200, seed=0)(X)
    assert (gaps.amortization > -5 * gaps.std_errors["amortization"]).all()
    assert (gaps.approximation > -5 * gaps.std_errors["approximation"]).all()
    assert ((gaps.log_evidence - TRUTH).abs() < 5 * gaps.std_errors["log_evidence"] + 1e-3).all()


@pytest.mark.filterwarnings("ignore::pyro_vae.errors.UnreliableEvidenceWarning")
def test_a_loop_over_particles_replays_a_flow_without_an_inverse():
    flow = make("planar")

    def looped(x):
        assert float(x[0, 0]) > -99  # reads data: no particle axis
        flow_guide(flow)(x)

    one, other = (
        pv.ImportanceSampling(model, g, num_particles=500, seed=3)(X).log_evidence for g in (flow_guide(flow), looped)
    )
    assert ((one - other).abs() < 0.2).all()


def test_hidden_randomness_behind_a_flow_without_an_inverse_is_found():
    flow = make("planar")

    def guide(x):
        flow_guide(flow, loc=float(torch.rand(())))(x)

    with pytest.raises(pv.errors.HiddenRandomnessError):
        pv.ImportanceSampling(model, guide, num_particles=10)(X)


def test_the_gradient_of_the_weighted_bound():
    """The same loss and gradient as a hand-written one on the same noise, K = 1."""
    flow = make("planar")
    guide = flow_guide(flow)
    torch.manual_seed(5)
    pv.ImportanceWeightedELBO(num_particles=1).differentiable_loss(model, guide, X).backward()
    found = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    torch.manual_seed(5)
    base = 0.8 * X + 0.5 * torch.randn(1, 2, 2)
    z = flow(base)
    log_q = dist.Normal(0.8 * X, 0.5).log_prob(base).sum(-1) - flow.log_abs_det_jacobian(base, z)
    loss = -(dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z, 0.5).log_prob(X).sum(-1) - log_q).sum()
    loss.backward()
    for ours, parameter in zip(found, flow.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(StructureError, match="use gradient='standard'"):
        pv.ImportanceWeightedELBO(num_particles=2, gradient="dreg").loss(model, guide, X)


def test_where_log_q_is_needed_at_other_values_the_error_has_a_name():
    guide = flow_guide(make("planar"))
    with pytest.raises(StructureError, match="without an inverse"):
        pv.ELBOSurgery(model, guide)([X], progress=False)
    with pytest.raises(StructureError, match="without an inverse"):
        pv.AnnealedImportanceSampling(model, guide, start="guide", num_steps=2, progress=False)(X)
    with pytest.raises(StructureError, match="without an inverse"):
        pv.ImportanceSampling(guide_as_prior, flow_guide(make("spline")), num_particles=10)(X)


def guide_as_prior(x):
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
        z = pyro.sample("z", dist.TransformedDistribution(base, [make("planar")]))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


# --------------------------------------------------------------------------------------------- without a support


def prior_without_support(wrap):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", wrap(torch.zeros(2), torch.ones(2)))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    return model


def zuko_like(loc, scale):
    from pyro.contrib.zuko import ZukoToPyro

    return ZukoToPyro(Plain(loc, scale))


def pyro_like(loc, scale):
    return WithoutSupport(dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("wrap", [zuko_like, pyro_like])
def test_a_prior_without_a_support(wrap):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.5).to_event(1))

    model = prior_without_support(wrap)
    for estimator in (
        pv.ImportanceSampling(model, guide, num_particles=2000, seed=0),
        pv.AdaptiveImportanceSampling(model, guide, seed=0),
        pv.AnnealedImportanceSampling(model, guide, num_steps=20, seed=0, progress=False),
    ):
        evidence = estimator(X)
        assert ((evidence.log_evidence - TRUTH).abs() < 5 * evidence.std_error + 1e-3).all()
        assert (evidence.std_error < 0.02).all()
        assert "support not checked (the support of 'z' is unknown" in one_line(evidence)
    torch.testing.assert_close(pv.ExactEvidence(model, guide)(X).log_evidence, TRUTH, rtol=1e-4, atol=1e-4)
    assert pv.simulate(model, X, seed=0).observed["x"].shape == X.shape


@pytest.mark.parametrize("wrap", [zuko_like, pyro_like])
def test_the_gaps_of_a_guide_without_a_support(wrap):
    """N(.3, 2) for every datum, moved and scaled per datum: q* is the posterior, whose approximation gap is zero."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", wrap(torch.full_like(x, 0.3), torch.full_like(x, 2.0)))

    gaps = pv.InferenceGaps(model, guide, seed=0)(X)
    assert "shift" in gaps.family
    posterior = dist.Normal(0.8 * X, math.sqrt(0.2))
    kl = torch.distributions.kl_divergence(dist.Normal(0.3, 2.0), posterior).sum(-1)
    assert ((gaps.amortization - kl).abs() < 5 * gaps.std_errors["amortization"] + 0.02).all()
    assert (gaps.approximation.abs() < 5 * gaps.std_errors["approximation"] + 0.02).all()
    assert (gaps.std_errors["approximation"] < 0.05).all()


def test_a_likelihood_without_a_support():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", WithoutSupport(dist.Normal(z, 0.5).to_event(1)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, math.sqrt(0.2)).to_event(1))

    found = pv.ImportanceSampling(model, guide, num_particles=7)(X).log_evidence
    torch.testing.assert_close(found, TRUTH, rtol=1e-5, atol=1e-5)
