"""Where float32 is not enough: every estimator says so, and says nothing where it is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import exact_pair, linear_gaussian, quiet
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.errors.PrecisionWarning")  # the checks are looked at instead

B, GENES = 4, 100


def pair(family, slope=0.3):
    """Counts around 5 exp(slope z) in every gene; `family` maps (x, mean) to their distribution."""

    def model(x):
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            mean = 5 * (slope * z).exp().unsqueeze(-1).expand(z.shape + x.shape[-1:])
            pyro.sample("x", family(x, mean).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("cells", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 0.2))

    return model, guide


def negative_binomial(size):
    return lambda x, mean: dist.NegativeBinomial(x.new_tensor(size), logits=(mean / size).log())


FAMILIES = {
    "negative binomial": negative_binomial,
    "gamma Poisson": lambda n: lambda x, mean: dist.GammaPoisson(x.new_tensor(n), n / mean),
    "binomial": lambda n: lambda x, mean: dist.Binomial(x.new_tensor(n), logits=(mean / n).log()),
    "beta binomial": lambda n: lambda x, mean: dist.BetaBinomial(mean, x.new_tensor(n), total_count=x.new_tensor(n)),
    "Student t": lambda n: lambda x, mean: dist.StudentT(x.new_tensor(n), mean, 1.0),
    "Poisson": lambda n: lambda x, mean: dist.Poisson(mean * n / 5),
}


def observed(family, size, genes=GENES):
    return torch.poisson(torch.full((B, genes), size if family == "Poisson" else 5.0))


def assert_right_or_doubted(evidence, truth):
    """At most 5 stated errors (and what float32 scatters anyway), or a doubt."""
    error = (evidence.log_evidence.double() - truth).abs()
    allowed = 5 * evidence.std_error + 1e-3 + 5e-7 * truth.abs()
    assert bool(((error <= allowed) | evidence.checks["precision"]).all()), (error, evidence.std_error)


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5, 1e7])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_large_parameters(family, size):
    model, guide = pair(FAMILIES[family](size), slope=0.01 if family == "Poisson" else 0.3)
    x = observed(family, size)
    exact = pv.ExactEvidence(model, guide)(x.double())
    assert not exact.checks["precision"].any()
    with quiet():
        evidence = pv.AdaptiveImportanceSampling(model, guide, seed=0)(x)
    assert_right_or_doubted(evidence, exact.log_evidence)
    if size >= 1e4:
        assert bool(evidence.checks["precision"].all())


@pytest.mark.parametrize("size", [1e2, 1e7])
def test_two_thousand_genes(size):
    model, guide = pair(negative_binomial(size))
    x = observed("negative binomial", size, 2000)[:2]
    truth = pv.ExactEvidence(model, guide)(x.double()).log_evidence
    with quiet():
        assert_right_or_doubted(pv.AdaptiveImportanceSampling(model, guide, seed=0)(x), truth)


@pytest.mark.parametrize(
    "estimator",
    [
        lambda m, g: pv.ImportanceSampling(m, g, num_particles=500, seed=0),
        lambda m, g: pv.ImportanceSampling(m, g, num_particles=500, jackknife=1, seed=0),
        lambda m, g: pv.AdaptiveImportanceSampling(m, g, seed=0),
        lambda m, g: pv.AnnealedImportanceSampling(m, g, num_steps=10, progress=False, seed=0),
        lambda m, g: pv.ExactEvidence(m, g),
    ],
    ids=["importance", "jackknife", "adaptive", "annealed", "exact"],
)
@pytest.mark.parametrize("size, doubted", [(10.0, False), (1e4, True), (1e7, True)])
def test_every_estimator_looks(estimator, size, doubted):
    model, guide = pair(negative_binomial(size))
    x = observed("negative binomial", size)
    with quiet():
        evidence = estimator(model, guide)(x)
        in_float64 = estimator(model, guide)(x.double())
    assert evidence.checks["precision"].tolist() == [doubted] * B and "precision" not in evidence.unchecked
    assert in_float64.checks["precision"].tolist() == [False] * B
    if evidence.bound != "exact":  # the same draws but for rounding, so far as chains and fits are stable
        assert in_float64.cost == evidence.cost - 2


def test_gaps_and_both_bounds():
    model, guide = pair(negative_binomial(1e5))
    simulated = pv.simulate(model, torch.zeros(B, GENES), seed=1)
    x = simulated.observed["x"]
    with quiet():
        gaps = pv.InferenceGaps(model, guide, seed=0)(x)
        options = {"num_steps": 20, "progress": False, "seed": 0}
        bounds = pv.BidirectionalMonteCarlo(model, guide, latents=simulated.latents, **options)(x)
    for evidence in (gaps.evidence, bounds.lower, bounds.upper):
        assert bool(evidence.checks["precision"].all())


def test_cost_is_two_evaluations_that_were_run():
    rows = [0]

    def counted(x, mean):
        rows[0] += mean.shape[:-1].numel()
        return negative_binomial(1e4)(x, mean)

    x = observed("negative binomial", 1e4)
    estimator = pv.ImportanceSampling(*pair(counted), num_particles=300, seed=0)
    with quiet():
        estimator(x)
        rows[0] = 0
        evidence = estimator(x)
    assert evidence.cost == rows[0] / len(x) == 302


# --- no alarm where float32 is enough ---


@pytest.mark.parametrize("num_data, data_dim", [(50, 4), (20, 60)])
def test_an_exact_guide_has_weights_without_error_and_no_doubt(num_data, data_dim):
    """A stated error of nearly zero does not make a doubt of every rounding."""
    lm, x = linear_gaussian(num_data=num_data, data_dim=data_dim, dtype=torch.float32)
    model, guide = exact_pair(lm)
    for estimator in (pv.ImportanceSampling(model, guide, num_particles=200, seed=0), pv.ExactEvidence(model, guide)):
        evidence = estimator(x)
        assert "precision" not in evidence.unchecked
        assert not evidence.checks["precision"].any()


class VAE(nn.Module):
    def __init__(self, likelihood, data_dim=784):
        super().__init__()
        self.likelihood = likelihood
        self.encoder = nn.Sequential(nn.Linear(data_dim, 50), nn.Softplus(), nn.Linear(50, 10))
        self.decoder = nn.Sequential(nn.Linear(5, 50), nn.Softplus(), nn.Linear(50, data_dim))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


ORDINARY = {
    "Bernoulli": (lambda raw: dist.Bernoulli(logits=raw), lambda mean: torch.bernoulli(mean)),
    "Normal": (lambda raw: dist.Normal(raw, 0.3), lambda mean: mean + 0.3 * torch.randn_like(mean)),
    "Laplace": (lambda raw: dist.Laplace(raw, 0.3), lambda mean: mean),
    "Binomial": (lambda raw: dist.Binomial(16, logits=raw), lambda mean: (16 * mean).round()),
    "Poisson": (lambda raw: dist.Poisson(raw.exp()), lambda mean: torch.poisson(3 * mean)),
    "ContinuousBernoulli": (lambda raw: pv.nn.ContinuousBernoulli()(8 * raw).base_dist, lambda mean: mean),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_vae_in_float32_has_no_doubt(name):
    likelihood, data = ORDINARY[name]
    vae, x = VAE(likelihood), data(torch.rand(30, 784))
    with quiet():
        for estimator in (pv.ImportanceSampling, pv.AdaptiveImportanceSampling):
            evidence = estimator(vae.model, vae.guide, num_particles=300, seed=0)(x)
            assert "precision" not in evidence.unchecked and int(evidence.checks["precision"].sum()) == 0


# --- where float32 makes an estimator fail ---


def test_grids_that_disagree_by_rounding_name_it_and_the_remedy_works():
    model, guide = pair(FAMILIES["gamma Poisson"](1e5))
    x = observed("gamma Poisson", 1e5)
    with pytest.raises(NonFiniteError, match=r"rounding in float32 moves .* nats\. Cast model and data to float64"):
        pv.ExactEvidence(model, guide)(x)
    exact = pv.ExactEvidence(model, guide)(x.double())  # what the message says
    with quiet():
        adaptive = pv.AdaptiveImportanceSampling(model, guide, num_particles=2000, seed=0)(x.double())
    assert bool(((exact.log_evidence - adaptive.log_evidence).abs() < 5 * adaptive.std_error).all())


def test_grids_that_disagree_for_another_reason_do_not_blame_rounding():
    """x uniform on [0, z]: the density jumps at z = x, in float32 as in float64."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Uniform(torch.zeros_like(z), z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2 + x, x.new_tensor(1.0)))

    for x in (torch.tensor([0.3, 1.0]), torch.tensor([0.3, 1.0]).double()):
        with pytest.raises(NonFiniteError, match="jumps"):
            pv.ExactEvidence(model, guide, check_support=False)(x)


def test_a_program_that_cannot_be_cast_is_not_checked_and_says_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.type(torch.FloatTensor), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    evidence = pv.ImportanceSampling(model, guide, num_particles=200, seed=0)(torch.randn(3))
    assert "precision" not in evidence.checks and "lower precision" in evidence.unchecked["precision"]
