"""Sites outside the data with one value are givens: log p(x_n | givens), by whatever idiom Pyro has for it."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pair_helpers import one_line, quiet
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.errors import AuxiliarySiteError, DatumPlateError, GlobalLatentError, StructureError

MU = 0.8
X = torch.randn(6, generator=torch.Generator().manual_seed(0)) + 1
TRUTH = dist.Normal(MU, 2**0.5).log_prob(X)


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * (x + MU), 0.8))


def with_delta(x):
    pyro.sample("mu", dist.Delta(torch.tensor(MU)))
    local_guide(x)


def observing(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0), obs=torch.tensor(MU))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_a_parameter(x):
    """A prior on a parameter, as observed site outside of the data; the parameter comes from `poutine.substitute`."""
    mu = pyro.param("mu_value", torch.tensor(0.0))
    pyro.sample("mu_prior", dist.Normal(0.0, 2.0), obs=mu)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def auto_delta():
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["mu"]), init_loc_fn=lambda site: torch.tensor(MU)))
    guide.append(local_guide)
    guide(X)
    return guide


def assert_near(evidence, truth):
    """Within five errors, which are small."""
    assert evidence.std_error.max() < 0.04
    assert ((evidence.log_evidence - truth).abs() < 5 * evidence.std_error).all()


VALUE = {"mu": torch.tensor(MU)}
TRACE = poutine.trace(lambda: pyro.sample("mu", dist.Delta(torch.tensor(MU)))).get_trace()
IDIOMS = {
    "observed": lambda: (observing, local_guide, ("mu",)),
    "condition": lambda: (pyro.condition(model, VALUE), local_guide, ("mu",)),
    "do": lambda: (pyro.do(model, VALUE), local_guide, ()),
    "replay": lambda: (poutine.replay(model, trace=TRACE), local_guide, ("mu",)),
    "substitute": lambda: (poutine.substitute(of_a_parameter, {"mu_value": torch.tensor(MU)}), local_guide, ("mu_prior",)),
    "Delta": lambda: (model, with_delta, ("mu",)),
    "AutoDelta": lambda: (model, auto_delta(), ("mu",)),
    "factor": lambda: (with_factor, local_guide, ("regulariser",)),
}


def with_factor(x):
    pyro.factor("regulariser", torch.tensor(-17.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(MU, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("num_data", [6, 1])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_the_evidence_is_that_given_what_is_fixed(idiom, num_data):
    """x ~ N(mu, 2). Weights of a guide .8 for .71 wide: five errors, gated."""
    model, guide, given = IDIOMS[idiom]()
    x, truth = X[:num_data], TRUTH[:num_data]
    if idiom == "AutoDelta" and num_data == 1:
        pytest.skip("an autoguide knows the data that it was first run on")
    options = {"seed": 0} | ({"datum_plate": "data"} if num_data == 1 else {})
    with quiet():
        found = pv.ImportanceSampling(model, guide, num_particles=2000, **options)(x)
    assert found.given == given and found.std_error.max() < 0.02
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error).all()
    torch.testing.assert_close(pv.ExactEvidence(model, guide, **options)(x).log_evidence, truth, rtol=0, atol=1e-4)
    fitted = pv.AdaptiveImportanceSampling(model, guide, **options)(x)
    assert ((fitted.log_evidence - truth).abs() < 5 * fitted.std_error).all() and fitted.std_error.max() < 0.03
    gaps = pv.InferenceGaps(model, guide, **options)(x)
    assert ((gaps.log_evidence - truth).abs() < 5 * gaps.std_errors["log_evidence"]).all()
    # the family contains the posterior N((x + mu) / 2, 1/2), and KL(q to it) is that of two widths
    kl = float(torch.distributions.kl_divergence(dist.Normal(0.0, 0.8), dist.Normal(0.0, 0.5**0.5)))
    assert ((gaps.amortization - kl).abs() < 5 * gaps.std_errors["amortization"] + 2e-3).all()
    assert gaps.evidence.given == given


@pytest.mark.parametrize("idiom", ["condition", "Delta", "do"])
def test_every_estimator_takes_them(idiom):
    model, guide, given = IDIOMS[idiom]()
    chains = {"num_steps": 30, "num_chains": 50, "progress": False, "seed": 0}
    with quiet():
        annealed = pv.AnnealedImportanceSampling(model, guide, **chains)(X)
        check = pv.SelfCheck(model, guide, num_steps=30, num_chains=10, progress=False, seed=0)(X.repeat(20))
    assert ((annealed.log_evidence - TRUTH).abs() < 5 * annealed.std_error + 1e-4).all()
    assert check.passed, check.verdict()
    loader = {"args": lambda x: (x,), "progress": False}
    units = pv.ActiveUnits(model, guide, seed=0)([X], **loader)
    kl = torch.distributions.kl_divergence(dist.Normal(0.5 * (X + MU), 0.8), dist.Normal(MU, 1.0)).mean()
    torch.testing.assert_close(units.site_kl["z"].value, kl)
    surgery = pv.ELBOSurgery(model, guide, seed=0)([X], **loader)
    assert abs(float(surgery.kl.value - kl)) < 5 * float(surgery.kl.std_error) + 0.05
    with quiet():
        page = pv.diagnose(model, guide, train=[X.repeat(10)], test=[X.repeat(10)], args=lambda x: (x,), progress=False)
    assert page.left_out == {} and page.test.evidence.given == given
    assert f"given: {', '.join(given)}" in one_line(annealed) if given else "given" not in one_line(annealed)


@pytest.mark.parametrize("read", [lambda mu: mu, lambda mu: torch.full((), float(mu))])
def test_with_no_latent_left_it_is_the_log_likelihood(read):
    """Bayesian regression at its MAP: exact, whatever K; also where a program reads the value into Python."""
    t = torch.linspace(-1, 1, 6)

    def regression(t, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.sample("x", dist.Normal(read(w) * t + b.sum(), s), obs=x)

    guide = AutoDelta(regression)
    guide(t, X)
    values = guide()
    truth = dist.Normal(values["w"] * t + values["b"].sum(), values["s"]).log_prob(X).detach()
    for num_particles in (1, 7):
        with quiet():
            found = pv.ImportanceSampling(regression, guide, num_particles=num_particles, seed=0)(t, X)
        torch.testing.assert_close(found.log_evidence, truth)
        torch.testing.assert_close(found.elbo, truth)
        assert set(found.given) == {"w", "b", "s"}
    assert found.std_error.abs().max() == 0


def test_values_follow_the_parameters_and_the_arguments():
    """Nothing of one call is kept for the next."""

    def guide(x, mu):
        pyro.sample("mu", dist.Delta(mu))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (x + mu), 0.7))

    estimator = pv.AdaptiveImportanceSampling(lambda x, mu: model(x), guide, seed=0)
    for mu in (0.8, -1.0):
        truth = dist.Normal(mu, 2**0.5).log_prob(X)
        assert_near(estimator(X, torch.tensor(mu)), truth)
    trained = auto_delta()
    estimator = pv.AdaptiveImportanceSampling(model, trained, seed=0)
    for mu in (0.8, -1.0):
        with torch.no_grad():
            for parameter in trained[0].parameters():
                parameter.fill_(mu)
        truth = dist.Normal(mu, 2**0.5).log_prob(X)
        assert_near(estimator(X), truth)


def test_a_given_in_a_plate_of_its_own():
    """A mean for each of two groups, beside a subsampled plate of data."""
    means = torch.tensor([0.8, -0.3])
    group = torch.tensor([0, 1, 0, 1, 1, 0])

    def grouped(x):
        with pyro.plate("groups", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 6, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(mu[group[index]], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("groups", 2):
            mu = pyro.sample("mu", dist.Delta(means))
        with pyro.plate("data", 6, subsample_size=4) as index:
            pyro.sample("z", dist.Normal(0.5 * (x[index] + mu[group[index]]), 0.7))

    found = pv.AdaptiveImportanceSampling(grouped, guide, seed=0)(X)
    truth = dist.Normal(means[group], 2**0.5).log_prob(X)[found.index]
    assert_near(found, truth)
    assert found.given == ("mu",) and set(found.stripped_scales) == {"z", "x"}


def test_an_observation_outside_the_plate_that_depends_on_the_latents_is_data():
    def swallowed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(DatumPlateError, match="'x' lies outside the datum plate 'data'"):
        pv.ImportanceSampling(swallowed, local_guide, seed=0)(X)

    def half(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=x.sum())

    with pytest.raises(DatumPlateError, match="'total' lies outside the datum plate 'data' and depends on its latents"):
        pv.ImportanceSampling(half, local_guide, seed=0)(X)


def test_a_point_that_is_drawn_is_no_given():
    def guide(x):
        pyro.sample("mu", dist.Delta(torch.randn(())))
        local_guide(x)

    with pytest.raises(StructureError, match="'mu' has another value in every run"):
        pv.ImportanceSampling(model, guide, seed=0)(X)


def test_points_of_local_latents_stay_refused():
    def guide(x):
        pyro.sample("mu", dist.Delta(torch.tensor(MU)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    with pytest.raises(AuxiliarySiteError, match="'z' is a Delta"):
        pv.ImportanceSampling(model, guide, seed=0)(X)
    replayed = poutine.replay(model, trace=poutine.trace(poutine.block(with_delta, hide=["mu"])).get_trace(X))
    with pytest.raises(StructureError, match="'z' of the data already has a value"):
        pv.ImportanceSampling(pyro.condition(replayed, VALUE), with_delta, seed=0)(X)


def test_a_global_latent_that_is_drawn_is_refused_with_ways_out_that_work():
    def guide(x):
        pyro.sample("mu", dist.Normal(MU, 0.5))
        local_guide(x)

    with pytest.raises(GlobalLatentError, match=r"pyro.condition\(model, \{'mu': value\}\)") as error:
        pv.ImportanceSampling(model, guide, seed=0)(X)
    assert "a Delta for it in the guide" in str(error.value) and "datum_plate=None" in str(error.value)
    whole = pv.AdaptiveImportanceSampling(model, guide, datum_plate=None, seed=0, num_particles=4000)(X)
    covariance = 4 * torch.ones(6, 6) + 2 * torch.eye(6)
    truth = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(X)
    assert abs(float(whole.log_evidence - truth)) < 5 * float(whole.std_error) + 1e-3


def test_objectives_with_a_weight_per_datum_do_not_drop_a_prior():
    """In training the density of a given has a gradient, which a weight per datum has no place for."""
    for model, guide, _ in (IDIOMS["substitute"](), IDIOMS["Delta"]()):
        with pytest.raises(StructureError, match="Train with a Beta"):
            pv.ImportanceWeightedELBO(num_particles=3).loss(model, guide, X)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_programs_that_take_no_particle_axis(execution):
    def written_for_one(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).expand([len(x)]))
            z = z.reshape(len(x)) if execution == "vmap" else torch.stack([z[n] for n in range(int(len(z)))])
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    estimator = pv.AdaptiveImportanceSampling(written_for_one, with_delta, seed=0)
    assert_near(estimator(X), TRUTH)


def test_constrained_values_of_autodelta():
    def positive(x):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(MU, 1.0))
            pyro.sample("x", dist.Normal(z, s), obs=x)

    guide = AutoGuideList(positive)
    guide.append(AutoDelta(poutine.block(positive, expose=["s"]), init_loc_fn=lambda site: torch.tensor(1.7)))
    guide.append(local_guide)
    guide(X)
    found = pv.AdaptiveImportanceSampling(positive, guide, seed=0)(X)
    truth = dist.Normal(MU, (1 + 1.7**2) ** 0.5).log_prob(X)
    assert_near(found, truth)
    assert constraints.positive.check(guide[0]()["s"])


# ------------------------------------------------------------------ what the guide observes for a loss of its own


LABELS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])


def labelled(x, t):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(MU, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("t", dist.Bernoulli(0.5), obs=t)


def classifier(how):
    """A classifier inside the guide, as in Pyro's examples CEVAE and scANVI."""

    def guide(x, t):
        with pyro.plate("data", len(x)):
            if how == "site":
                pyro.sample("t", dist.Bernoulli(logits=x), obs=t, infer={"is_auxiliary": True})
            elif how == "plain site":
                pyro.sample("t", dist.Bernoulli(logits=x), obs=t)
            else:
                pyro.factor("clf", dist.Bernoulli(logits=x).log_prob(t), has_rsample=False)
            pyro.sample("z", dist.Normal(0.5 * (x + MU), 0.8))

    marks = {"clf": {"is_loss": True}} if how == "marked factor" else {}
    return poutine.infer_config(guide, config_fn=lambda site: marks.get(site["name"], {}))


@pytest.mark.parametrize(("how", "name"), [("site", "t"), ("marked factor", "clf")])
def test_a_marked_loss_of_the_guide_is_left_out_of_log_q_and_named(how, name):
    truth = TRUTH - math.log(2)
    found = pv.AdaptiveImportanceSampling(labelled, classifier(how), seed=0)(X, LABELS)
    assert_near(found, truth)
    assert found.left_out == (name,) and f"left out of log q: {name}" in one_line(found)
    kl = float(torch.distributions.kl_divergence(dist.Normal(0.0, 0.8), dist.Normal(0.0, 0.5**0.5)))
    gaps = pv.InferenceGaps(labelled, classifier(how), seed=0)(X, LABELS)
    assert ((gaps.elbo - (truth - kl)).abs() < 5 * gaps.std_errors["elbo"]).all()


@pytest.mark.parametrize(("how", "name"), [("plain site", "t"), ("factor", "clf")])
def test_unmarked_ones_are_refused_with_remedies_that_work(how, name):
    with pytest.raises(StructureError, match=rf"poutine.block\(guide, hide=\['{name}'\]\)"):
        pv.ImportanceSampling(labelled, classifier(how), seed=0)(X, LABELS)
    hidden = poutine.block(classifier(how), hide=[name])
    assert_near(pv.AdaptiveImportanceSampling(labelled, hidden, seed=0)(X, LABELS), TRUTH - math.log(2))


@pytest.mark.parametrize("how", ["site", "factor", "marked factor"])
def test_objectives_with_a_weight_per_datum_do_not_lose_them(how):
    with pytest.raises(StructureError, match="poutine.block"):
        pv.ImportanceWeightedELBO(num_particles=3).loss(labelled, classifier(how), X, LABELS)
