"""Networks that are no such networks, and data that do not fit, get an error that names the remedy."""

import copy

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from vae_helpers import assert_same, small_data, small_vae, snapshot, svi_of

from pyro_vae.errors import ArgumentError, EmptyBatchError, OptionError, StructureError
from pyro_vae.models import VAE, Concatenated, ConditionalVAE
from pyro_vae.nn import Normal, StandardNormal


def networks():
    vae = small_vae()
    return {"encoder": vae.encoder, "decoder": vae.decoder, "prior": vae.prior}


class Returns(nn.Module):
    """A network that ends in any function."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.Sequential(*layers)

    def forward(self, *inputs):
        return self.function(*(self.layers(tensor) for tensor in inputs))


class PyroLayer(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.ones(6), constraint=dist.constraints.positive)

    def forward(self, z):
        return dist.Normal(z.sum(-1, keepdim=True), self.scale).to_event(1)


@pytest.mark.parametrize("kind", [VAE, ConditionalVAE])
@pytest.mark.parametrize("role", ["encoder", "decoder", "prior"])
def test_networks_are_modules(kind, role):
    for wrong in (lambda x: x, None, dist.Normal(torch.zeros(2), 1.0).to_event(1)):
        with pytest.raises(OptionError, match=f"the {role} must be an nn.Module.*got") as error:
            kind(**{**networks(), role: wrong})
        assert ("StandardNormal" in str(error.value)) is (role == "prior")


@pytest.mark.parametrize("kind", [VAE, ConditionalVAE])
def test_modules_that_pyro_shares_by_name_are_refused(kind):
    for wrong in (PyroLayer(), nn.Sequential(nn.Linear(2, 2), PyroLayer()), PyroModule[nn.Linear](2, 6)):
        with pytest.raises(OptionError, match="the decoder contains a PyroModule.*plain nn.Module"):
            kind(**{**networks(), "decoder": wrong})


WRONG_NETWORKS = {
    "encoder without a head": ("encoder", nn.Linear(6, 4), "the encoder must return a distribution.*got Tensor.*head"),
    "decoder without a head": ("decoder", nn.Linear(2, 6), "the decoder must return a distribution.*got Tensor.*head"),
    "prior that is a tensor": ("prior", Returns(lambda: torch.zeros(2)), "the prior must return a distribution.*got Tensor"),
    "a distribution of torch": (
        "encoder",
        Returns(lambda h: torch.distributions.Normal(h, 1.0), nn.Linear(6, 2)),
        "the encoder must return a distribution of pyro.distributions, got Normal",
    ),
    "no event in the encoder": (
        "encoder",
        Returns(lambda h: dist.Normal(h, 1.0), nn.Linear(6, 2)),
        r"the encoder must return one distribution per row, batch shape \(10,\), got batch shape \(10, 2\).*to_event",
    ),
    "no event in the decoder": (
        "decoder",
        Returns(lambda h: dist.Normal(h, 1.0), nn.Linear(2, 6)),
        r"the decoder must return one distribution per row, batch shape \(10,\), got batch shape \(10, 6\)",
    ),
    "no event in the prior": (
        "prior",
        Returns(lambda: dist.Normal(torch.zeros(2), 1.0)),
        r"the prior must return one distribution per row, batch shape \(\) or \(10,\), got batch shape \(2,\)",
    ),
    "one event for the whole batch": (
        "encoder",
        Returns(lambda h: dist.Normal(h, 1.0).to_event(2), nn.Linear(6, 2)),
        r"the encoder must return one distribution per row, batch shape \(10,\), got batch shape \(\)",
    ),
    "rows that are mixed": (
        "decoder",
        Returns(lambda h: dist.Normal(h.mean(0, keepdim=True), 1.0).to_event(1), nn.Linear(2, 6)),
        r"the decoder must return one distribution per row, batch shape \(10,\), got batch shape \(1,\)",
    ),
    "more latents in the encoder": (
        "encoder",
        nn.Sequential(nn.Linear(6, 6), Normal()),
        r"same event shape, got \(10, 3\) for all rows from the encoder and \(2,\)",
    ),
    "one latent, which would be broadcast": (
        "encoder",
        nn.Sequential(nn.Linear(6, 2), Normal()),
        r"same event shape, got \(10, 1\) for all rows from the encoder and \(2,\)",
    ),
}


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize(("role", "network", "message"), WRONG_NETWORKS.values(), ids=WRONG_NETWORKS)
def test_networks_return_one_distribution_per_row(role, network, message, validation):
    vae = VAE(**{**networks(), role: network})
    before = snapshot(vae)
    with pyro.validation_enabled(validation), pytest.raises(StructureError, match=message):
        svi_of(vae).step(small_data())
    assert_same(vae.state_dict(), before)


def test_as_many_rows_as_latents_do_not_pass_for_events():
    """Pyro alone takes the latent dimension for the plate when the two sizes agree."""
    vae = VAE(**{**networks(), "encoder": Returns(lambda h: dist.Normal(h, 1.0), nn.Linear(6, 2))})
    with pytest.raises(StructureError, match=r"batch shape \(2,\), got batch shape \(2, 2\)"):
        svi_of(vae).step(small_data(2))


WRONG_DATA = {
    "of another shape": (small_data().reshape(10, 2, 3), ArgumentError, "mat1|event shape"),
    "no tensor": (numpy.zeros((10, 6)), ArgumentError, "x must be a tensor of data.*got ndarray"),
    "a scalar": (torch.tensor(1.0), ArgumentError, r"x must be a tensor of data.*got \(\)"),
    "nothing": (None, ArgumentError, "x must be a tensor of data.*got NoneType"),
    "no rows": (torch.zeros(0, 6), EmptyBatchError, "at least one row"),
    "a single datum without its batch": (torch.zeros(6), StructureError, r"batch shape \(6,\), got batch shape \(\)"),
}


@pytest.mark.parametrize(("x", "error", "message"), WRONG_DATA.values(), ids=WRONG_DATA)
def test_data_are_rows(x, error, message):
    vae = small_vae()
    if isinstance(x, torch.Tensor) and x.dim() == 3:
        vae.encoder = Returns(lambda h: dist.Normal(h, 1.0).to_event(1), nn.Flatten(1), nn.Linear(6, 2))
    with pytest.raises(error, match=message):
        svi_of(vae).step(x)


@pytest.mark.parametrize("validation", [True, False])
def test_data_that_would_be_broadcast_against_the_likelihood_are_refused(validation):
    vae = small_vae()
    vae.encoder = nn.Sequential(nn.Linear(1, 4), Normal())
    vae.decoder = Returns(lambda h: dist.Normal(h, 1.0).to_event(1), nn.Linear(2, 6))
    with (
        pyro.validation_enabled(validation),
        pytest.raises(ArgumentError, match=r"event shape of the decoder's likelihood, \(6,\), got \(1,\)"),
    ):
        svi_of(vae).step(small_data()[:, :1])


def test_looks_at_wrong_networks_say_the_same():
    vae = VAE(nn.Linear(6, 4), nn.Linear(2, 6), StandardNormal(2))
    with pytest.raises(StructureError, match="the encoder must return a distribution"):
        vae.reconstruct(small_data())
    with pytest.raises(StructureError, match="the decoder must return a distribution"):
        vae.generate(3)
    with pytest.raises(OptionError, match="the encoder must be an nn.Module"):
        vae.encoder = None
    conditional = ConditionalVAE(Concatenated(nn.Linear(8, 4)), Concatenated(nn.Linear(4, 6)), copy.deepcopy(vae.prior))
    with pytest.raises(StructureError, match="the encoder must return a distribution"):
        conditional.encode(small_data(), torch.zeros(10, 2))
    with pytest.raises(ArgumentError, match="must be a tensor"):
        conditional.generate(None)
