"""The linear VAE against the closed forms of probabilistic PCA."""

import copy
import time

import pyro
import pytest
import torch
from pair_helpers import F64
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from vae_helpers import assert_all_moved, small_data, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import OptionError
from pyro_vae.exact import LinearGaussian, collapsed
from pyro_vae.models import LinearVAE
from pyro_vae.objectives import BetaTraceMeanField_ELBO


def digits():
    """1797 x 64, in [0, 1]."""
    return torch.tensor(load_digits().data, dtype=torch.float32) / 16


def optimal_vae(x, latent_dim):
    """The parameters of the closed form: principal axes, and the posterior as guide."""
    vae, best = LinearVAE(x.shape[1], latent_dim).double(), LinearGaussian.fit(x, latent_dim)
    posterior = best.posterior(x)
    gain = torch.linalg.lstsq(x - x.mean(0), posterior.mean).solution.T
    with torch.no_grad():
        vae.decoder[0].weight.copy_(best.weight)
        vae.decoder[0].bias.copy_(best.bias)
        vae.decoder[1].log_scale.copy_(best.variance.sqrt().log())
        vae.encoder.linear.weight.copy_(gain)
        vae.encoder.linear.bias.copy_(-gain @ best.bias)
        vae.encoder.log_scale.copy_(posterior.covariance_matrix[0].diagonal().sqrt().log())
    return vae, best


def test_at_the_optimum_the_guide_is_exact_for_any_draw():
    x = small_data(40).double() @ torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    vae, best = optimal_vae(x, 2)
    truth = best.log_evidence(x)
    torch.testing.assert_close(vae.exact().log_evidence(x), truth)
    assert -Trace_ELBO().loss(vae.model, vae.guide, x) == pytest.approx(float(truth.sum()), abs=1e-8)
    evidence = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3, seed=0)(x)
    torch.testing.assert_close(evidence.log_evidence, truth, rtol=0, atol=1e-10)
    with torch.no_grad():
        gaps = vae.exact().gaps(x, vae.encode(x))
    assert max(float(g.abs().max()) for g in (gaps.amortization, gaps.approximation, gaps.inference)) < 1e-10
    torch.testing.assert_close(vae.exact().rate(vae.encode(x)), best.rate(best.posterior(x)))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_exact_describes_the_present_parameters_and_stays_as_it_was(scale):
    vae, x = LinearVAE(6, 2, scale=scale), small_data()
    exact = vae.exact()
    with torch.no_grad():
        elbo = float(exact.elbo(x, vae.encode(x)).sum())
    mean_field = -TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True).loss(vae.model, vae.guide, x)
    # Only the distortion is sampled: 10 data at 4000 draws each.
    assert mean_field == pytest.approx(elbo, rel=0.01)
    before = copy.deepcopy(exact)
    svi_of(vae).step(x)
    assert torch.equal(exact.weight, before.weight) and torch.equal(exact.bias, before.bias)
    assert torch.equal(exact.variance, before.variance)
    assert not torch.equal(vae.exact().weight, exact.weight)
    assert torch.equal(vae.exact().variance, exact.variance) is (scale is not None)
    assert not any(t.requires_grad for t in (exact.weight, exact.bias, exact.variance))


def test_a_given_scale_keeps_its_digits_in_double_precision():
    vae = LinearVAE(6, 2, scale=0.3).double()
    assert float(vae.exact().variance) == pytest.approx(0.09, rel=1e-15)
    assert vae.exact().weight.dtype is F64
    assert len(list(LinearVAE(6, 2).parameters())) == len(list(vae.parameters())) + 1


def test_every_parameter_learns_and_copies_share_nothing():
    first, x = LinearVAE(6, 2), small_data()
    svi_of(first).step(x)
    vae = copy.deepcopy(first)
    before = snapshot(vae)
    svi_of(vae).step(x)
    assert_all_moved(vae, before)
    assert torch.equal(first.encoder.log_scale, before["guide.encoder.log_scale"])


@pytest.mark.parametrize("options", [(0, 2), (6, 0), (6.0, 2), (6, True)])
def test_dimensions_are_whole_numbers(options):
    with pytest.raises(OptionError, match="must be a whole number of at least 1"):
        LinearVAE(*options)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), True])
def test_the_scale_is_positive(scale):
    with pytest.raises(OptionError, match="positive number"):
        LinearVAE(6, 2, scale=scale)


def train(vae, x, loss, num_steps, lr=0.03):
    """All data at each step, the learning rate falling to zero along a cosine."""
    scheduler = pyro.optim.CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": num_steps})
    svi = SVI(vae.model, vae.guide, scheduler, loss)
    for _ in range(num_steps):
        svi.step(x)
        scheduler.step()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_trained_by_svi_it_is_the_ppca_of_the_digits(loss):
    x, start = digits(), time.time()
    best = LinearGaussian.fit(x.double(), 5)
    best_log_evidence, best_rate = best.log_evidence(x.double()).mean(), best.rate(best.posterior(x.double())).mean()
    assert (float(best_log_evidence), float(best_rate)) == pytest.approx((8.9076, 6.4814), abs=5e-5)
    vae = LinearVAE(64, 5)
    train(vae, x, loss(), num_steps=1200, lr=0.04)
    with torch.no_grad():
        exact, q = vae.exact(), vae.encode(x)
        log_evidence, rate, elbo = (float(t.mean()) for t in (exact.log_evidence(x), exact.rate(q), exact.elbo(x, q)))
    print(f"log p(x) {log_evidence:.4f}, rate {rate:.4f}, ELBO {elbo:.4f}, {time.time() - start:.0f} s")
    assert abs(log_evidence - 8.9076) < 0.02
    assert abs(rate - 6.4814) < 0.03
    assert 8.9076 - 0.03 < elbo < log_evidence  # the guide has become exact


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "num_used"), [(0.5, 8), (2.0, 5), (4.0, 3)])
def test_at_fixed_noise_beta_decides_how_many_dimensions_are_used(beta, num_used):
    """Dimension j is used where its eigenvalue is above beta s^2; its rate is then 1/2 log(eigenvalue / (beta s^2))."""
    x, variance = digits(), 0.12
    unused = collapsed(x.double(), 8, variance, beta)
    assert int((~unused).sum()) == num_used
    vae = LinearVAE(64, 8, scale=variance**0.5)
    train(vae, x, BetaTraceMeanField_ELBO(beta=beta), num_steps=1500)
    with torch.no_grad():
        prior = torch.distributions.Normal(0.0, 1.0)
        rates = torch.distributions.kl_divergence(vae.encode(x).base_dist, prior).mean(0).sort(descending=True)[0]
        best = LinearGaussian.fit(x.double(), 8, beta * variance)
        total = best.rate(best.posterior(x.double())).mean()
    print(f"beta {beta}: rates {[round(float(r), 4) for r in rates]}, closed form in all {float(total):.4f}")
    assert int((rates > 0.01).sum()) == num_used  # the smallest that is used has 0.06, the others less than 0.001
    assert float(rates.sum()) == pytest.approx(float(total), rel=0.02)
