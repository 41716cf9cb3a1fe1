"""The conditional VAE: exact where its log p(x given y) is known, and as independent of other instances as the plain one."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from vae_helpers import assert_all_moved, small_data, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, EmptyBatchError
from pyro_vae.models import Concatenated, ConditionalVAE
from pyro_vae.nn import MultivariateNormal, Normal, StandardNormal

S2 = 0.3  # noise variance


def conditional_vae(prior=None):
    encoder = Concatenated(nn.Sequential(nn.Linear(6 + 3, 4), Normal()))
    decoder = Concatenated(nn.Sequential(nn.Linear(2 + 3, 6), Normal(0.5)))
    return ConditionalVAE(encoder, decoder, prior or StandardNormal(2))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def exact_vae(depends_on_y):
    """z ~ N(A y, I), x ~ N(W z + V y, s^2 I), with its posterior as the guide; and log p(x given y)."""
    generator = torch.Generator().manual_seed(0)
    a, w, v = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((2, 3), (6, 2), (6, 3)))
    a = a if depends_on_y else torch.zeros_like(a)
    precision = torch.eye(2, dtype=F64) + w.T @ w / S2
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    gain = torch.linalg.inv(precision) @ w.T / S2

    def posterior(x, y):
        return dist.MultivariateNormal(y @ a.T + (x - y @ (v + w @ a).T) @ gain.T, scale_tril=root)

    def log_evidence(x, y):
        covariance = w @ w.T + S2 * torch.eye(6, dtype=F64)
        return torch.distributions.MultivariateNormal(y @ (v + w @ a).T, covariance).log_prob(x)

    decoder = Function(lambda z, y: dist.Normal(z @ w.T + y @ v.T, S2**0.5).to_event(1))
    prior = Function(lambda y: dist.Normal(y @ a.T, 1.0).to_event(1)) if depends_on_y else StandardNormal(2).double()
    return ConditionalVAE(Function(posterior), decoder, prior), log_evidence


@pytest.mark.parametrize("depends_on_y", [False, True])
def test_with_the_exact_guide_every_draw_gives_the_evidence(depends_on_y):
    vae, log_evidence = exact_vae(depends_on_y)
    x, y = small_data().double(), torch.randn(10, 3, dtype=F64)
    truth = log_evidence(x, y)
    elbo = -Trace_ELBO().loss(vae.model, vae.guide, x, y)
    assert elbo == pytest.approx(float(truth.sum()), abs=1e-8)
    evidence = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3, seed=0)(x, y)
    torch.testing.assert_close(evidence.log_evidence, truth, rtol=0, atol=1e-10)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3)
    result = pv.evaluate(estimator, loader, args=lambda batch: (batch[0], batch[1]), seed=0)
    torch.testing.assert_close(result.log_evidence, truth, rtol=0, atol=1e-10)


def test_generated_data_have_the_mean_of_their_row():
    """x given y ~ N((V + W A) y, ...): 12 means, false alarms in 8e-5 of seeds."""
    vae, _ = exact_vae(True)
    y = torch.eye(3, dtype=F64)[:2]
    draws = torch.stack([vae.generate(y) for _ in range(4000)])
    expected = vae.decode(vae.prior(y).mean, y).mean  # the model is linear
    error = draws.std(0) / 4000**0.5
    assert draws.shape == (4000, 2, 6) and error.max() < 0.06
    assert ((draws.mean(0) - expected).abs() < 4.5 * error).all()


@pytest.mark.parametrize("prior", ["of y", "standard normal"])
@pytest.mark.parametrize("way", ["SVI", "torch.optim"])
def test_a_second_instance_and_a_copy_learn_every_parameter(prior, way):
    x, y = small_data(), torch.randn(10, 3)

    def make():
        return conditional_vae(nn.Sequential(nn.Linear(3, 4), Normal()) if prior == "of y" else None)

    first = make()
    svi_of(first).step(x, y)
    for vae in (make(), copy.deepcopy(first)):
        before, of_first = snapshot(vae), snapshot(first)
        if way == "SVI":
            svi_of(vae).step(x, y)
        else:
            objective = Trace_ELBO()(vae.model, vae.guide)
            optimizer = torch.optim.Adam(objective.parameters())
            objective(x, y).backward()
            optimizer.step()
        assert_all_moved(vae, before)
        assert all(torch.equal(a, b) for a, b in zip(snapshot(first).values(), of_first.values(), strict=True))


def test_looks_at_the_data_of_each_row():
    vae, x, y = conditional_vae(nn.Sequential(nn.Linear(3, 4), Normal())), small_data(), torch.randn(10, 3)
    assert vae.encode(x, y).batch_shape == (10,)
    assert vae.decode(torch.randn(5, 10, 2), y).batch_shape == (5, 10)
    torch.manual_seed(0)
    shown = vae.reconstruct(x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(shown, vae.decode(vae.encode(x, y).sample(), y).mean.detach())
    assert vae.generate(y[:4]).shape == (4, 6) and not vae.generate(y).requires_grad
    assert not pyro.get_param_store()
    vae.prior = StandardNormal(2)
    assert vae.generate(y[:4]).shape == (4, 6)
    with pytest.raises(EmptyBatchError):
        vae.generate(y[:0])


def test_the_state_holds_each_tensor_once():
    assert list(conditional_vae().state_dict()) == [
        "model.decoder.network.0.weight",
        "model.decoder.network.0.bias",
        "model.prior.loc",
        "model.prior.scale",
        "guide.encoder.network.0.weight",
        "guide.encoder.network.0.bias",
    ]


@pytest.mark.parametrize(
    ("z", "y"), [((10, 2), (10, 3)), ((4, 10, 2), (10, 3)), ((4, 10, 2), (1, 3)), ((2,), (3,)), ((4, 10, 2), (4, 1, 3))]
)
def test_concatenated_broadcasts_leading_dimensions(z, y):
    z, y = torch.randn(z), torch.randn(y)
    joined = Concatenated(nn.Identity())(z, y)
    leading = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
    assert joined.shape == (*leading, 5)
    assert torch.equal(joined[..., :2], z.expand(*leading, 2)) and torch.equal(joined[..., 2:], y.expand(*leading, 3))


def test_concatenated_looks_at_the_first_input_through_its_own_layer():
    a, b, c = torch.randn(4, 2), torch.randn(4, 1), torch.ones(4, 3, dtype=torch.long)
    joined = Concatenated(nn.Identity(), first=Function(lambda x: 2 * x))(a, b, c)
    assert torch.equal(joined, torch.cat([2 * a, b, c.float()], -1))


@pytest.mark.parametrize("y", [(3,), (5,), (5, 3), (9, 3)])
def test_conditions_without_a_row_for_each_datum_are_refused(y):
    """Labels (B,) would else be one condition of size B, the same for all data."""
    vae = conditional_vae()
    with pytest.raises(ArgumentError, match=r"a row for each datum.*one-hot"):
        svi_of(vae).step(small_data(), torch.zeros(y))


def test_a_full_covariance_guide_fits_in():
    encoder = Concatenated(nn.Sequential(nn.Linear(6 + 3, 5), MultivariateNormal()))
    vae = conditional_vae()
    vae.encoder = encoder
    before = snapshot(vae)
    svi_of(vae).step(small_data(), torch.randn(10, 3))
    assert_all_moved(vae, before)
