"""Parameters that are made in the first call, which an optimiser made before it leaves as they are."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import UntrainedParameterWarning

OBJECTIVES = {
    "trace": pv.BetaTrace_ELBO,
    "mean-field": pv.BetaTraceMeanField_ELBO,
    "importance-weighted": lambda: pv.ImportanceWeightedELBO(num_particles=2),
    "compiled": lambda: pv.BetaTrace_ELBO(compile={"backend": "eager"}),
}
X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Model(nn.Module):
    def __init__(self, stores_scale):
        super().__init__()
        self.decode, self.stores_scale = nn.Linear(2, 3), stores_scale

    def forward(self, x):
        scale = pyro.param("noise", torch.ones(()), dist.constraints.positive) if self.stores_scale else 1.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), scale).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.LazyLinear(2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encode(x), 0.3).to_event(1))


def pair(kind):
    model = Model(stores_scale=kind == "store")
    return model, autoguide.AutoNormal(model) if kind == "autoguide" else nn.Sequential(Guide())[0]


def train(loss, optimizer, num_steps=4):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss(X).backward()
            optimizer.step()
    return [str(w.message) for w in caught if issubclass(w.category, UntrainedParameterWarning)]


def made(objective, kind):
    loss = OBJECTIVES[objective]()(*pair(kind))
    if kind == "store":
        with torch.no_grad():
            loss.guide(X)  # its lazy layer alone
    return loss


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("kind", "name"), [("store", "noise"), ("autoguide", "guide.locs.z_unconstrained")])
def test_what_an_optimiser_was_not_given_is_named_once(objective, kind, name):
    if (objective, kind) == ("compiled", "autoguide"):
        pytest.skip("parameters of autoguides are not compiled under torch.optim")
    loss = made(objective, kind)
    said = train(loss, torch.optim.Adam(loss.parameters()))
    assert len(said) == 1 and f"'{name}'" in said[0] and "torch.no_grad()" in said[0]
    assert "decode" not in said[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["store", "autoguide"])
def test_the_remedies_work(objective, kind):
    if (objective, kind) == ("compiled", "autoguide"):
        pytest.skip("parameters of autoguides are not compiled under torch.optim")
    loss = made(objective, kind)
    with torch.no_grad():
        loss(X)
    stored = list(pyro.get_param_store()._params.values()) if kind == "store" else []
    before = [param.detach().clone() for param in (*loss.parameters(), *stored)]
    assert not train(loss, torch.optim.Adam([*loss.parameters(), *stored]))
    assert all(not torch.equal(*both) for both in zip(before, (*loss.parameters(), *stored), strict=True))


def test_accumulated_gradients_are_no_reason():
    """Nothing has moved yet, so that nothing is said yet."""
    loss = made("trace", "store")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedParameterWarning)
        for _ in range(3):
            loss(X).backward()
    assert train(loss, torch.optim.Adam(loss.parameters()))


def test_an_argument_that_takes_a_gradient_is_no_parameter():
    loss = made("trace", "none")
    with torch.no_grad():
        loss(X)
    x = X.clone().requires_grad_()
    optimizer = torch.optim.Adam(loss.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedParameterWarning)
        for _ in range(3):
            loss(x).backward()
            optimizer.step()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["deepcopy", "pickle"]
)
def test_a_copy_looks_again(copied):
    loss = copied(made("trace", "store"))
    assert train(loss, torch.optim.Adam(loss.parameters()))
    assert not train(copied(loss), torch.optim.Adam([*loss.parameters()]), num_steps=1)
