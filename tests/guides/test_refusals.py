"""What a guide made from the model refuses, by name, and that the remedies work."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, DatumPlateError, OptionError, StructureError, SubsamplingError

X = torch.tensor([[0.3], [-1.2], [0.5]])


def make(model, *args, network=None, **options):
    return pv.AmortizedGuide(model, network or nn.Linear(1, 4), args or (X,), **options)


def of(sample):
    """A model with the latent that `sample` draws."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = sample(x)
            pyro.sample("obs", dist.Normal(z.to(x.dtype), 1.0), obs=x[:, 0])

    return model


def test_a_discrete_latent_and_its_remedy():
    model = of(lambda x: pyro.sample("kind", dist.Bernoulli(0.3)) + pyro.sample("z", dist.Normal(0.0, 1.0)))
    with pytest.raises(StructureError, match="'kind' is discrete"):
        make(model)
    enumerated = pyro.infer.config_enumerate(model)
    guide = make(enumerated)
    assert guide.names == ("z",)
    assert bool(pv.ImportanceSampling(enumerated, guide, num_particles=5, seed=0)(X).log_evidence.isfinite().all())


def test_a_support_that_depends_on_another_latent():
    model = of(lambda x: pyro.sample("z", dist.Uniform(0.0, pyro.sample("top", dist.Gamma(2.0, 2.0)))))
    with pytest.raises(StructureError, match="'z' differs between data"):
        make(model)
    with pytest.raises(StructureError, match="'z' depends on other latents"):
        make(model, X[:1])


def test_a_support_that_depends_on_the_data():
    with pytest.raises(StructureError, match="'z' differs between data"):
        make(of(lambda x: pyro.sample("z", dist.Uniform(0.0, x[:, 0].abs() + 1))))


def test_bounds_of_one_event_are_those_of_all_data():
    """A Uniform repeats its bounds for all data; a guide for three data serves five hundred."""
    high = torch.tensor([1.0, 3.0])
    model = of(lambda x: pyro.sample("z", dist.Uniform(x.new_zeros(len(x), 2), high).to_event(1)).sum(-1))
    guide = make(model)
    z = guide(torch.zeros(500, 1))["z"].detach()
    assert z.shape == (500, 2) and bool((z > 0).all())
    assert 0.9 < float(z[:, 0].max()) < 1.0 and 2.0 < float(z[:, 1].max()) < 3.0


def test_a_model_without_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(0.0, 1.0), obs=x[:, 0])

    with pytest.raises(StructureError, match="no latent"):
        make(model)


def test_a_given_subsample_and_both_remedies():
    def given(x, index):
        with pyro.plate("data", 100, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x[:, 0])

    class Network(nn.Linear):
        def forward(self, x, index):
            return super().forward(x)

    with pytest.raises(SubsamplingError, match="is given its subsample"):
        make(given, X, torch.arange(3), network=Network(1, 4))

    def drawn(x):
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x[:, 0])

    plain = of(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)))
    torch.manual_seed(0)
    guide = make(drawn)
    first = pv.BetaTrace_ELBO()(drawn, guide)
    second = pv.BetaTrace_ELBO()(pyro.poutine.scale(plain, 100 / 3), pyro.poutine.scale(guide_of(plain, guide), 100 / 3))
    torch.manual_seed(1)
    one = first(X)
    torch.manual_seed(1)
    torch.testing.assert_close(one, second(X), rtol=0.5, atol=100.0)  # other draws: the same scale


def guide_of(model, other):
    guide = make(model)
    guide.load_state_dict(other.state_dict())
    return guide


def test_the_plate_of_the_data():
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(3, 2)
    with pytest.raises(DatumPlateError, match="'columns', 'data'"):
        make(model, x, network=nn.Linear(2, 4))
    with pytest.raises(DatumPlateError, match="'rows'"):
        make(model, x, network=nn.Linear(2, 4), datum_plate="rows")
    guide = make(model, x, network=nn.Linear(2, 4), datum_plate="data")
    assert guide(torch.zeros(5, 2))["z"].shape == (5, 2)


@pytest.mark.parametrize("features", [torch.zeros(3), torch.zeros(3, 2, 2), torch.zeros(2, 4), "text"])
def test_features_of_another_shape(features):
    class Network(nn.Module):
        def forward(self, x):
            return features

    with pytest.raises((ArgumentError, StructureError), match="features"):
        make(of(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0))), network=Network())


def test_arguments_and_options():
    model = of(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)))
    with pytest.raises(ArgumentError, match="tuple of the model's arguments"):
        pv.AmortizedGuide(model, nn.Linear(1, 4), X)
    with pytest.raises(ArgumentError, match="the model takes"):
        make(model, X, X)
    with pytest.raises(OptionError, match="'diagonal', 'full', 'flow'"):
        make(model, family="normal")
    with pytest.raises(OptionError, match=r"features \(B, H\)"):
        pv.AmortizedGuide(model, lambda x: x, (X,))
