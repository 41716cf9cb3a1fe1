"""Latents that Deltas set from auxiliary draws: guides by EasyGuide, and autoguides of one's own."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from kernel_helpers import F64, assert_close
from pair_helpers import quiet
from pyro.contrib.easyguide import EasyGuide

import pyro_vae as pv
from pyro_vae.errors import AuxiliarySiteError, MaskError, StructureError

X = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0], dtype=F64)
ZERO = torch.zeros((), dtype=F64)


def chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(ZERO, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x0", dist.Normal(a, 1.0), obs=x[:, 0])
        pyro.sample("x1", dist.Normal(b, 1.0), obs=x[:, 1])


COVARIANCE = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64)
TRUTH = dist.MultivariateNormal(torch.zeros(2, dtype=F64), COVARIANCE).log_prob(X)


def posterior(x):
    """Of (a, b): precision [[3, -1], [-1, 2]]."""
    covariance = torch.linalg.inv(torch.tensor([[3.0, -1.0], [-1.0, 2.0]], dtype=F64))
    return dist.MultivariateNormal(x @ covariance, covariance)


def joint(x, stated=0.0, both=True):
    with pyro.plate("data", len(x)):
        ab = pyro.sample("ab", posterior(x), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(ab[..., 0], log_density=stated))
        b = ab[..., 1] if both else ab[..., 0]
        pyro.sample("b", dist.Delta(b))


class Easy(EasyGuide):
    def guide(self, x):
        group = self.group(match="a|b")
        with self.plate("data", len(x)):
            group.sample("ab", posterior(x))


@pytest.mark.parametrize("guide", [joint, Easy(chain)], ids=["by hand", "EasyGuide"])
@pytest.mark.parametrize("num_particles", [1, 6])
def test_an_exact_joint_guide_gives_log_p(guide, num_particles):
    found = pv.ImportanceSampling(chain, guide, num_particles=num_particles, seed=0)(X)
    assert_close(found.log_evidence, TRUTH)
    assert_close(found.elbo, TRUTH)


def test_the_whole_call_as_one_datum():
    assert_close(pv.ImportanceSampling(chain, joint, datum_plate=None, seed=0)(X).log_evidence, TRUTH.sum().reshape(1))


def test_surgery_and_units_of_unpacked_draws():
    """KL of all latents by formula, and its parts against the same posterior as one latent of two numbers."""

    def vector(x):
        with pyro.plate("data", len(x)):
            prior = dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=F64))
            ab = pyro.sample("ab", prior)
            pyro.sample("x", dist.Normal(ab, 1.0).to_event(1), obs=x)

    def vector_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("ab", posterior(x))

    prior = dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=F64))
    kl = torch.distributions.kl_divergence(posterior(X), prior).mean()
    units = pv.ActiveUnits(chain, joint, num_particles=500, seed=0)([X], progress=False)
    assert abs(float(units.site_kl["a+b"].value - kl)) < 4.5 * float(units.site_kl["a+b"].std_error) < 0.2
    assert bool(units.kl.isnan().all())  # a joint density has no parts
    same = pv.ELBOSurgery(vector, vector_guide, num_particles=500, seed=1)([X], progress=False)
    for guide in (joint, Easy(chain)):
        found = pv.ELBOSurgery(chain, guide, num_particles=500, seed=0)([X], progress=False)
        assert abs(float(found.kl.value - kl)) < 4.5 * float(found.kl.std_error) < 0.2
        for part in ("mutual_information", "marginal_kl"):
            ours, theirs = getattr(found, part), getattr(same, part)
            error = math.hypot(float(ours.std_error), float(theirs.std_error))
            assert abs(float(ours.value - theirs.value)) < 4.5 * error < 0.2


def test_surgery_refuses_draws_that_every_datum_unpacks_otherwise():
    """a = loc(x) + u: the same u is another latent under another datum."""

    def shifted(x):
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros(len(x), 2, dtype=F64), 1.0).to_event(1)
            u = pyro.sample("u", noise, infer={"is_auxiliary": True})
            pyro.sample("a", dist.Delta(u[..., 0] + x[:, 0] / 2))
            pyro.sample("b", dist.Delta(u[..., 1]))

    found = pv.ImportanceSampling(chain, shifted, num_particles=4000, seed=0)(X)
    assert ((found.log_evidence - TRUTH).abs() < 5 * found.std_error + 1e-3).all()
    with pytest.raises(StructureError, match="differs from datum to datum"):
        pv.ELBOSurgery(chain, shifted, seed=0)([X], progress=False)


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        r = pyro.sample("r", dist.Gamma(torch.tensor(2.0, dtype=F64), torch.tensor(1.0, dtype=F64)))
        pyro.sample("x", dist.Poisson(r), obs=x)


def in_unconstrained_space(x, sign=-1.0):
    scale = pyro.param("scale", torch.tensor(0.6, dtype=F64))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal((1 + x).log() - 0.3, scale), infer={"is_auxiliary": True})
        pyro.sample("r", dist.Delta(u.exp(), log_density=sign * u))


def as_a_distribution(x):
    scale = pyro.param("scale", torch.tensor(0.6, dtype=F64))
    with pyro.plate("data", len(x)):
        pyro.sample("r", dist.LogNormal((1 + x).log() - 0.3, scale))


def test_the_jacobian_counts():
    """r ~ Gamma(2, 1), x ~ Poisson(r): a closed form, and the same guide written as a distribution."""
    k = COUNTS
    truth = torch.lgamma(2 + k) - torch.lgamma(k + 1) - (2 + k) * math.log(2)
    with quiet():
        found = pv.AdaptiveImportanceSampling(gamma_poisson, in_unconstrained_space, num_particles=2000, seed=0)(COUNTS)
        gaps = pv.InferenceGaps(gamma_poisson, in_unconstrained_space, num_particles=2000, seed=0)(COUNTS)
        same = pv.InferenceGaps(gamma_poisson, as_a_distribution, num_particles=2000, seed=0)(COUNTS)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error).all() and found.std_error.max() < 0.03
    for name in ("elbo", "optimal_elbo"):  # the second has a control variate
        errors = (gaps.std_errors[name].square() + same.std_errors[name].square()).sqrt()
        assert ((getattr(gaps, name) - getattr(same, name)).abs() < 4.5 * errors + 0.01).all() and errors.max() < 0.15


def test_an_objective_trains_it_as_the_distribution():
    losses, gradients = [], []
    for guide in (in_unconstrained_space, as_a_distribution):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = pv.ImportanceWeightedELBO(num_particles=5).differentiable_loss(gamma_poisson, guide, COUNTS)
        loss.backward()
        losses.append(loss.item())
        gradients.append(pyro.param("scale").unconstrained().grad.item())
    assert losses[0] == pytest.approx(losses[1]) and gradients[0] == pytest.approx(gradients[1])


WRONG = {
    "another constant": (chain, lambda x: joint(x, stated=0.3), X),
    "one number twice": (chain, lambda x: joint(x, both=False), X),
    "no Jacobian": (gamma_poisson, lambda x: in_unconstrained_space(x, sign=0.0), COUNTS),
    "wrong sign": (gamma_poisson, lambda x: in_unconstrained_space(x, sign=1.0), COUNTS),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_jacobian_that_is_not_the_one_stated_is_refused(fault):
    model, guide, x = WRONG[fault]
    with pytest.raises(AuxiliarySiteError, match=r"log_density=-log\|f'\(u\)\|"):
        pv.ImportanceSampling(model, guide, seed=0)(x)


def test_more_draws_than_latents_are_refused():
    def guide(x):
        joint(x)
        with pyro.plate("data", len(x)):
            pyro.sample("more", dist.Normal(ZERO, 1.0), infer={"is_auxiliary": True})

    with pytest.raises(AuxiliarySiteError, match="with as many numbers in u as in the latents"):
        pv.ImportanceSampling(chain, guide, seed=0)(X)


def test_masks_and_unmarked_draws_are_refused():
    with pytest.raises(MaskError, match="mask none of them"):
        pv.ImportanceSampling(chain, poutine.mask(joint, mask=torch.tensor([True] * 4 + [False])), seed=0)(X)
    unmarked = poutine.infer_config(joint, lambda site: {"is_auxiliary": False} if site["name"] == "ab" else {})
    with pytest.raises(AuxiliarySiteError, match="mark it infer="):
        pv.ImportanceSampling(chain, unmarked, seed=0)(X)
