"""Discrete draws that only the guide has are summed out of log q: the guide is then a mixture."""

import contextlib
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from kernel_helpers import F64, assert_close, normal, tensor, weigh
from pyro import poutine
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.errors import AuxiliarySiteError, ConvergenceWarning, EnumerationError, MaskError

X = tensor([1.9, -0.5, 3.0])
LOCS, SHARES = tensor([-1.4, 1.2, 0.3]), tensor([0.3, 0.5, 0.2])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 2.0))
        pyro.sample("x", dist.Normal(z * z, 0.5), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        i = pyro.sample("i", dist.Categorical(SHARES.expand(len(x), 3)), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(LOCS[i] * (1 + 0.05 * x), 0.4))


def as_one_distribution(x):
    with pyro.plate("data", len(x)):
        parts = dist.Normal(LOCS * (1 + 0.05 * x).unsqueeze(-1), 0.4)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(SHARES.expand(len(x), 3)), parts))


def log_q(z, x):
    """(..., B)"""
    terms = [normal(z, loc * (1 + 0.05 * x), 0.4) + math.log(share) for loc, share in zip(LOCS, SHARES, strict=True)]
    return torch.stack(terms).logsumexp(0)


def grid():
    z = torch.linspace(-14, 14, 28001, dtype=F64).unsqueeze(-1)
    return z, normal(z, 0.0, 2.0) + normal(X, z * z, 0.5), log_q(z, X)


@pytest.mark.parametrize("K", [1, 2, 7])
def test_the_weights_are_those_of_the_mixture(K):
    result = weigh(model, guide, X, K=K)
    z = result.values["z"]
    assert result.structure.indicators == ("i",) and set(result.guide) == {"z"}
    assert_close(result.log_weight, normal(z, 0.0, 2.0) + normal(X, z * z, 0.5) - log_q(z, X), atol=1e-10)


def test_two_indicators_with_latents_between_them():
    """i, then z1 given i, then j given z1, then z2 given all: log q by the sum over six combinations, site by site."""

    def pair_model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(len(x)), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 0.5), obs=x)

    def pair_guide(x):
        with pyro.plate("data", len(x)):
            i = pyro.sample("i", dist.Categorical(SHARES.expand(len(x), 3)))
            z1 = pyro.sample("z1", dist.Normal(LOCS[i], 0.6))
            j = pyro.sample("j", dist.Bernoulli(torch.sigmoid(z1)))
            pyro.sample("z2", dist.Normal(j + LOCS[i] + z1, 0.7))

    result = weigh(pair_model, pair_guide, X, K=5)
    z1, z2 = result.values["z1"], result.values["z2"]
    first = torch.stack([normal(z1, loc, 0.6) + math.log(share) for loc, share in zip(LOCS, SHARES, strict=True)])
    both = []
    for j in (0.0, 1.0):
        log_j = torch.nn.functional.logsigmoid(z1 if j else -z1)
        both += [term + log_j + normal(z2, j + loc + z1, 0.7) for term, loc in zip(first, LOCS, strict=True)]
    assert_close(result.lw.log_guide_by_site["z1"], first.logsumexp(0), atol=1e-10)
    assert_close(result.lw.log_guide_by_site["z2"], torch.stack(both).logsumexp(0) - first.logsumexp(0), atol=1e-10)
    assert_close(result.lw.log_guide, torch.stack(both).logsumexp(0), atol=1e-10)


def test_every_estimator_is_right():
    z, log_joint, log_guide = grid()
    step = math.log(28 / 28000)
    truth = log_joint.logsumexp(0) + step
    elbo = (log_guide.exp() * (log_joint - log_guide)).sum(0) * math.exp(step)
    found = pv.ImportanceSampling(model, guide, num_particles=5000, seed=0)(X)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error).all() and bool((found.std_error < 0.1).all())
    assert ((found.elbo - elbo).abs() < 5 * found.elbo_std_error).all()
    fitted = pv.AdaptiveImportanceSampling(model, guide, seed=0)(X)
    assert ((fitted.log_evidence - truth).abs() < 5 * fitted.std_error + 1e-3).all()
    assert bool((fitted.std_error < 0.05).all())
    assert torch.allclose(pv.ExactEvidence(model, guide, seed=0)(X).log_evidence, truth, atol=1e-6)
    kl = (log_guide.exp() * (log_guide - normal(z, 0.0, 2.0))).sum(0).mul(math.exp(step)).mean()
    units = pv.ActiveUnits(model, guide, num_particles=400, seed=0)([X], args=lambda x: (x,), progress=False)
    assert abs(float(units.site_kl["z"].value - kl)) < 5 * float(units.site_kl["z"].std_error)
    assert abs(float(units.site_kl["z"].value - kl)) < 0.1
    same = pv.ELBOSurgery(model, as_one_distribution, num_particles=300, seed=1)([X], args=lambda x: (x,), progress=False)
    surgery = pv.ELBOSurgery(model, guide, num_particles=300, seed=0)([X], args=lambda x: (x,), progress=False)
    for part in ("kl", "mutual_information", "marginal_kl"):
        ours, theirs = getattr(surgery, part), getattr(same, part)
        error = math.hypot(float(ours.std_error), float(theirs.std_error))
        assert abs(float(ours.value - theirs.value)) < 5 * error and error < 0.1, part


def test_gaps_free_the_components_together():
    """All components of a datum move and widen together. A mixture of two alike is one normal: its q* is the posterior."""

    def normal_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def alike(x):
        with pyro.plate("data", len(x)):
            i = pyro.sample("i", dist.Bernoulli(x.new_full((len(x),), 0.5)))
            pyro.sample("z", dist.Normal(x / 4 + 0.0 * i, 1.1))

    gaps = pv.InferenceGaps(normal_model, alike, num_particles=300, seed=0)(X)
    truth = normal(X, 0.0, math.sqrt(2.0))
    q, posterior = dist.Normal(X / 4, 1.1), dist.Normal(X / 2, math.sqrt(0.5))
    assert torch.allclose(gaps.optimal_elbo, truth, atol=2e-3)
    right = torch.distributions.kl_divergence(q, posterior)
    assert ((gaps.amortization - right).abs() < 5 * gaps.std_errors["amortization"] + 2e-3).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        gaps = pv.InferenceGaps(model, guide, num_particles=500, seed=0)(X)
    assert (gaps.optimal_elbo > gaps.elbo).all() and (gaps.optimal_elbo < gaps.log_evidence + 0.05).all()


def in_a_plate(x):
    with pyro.plate("data", len(x)):
        with pyro.plate("parts", 2, dim=-2):
            i = pyro.sample("i", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Normal(i.sum(-2), 1.0))


def many_values(x):
    with pyro.plate("data", len(x)):
        i = pyro.sample("i", dist.Categorical(torch.ones(65)))
        pyro.sample("z", dist.Normal(i * 0.1, 1.0))


def masked(x):
    with pyro.plate("data", len(x)):
        i = pyro.sample("i", dist.Bernoulli(0.5 * torch.ones(len(x))))
        pyro.sample("z", dist.Normal(i, 1.0).mask(x > 0))


def unlimited(x):
    with pyro.plate("data", len(x)):
        i = pyro.sample("i", dist.Poisson(torch.ones(len(x))))
        pyro.sample("z", dist.Normal(i, 1.0))


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (in_a_plate, EnumerationError, "plate inside the datum"),
        (many_values, EnumerationError, "at most 64"),
        (masked, MaskError, "mask observations only"),
        (unlimited, AuxiliarySiteError, "no latent counterpart"),
    ],
)
def test_refusals(other, error, message):
    with pytest.raises(error, match=message):
        weigh(model, other, X)


def pair_in_an_inner_plate(masked_sides):
    """Two latents per datum that depend on one indicator. The sides that are named have a mask, (2, B)."""

    def within(side, mask):
        return poutine.mask(mask=mask) if side in masked_sides else contextlib.nullcontext()

    def model(x, mask):
        with pyro.plate("data", 3), pyro.plate("inner", 2), within("model", mask):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x, mask):
        with pyro.plate("data", 3):
            i = pyro.sample("i", dist.Categorical(SHARES.expand(3, 3)))
            with pyro.plate("inner", 2), within("guide", mask):
                pyro.sample("z", dist.Normal(0.5 * x + 0.4 * LOCS[i], 0.8))

    return model, guide


INNER = torch.stack([X, 0.5 - X])
ALL, SOME = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize("sides", [("model",), ("guide",), ("model", "guide")])
def test_a_mask_that_hides_nothing_changes_no_number(sides):
    """The density of a summed site is a sum over the inner plate already: the mask once repeated it over that plate."""
    expected = weigh(*pair_in_an_inner_plate(()), INNER, ALL, K=7)
    assert_close(weigh(*pair_in_an_inner_plate(sides), INNER, ALL, K=7).log_weight, expected.log_weight, atol=1e-10)
    truth = normal(INNER, 0.0, math.sqrt(1.49)).sum(0)
    for make in (pv.ImportanceSampling, pv.AdaptiveImportanceSampling):
        result = make(*pair_in_an_inner_plate(sides), num_particles=2000, seed=0)(INNER, ALL)
        assert bool(((result.log_evidence - truth).abs() < 4.5 * result.std_error + 0.01).all())


@pytest.mark.parametrize("sides", [("model",), ("model", "guide")])
def test_a_mask_that_hides_in_a_later_call_is_refused(sides):
    """The structure was found in a call in which the mask hid nothing."""
    estimator = pv.ImportanceSampling(*pair_in_an_inner_plate(sides), num_particles=200, seed=0)
    estimator(INNER, ALL)
    with pytest.raises(MaskError, match="mask observations only"):
        estimator(INNER, SOME)


def test_training_refuses_what_has_no_gradient_and_the_remedy_trains():
    def program(x):
        shares = pyro.param("shares", SHARES, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            i = pyro.sample("i", dist.Categorical(shares.expand(len(x), 3)))
            pyro.sample("z", dist.Normal(LOCS[i], 0.4))

    pyro.clear_param_store()
    elbo = pv.ImportanceWeightedELBO(num_particles=2)
    with pytest.raises(AuxiliarySiteError, match="MixtureSameFamily"):
        elbo.differentiable_loss(model, program, X)


def test_a_loss_of_the_guide_is_no_part_of_the_sum():
    """An auxiliary observation between indicator and latent that reads the indicator."""

    def with_loss(x):
        with pyro.plate("data", len(x)):
            i = pyro.sample("i", dist.Categorical(SHARES.expand(len(x), 3)), infer={"is_auxiliary": True})
            pyro.sample("label", dist.Normal(1.0 * i, 0.3), obs=x, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(LOCS[i] * (1 + 0.05 * x), 0.4))

    result = weigh(model, with_loss, X, K=5)
    z = result.values["z"]
    assert_close(result.log_weight, normal(z, 0.0, 2.0) + normal(X, z * z, 0.5) - log_q(z, X), atol=1e-10)


def test_an_indicator_after_latents_leaves_the_gap_whole():
    """Its probabilities follow the latents that a fit would move, and their gradient is not known."""

    def late(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 1.0))
            j = pyro.sample("j", dist.Bernoulli(torch.sigmoid(4 * z)))
            pyro.sample("w", dist.Normal(j, 1.0))

    def two(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            w = pyro.sample("w", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    gaps = pv.InferenceGaps(two, late, num_particles=300, seed=0)(X)
    assert "'j' after continuous latents" in gaps.unsplit
    truth = normal(X, 0.0, math.sqrt(3.0))
    assert ((gaps.log_evidence - truth).abs() < 5 * gaps.std_errors["log_evidence"] + 1e-3).all()


def test_a_latent_before_all_indicators():
    """z from its own density, then j given z, then w given j: q(z) sum_j q(j given z) q(w given j)."""

    def two(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            w = pyro.sample("w", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def late(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 1.0))
            j = pyro.sample("j", dist.Bernoulli(torch.sigmoid(4 * z)))
            pyro.sample("w", dist.Normal(j, 1.0))

    result = weigh(two, late, X, K=5)
    z, w = result.values["z"], result.values["w"]
    log_j = torch.nn.functional.logsigmoid(torch.stack([-4 * z, 4 * z]))
    log_w = (log_j + torch.stack([normal(w, 0.0, 1.0), normal(w, 1.0, 1.0)])).logsumexp(0)
    assert_close(result.lw.log_guide_by_site["z"], normal(z, X / 2, 1.0), atol=1e-10)
    assert_close(result.lw.log_guide_by_site["w"], log_w, atol=1e-10)
