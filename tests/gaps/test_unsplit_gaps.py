"""Guides with draws that no gradient passes through: log p(x), L[q] and the whole gap, and why it is not split."""

import json
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, one_line, quiet

import pyro_vae as pv
from pyro_vae.evidence import ImportanceSampling

X = torch.randn(40, dtype=F64, generator=torch.Generator().manual_seed(0)) * 1.2


def switch(x):
    """What is there or not, as in attend-infer-repeat: x ~ N(there * what, .5)."""
    with pyro.plate("data", len(x)):
        there = pyro.sample("there", dist.Bernoulli(x.new_tensor(0.3)))
        what = pyro.sample("what", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(there * what, 0.5), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        there = pyro.sample("there", dist.Bernoulli(probs=(0.2 + 0.4 * x.abs()).clamp(max=0.9)))
        pyro.sample("what", dist.Normal(there * 0.7 * x, 0.5 + 0.6 * (1 - there)))


TRUTH = torch.logaddexp(
    math.log(0.7) + dist.Normal(torch.zeros((), dtype=F64), 0.5).log_prob(X),
    math.log(0.3) + dist.Normal(torch.zeros((), dtype=F64), 1.25**0.5).log_prob(X),
)


def elbo():
    """By moments of Gaussians, over both values of the switch."""
    probs = (0.2 + 0.4 * X.abs()).clamp(max=0.9)
    found = 0.0
    for there, q, p in ((0.0, 1 - probs, 0.7), (1.0, probs, 0.3)):
        mean, scale = there * 0.7 * X, 0.5 + 0.6 * (1 - there)
        prior = -0.5 * (math.log(2 * math.pi) + mean**2 + scale**2)
        likelihood = -0.5 * (math.log(2 * math.pi * 0.25) + ((X - there * mean) ** 2 + there * scale**2) / 0.25)
        entropy = 0.5 * (math.log(2 * math.pi * scale**2) + 1)
        found = found + q * (math.log(p) - q.log() + prior + likelihood + entropy)
    return found


@pytest.fixture(scope="module")
def gaps():
    with quiet():
        return pv.InferenceGaps(switch, guide, num_particles=2000, seed=0)(X)


def test_the_whole_gap_is_there(gaps):
    assert gaps.std_errors["log_evidence"].max() < 0.08 and gaps.std_errors["elbo"].max() < 0.15
    assert ((gaps.log_evidence - TRUTH).abs() < 5 * gaps.std_errors["log_evidence"]).all()
    assert ((gaps.elbo - elbo()).abs() < 5 * gaps.std_errors["elbo"]).all()
    assert ((gaps.inference - (TRUTH - elbo())).abs() < 5 * gaps.std_errors["inference"]).all()
    assert bool(gaps.amortization.isnan().all()) and bool(gaps.approximation.isnan().all())


def test_it_says_why_it_is_not_split(gaps):
    assert "'there'" in gaps.unsplit and gaps.larger_part() == "undecided" and gaps.verdict().startswith("Not split: ")
    assert "not converged" not in gaps.doubts and gaps.unchecked["not converged"] == "q* was not fitted"
    assert set(gaps.summary()) == {"elbo", "log_evidence", "inference"}
    text = str(gaps)
    assert "nan" not in text and "amortization" not in text and "Not split" in text
    json.dumps(gaps.to_dict(), default=str)
    both = pv.Gaps.cat([gaps, gaps.select(torch.arange(3))])
    assert len(both) == 43 and both.unsplit == gaps.unsplit


def test_an_estimator_of_ones_own_is_taken():
    made = pv.InferenceGaps(
        switch, guide, num_particles=50, seed=0, evidence=lambda m, g: ImportanceSampling(m, g, num_particles=77, seed=0)
    )
    with quiet():
        assert made(X).evidence.num_particles == 77


def test_it_is_drawn(gaps):
    for plot in (pv.plots.plot_gaps, pv.plots.plot_gaps_per_datum):
        ax = plot(gaps)
        texts = [text.get_text() for text in ax.texts] + [text.get_text() for text in ax.get_xticklabels()]
        texts += ax.get_legend_handles_labels()[1]
        assert not any("nan" in text or "optimal" in text or "amortization" in text for text in texts)
        plt.close(ax.figure)


def test_the_diagnosis_gives_all_but_the_split(tmp_path):
    with quiet():
        page = pv.diagnose(switch, guide, train=[X], test=[X], args=lambda x: (x,), progress=False)
    assert page.culprit in ("undecided", "estimate", "none") and "nan" not in one_line(page)
    if page.culprit == "undecided":
        assert "enumerate" in page.advice
    page.to_html(tmp_path / "page.html")
    page.to_csv(tmp_path / "page.csv")
    assert any(finding.topic == "gap" for finding in page.findings)


def test_log_p_comes_from_fitted_proposals_where_only_the_guide_is_in_the_way():
    """A mixture has no reparameterised draws, but its latents are continuous: two modes, the guide too narrow."""
    x = torch.tensor([1.9, -0.5], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0))
            pyro.sample("x", dist.Normal(z * z, 0.5), obs=x)

    def mixture(x):
        with pyro.plate("data", len(x)):
            parts = dist.Normal(x.new_tensor([-1.2, 1.2]).expand(len(x), 2), 0.4)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(x.new_ones(len(x), 2)), parts))

    z = torch.linspace(-12, 12, 240001, dtype=F64)
    joint = dist.Normal(torch.zeros((), dtype=F64), 2.0).log_prob(z) + dist.Normal(z * z, 0.5).log_prob(x[:, None])
    gaps = pv.InferenceGaps(model, mixture, seed=0)(x)
    assert "'z'" in gaps.unsplit and gaps.evidence.method == "fitted proposals"
    assert gaps.std_errors["log_evidence"].max() < 0.04
    truth = joint.logsumexp(1) + math.log(24 / 240000)
    assert ((gaps.log_evidence - truth).abs() < 5 * gaps.std_errors["log_evidence"]).all()


def test_a_split_beside_log_p_from_the_guides_own_draws():
    """The mask of a latent depends on an enumerated one: no proposal can be fitted, but q* can, given the switch."""

    def masked_model(x):
        with pyro.plate("data", len(x)):
            there = pyro.sample("there", dist.Bernoulli(x.new_tensor(0.3)))
            with pyro.poutine.mask(mask=there.bool()):
                what = pyro.sample("what", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(there * what, 0.5), obs=x)

    def masked_guide(x):
        with pyro.plate("data", len(x)):
            probs = (0.2 + 0.4 * x.abs()).clamp(max=0.9)
            there = pyro.sample("there", dist.Bernoulli(probs=probs), infer={"enumerate": "parallel"})
            with pyro.poutine.mask(mask=there.bool()):
                pyro.sample("what", dist.Normal(0.7 * x, 0.6))

    with quiet():
        gaps = pv.InferenceGaps(masked_model, masked_guide, num_particles=500, seed=0)(X)
    assert gaps.evidence.num_particles == 1000 and not gaps.unsplit and gaps.held == ("there",)
    assert gaps.std_errors["log_evidence"].max() < 0.05
    assert ((gaps.log_evidence - TRUTH).abs() < 5 * gaps.std_errors["log_evidence"]).all()
    probs = (0.2 + 0.4 * X.abs()).clamp(max=0.9)
    # Given that it is there, the family has the exact posterior N(.8 x, .2): the ELBO of the best offsets is known.
    log_there = math.log(0.3) + dist.Normal(torch.zeros((), dtype=F64), 1.25**0.5).log_prob(X) - probs.log()
    log_not = math.log(0.7) + dist.Normal(torch.zeros((), dtype=F64), 0.5).log_prob(X) - (1 - probs).log()
    best = probs * log_there + (1 - probs) * log_not
    assert bool(gaps.converged.all()) and gaps.std_errors["optimal_elbo"].max() < 0.02
    assert ((gaps.optimal_elbo - best).abs() < 5 * gaps.std_errors["optimal_elbo"] + 0.005).all()
