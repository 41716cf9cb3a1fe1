"""Programs with keyword-only arguments, and batches that are dicts: `args=` may return a dict everywhere."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import quiet
from pyro.infer import SVI, Trace_ELBO
from torch.utils.data import DataLoader

import pyro_vae as pv
from pyro_vae.errors import ArgumentError

X = torch.randn(40, generator=torch.Generator().manual_seed(0))
TRUTH = dist.Normal(0.0, 2**0.5).log_prob(X)


def model(*, x, beta=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(*, x, beta=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.8))


def by_keyword(batch):
    return {"x": batch["x"]}


LOADER = [{"x": X[:25], "label": X[:25] > 0}, {"x": X[25:], "label": X[25:] > 0}]
RUNS = {
    "evaluate": lambda: pv.evaluate(pv.AdaptiveImportanceSampling(model, guide), LOADER, args=by_keyword, seed=0),
    "units": lambda: pv.ActiveUnits(model, guide, seed=0)(LOADER, args=by_keyword),
    "surgery": lambda: pv.ELBOSurgery(model, guide, seed=0)(LOADER, args=by_keyword),
    "aggregated": lambda: pv.AggregatedPosterior(model, guide, seed=0)(LOADER, args=by_keyword),
    "rate-distortion": lambda: pv.RateDistortion(model, guide, num_steps=40, seed=0)(LOADER, args=by_keyword),
    "samples": lambda: pv.SampleCheck(model, guide, seed=0)(LOADER, train=LOADER, args=by_keyword),
    "factors": lambda: pv.MutualInformationGap(model, guide, seed=0)(
        LOADER, args=by_keyword, factors=lambda batch: batch["label"].long()
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_everything_over_a_loader_takes_a_dict(name):
    with quiet():
        record = RUNS[name]()
    if name == "evaluate":
        assert ((record.log_evidence - TRUTH).abs() < 5 * record.std_error).all() and record.std_error.max() < 0.05
    if name == "units":
        kl = torch.distributions.kl_divergence(dist.Normal(0.5 * X, 0.8), dist.Normal(0.0, 1.0)).mean()
        torch.testing.assert_close(record.site_kl["z"].value, kl)


def test_the_diagnosis_takes_a_dict():
    with quiet():
        page = pv.diagnose(model, guide, train=LOADER, test=LOADER, args=by_keyword, progress=False, num_data=40)
    assert page.left_out == {}
    assert abs(float(page.test.log_evidence.mean() - TRUTH.mean())) < 0.02


def test_a_batch_that_is_a_dict_of_keywords_needs_no_args():
    loader = DataLoader([{"x": float(x)} for x in X.double()], batch_size=16)
    with quiet():
        record = pv.evaluate(pv.AdaptiveImportanceSampling(model, guide), loader, seed=0)
    assert ((record.log_evidence - TRUTH).abs() < 5 * record.std_error + 1e-6).all()
    with pytest.raises(ArgumentError, match=r"'label', 'x'\] keyword arguments"):
        pv.evaluate(pv.ImportanceSampling(model, guide), LOADER)
    with pytest.raises(ArgumentError, match="to a tuple of the model's arguments, or to a dict of its keyword arguments"):
        pv.evaluate(pv.ImportanceSampling(model, guide), LOADER, args=lambda batch: batch["x"])


def test_aggressive_training_takes_a_dict():
    def learned(*, x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def encoder(*, x):
        scale = pyro.param("scale", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(scale * x, 0.8))

    svi = SVI(learned, encoder, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    training = pv.AggressiveTraining(svi, LOADER, args=by_keyword, max_inner_steps=3)
    training.step()
    assert pyro.param("shift").item() != 0.0 and pyro.param("scale").item() != 0.5
