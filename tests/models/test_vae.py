"""The object around the two programs: its networks, its state, reconstructions and draws."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import SIGMAS
from pyro import poutine
from torch import nn
from vae_helpers import small_data, small_vae, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import OptionError, StructureError
from pyro_vae.models import VAE, LinearVAE, mlp_vae
from pyro_vae.nn import Binomial, Categorical, Normal, StandardNormal


def test_the_state_holds_each_tensor_once():
    vae = small_vae()
    assert list(vae.state_dict()) == [
        "model.decoder.0.weight",
        "model.decoder.0.bias",
        "model.prior.loc",
        "model.prior.scale",
        "guide.encoder.0.weight",
        "guide.encoder.0.bias",
        "guide.encoder.2.weight",
        "guide.encoder.2.bias",
    ]
    assert len(list(vae.parameters())) == 6
    assert (vae.encoder, vae.decoder, vae.prior) == (vae.guide.encoder, vae.model.decoder, vae.model.prior)
    other = small_vae()
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.decode(torch.ones(2)).mean, vae.decode(torch.ones(2)).mean)


@pytest.mark.parametrize("role", ["encoder", "decoder", "prior"])
def test_a_replaced_network_replaces_the_one_that_runs(role):
    vae, new = small_vae(), copy.deepcopy(getattr(small_vae(), role))
    setattr(vae, role, new)
    owner = vae.guide if role == "encoder" else vae.model
    assert getattr(vae, role) is getattr(owner, role) is new
    assert set(dict(vae.named_children())) == {"model", "guide"}


def test_encode_and_decode_give_the_networks_distributions_with_gradients():
    vae, x = small_vae(), small_data()
    q, p = vae.encode(x), vae.decode(torch.randn(3, 10, 2))
    assert (q.batch_shape, q.event_shape) == ((10,), (2,))
    assert (p.batch_shape, p.event_shape) == ((3, 10), (6,))
    assert q.mean.requires_grad and p.mean.requires_grad
    torch.testing.assert_close(q.mean, vae.guide.encoder(x).mean)


def test_a_reconstruction_is_the_mean_at_one_draw():
    vae, x = small_vae(), small_data()
    torch.manual_seed(0)
    shown = vae.reconstruct(x)
    torch.manual_seed(0)
    expected = vae.decode(vae.encode(x).sample()).mean
    torch.testing.assert_close(shown, expected)
    assert not torch.equal(vae.reconstruct(x), shown)  # another draw


def test_generated_data_have_the_moments_of_the_model():
    """x ~ N(b, W W' + s^2 I): 6 means and 21 covariances, false alarms in 2e-4 of seeds."""
    vae, n = LinearVAE(6, 2, scale=0.5).double(), 20_000
    with torch.no_grad():
        vae.decoder[0].bias.copy_(torch.arange(6.0))
    x, exact = vae.generate(n), vae.exact()
    covariance = exact.weight @ exact.weight.T + exact.variance * torch.eye(6)
    error = (covariance.diagonal() / n).sqrt()
    assert error.max() < 0.02
    assert ((x.mean(0) - exact.bias).abs() < SIGMAS * error).all()
    found = torch.cov(x.T)
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    assert ((found - covariance).abs() < SIGMAS * error).all()


def test_draws_come_from_the_callers_random_state():
    vae, x = small_vae(), small_data()
    for draw in (lambda: vae.generate(5), lambda: vae.reconstruct(x)):
        torch.manual_seed(0)
        first, state = draw(), torch.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(draw(), first) and torch.equal(torch.get_rng_state(), state)


class Thinned(nn.Sequential):
    """Batch norm and dropout: both behave otherwise in train mode, and the first moves its buffers."""

    def __init__(self, width):
        super().__init__(nn.BatchNorm1d(width), nn.Dropout(0.5))


def test_looking_at_a_vae_leaves_no_trace():
    encoder = nn.Sequential(Thinned(6), nn.Linear(6, 4), Normal())
    decoder = nn.Sequential(Thinned(2), nn.Linear(2, 6), Normal(0.5))
    vae, x = VAE(encoder, decoder, StandardNormal(2)), small_data()
    svi_of(vae).step(x)
    vae.encoder[0][0].eval()  # a mode of its own
    modes, before = [m.training for m in vae.modules()], snapshot(vae)
    gradients = [p.grad.clone() for p in vae.parameters()]
    pyro.clear_param_store()
    with poutine.trace() as outer:
        images = [vae.reconstruct(x), vae.generate(4)]
    assert not any(image.requires_grad for image in images)
    assert [m.training for m in vae.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(snapshot(vae).values(), before.values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(vae.parameters(), gradients, strict=True))
    assert not pyro.get_param_store() and not outer.trace.nodes
    torch.manual_seed(0)
    in_train_mode = vae.reconstruct(x)
    torch.manual_seed(0)
    assert torch.equal(vae.eval().reconstruct(x), in_train_mode)
    with pytest.raises(RuntimeError):
        vae.train().reconstruct(torch.zeros(10, 7))
    assert all(m.training for m in vae.modules())


class CauchyHead(nn.Module):
    def forward(self, raw):
        return dist.Cauchy(raw, 1.0).to_event(1)


@pytest.mark.parametrize("head", [Categorical(3), CauchyHead()], ids=["Categorical", "Cauchy"])
def test_a_likelihood_without_a_mean_says_what_to_draw_instead(head):
    width = 18 if isinstance(head, Categorical) else 6
    vae = VAE(small_vae().encoder, nn.Sequential(nn.Linear(2, width), head), StandardNormal(2))
    with pytest.raises(StructureError, match=r"no mean to reconstruct.*vae.decode\(vae.encode\(x\).sample\(\)\).sample\(\)"):
        vae.reconstruct(small_data())
    assert vae.generate(4).shape == (4, 6)
    assert vae.decode(vae.encode(small_data()).sample()).sample().shape == (10, 6)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_generate_takes_a_number_of_data(n):
    with pytest.raises(OptionError, match="n must be a whole number of at least 1"):
        small_vae().generate(n)


def test_double_precision_stays():
    vae = mlp_vae(6, 2, likelihood=Binomial(4), hidden=(8,)).double()
    x = vae.generate(10)
    assert x.dtype is torch.float64 and vae.reconstruct(x).dtype is torch.float64
    assert pv.ImportanceSampling(vae.model, vae.guide, num_particles=20, seed=0)(x).log_evidence.dtype is torch.float64


def test_the_classes_can_be_subclassed():
    class Mine(VAE):
        def __init__(self):
            vae = small_vae()
            super().__init__(vae.encoder, vae.decoder, vae.prior)
            self.note = nn.Parameter(torch.zeros(3))

    vae, x = copy.deepcopy(Mine()), small_data()
    before = snapshot(vae)
    svi_of(vae).step(x)
    assert not torch.equal(vae.encoder[0].weight, before["guide.encoder.0.weight"])
    assert vae.generate(2).shape == (2, 6)
