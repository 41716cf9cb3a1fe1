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


def two_levels(infer_of_s):
    """A flip s of the datum and two flips t in a plate below it; x ~ N(s + t, 1) for each."""

    def model(x):
        with pyro.plate("data", 2, dim=-2):
            s = pyro.sample("s", dist.Bernoulli(torch.full((2, 1), 0.4)), infer=infer_of_s["model"])
            with pyro.plate("inner", 2, dim=-1):
                t = pyro.sample("t", dist.Bernoulli(torch.full((2, 2), 0.3)))
                pyro.sample("x", dist.Normal(s + t, 1.0), obs=x[:, None].expand(2, 2))

    def guide(x):
        with pyro.plate("data", 2, dim=-2):
            if infer_of_s["guide"]:
                pyro.sample("s", dist.Bernoulli(torch.full((2, 1), 0.5)), infer=infer_of_s["guide"])
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("t", dist.Bernoulli(torch.full((2, 2), 0.5)), infer=ENUMERATE)

    return model, guide


def test_a_site_summed_out_above_one_that_the_guide_enumerates():
    with pytest.raises(EnumerationError, match="Enumerate both in the guide"):
        loss(*two_levels({"model": ENUMERATE, "guide": {}}), nesting=2, num_particles=1)
    kl = torch.distributions.kl_divergence
    kl_s, kl_t = (float(kl(dist.Bernoulli(0.5), dist.Bernoulli(p))) for p in (0.4, 0.3))
    log_p = dist.Normal(torch.tensor([0.0, 1.0, 1.0, 2.0]), 1.0).log_prob(X.unsqueeze(-1)).mean(-1)
    found = loss(*two_levels({"model": {}, "guide": ENUMERATE}), nesting=2, num_particles=1)
    assert found == pytest.approx(float(2 * kl_s + 4 * kl_t - 2 * log_p.sum()), rel=1e-5)


def crossed(in_a_loop):
    """A flip for each of two rows and of two columns, both summed out by the model; y ~ N(row + column, 1) for each pair."""
    y = torch.tensor([[0.3, -0.5], [1.2, 0.4]])

    def model(x):
        rows = pyro.plate("rows", 2, dim=-1)
        flip = dist.Bernoulli(torch.tensor(0.3))
        with rows:
            row = pyro.sample("row", flip.expand([2]), infer=ENUMERATE)
        if in_a_loop:
            for j in pyro.plate("columns", 2):
                column = pyro.sample(f"column_{j}", flip, infer=ENUMERATE)
                with rows:
                    pyro.sample(f"y_{j}", dist.Normal(row + column, 1.0), obs=y[:, j])
            return
        columns = pyro.plate("columns", 2, dim=-2)
        with columns:
            column = pyro.sample("column", flip.expand([2, 1]), infer=ENUMERATE)
        with rows, columns:
            pyro.sample("y", dist.Normal(row + column, 1.0), obs=y.T)

    return model, lambda x: None, y


def test_summed_out_sites_of_crossed_plates():
    with pytest.raises(EnumerationError, match="Iterate over one of the plates"):
        loss(*crossed(in_a_loop=False)[:2], nesting=2, num_particles=1)
    model, guide, y = crossed(in_a_loop=True)
    flips = torch.cartesian_prod(*[torch.arange(2.0)] * 4)  # two rows, two columns
    log_prior = dist.Bernoulli(0.3).log_prob(flips).sum(-1)
    mean = flips[:, :2, None] + flips[:, None, 2:]
    log_p = (log_prior + dist.Normal(mean, 1.0).log_prob(y).sum((-1, -2))).logsumexp(0)
    assert loss(model, guide, num_particles=1) == pytest.approx(-float(log_p), rel=1e-5)


@pytest.mark.parametrize("infer", [{}, ENUMERATE])
def test_a_fault_of_the_program_itself_keeps_its_error(infer):
    """Sizes that do not fit, and a network in another precision, with and without an enumerated site."""

    def model_with(mean):
        def model(x):
            with pyro.plate("data", 2):
                s = pyro.sample("s", dist.Bernoulli(torch.full((2,), 0.3)))
                pyro.sample("x", dist.Normal(mean(s), 1.0), obs=x)

        return model

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("s", dist.Bernoulli(torch.full((2,), 0.5)), infer=infer)

    linear = torch.nn.Linear(2, 2)
    for mean in (lambda s: s + torch.ones(5), lambda s: linear(torch.ones(2).double())):
        with pytest.raises((RuntimeError, ValueError)) as found:
            loss(model_with(mean), guide, num_particles=1)
        assert not isinstance(found.value, EnumerationError)
