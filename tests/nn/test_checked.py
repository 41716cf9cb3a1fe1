"""Data without a density are refused by name, at once, and by the kernel; nothing is hidden from the kernel."""

import pyro
import pytest
import torch
from head_specs import SPECS
from nn_helpers import Bias, in_eval_mode, raw_numbers, simulated
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_vae as pv
import pyro_vae.nn as nn
from pyro_vae.densities import innermost
from pyro_vae.errors import SupportError

every_head = pytest.mark.parametrize("name", SPECS)


@every_head
def test_data_outside_the_support_are_refused_by_name(name):
    head = in_eval_mode(name, dtype=torch.float32)
    fn = head(raw_numbers(head, size=3, batch=(20,), dtype=torch.float32))
    good = fn.sample().float()
    for bad in SPECS[name].bad:
        x = good.clone()
        x[2, 0] = x[7, 1] = x[7, 2] = bad
        words = name.split("-")[0]
        with pytest.raises(SupportError, match=rf"the {words} head takes .*3 of 60 values are not in rows \[2, 7\] .*: \w+"):
            fn.log_prob(x)
    fn.log_prob(good)


def test_the_message_has_room_for_many_rows_and_for_none():
    fn = nn.Bernoulli()(torch.zeros(40, 2))
    with pytest.raises(SupportError, match=r"\[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and 30 more \(finite ones from 0.5 to 0.5\)"):
        fn.log_prob(torch.full((40, 2), 0.5))
    with pytest.raises(SupportError, match=r"2 of 2 values are not \(none finite\).*binarise"):
        nn.Bernoulli()(torch.zeros(2)).log_prob(torch.full((2,), torch.nan))
    with pytest.raises(SupportError, match=r"rows \[\[0, 1\]\]"):
        x = torch.zeros(2, 3, 4)
        x[0, 1] = 7
        nn.Bernoulli()(torch.zeros(2, 3, 4)).log_prob(x)


def test_full_covariance_and_prior_refuse_nan():
    z = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
    for fn in (nn.MultivariateNormal()(torch.zeros(2, 5)), nn.StandardNormal(2)()):
        with pytest.raises(SupportError, match=r"1 of 4 values are not in rows \[1\].*learning rate"):
            fn.log_prob(z)
        with pytest.raises(SupportError):
            fn.expand((2,)).log_prob(z)


def test_large_finite_numbers_and_whole_types_are_data():
    """A sum of these overflows float32."""
    nn.StandardNormal(4)().log_prob(torch.full((3, 4), 3e38))
    for head in (nn.Bernoulli(), nn.ContinuousBernoulli(), nn.Normal(0.1)):
        assert head(torch.zeros(0, 4)).log_prob(torch.zeros(0, 4)).shape == (0,)
    assert nn.Binomial(3)(torch.zeros(4)).log_prob(torch.tensor([0, 1, 2, 3])).shape == ()
    assert nn.DiscretizedLogistic(256)(torch.zeros(8)).log_prob(torch.tensor([0, 1, 2, 255], dtype=torch.uint8)).shape == ()
    nn.Binomial(1)(torch.zeros(2)).log_prob(torch.tensor([True, False]))


@every_head
@pytest.mark.parametrize("validation", [True, False])
def test_data_of_another_shape_are_refused_always(name, validation):
    """(B, 1) against (B, X) would be stretched without a word."""
    head = in_eval_mode(name, dtype=torch.float32)
    with pyro.validation_enabled(validation):
        fn = head(raw_numbers(head, size=3, batch=(5,), dtype=torch.float32))
        for shape in ((5, 1), (5, 2), (1,), (), (3, 5)):
            with pytest.raises(SupportError, match=rf"events of shape \(3,\).*{tuple(shape)}".replace("()", r"\(\)")):
                fn.log_prob(torch.zeros(shape))
        wide = head(raw_numbers(head, size=1, batch=(5,), dtype=torch.float32))
        with pytest.raises(SupportError):
            wide.log_prob(torch.zeros(5, 3))
        with pytest.raises(SupportError):
            fn.expand((2, 5)).log_prob(torch.zeros(5, 1))


@every_head
def test_without_argument_checks_the_support_is_not_looked_at(name):
    head = in_eval_mode(name, dtype=torch.float32)
    fn = head(raw_numbers(head, size=3, dtype=torch.float32))
    x = fn.sample().float()
    x[1] = -1.0 if name == "DiscretizedLogistic" else 0.5
    bad = x if SPECS[name].is_discrete else x + torch.nan
    with pyro.validation_enabled(False):
        assert fn.log_prob(bad).shape == ()
    with pytest.raises(SupportError):  # the switch counts at this moment, not when the head was called
        fn.log_prob(bad)
    with pyro.validation_enabled(False):
        fn = head(raw_numbers(head, size=3, dtype=torch.float32)).expand((2,))
    with pytest.raises(SupportError):
        fn.log_prob(bad)


@every_head
def test_the_kernel_sees_through(name):
    head = in_eval_mode(name)
    fn = head(raw_numbers(head, size=3))
    assert isinstance(fn, torch.distributions.Independent)
    assert type(innermost(fn)).__name__ == SPECS[name].innermost
    assert fn.support.event_dim == 1
    assert repr(fn.support) == repr(head.support)


# --- in programs ---


def pair_of(head, size):
    """One latent, which the data do not depend on: log p(x) = log_prob(x) for every guide that equals the prior."""
    prior, decoder = nn.StandardNormal(1), torch.nn.Sequential(Bias(head.num_outputs(size)), head)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("obs", decoder(pyro.sample("latent", prior())), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("latent", prior())

    return model, guide, decoder.eval()


@every_head
def test_evidence_of_a_head_is_its_density(name):
    head = SPECS[name].make()
    x = simulated(head, num_data=5, spread=SPECS[name].spread_of_data)
    model, guide, decoder = pair_of(head, 6)
    evidence = pv.ImportanceSampling(model, guide, num_particles=3, seed=0)(x)
    torch.testing.assert_close(evidence.log_evidence, decoder(torch.zeros(5, 1)).log_prob(x).detach())


@every_head
def test_the_kernel_and_svi_refuse_such_data_too(name):
    """The kernel runs with argument checks off and looks for itself; Pyro passes the head's words on."""
    head = SPECS[name].make()
    x = simulated(head, num_data=5, spread=SPECS[name].spread_of_data).float()
    x[3, 2] = SPECS[name].bad[-1]
    model, guide, _ = pair_of(head, 6)
    with pytest.raises(pv.errors.InvalidDataError, match=r"'obs'.*in data \[3\]"):
        pv.ImportanceSampling(model, guide, num_particles=3, seed=0)(x)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"site 'obs':\nthe \w+ head takes .* in rows \[3\]"):
        svi.evaluate_loss(x)


@every_head
@pytest.mark.parametrize("filling", [torch.nan, -7.5])
def test_single_numbers_may_be_missing(name, filling):
    """A mask below the event leaves out a number, whatever stands in its place: value and gradient see no hole."""
    head = SPECS[name].make()
    x = simulated(head, num_data=5, spread=SPECS[name].spread_of_data).float()
    seen = torch.ones(5, 6, dtype=torch.bool)
    seen[1, 2] = seen[3, 5] = seen[3, 0] = False
    network = torch.nn.Sequential(Bias(head.num_outputs(6)), head).eval()
    prior = nn.StandardNormal(1)

    def model(x):
        with pyro.plate("data", len(x)):
            fn = network(pyro.sample("latent", prior()))
            pyro.sample("obs", fn.base_dist.mask(seen).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("latent", prior())

    by_number = network(torch.zeros(5, 1)).base_dist.log_prob(x).detach()
    holes = torch.where(seen, x, filling)
    evidence = pv.ImportanceSampling(model, guide, num_particles=3, seed=0)(holes)
    torch.testing.assert_close(evidence.log_evidence, torch.where(seen, by_number, 0.0).sum(-1), rtol=1e-5, atol=1e-5)
    loss = pv.ImportanceWeightedELBO(num_particles=2)
    loss.differentiable_loss(model, guide, holes).backward()
    assert bool(network[0].raw.grad.isfinite().all())


def test_a_pseudo_likelihood_can_still_be_evaluated_as_one():
    x = torch.full((5, 6), 0.25)
    model, guide, _ = pair_of(nn.Bernoulli(), 6)
    evidence = pv.ImportanceSampling(model, guide, num_particles=3, seed=0, check_support=False)(x)
    torch.testing.assert_close(evidence.log_evidence, torch.full((5,), -6 * torch.tensor(2.0).log()))
    assert not evidence.support_checked
