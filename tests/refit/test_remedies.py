"""What the diagnosis says first: every call that it names exists, and does what is said."""

import functools
import importlib
import inspect
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, linear_gaussian, model_of, one_line, quiet
from pyro.infer import SVI
from refit_helpers import FEW, Linear, Network, adam, batches_of
from torch import nn

import pyro_vae as pv
from pyro_vae.exact import LinearGaussian
from pyro_vae.refit.refit import NEXT
from pyro_vae.report.culprits import ADVICE, HEADLINES

OPTIONS = {"num_data": 100, "num_particles": 100, "progress": False}


@pytest.fixture(autouse=True)
def short_chains(monkeypatch):
    """The self-check of a page takes 25 steps instead of 200: enough here, or the culprit would be the estimate."""
    module = importlib.import_module("pyro_vae.report.diagnose")  # the package has a function of this name
    monkeypatch.setattr(module, "SelfCheck", functools.partial(pv.SelfCheck, num_steps=25))


def resolved(name):
    value = pv
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("text", [*ADVICE.values(), *HEADLINES.values(), *NEXT.values()])
def test_every_name_and_option_that_is_printed_exists(text):
    for name, options in re.findall(r"pv\.([\w.]*\w)(?:\(([^()]*)\))?", text):
        value = resolved(name)
        for option in re.findall(r"(\w+)=", options):
            assert option in inspect.signature(value).parameters, (name, option)


def diagnosed(model, guide, train, test):
    with quiet():
        return pv.diagnose(model, guide, train=batches_of(train), test=batches_of(test), **OPTIONS)


def refitted(model, guide, train, test, num_epochs, optim=None, **options):
    optim = optim or adam(3e-2, 0.02 ** (1 / num_epochs))
    with quiet():
        return pv.refit_guide(
            model, guide, batches_of(train), optim, test=batches_of(test), num_epochs=num_epochs, **FEW, **options
        )


@pytest.mark.slow
def test_the_encoder_is_at_fault_and_a_refit_repairs_it():
    lm, x = linear_gaussian(latent_dim=2, data_dim=4, num_data=500)
    model, guide = model_of(lm), Linear(4, 2)
    refitted(model, guide, x[:400], x[400:], 2)  # trained, and not enough
    page = diagnosed(model, guide, x[:400], x[400:])
    assert page.culprit == "encoder", page
    assert "pv.refit_guide(model, guide, train, optim, test=test, num_epochs=100)" in page.advice
    assert f"First: {page.advice}" in one_line(page)
    refitted(model, guide, x[:400], x[400:], 100)
    assert diagnosed(model, guide, x[:400], x[400:]).culprit in ("family", "none")


@pytest.mark.slow
def test_an_overfitted_encoder_and_data_simulated_from_the_model():
    lm, x = linear_gaussian(latent_dim=2, data_dim=8, num_data=230, variance=0.1)
    model, train, test = model_of(lm), x[:30], x[30:]
    torch.manual_seed(0)
    guide = Network(8, 2, 200)
    refitted(model, guide, train, test, 200, adam(6e-3, 0.985))
    page = diagnosed(model, guide, train, test)
    assert page.culprit == "overfitted encoder", page
    assert "simulated=1" in page.advice
    refit = refitted(model, guide, train, test, 300, adam(6e-3, 0.99), simulated=1)
    before, after = (side.summary()["amortization"] for side in (refit.test_before, refit.test_after))
    assert float(after.value) < 0.2 * float(before.value)
    assert float(refit.parts["generalisation after"].value) < 0.2 * float(refit.parts["generalisation before"].value)
    refitted(model, guide, train, test, 600, adam(3e-3, 0.995), simulated=4)
    assert diagnosed(model, guide, train, test).culprit == "none"


class Full(nn.Module):
    """A Gaussian with any covariance, the same for all x."""

    def __init__(self, data_dim, latent_dim):
        super().__init__()
        self.loc = nn.Linear(data_dim, latent_dim, dtype=F64)
        self.tril = nn.Parameter(torch.eye(latent_dim, dtype=F64))

    def forward(self, x):
        pyro.module("full", self)
        with pyro.plate("data", len(x)):
            tril = self.tril.tril(-1) + self.tril.diagonal().exp().diag_embed()
            pyro.sample("z", dist.MultivariateNormal(self.loc(x), scale_tril=tril))


@pytest.mark.slow
def test_the_family_is_at_fault_and_a_richer_one_takes_over():
    lm, _ = linear_gaussian(latent_dim=2, data_dim=6, variance=0.3)
    lm = LinearGaussian(lm.weight[:, :1] + torch.tensor([0.0, 0.4], dtype=F64), lm.bias, lm.variance)
    model = model_of(lm)
    x = pv.simulate(model, torch.zeros(500, 6, dtype=F64), seed=0).observed["x"]
    train, test = x[:400], x[400:]
    guide = Linear(6, 2)
    refitted(model, guide, train, test, 150)
    page = diagnosed(model, guide, train, test)
    assert page.culprit == "family" and "other=richer_guide" in page.advice, page
    full = Full(6, 2)
    refit = refitted(model, guide, train, test, 150, adam(0.2, 0.02 ** (1 / 150)), other=full)
    assert float(refit.test_before.approximation.mean()) == pytest.approx(float(lm.approximation_gap()), abs=0.03)
    assert float(refit.test_after.inference.mean()) < 0.1 < 0.9 < float(refit.changes["elbo"].value)
    assert diagnosed(model, full, train, test).culprit == "none"


@pytest.mark.slow
def test_an_overfitted_model_and_early_stopping():
    """100 data of 20 dimensions that 200 hidden units learn by heart; the same training, stopped in time."""
    lm, x = linear_gaussian(latent_dim=2, data_dim=20, num_data=700, variance=0.5, dtype=torch.float32)
    train, held_out, test = x[:100], x[100:400], x[400:]

    def run(stops):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = pv.mlp_vae(20, latent_dim=2, likelihood=pv.nn.Normal(scale=0.7), hidden=(200,))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 6e-3}), pv.BetaTraceMeanField_ELBO())
        stopping = pv.EarlyStopping(vae.model, vae.guide, batches_of(held_out), every=25)
        for step in range(1500):
            svi.step(train)
            if stops and stopping(step):
                stopping.restore_best()
                break
        return diagnosed(vae.model, vae.guide, train, test)

    long, short = run(False), run(True)
    assert long.culprit == "overfitted model" and "pv.EarlyStopping(" in long.advice, long
    assert float(short.test.log_evidence.mean()) > float(long.test.log_evidence.mean()) + 0.5

    def lost(page):
        return float(page.train.log_evidence.mean() - page.test.log_evidence.mean())

    assert lost(short) < 0.6 * lost(long)
