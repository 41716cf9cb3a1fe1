"""A VAE written as in Pyro's own tutorial goes through everything unchanged, and nothing of it changes."""

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import quiet
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

PIXELS, HIDDEN, LATENT = 36, 16, 3


class Decoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, PIXELS)
        self.softplus = nn.Softplus()
        self.sigmoid = nn.Sigmoid()

    def forward(self, z):
        hidden = self.softplus(self.fc1(z))
        loc_img = self.sigmoid(self.fc21(hidden))
        return loc_img


class Encoder(nn.Module):
    def __init__(self, z_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)
        self.softplus = nn.Softplus()

    def forward(self, x):
        x = x.reshape(-1, PIXELS)
        hidden = self.softplus(self.fc1(x))
        z_loc = self.fc21(hidden)
        z_scale = torch.exp(self.fc22(hidden))
        return z_loc, z_scale


class VAE(nn.Module):
    def __init__(self, z_dim=LATENT, hidden_dim=HIDDEN):
        super().__init__()
        self.encoder = Encoder(z_dim, hidden_dim)
        self.decoder = Decoder(z_dim, hidden_dim)
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z_scale = torch.ones(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder.forward(z)
            pyro.sample(
                "obs",
                dist.Bernoulli(loc_img, validate_args=False).to_event(1),
                obs=x.reshape(-1, PIXELS),
            )
            return loc_img

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder.forward(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


@pytest.fixture
def trained():
    """Two steps of SVI on binary 6x6 images, shape (B, 1, 6, 6)."""
    x = (torch.rand(20, 1, 6, 6) < 0.3).float()
    vae = VAE()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=Trace_ELBO())
    for _ in range(2):
        svi.step(x)
    return vae, x


def snapshot(vae):
    store = pyro.get_param_store()
    return {
        "state": {name: value.clone() for name, value in vae.state_dict().items()},
        "store": {name: store[name].detach().clone() for name in store.keys()},  # noqa: SIM118
        "handles": {name: id(store._params[name]) for name in store.keys()},  # noqa: SIM118
        "grad": {name: p.grad is None for name, p in vae.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in vae.named_parameters()},
        "modes": {name: module.training for name, module in vae.named_modules()},
        "rng": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
        "validation": torch.distributions.Distribution._validate_args,
        "dtype": torch.get_default_dtype(),
    }


def assert_untouched(before, vae):
    after = snapshot(vae)
    for kind in ("state", "store"):
        assert before[kind].keys() == after[kind].keys()
        for name, value in before[kind].items():
            assert torch.equal(value, after[kind][name]), (kind, name)
    for kind in ("handles", "grad", "requires_grad", "modes", "validation", "dtype"):
        assert before[kind] == after[kind], kind
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert np.array_equal(before["rng"][1], after["rng"][1])
    assert before["rng"][2] == after["rng"][2]


ESTIMATORS = {
    "importance": functools.partial(pv.ImportanceSampling, num_particles=300),
    "adaptive": functools.partial(pv.AdaptiveImportanceSampling, num_particles=200),
    "gaps": functools.partial(pv.InferenceGaps, num_particles=100),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_leave_everything_as_it_was(trained, name, training):
    vae, x = trained
    vae.train(training)
    vae.decoder.fc1.eval()  # a mixed state is kept, too
    vae.zero_grad(set_to_none=True)
    before = snapshot(vae)
    estimator = ESTIMATORS[name](vae.model, vae.guide, seed=0)
    with quiet():
        result, again = estimator(x), estimator(x)
    assert_untouched(before, vae)
    assert len(result) == 20
    assert result.log_evidence.dtype == torch.float32
    assert bool(result.log_evidence.isfinite().all())
    assert not result.log_evidence.requires_grad
    assert torch.equal(result.log_evidence, again.log_evidence)
    str(result)


def test_gradients_of_a_running_training_survive(trained):
    """Called between backward() and step(), as a training script may."""
    vae, x = trained
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in vae.named_parameters()}
    with quiet():
        for make in ESTIMATORS.values():
            make(vae.model, vae.guide, seed=0)(x)
    for name, parameter in vae.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])


def test_training_goes_on_as_if_nothing_had_been_looked_at():
    """Bitwise the same parameters after the next steps."""

    def train(look):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        x = (torch.rand(20, 1, 6, 6) < 0.3).float()
        vae = VAE()
        svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=Trace_ELBO())
        for _ in range(3):
            svi.step(x)
            if look:
                with quiet():
                    for make in ESTIMATORS.values():
                        make(vae.model, vae.guide, seed=0)(x)
                pv.simulate(vae.model, x, seed=0)
        return vae.state_dict()

    plain, looked = train(False), train(True)
    for name, value in plain.items():
        assert torch.equal(value, looked[name]), name


def test_a_pair_that_was_never_trained_works_and_leaves_the_store_empty():
    vae, x = VAE(), (torch.rand(8, 1, 6, 6) < 0.3).float()
    for make in ESTIMATORS.values():
        with quiet():
            result = make(vae.model, vae.guide, seed=0)(x)
        assert bool(result.elbo.isfinite().all())
    assert len(pyro.get_param_store()) == 0


def test_the_numbers_agree(trained):
    """ELBO with Pyro's own, both estimates of log p(x) with one another (4.5 errors)."""
    vae, x = trained
    with quiet():
        plain = pv.ImportanceSampling(vae.model, vae.guide, num_particles=20_000, seed=0)(x)
        fitted = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=1000, seed=0)(x)
        gaps = pv.InferenceGaps(vae.model, vae.guide, seed=0)(x)
    error = (plain.std_error.square() + fitted.std_error.square()).sqrt()
    assert error.max() < 0.05
    assert ((plain.log_evidence - fitted.log_evidence).abs() / error).max() < 4.5
    with torch.no_grad():
        losses = torch.tensor([Trace_ELBO(num_particles=100).loss(vae.model, vae.guide, x) for _ in range(10)])
    own = -losses / len(x)
    error = float(own.std()) / 10**0.5 + float(plain.elbo_std_error.square().sum().sqrt()) / len(x)
    assert error < 0.03
    assert abs(float(own.mean() - plain.elbo.mean())) < 4.5 * error
    assert float(gaps.inference.mean()) > 0
    assert torch.allclose(gaps.inference, gaps.amortization + gaps.approximation, atol=1e-4)


def test_simulate(trained):
    vae, x = trained
    vae.zero_grad(set_to_none=True)
    before = snapshot(vae)
    sim = pv.simulate(vae.model, torch.zeros(50, 1, 6, 6), seed=0)
    assert_untouched(before, vae)
    assert sim.observed["obs"].shape == (50, PIXELS)
    assert sim.latents["latent"].shape == (50, LATENT)
    assert set(sim.observed["obs"].unique().tolist()) == {0.0, 1.0}
    with quiet():
        result = pv.ImportanceSampling(vae.model, vae.guide, num_particles=50, seed=0)(sim.observed["obs"])
    assert len(result) == 50


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_evaluate_over_a_loader_with_labels(trained, name):
    vae, x = trained
    vae.zero_grad(set_to_none=True)
    loader = DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=8)
    batches = list(loader)  # a DataLoader draws a number itself; tests/test_evaluate.py looks at that
    before = snapshot(vae)
    with quiet():
        result = pv.evaluate(ESTIMATORS[name](vae.model, vae.guide), batches, progress=False, seed=0)
    assert_untouched(before, vae)
    with quiet():
        again = pv.evaluate(ESTIMATORS[name](vae.model, vae.guide), loader, progress=False, seed=0)
    assert torch.equal(result.log_evidence, again.log_evidence)
    assert len(result) == 20


def test_parameters_under_constraints_are_read_and_kept():
    """`pyro.param` with a constraint: the trained value counts, the user's handle stays alive."""
    x = torch.randn(6)

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            variance = pyro.param("scale").detach() ** 2
            pyro.sample("z", dist.Normal(x / (1 + variance), (variance / (1 + variance)).sqrt()))

    handle = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    result = pv.ImportanceSampling(model, guide, num_particles=3, seed=0)(x)
    truth = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    assert torch.allclose(result.log_evidence, truth, atol=1e-4)
    handle.sum().backward()
    assert handle.unconstrained().grad is not None
    assert pyro.get_param_store()._params["scale"] is handle.unconstrained()
