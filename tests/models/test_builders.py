"""VAEs in one line: every head fits in and learns, and a newcomer's first one is a good one."""

import copy

import pyro
import pytest
import torch
from head_specs import SPECS
from pair_helpers import quiet
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from vae_helpers import assert_all_moved, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import OptionError
from pyro_vae.models import ConditionalVAE, conv_vae, mlp_conditional_vae, mlp_vae
from pyro_vae.nn import (
    Bernoulli,
    Binomial,
    MultivariateNormal,
    Normal,
)


def conditional(latent_dim, likelihood):
    return mlp_conditional_vae(12, 3, latent_dim, likelihood=likelihood, hidden=(8,))


BUILDERS = {
    "mlp_vae": (lambda d, head: mlp_vae(12, d, likelihood=head(), hidden=(8,)), (12,)),
    "mlp_conditional_vae": (lambda d, head: conditional(d, head()), (12,)),
    "conv_vae": (lambda d, head: conv_vae((2, 9, 6), d, likelihood=head(3), channels=(3, 4)), (2, 9, 6)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("build", "shape"), BUILDERS.values(), ids=BUILDERS)
def test_every_head_fits_learns_and_is_evaluated(build, shape, spec):
    vae = build(2, spec.make)
    y = torch.eye(3)[torch.arange(6) % 3]
    given = (y,) if isinstance(vae, ConditionalVAE) else ()
    x = vae.generate(*given or (6,))
    assert x.shape == (6, *shape)
    before = snapshot(vae)
    svi_of(vae).step(x, *given)
    assert_all_moved(vae, before)
    vae.eval()
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=5, seed=0)
    with quiet():
        assert estimator(x, *given).log_evidence.isfinite().all()
    assert [known[-1] for known in estimator._pair._known.values()] == ["leading"]
    if spec.has_mean:
        assert vae.reconstruct(x, *given).shape == x.shape


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_the_posterior_can_have_full_covariance(latent_dim):
    for build in (
        lambda head: mlp_vae(12, latent_dim, likelihood=Normal(0.5), posterior=head, hidden=(8, 5)),
        lambda head: mlp_conditional_vae(12, 3, latent_dim, likelihood=Normal(0.5), posterior=head),
        lambda head: conv_vae((1, 8, 8), latent_dim, likelihood=Bernoulli(event_dim=3), posterior=head),
    ):
        vae = build(MultivariateNormal())
        x = torch.zeros(4, 1, 8, 8) if "Conv" in repr(vae) else torch.zeros(4, 12)
        q = vae.encode(x, torch.zeros(4, 3)) if isinstance(vae, ConditionalVAE) else vae.encode(x)
        assert (q.batch_shape, q.event_shape) == ((4,), (latent_dim,))
        assert isinstance(q, torch.distributions.MultivariateNormal)


def test_widths_and_activations_are_the_ones_given():
    vae = mlp_vae(64, 8, likelihood=Binomial(16), hidden=(30, 20), activation=nn.Tanh)
    shapes = {name: tuple(p.shape) for name, p in vae.named_parameters() if name.endswith("weight")}
    assert list(shapes.values()) == [(20, 8), (30, 20), (64, 30), (30, 64), (20, 30), (16, 20)]
    assert sum(isinstance(m, nn.Tanh) for m in vae.modules()) == 4
    assert not any(isinstance(m, nn.ReLU) for m in vae.modules())
    vae = conv_vae((3, 16, 16), 8, likelihood=Normal(event_dim=3), channels=(5, 7))
    shapes = [tuple(p.shape) for p in vae.parameters() if p.dim() == 4]
    assert shapes == [(7, 5, 4, 4), (5, 6, 4, 4), (5, 3, 4, 4), (7, 5, 4, 4)]


def test_encoders_see_the_data_through_the_heads_input_layer():
    vae = mlp_vae(4, 2, likelihood=Binomial(16), hidden=())
    x = torch.tensor([[0.0, 4.0, 8.0, 16.0]])
    linear = vae.encoder[1][0]
    expected = (x / 16) @ linear.weight.T + linear.bias
    torch.testing.assert_close(vae.encode(x).mean, expected[:, :2])
    conditional = mlp_conditional_vae(4, 3, 2, likelihood=Binomial(16), hidden=())
    linear, y = conditional.encoder.network[0][0], torch.tensor([[0.0, 1.0, 0.0]])
    expected = torch.cat([x / 16, y], -1) @ linear.weight.T + linear.bias
    torch.testing.assert_close(conditional.encode(x, y).mean, expected[:, :2])


def test_a_head_passed_to_two_vaes_is_not_shared():
    head = Normal("learned")
    first, second = (mlp_vae(6, 2, likelihood=head, hidden=(8,)) for _ in range(2))
    before = snapshot(second)
    svi_of(first).step(torch.randn(5, 6))
    assert first.decoder[1].log_scale != 0
    assert all(torch.equal(a, b) for a, b in zip(snapshot(second).values(), before.values(), strict=True))
    assert head.log_scale == 0


def test_building_draws_no_more_than_the_layers_and_clears_no_store():
    pyro.param("theirs", torch.zeros(2))
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(2, 8), nn.Linear(8, 6)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    vae = mlp_vae(6, 2, likelihood=Bernoulli(), hidden=(8,))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(vae.encoder[1][0].weight, layers[0].weight)
    assert list(pyro.get_param_store()) == ["theirs"]


WRONG = {
    "no head": (lambda: mlp_vae(6, 2, likelihood=nn.Linear(2, 6)), "likelihood must be a head.*got Linear"),
    "the class of a head": (lambda: mlp_vae(6, 2, likelihood=Bernoulli), "likelihood must be a head.*got type"),
    "an image head for vectors": (
        lambda: mlp_vae(6, 2, likelihood=Bernoulli(event_dim=3)),
        "likelihood must have event_dim=1.*conv_vae",
    ),
    "a vector head for images": (
        lambda: conv_vae((1, 8, 8), 2, likelihood=Bernoulli()),
        "likelihood must have event_dim=3 here, got Bernoulli with 1.*mlp_vae",
    ),
    "a posterior for images": (
        lambda: mlp_vae(6, 2, likelihood=Bernoulli(), posterior=Normal(event_dim=3)),
        "posterior must have event_dim=1",
    ),
    "no posterior head": (
        lambda: conv_vae((1, 8, 8), 2, likelihood=Bernoulli(event_dim=3), posterior="normal"),
        "posterior must be a head.*got str",
    ),
    "no data": (lambda: mlp_vae(0, 2, likelihood=Bernoulli()), "data_dim must be a whole number"),
    "no latents": (lambda: mlp_vae(6, 0, likelihood=Bernoulli()), "latent_dim must be a whole number"),
    "no condition": (lambda: mlp_conditional_vae(6, 0, 2, likelihood=Bernoulli()), "condition_dim must be a whole number"),
    "a fraction": (lambda: mlp_vae(6, 2.5, likelihood=Bernoulli()), "latent_dim must be a whole number"),
    "no image": (lambda: conv_vae((8, 8), 2, likelihood=Bernoulli(event_dim=3)), "image_shape must be"),
    "too small an image": (lambda: conv_vae((1, 3, 3), 2, likelihood=Bernoulli(event_dim=3)), "image_shape must be"),
}


@pytest.mark.parametrize(("build", "message"), WRONG.values(), ids=WRONG)
def test_options_that_do_not_fit_are_named(build, message):
    with pytest.raises(OptionError, match=message):
        build()


def test_a_newcomers_first_vae():
    """The docs' example, with fewer steps: better than an untrained one by far, evaluated, copied and trained on."""
    digits = torch.tensor(load_digits().data, dtype=torch.float)  # whole numbers 0..16
    train, test = digits[:1500], digits[1500:]
    vae = mlp_vae(64, latent_dim=8, likelihood=Binomial(16))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
    untrained = svi.evaluate_loss(test) / len(test)
    for _ in range(400):
        svi.step(train[torch.randint(len(train), (100,))])
    trained = svi.evaluate_loss(test) / len(test)
    assert untrained > 250 and trained < 130
    other = copy.deepcopy(vae)
    svi_of_copy = SVI(other.model, other.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
    for _ in range(200):
        svi_of_copy.step(train[torch.randint(len(train), (100,))])
    assert svi_of_copy.evaluate_loss(test) / len(test) < trained - 3
    assert svi.evaluate_loss(test) / len(test) == pytest.approx(trained, abs=2)  # the original did not move
    loader = DataLoader(TensorDataset(test[:60]), batch_size=30)
    with quiet():
        gaps = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide, num_particles=200), loader, seed=0)
    assert len(gaps) == 60
    elbo, bound = float(gaps.elbo.mean()), float(gaps.log_evidence.mean())
    assert -140 < elbo < bound < -90
    assert float(gaps.amortization.mean()) > 0
    images = vae.generate(16)
    assert images.shape == (16, 64) and bool(((images >= 0) & (images <= 16) & (images == images.round())).all())
    error = (vae.reconstruct(test) - test).square().mean() / test.var()
    assert float(error) < 0.5
