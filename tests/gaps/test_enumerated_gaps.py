"""A guide that enumerates all its latents: the gaps are sums without an error."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, one_line
from pyro.infer import config_enumerate

import pyro_vae as pv
from pyro_vae.errors import LocalFitError
from pyro_vae.gaps.enumerated import best_product

X = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
W = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
LOGITS = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(2))


def mixture(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(x.new_ones(3) / 3))
        pyro.sample("x", dist.Normal(W.to(x)[c], 1.0).to_event(1), obs=x)


@config_enumerate
def classifier(x):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Categorical(logits=LOGITS.to(x)[: len(x)]))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("num_data", [1, 5])
def test_one_class_has_no_approximation_gap(dtype, num_data):
    x = X[:num_data].to(dtype)
    gaps = pv.InferenceGaps(mixture, classifier, datum_plate="data")(x)
    log_p = dist.Normal(W[:, None], 1.0).log_prob(X[:num_data]).sum(-1).T - torch.tensor(3.0, dtype=F64).log()
    log_q = LOGITS[:num_data].log_softmax(-1)
    elbo = (log_q.exp() * (log_p - log_q)).sum(-1)
    tolerance = {"rtol": 0, "atol": 1e-10 if dtype == F64 else 1e-5}
    torch.testing.assert_close(gaps.elbo.double(), elbo, **tolerance)
    torch.testing.assert_close(gaps.optimal_elbo.double(), log_p.logsumexp(-1), **tolerance)
    torch.testing.assert_close(gaps.amortization.double(), log_p.logsumexp(-1) - elbo, **tolerance)
    assert all(bool((error == 0).all()) for error in gaps.std_errors.values()) and bool(gaps.reliable.all())
    assert gaps.larger_part() == "encoder" and gaps.evidence.bound == "exact" and "lower bound" not in one_line(gaps)


def two_switches(x):
    """Both raise the mean, so that one explains the other away: the posterior is no product."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)))
        b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.4)))
        pyro.sample("x", dist.Normal(2 * (a + b) - 1, 0.7), obs=x[:, 0])


def test_the_best_product_is_that_of_a_search():
    """Two switches, all products on a grid of 0.005, refined once around the best: to 1e-5 nats."""

    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Bernoulli(x.new_full((len(x),), 0.5)))
            pyro.sample("b", dist.Bernoulli(x.new_full((len(x),), 0.2)))

    gaps = pv.InferenceGaps(two_switches, guide)(X)
    values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=F64)
    prior = dist.Bernoulli(torch.tensor([0.3, 0.4], dtype=F64)).log_prob(values).sum(-1)
    log_joint = prior[:, None] + dist.Normal(2 * values.sum(-1)[:, None] - 1, 0.7).log_prob(X[:, 0])  # (4, B)

    def bound(p, q):
        weights = torch.stack([(1 - p) * (1 - q), (1 - p) * q, p * (1 - q), p * q])
        entropy = -sum(torch.xlogy(r, r) for r in (p, 1 - p, q, 1 - q))
        return torch.einsum("kij,kb->ijb", weights, log_joint) + entropy[..., None]

    grid = torch.linspace(0, 1, 201, dtype=F64)
    coarse = bound(*torch.meshgrid(grid, grid, indexing="ij")).flatten(0, 1)
    for n in range(len(X)):
        best = int(coarse[:, n].argmax())
        fine = [(grid[i] + torch.linspace(-0.005, 0.005, 401, dtype=F64)).clamp(0, 1) for i in (best // 201, best % 201)]
        right = bound(*torch.meshgrid(*fine, indexing="ij"))[..., n].max()
        assert -1e-9 < float(gaps.optimal_elbo[n] - right) < 1e-5
    torch.testing.assert_close(gaps.log_evidence, log_joint.logsumexp(0))
    assert (gaps.approximation > 1e-3).any() and (gaps.amortization >= 0).all()


def test_a_guide_that_draws_one_given_the_other_can_be_any_distribution():
    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(x.new_full((len(x),), 0.5)))
            pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a))

    gaps = pv.InferenceGaps(two_switches, guide)(X)
    torch.testing.assert_close(gaps.optimal_elbo, gaps.log_evidence)


def test_some_given_some_others_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            total = sum(pyro.sample(name, dist.Bernoulli(x.new_tensor(0.3))) for name in "abc")
            pyro.sample("x", dist.Normal(total, 1.0), obs=x[:, 0])

    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Bernoulli(x.new_full((len(x),), 0.5)))
            b = pyro.sample("b", dist.Bernoulli(x.new_full((len(x),), 0.5)))
            pyro.sample("c", dist.Bernoulli(0.2 + 0.6 * b))

    with pytest.raises(LocalFitError, match="some of these depend on some of the others"):
        pv.InferenceGaps(model, guide)(X)
    assert pv.ExactEvidence(model, guide)(X).log_evidence.isfinite().all()


def test_a_family_that_cannot_be_any_distribution_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(3, x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x[:, 0])

    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Binomial(3, x.new_full((len(x),), 0.5)))

    with pytest.raises(LocalFitError, match="'n' is not known: use Categorical"):
        pv.InferenceGaps(model, guide)(X)


def test_with_nothing_left_to_infer_all_gaps_are_zero():
    def summed(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_ones(3) / 3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(W[c], 1.0).to_event(1), obs=x)

    gaps = pv.InferenceGaps(summed, lambda x: None)(X)
    torch.testing.assert_close(gaps.elbo, pv.ExactEvidence(mixture, classifier)(X).log_evidence)
    assert float(gaps.inference.abs().max()) == 0.0 and float(gaps.amortization.abs().max()) == 0.0


def test_the_best_product_of_a_product_is_its_sum():
    """Three axes of 2, 3 and 4 values without interaction."""
    tables = [torch.randn(n, 6, dtype=F64) for n in (2, 3, 4)]
    log_joint = tables[0][:, None, None] + tables[1][None, :, None] + tables[2][None, None]
    torch.testing.assert_close(best_product(log_joint), log_joint.flatten(0, 2).logsumexp(0))


def test_the_diagnosis_of_a_categorical_vae():
    page = pv.diagnose(mixture, classifier, train=[X], test=[X], args=lambda x: (x,), progress=False)
    assert page.test.larger_part() == "encoder" and page.culprit in ("encoder", "estimate")
    assert page.units is not None and page.surgery is not None
