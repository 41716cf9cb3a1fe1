"""`pyro_vae.exact`, each closed form against a second derivation, brute force, or published numbers."""

import itertools
import math

import pyro.distributions as pyro_dist
import pytest
import torch
from sklearn.datasets import load_digits
from torch.distributions import (
    Bernoulli,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    kl_divergence,
)

from pyro_vae import exact

BATCH, LATENT, DATA = 5, 3, 6


def make_model(latent_dim=LATENT, data_dim=DATA, variance=0.3):
    weight = torch.randn(data_dim, latent_dim, dtype=torch.float64)
    bias = torch.randn(data_dim, dtype=torch.float64)
    return exact.LinearGaussian(weight, bias, torch.tensor(variance, dtype=torch.float64))


def make_data(model, num_data=BATCH):
    z = torch.randn(num_data, model.weight.shape[1], dtype=torch.float64)
    noise = torch.randn(num_data, len(model.bias), dtype=torch.float64)
    return z @ model.weight.T + model.bias + model.variance.sqrt() * noise


def make_guides(latent_dim=LATENT, num_data=BATCH):
    loc = torch.randn(num_data, latent_dim, dtype=torch.float64)
    scale = torch.rand(num_data, latent_dim, dtype=torch.float64) + 0.2
    below = torch.randn(num_data, latent_dim, latent_dim, dtype=torch.float64).tril(-1)
    factor = torch.randn(num_data, latent_dim, 2, dtype=torch.float64)
    return {
        "diagonal": Independent(Normal(loc, scale), 1),
        "pyro": pyro_dist.Normal(loc, scale).to_event(1),
        "full": MultivariateNormal(loc, scale_tril=below + scale.diag_embed()),
        "low rank": LowRankMultivariateNormal(loc, factor, scale),
    }


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().data) / 16


# Linear-Gaussian model


@pytest.mark.parametrize("latent_dim, data_dim", [(1, 1), (3, 6), (6, 3)])
def test_log_evidence_is_that_of_the_marginal(latent_dim, data_dim):
    torch.manual_seed(0)
    model = make_model(latent_dim, data_dim)
    x = make_data(model)
    covariance = model.weight @ model.weight.T + model.variance * torch.eye(data_dim, dtype=torch.float64)
    expected = MultivariateNormal(model.bias, covariance).log_prob(x)
    torch.testing.assert_close(model.log_evidence(x), expected, rtol=0, atol=1e-10)


def test_posterior_satisfies_bayes_rule_everywhere():
    torch.manual_seed(1)
    model = make_model()
    x = make_data(model)
    z = torch.randn(7, BATCH, LATENT, dtype=torch.float64)
    log_joint = Normal(0, 1).log_prob(z).sum(-1)
    log_joint = log_joint + Normal(z @ model.weight.T + model.bias, model.variance.sqrt()).log_prob(x).sum(-1)
    posterior = model.posterior(x)
    assert posterior.batch_shape == (BATCH,)
    expected = model.log_evidence(x).expand(7, BATCH)
    torch.testing.assert_close(log_joint - posterior.log_prob(z), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["diagonal", "pyro", "full", "low rank"])
def test_rate_distortion_and_elbo_of_any_gaussian(family):
    torch.manual_seed(2)
    model = make_model()
    x = make_data(model)
    q = make_guides()[family]
    prior = MultivariateNormal(torch.zeros(LATENT).double(), torch.eye(LATENT).double())
    covariance = q.variance.diag_embed() if isinstance(q, Independent) else q.covariance_matrix
    as_full = MultivariateNormal(q.mean, covariance)
    torch.testing.assert_close(model.rate(q), kl_divergence(as_full, prior), rtol=0, atol=1e-10)
    # The 2 D points m +- sqrt(D) L e_j average any quadratic exactly.
    offsets = math.sqrt(LATENT) * torch.linalg.cholesky(covariance).mT
    z = q.mean.unsqueeze(-2) + torch.cat([offsets, -offsets], -2)
    likelihood = Normal(z @ model.weight.T + model.bias, model.variance.sqrt())
    expected = -likelihood.log_prob(x.unsqueeze(-2)).sum(-1).mean(-1)
    torch.testing.assert_close(model.distortion(x, q), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.elbo(x, q), -(model.distortion(x, q) + model.rate(q)))
    # ... and the ELBO once more, from the other side.
    gap = kl_divergence(as_full, model.posterior(x))
    torch.testing.assert_close(model.elbo(x, q), model.log_evidence(x) - gap, rtol=0, atol=1e-9)


def test_elbo_by_monte_carlo():
    # 4.6 standard errors for five data are a false-alarm rate of 2e-5; the error is gated at 0.02 nats.
    torch.manual_seed(3)
    model = make_model()
    x = make_data(model)
    best = model.optimal_diagonal(x)
    q = Independent(Normal(best.mean + 0.3, 1.5 * best.stddev), 1)
    z = q.sample((100_000,))
    log_weight = Normal(0, 1).log_prob(z).sum(-1) - q.log_prob(z)
    log_weight += Normal(z @ model.weight.T + model.bias, model.variance.sqrt()).log_prob(x).sum(-1)
    std_error = log_weight.std(0) / math.sqrt(len(z))
    assert (std_error < 0.02).all()
    assert ((log_weight.mean(0) - model.elbo(x, q)).abs() < 4.6 * std_error).all()


def test_optimal_diagonal_is_where_gradient_descent_ends():
    torch.manual_seed(4)
    model = make_model()
    x = make_data(model)
    loc = torch.zeros(BATCH, LATENT, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(BATCH, LATENT, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([loc, log_scale], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model.elbo(x, Independent(Normal(loc, log_scale.exp()), 1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = model.optimal_diagonal(x)
    torch.testing.assert_close(loc.detach(), best.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_scale.detach().exp(), best.stddev, rtol=0, atol=1e-5)
    gap = model.log_evidence(x) - model.elbo(x, best)
    torch.testing.assert_close(gap, model.approximation_gap().expand(BATCH), rtol=0, atol=1e-10)
    assert model.approximation_gap() > 0.1


def test_diagonal_guides_are_exact_where_the_weights_are_orthogonal():
    torch.manual_seed(5)
    directions = torch.linalg.qr(torch.randn(DATA, LATENT, dtype=torch.float64)).Q
    weight = directions * torch.tensor([3.0, 1.0, 0.2])
    model = exact.LinearGaussian(weight, torch.zeros(DATA).double(), torch.tensor(0.1).double())
    x = make_data(model)
    elbo = model.elbo(x, model.optimal_diagonal(x))
    torch.testing.assert_close(elbo, model.log_evidence(x), rtol=0, atol=1e-10)
    assert abs(model.approximation_gap()) < 1e-12


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_gaps_add_up(family):
    torch.manual_seed(6)
    model = make_model()
    x = make_data(model)
    q = make_guides()[family]
    gaps = model.gaps(x, q)
    covariance = q.variance.diag_embed() if family == "diagonal" else q.covariance_matrix
    divergence = kl_divergence(MultivariateNormal(q.mean, covariance), model.posterior(x))
    torch.testing.assert_close(gaps.inference, divergence, rtol=0, atol=1e-9)
    torch.testing.assert_close(gaps.inference, gaps.amortization + gaps.approximation)
    best = model.optimal_diagonal(x) if family == "diagonal" else model.posterior(x)
    expected = model.elbo(x, best) - model.elbo(x, q)
    torch.testing.assert_close(gaps.amortization, expected, rtol=0, atol=1e-9)
    assert (gaps.amortization > 0).all() and (gaps.approximation >= 0).all()


def test_amortization_gap_of_a_shifted_mean():
    torch.manual_seed(7)
    model = make_model()
    x = make_data(model)
    error = torch.randn(BATCH, LATENT, dtype=torch.float64)
    best = model.optimal_diagonal(x)
    shifted = Independent(Normal(best.mean + error, best.stddev), 1)
    precision = model.weight.T @ model.weight / model.variance + torch.eye(LATENT).double()
    expected = 0.5 * torch.einsum("bi,ij,bj->b", error, precision, error)
    torch.testing.assert_close(model.gaps(x, shifted).amortization, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
def test_beta_posterior_is_a_stationary_maximum_of_the_beta_elbo(beta):
    torch.manual_seed(8)
    model = make_model()
    x = make_data(model)

    def beta_elbo(loc, root):
        q = MultivariateNormal(loc, scale_tril=root.tril())
        return -(model.distortion(x, q) + beta * model.rate(q)).sum()

    best = model.beta_posterior(x, beta)
    loc, root = best.loc.detach().requires_grad_(), best.scale_tril.detach().clone().requires_grad_()
    gradients = torch.autograd.grad(beta_elbo(loc, root), (loc, root))
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients)
    for _ in range(10):
        other = root + 0.1 * torch.randn_like(root) * root.diagonal(dim1=-2, dim2=-1).min()
        assert beta_elbo(loc + 0.1 * torch.randn_like(loc), other) < beta_elbo(loc, root)


def test_slope_of_the_rate_distortion_curve_is_minus_beta():
    torch.manual_seed(9)
    model = make_model()
    x = make_data(model)
    beta = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    q = model.beta_posterior(x, beta)
    (rate_slope,) = torch.autograd.grad(model.rate(q).sum(), beta, retain_graph=True)
    (distortion_slope,) = torch.autograd.grad(model.distortion(x, q).sum(), beta)
    assert (distortion_slope / rate_slope).item() == pytest.approx(-1.7, rel=1e-9)


def test_closed_forms_are_differentiable():
    torch.manual_seed(10)
    model = make_model()
    x = make_data(model)

    def sums(weight, bias, variance, x):
        model = exact.LinearGaussian(weight, bias, variance)
        q = model.optimal_diagonal(x)
        return model.log_evidence(x).sum() + model.elbo(x, q).sum(), model.approximation_gap()

    inputs = [value.clone().requires_grad_() for value in (model.weight, model.bias, model.variance, x)]
    assert torch.autograd.gradcheck(sums, inputs)


# Maximum likelihood and collapse

# notes: digits / 16, 1797 x 64, biased covariance, no dequantisation
DIGITS_TABLE = [
    (2, 0.05411698, 0.0057, 2.5137, -2.5194),
    (5, 0.03619681, 8.9076, 6.4814, -15.3890),
    (10, 0.02275137, 17.4519, 12.7961, -30.2481),
]


@pytest.mark.parametrize("latent_dim, variance, log_likelihood, rate, distortion", DIGITS_TABLE)
def test_maximum_likelihood_on_digits(digits, latent_dim, variance, log_likelihood, rate, distortion):
    model = exact.LinearGaussian.fit(digits, latent_dim)
    q = model.posterior(digits)
    assert model.variance.item() == pytest.approx(variance, abs=1e-8)
    assert model.log_evidence(digits).mean().item() == pytest.approx(log_likelihood, abs=1e-4)
    closed_form = exact.LinearGaussian.max_log_likelihood(digits, latent_dim)
    assert closed_form.item() == pytest.approx(model.log_evidence(digits).mean().item(), abs=1e-9)
    assert model.rate(q).mean().item() == pytest.approx(rate, abs=1e-4)
    assert model.distortion(digits, q).mean().item() == pytest.approx(distortion, abs=1e-4)


def test_fit_beats_its_neighbours_and_is_stationary():
    torch.manual_seed(11)
    x = make_data(make_model(), 200)
    for variance in (None, 0.5):
        fitted = exact.LinearGaussian.fit(x, 2, variance)
        fields = fitted.weight, fitted.bias, fitted.variance
        parameters = [field.clone().requires_grad_() for field in fields]
        mean_evidence = exact.LinearGaussian(*parameters).log_evidence(x).mean()
        gradients = torch.autograd.grad(mean_evidence, parameters)
        # The fixed variance is the one parameter that is not at its optimum.
        assert all(gradient.abs().max() < 1e-9 for gradient in gradients[: 3 if variance is None else 2])
        closed_form = exact.LinearGaussian.max_log_likelihood(x, 2, variance)
        torch.testing.assert_close(closed_form, mean_evidence.detach(), rtol=0, atol=1e-10)
        for _ in range(10):
            moved = fitted.weight + 0.1 * torch.randn_like(fitted.weight)
            other = exact.LinearGaussian(moved, fitted.bias, fitted.variance)
            assert other.log_evidence(x).mean() < mean_evidence


@pytest.mark.parametrize("variance, active", [(0.01, 39), (0.05, 18), (0.1, 12)])
def test_collapse_on_digits(digits, variance, active):
    collapsed = exact.collapsed(digits, 64, variance)
    assert collapsed.shape == (64,) and (~collapsed).sum() == active
    model = exact.LinearGaussian.fit(digits, 64, variance)
    assert torch.equal(model.weight.norm(dim=0) == 0, collapsed)
    # A collapsed dimension carries no information, an active one has the variance 1 - s^2 / l_j of its mean.
    mean_variance = model.posterior(digits).mean.var(0, correction=0)
    assert (mean_variance[collapsed] < 1e-12).all()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(digits.T, correction=0)).flip(0)
    expected = (1 - variance / eigenvalues)[~collapsed]
    torch.testing.assert_close(mean_variance[~collapsed], expected, rtol=0, atol=1e-9)
    closed_form = exact.LinearGaussian.max_log_likelihood(digits, 64, variance)
    torch.testing.assert_close(closed_form, model.log_evidence(digits).mean(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("beta", [0.5, 2.0, 5.0])
def test_beta_acts_like_noise(digits, beta):
    variance = torch.tensor(0.05, dtype=torch.float64)
    optimum = exact.LinearGaussian.fit(digits, 30, beta * variance)
    assert torch.equal(exact.collapsed(digits, 30, variance, beta), optimum.weight.norm(dim=0) == 0)
    weight = optimum.weight.clone().requires_grad_()
    model = exact.LinearGaussian(weight, optimum.bias, variance)
    q = model.beta_posterior(digits, beta)
    beta_elbo = -(model.distortion(digits, q) + beta * model.rate(q)).mean()
    (gradient,) = torch.autograd.grad(beta_elbo, weight)
    assert gradient.abs().max() < 1e-9


# Scalar, discrete and low-dimensional models


def test_scalar_posterior_is_the_one_dimensional_linear_gaussian():
    x = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    w, s = 1.7, torch.tensor(0.4, dtype=torch.float64)
    result = exact.scalar_posterior(x, w, s)
    model = exact.LinearGaussian(torch.tensor([[w]]).double(), torch.zeros(1).double(), s.square())
    expected = model.posterior(x.unsqueeze(-1))
    torch.testing.assert_close(result.mean, expected.mean.squeeze(-1))
    torch.testing.assert_close(result.variance, expected.variance.squeeze(-1))
    assert exact.scalar_posterior(x.float(), 2, 1).mean.dtype == torch.float32


def test_enumeration_is_the_sum_over_all_combinations():
    torch.manual_seed(12)
    x = torch.randn(BATCH, 2, dtype=torch.float64)
    bit = torch.tensor([0.0, 1.0], dtype=torch.float64)
    corners = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 0.5]], dtype=torch.float64)

    def log_joint(a, corner, b):
        prior = Bernoulli(0.3).log_prob(a) + Bernoulli(0.2 + 0.6 * a).log_prob(b) - math.log(3)
        mean = corner + torch.stack(torch.broadcast_tensors(a, a * b), -1)
        return prior + Normal(mean, 0.7).log_prob(x).sum(-1)

    table = exact.enumerate_log_joint(log_joint, [bit, corners, bit])
    assert table.shape == (2, 3, 2, BATCH)
    result = exact.enumerate_log_evidence(table, 3)
    combinations = itertools.product(bit, corners, bit)
    expected = torch.stack([log_joint(*values).exp() for values in combinations]).sum(0).log()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("centred", [False, True])
def test_quadrature_of_a_linear_gaussian_model(latent_dim, centred):
    torch.manual_seed(13)
    # Sharp posteriors need the centre; the wide ones (sd 0.4 and up) do without.
    model = make_model(latent_dim, 4, variance=0.01 if centred else 4.0)
    x = make_data(model)
    posterior = model.posterior(x)
    shapes = []

    def log_joint(z):
        shapes.append(tuple(z.shape))
        likelihood = Normal(z @ model.weight.T + model.bias, model.variance.sqrt())
        return Normal(0, 1).log_prob(z).sum(-1) + likelihood.log_prob(x).sum(-1)

    # A centre and a width that are only roughly right, as in practice.
    loc = posterior.mean + 0.3 * posterior.stddev if centred else None
    scale = 1.3 * posterior.stddev if centred else None
    result = exact.quadrature_log_evidence(log_joint, latent_dim, loc=loc, scale=scale)
    torch.testing.assert_close(result, model.log_evidence(x), rtol=0, atol=1e-8)
    assert all(shape[1:] == (BATCH if centred else 1, latent_dim) for shape in shapes)
    chunked = exact.quadrature_log_evidence(log_joint, latent_dim, loc=loc, scale=scale, chunk_size=777)
    torch.testing.assert_close(chunked, result, rtol=0, atol=1e-12)


def test_quadrature_of_a_skewed_model_by_a_fine_grid():
    # Poisson counts with log rate 1 + z: the trapezoidal rule on a fine grid is exact to rounding.
    x = torch.tensor([0.0, 3.0, 12.0], dtype=torch.float64)

    def log_joint(z):
        return (Normal(0, 1).log_prob(z) + Poisson((1 + z).exp()).log_prob(x.unsqueeze(-1))).sum(-1)

    grid = torch.linspace(-12, 8, 20_001, dtype=torch.float64).reshape(-1, 1, 1)
    expected = log_joint(grid).logsumexp(0) + math.log(1e-3)
    result = exact.quadrature_log_evidence(log_joint, 1, num_nodes=300)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-8)


def test_quadrature_follows_the_dtype_of_its_centre():
    x = torch.tensor([0.5, 2.0])

    def log_joint(z):
        assert z.dtype == torch.float32
        return (Normal(0, 1).log_prob(z) + Normal(z, 1).log_prob(x.unsqueeze(-1))).sum(-1)

    result = exact.quadrature_log_evidence(log_joint, 1, loc=x.unsqueeze(-1) / 2, scale=torch.ones(2, 1))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, Normal(0, math.sqrt(2)).log_prob(x))


# Errors: each names what it expected and what came


def linear_gaussian(weight_shape, bias_shape, variance):
    return exact.LinearGaussian(torch.zeros(weight_shape), torch.zeros(bias_shape), torch.tensor(variance))


SMALL = linear_gaussian((3, 2), (3,), 1.0)
STANDARD = Normal(torch.zeros(4, 2), torch.ones(4, 2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: linear_gaussian((3,), (3,), 1.0), r"weight \(X, D\).*\(3,\), \(3,\), \(\)"),
        (lambda: linear_gaussian((3, 2), (2,), 1.0), r"\(3, 2\), \(2,\), \(\)"),
        (lambda: linear_gaussian((3, 2), (3,), [1.0]), r"\(3, 2\), \(3,\), \(1,\)"),
        (lambda: linear_gaussian((3, 2), (3,), 0.0), "positive variance, but got 0.0"),
        (lambda: SMALL.log_evidence(torch.zeros(4, 2)), r"\(B, 3\), but got \(4, 2\)"),
        (lambda: SMALL.posterior(torch.tensor(0.0)), r"\(B, 3\), but got \(\)"),
        (lambda: SMALL.beta_posterior(torch.zeros(4, 3), 0.0), "beta > 0, but got 0.0"),
        (lambda: SMALL.rate(STANDARD), r"event shape \(2,\), but got a Normal of \(\)"),
        (lambda: SMALL.rate(Independent(StudentT(torch.ones(4, 2)), 1)), "Gaussian guide.*Independent"),
        (lambda: exact.LinearGaussian.fit(torch.zeros(4, 2, 2), 1), r"data \(B, X\), but got \(4, 2, 2\)"),
        (lambda: exact.LinearGaussian.fit(torch.randn(9, 3), 3), r"1\.\.2 for data \(B, 3\), but got 3"),
        (lambda: exact.collapsed(torch.randn(9, 3), 4, 0.1), r"1\.\.3 for data \(B, 3\), but got 4"),
        (lambda: exact.LinearGaussian.fit(torch.zeros(9, 3), 1), "noise variance, but got 0.0"),
        (lambda: exact.collapsed(torch.randn(9, 3), 1, -0.5), "noise variance, but got -0.5"),
        (
            lambda: exact.enumerate_log_joint(lambda z: torch.zeros(3, 5), [torch.arange(2)]),
            r"of \(2,\) \+ \(B,\), but got \(3, 5\)",
        ),
        (lambda: exact.enumerate_log_evidence(torch.zeros(3), 2), r"here 2.*got shape \(3,\)"),
        (lambda: exact.enumerate_log_evidence(torch.zeros(3), 0), r"here 0.*got shape \(3,\)"),
        (lambda: exact.quadrature_log_evidence(lambda z: z, 3), "1 or 2 latent dimensions, but got 3"),
        (lambda: exact.quadrature_log_evidence(lambda z: z, 1, num_nodes=400), r"1\.\.300, but got 400"),
        (lambda: exact.quadrature_log_evidence(lambda z: z, 1), r"z \(200, 1, 1\), but got \(200, 1, 1\)"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(call, message):
    torch.manual_seed(14)
    with pytest.raises(ValueError, match=message):
        call()
