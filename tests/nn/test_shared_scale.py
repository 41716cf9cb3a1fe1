"""Normal heads of one scale: given, learned, and the best for each batch, which training alone may see."""

import copy
import math

import pyro
import pytest
import torch
from nn_helpers import F64, Bias
from pair_helpers import assert_near, quiet
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn as torch_nn

import pyro_vae as pv
import pyro_vae.nn as nn
from pyro_vae.errors import BatchCouplingError, SupportError

LOG_2PI = math.log(2 * math.pi)


def normal_log_prob(x, loc, scale):
    return torch.distributions.Normal(loc, scale).log_prob(x).sum(-1)


def batch(num_data=5, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_data, size, generator=generator, dtype=F64) for _ in range(2))


# --- given and learned ---


def test_a_given_scale_is_that_number_in_both_precisions():
    head = nn.Normal(0.1)
    assert head.scale == 0.1
    assert not head.state_dict()
    x, loc = batch()
    torch.testing.assert_close(head(loc).log_prob(x), normal_log_prob(x, loc, 0.1), rtol=1e-14, atol=0)
    torch.testing.assert_close(head(loc.float()).log_prob(x.float()), normal_log_prob(x, loc, 0.1).float())
    assert float(head(loc).base_dist.scale[0, 0]) == 0.1


def test_a_learned_scale_finds_the_error_of_the_mean():
    head = nn.Normal("learned").double()
    x, loc = batch()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (-head(loc).log_prob(x).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(head.scale.detach(), (x - loc).square().mean().sqrt(), rtol=1e-4, atol=0)
    assert head.scale.shape == ()


# --- optimal, in training ---


def test_training_takes_the_best_scale_of_the_batch():
    """At the mean squared error s^2, log p of the batch is -n (log 2 pi s^2 + 1) / 2, and no other scale gives more."""
    head = nn.Normal("optimal").double()
    x, loc = batch()
    error = (x - loc).square().mean()
    log_prob = head(loc).log_prob(x)
    torch.testing.assert_close(log_prob.sum(), -0.5 * x.numel() * (error.log() + LOG_2PI + 1))
    torch.testing.assert_close(log_prob, normal_log_prob(x, loc, error.sqrt()))
    for factor in (0.9, 1.1):
        assert float(normal_log_prob(x, loc, factor * error.sqrt()).sum()) < float(log_prob.sum())


def test_its_gradient_is_that_of_the_log_of_the_error():
    """The scale is held fixed in the gradient; at the optimum that changes nothing."""
    x, loc = batch()
    loc.requires_grad_()
    (found,) = torch.autograd.grad(nn.Normal("optimal").double()(loc).log_prob(x).sum(), loc)
    profile = -0.5 * x.numel() * (x - loc).square().mean().log()
    torch.testing.assert_close(found, torch.autograd.grad(profile, loc)[0])
    head = nn.Normal("optimal").double()
    (of_one,) = torch.autograd.grad(head(loc).log_prob(x)[0], loc)
    expected = torch.zeros_like(x)
    expected[0] = ((x - loc)[0] / (x - loc).square().mean()).detach()
    torch.testing.assert_close(of_one, expected)


def test_the_mean_runs_over_particles_too():
    head = nn.Normal("optimal").double()
    x, _ = batch()
    loc = torch.randn(4, 5, 3, dtype=F64)
    error = (x - loc).square().mean()
    torch.testing.assert_close(head(loc).log_prob(x), normal_log_prob(x, loc, error.sqrt()))
    wide = head(loc).expand((2, 4, 5))
    torch.testing.assert_close(wide.log_prob(x), normal_log_prob(x, loc, error.sqrt()).expand(2, 4, 5))


def test_what_is_kept_is_the_average_and_then_follows_the_last_ten():
    head = nn.Normal("optimal").double()
    loc = torch.zeros(1, 1, dtype=F64)
    errors = [4.0, 1.0, 9.0, 2.0]
    for i, error in enumerate(errors, start=1):
        head(loc).log_prob(torch.full((1, 1), error**0.5, dtype=F64))
        assert float(head.variance) == pytest.approx(sum(errors[:i]) / i)
    for _ in range(200):
        head(loc).log_prob(torch.full((1, 1), 0.5, dtype=F64))
    assert float(head.scale) == pytest.approx(0.5, rel=1e-6)
    before = float(head.variance)
    head(loc).log_prob(torch.full((1, 1), 1.5, dtype=F64))
    assert float(head.variance) == pytest.approx(before + (1.5**2 - before) / 10)


def test_a_perfect_mean_leaves_the_density_finite():
    head = nn.Normal("optimal")
    loc = torch.ones(4, 3, requires_grad=True)
    log_prob = head(loc).log_prob(torch.ones(4, 3)).sum()
    assert bool(log_prob.isfinite())
    assert bool(torch.autograd.grad(log_prob, loc)[0].isfinite().all())


def test_bad_data_are_refused_before_they_reach_the_scale():
    head = nn.Normal("optimal")
    x = torch.zeros(5, 3)
    x[1, 1] = torch.nan
    with pytest.raises(SupportError, match=r"rows \[1\]"):
        head(torch.zeros(5, 3)).log_prob(x)
    with pytest.raises(SupportError, match="events of shape"):
        head(torch.zeros(5, 3)).log_prob(torch.zeros(5, 1))
    assert (float(head.variance), int(head.num_batches)) == (1, 0)


# --- optimal, everywhere else ---


def test_without_training_or_gradients_it_is_a_plain_normal():
    head = nn.Normal("optimal").double()
    x, loc = batch()
    head(loc).log_prob(x)
    kept = head.scale
    state = copy.deepcopy(head.state_dict())
    other = x + 3
    expected = normal_log_prob(other, loc, kept)
    fn = head(loc)
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            torch.testing.assert_close(fn.log_prob(other), expected)
            torch.testing.assert_close(head(loc).log_prob(other), expected)
    head.eval()
    torch.testing.assert_close(head(loc).log_prob(other), expected)
    torch.testing.assert_close(head(loc).log_prob(other[:1]), normal_log_prob(other[:1], loc, kept))
    head.train()
    assert head(loc).rsample().shape == loc.shape
    assert head(loc).variance.unique().tolist() == [float(kept) ** 2]
    torch.testing.assert_close(head.state_dict(), state, rtol=0, atol=0)


def small_vae(size=3):
    """A pair of plain Pyro programs and its modules, in train mode."""
    decoder = torch_nn.Sequential(nn.MLP(2, size, hidden=(8,)), nn.Normal("optimal"))
    encoder = torch_nn.Sequential(nn.MLP(size, 4, hidden=(8,)), nn.Normal())
    prior = nn.StandardNormal(2)
    modules = torch_nn.ModuleList([encoder, decoder])

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", decoder(pyro.sample("latent", prior())), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", encoder(x))

    return model, guide, modules


def test_svi_trains_and_evaluate_loss_moves_nothing():
    model, guide, modules = small_vae()
    x = 0.1 * torch.randn(40, 3) + torch.randn(40, 1)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-10:]) < sum(losses[:10])
    head = modules[1][1]
    assert int(head.num_batches) == 150
    assert float(head.scale) < 0.6
    state = copy.deepcopy(modules.state_dict())
    torch.manual_seed(1)
    in_train_mode = svi.evaluate_loss(x)
    torch.testing.assert_close(modules.state_dict(), state, rtol=0, atol=0)
    modules.eval()
    torch.manual_seed(1)
    assert svi.evaluate_loss(x) == in_train_mode
    TraceMeanField_ELBO().loss(model, guide, x)  # with gradients, in eval mode
    torch.testing.assert_close(modules.state_dict(), state, rtol=0, atol=0)


ESTIMATORS = {
    "ImportanceSampling": lambda m, g, **o: pv.ImportanceSampling(m, g, num_particles=3, **o),
    "AdaptiveImportanceSampling": lambda m, g, **o: pv.AdaptiveImportanceSampling(m, g, num_particles=50, **o),
    "InferenceGaps": lambda m, g, **o: pv.InferenceGaps(m, g, num_particles=50, **o),
}


@pytest.mark.parametrize("num_data", [1, 4])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_refuse_it_in_train_mode(name, num_data):
    """Also where no other datum could show the coupling, and where the whole call is one datum."""
    model, guide, modules = small_vae()
    x = torch.randn(num_data, 3)
    before = copy.deepcopy(modules.state_dict())
    for options in ({}, {"datum_plate": None}):
        with pytest.raises(BatchCouplingError, match=r"all \.eval\(\)"):
            ESTIMATORS[name](model, guide, seed=0, **options)(x)
    torch.testing.assert_close(modules.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(BatchCouplingError):
        pv.simulate(model, x)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_that_knows_the_model_refuses_it_too(name):
    """Switched to train mode between two calls; the modules of a closure cannot be seen from outside."""
    model, guide, modules = small_vae()
    estimator = ESTIMATORS[name](model, guide, seed=0)
    x = torch.randn(4, 3)
    modules.eval()
    with quiet():
        estimator(x)
    modules.train()
    with pytest.raises(BatchCouplingError):
        estimator(x)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_take_it_in_eval_mode(name):
    """log p(x) of a model whose data do not depend on the latent is the density with the kept scale."""
    head, prior = nn.Normal("optimal"), nn.StandardNormal(1)
    decoder = torch_nn.Sequential(Bias(3), head)
    x = torch.randn(4, 3)
    decoder(torch.zeros(4, 1)).log_prob(2 * x)
    decoder.eval()
    before = copy.deepcopy(decoder.state_dict())

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("obs", decoder(pyro.sample("latent", prior())), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("latent", nn.Normal()(torch.zeros(len(x), 2)))

    with quiet():
        result = ESTIMATORS[name](model, guide, seed=0)(x)
    found = getattr(result, "evidence", result)
    expected = normal_log_prob(x, torch.zeros(4, 3), float(head.scale))
    assert_near(found.log_evidence, expected, found.std_error + 1e-5, largest_error=0.1)
    torch.testing.assert_close(decoder.state_dict(), before, rtol=0, atol=0)


def test_what_handles_the_batch_norms_of_a_network_passes_it_by():
    head = nn.Normal("optimal")
    assert not any(isinstance(m, torch_nn.modules.batchnorm._BatchNorm) for m in head.modules())
    assert torch_nn.SyncBatchNorm.convert_sync_batchnorm(head) is head
