"""Where Pyro's enumeration fails, the error has a name, and its remedy works."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import EnumerationError

X = torch.tensor([0.3, -0.5])
ENUMERATE = {"enumerate": "parallel"}


def loss(model, guide, x=X, nesting=1, num_particles=2000):
    objective = pv.BetaTraceEnum_ELBO(
        max_plate_nesting=nesting, num_particles=num_particles, strict_enumeration_warning=False, vectorize_particles=True
    )
    return objective.loss(model, guide, x)


def events(apart):
    """Two flips with the prior .3, x ~ N(their sum, 1)."""

    def flips(p, infer):
        if apart:
            return sum(pyro.sample(f"s{i}", dist.Bernoulli(torch.tensor(p)).expand([2]), infer=infer) for i in range(2))
        return pyro.sample("s", dist.Bernoulli(p * torch.ones(2, 2)).to_event(1), infer=infer).sum(-1)

    def model(x):
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(flips(0.3, {}), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            flips(0.5, ENUMERATE)

    return model, guide


def test_enumerated_events():
    with pytest.raises(EnumerationError, match="Write a site for each number"):
        loss(*events(apart=False), num_particles=1)
    log_p = dist.Normal(torch.arange(3.0), 1.0).log_prob(X.unsqueeze(-1))
    kl = 2 * torch.distributions.kl_divergence(dist.Bernoulli(0.5), dist.Bernoulli(0.3))
    elbo = (log_p * torch.tensor([0.25, 0.5, 0.25])).sum() - 2 * kl
    assert loss(*events(apart=True), num_particles=1) == pytest.approx(-float(elbo), rel=1e-5)


def reversed_pair(infer, reverse=True):
    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            s = pyro.sample("s", dist.Bernoulli(logits=z))
            pyro.sample("x", dist.Normal(z + s, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            if reverse:
                s = pyro.sample("s", dist.Bernoulli(torch.tensor([0.3, 0.6])), infer=infer)
                pyro.sample("z", dist.Normal(0.5 * s, 1.0))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
                pyro.sample("s", dist.Bernoulli(logits=z), infer=infer)

    return model, guide


def test_a_guide_in_another_order_beside_an_enumerated_site():
    """The remedy against the ELBO that the kernel computes: five errors."""
    with pytest.raises(EnumerationError, match="Draw them in the order of the model"):
        loss(*reversed_pair(ENUMERATE), num_particles=1)
    for pair in (reversed_pair({}), reversed_pair(ENUMERATE, reverse=False)):
        model, guide = pair
        evidence = pv.ImportanceSampling(model, guide, num_particles=2000, seed=0)(X)
        error = 2 * float(evidence.elbo_std_error.square().sum().sqrt())
        assert abs(loss(model, guide) + float(evidence.elbo.sum())) < 5 * error
        assert error < 0.2


def beside(in_a_plate):
    def z(data):
        if in_a_plate:
            with data, pyro.plate("inner", 2, dim=-1):
                pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0))
        else:
            with data:
                pyro.sample("z", dist.Normal(torch.zeros(2, 1, 2), 1.0).to_event(1))

    def model(x):
        data = pyro.plate("data", 2, dim=-2)
        z(data)
        with data:
            s = pyro.sample("s", dist.Bernoulli(torch.full((2, 1), 0.4)))
            pyro.sample("t", dist.Bernoulli(torch.full((2, 1), 0.4)))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x[:, None])

    def guide(x):
        data = pyro.plate("data", 2, dim=-2)
        z(data)
        with data:
            pyro.sample("s", dist.Bernoulli(torch.full((2, 1), 0.5)), infer=ENUMERATE)
            pyro.sample("t", dist.Bernoulli(torch.full((2, 1), 0.5)), infer=ENUMERATE)

    return model, guide


def test_two_discrete_latents_beside_a_plate_inside_the_datum():
    with pytest.raises(EnumerationError, match="Write that plate as an event"):
        loss(*beside(in_a_plate=True), nesting=2, num_particles=1)
    kl = float(torch.distributions.kl_divergence(dist.Bernoulli(0.5), dist.Bernoulli(0.4)))
    log_p = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(X.unsqueeze(-1)).mean(-1).sum()
    found = loss(*beside(in_a_plate=False), nesting=2, num_particles=1)
    assert found == pytest.approx(float(4 * kl - log_p), rel=1e-5)
