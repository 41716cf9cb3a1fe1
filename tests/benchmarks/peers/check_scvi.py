"""Claims about scvi-tools that docs/coming_from.md makes, measured.

    pip install -c constraints.txt scvi-tools
    python tests/benchmarks/peers/check_scvi.py

Counts of 300 cells and 20 genes from a negative binomial with two latents, and an SCVI model with two, 50 epochs of it.
"""

import contextlib
import inspect
import io
import itertools
import logging
import math
import tempfile
import warnings
from functools import cache

import anndata
import numpy as np
import pyro
import pyro.distributions as dist
import scvi
import torch
from claims import run
from scvi.model import SCVI
from scvi.model._utils import get_max_epochs_heuristic
from scvi.train import TrainingPlan

import pyro_vae as pv


def counts(num_cells, num_genes, seed=0):
    rng = np.random.default_rng(seed)
    mean = np.exp(1 + rng.normal(size=(num_cells, 2)) @ rng.normal(size=(2, num_genes)))
    x = rng.poisson(rng.gamma(2.0, mean / 2)).astype(np.float32)
    return x[x.sum(1) > 0]


def train(x, num_epochs, **options):
    """An SCVI model of these counts, with the weight of its KL at 1 from half of the epochs on."""
    cells = anndata.AnnData(x)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        SCVI.setup_anndata(cells)
        scvi.settings.seed = 0
        scvi_model = SCVI(cells, n_latent=2, n_hidden=32, gene_likelihood="nb", **options)
        plan = {"n_epochs_kl_warmup": num_epochs // 2}
        scvi_model.train(max_epochs=num_epochs, accelerator="cpu", enable_progress_bar=False, plan_kwargs=plan)
    return scvi_model


@cache
def trained():
    return train(counts(300, 20), num_epochs=50)


def pair(scvi_model):
    """The trained module as a model and guide of Pyro; one batch, observed library size."""
    module = scvi_model.module.eval()

    def model(x):
        with pyro.plate("cells", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            px = module.generative(z, x.sum(1, keepdim=True).log(), x.new_zeros(len(x), 1))["px"]
            pyro.sample("obs", dist.GammaPoisson(px.theta, px.theta / px.mu).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("cells", len(x)):
            hidden = module.z_encoder.encoder(x.log1p(), x.new_zeros(len(x), 1))
            variance = module.z_encoder.var_activation(module.z_encoder.var_encoder(hidden)) + module.z_encoder.var_eps
            loc = module.z_encoder.mean_encoder(hidden)
            pyro.sample("latent", dist.Normal(loc, variance.sqrt()).to_event(1))

    return model, guide


def each(**options):
    """get_marginal_ll per cell."""
    return torch.as_tensor(trained().get_marginal_ll(return_mean=False, n_mc_samples_per_pass=100, **options))


def per_cell():
    """get_marginal_ll(return_mean=False) has one value per cell, without an error; it samples from the encoder as it is."""
    x = torch.tensor(counts(300, 20))
    theirs = each(n_mc_samples=1000)
    ours = pv.ImportanceSampling(*pair(trained()), num_particles=1000, seed=0)(x)
    fitted = pv.AdaptiveImportanceSampling(*pair(trained()), seed=0)(x)
    error = ours.mean().std_error
    line = f"{tuple(theirs.shape)}, mean {theirs.mean():.3f}; ImportanceSampling {ours.mean().value:.3f} +- {error:.3f} "
    high = [int(record.doubts["tails"].sum()) for record in (ours, fitted)]
    line += f"(Pareto k high for {high[0]}), AdaptiveImportanceSampling {fitted.mean().value:.3f} +- "
    line += f"{fitted.mean().std_error:.3f} (for {high[1]}); get_elbo {float(trained().get_elbo()):.3f}"
    return theirs.shape == (len(x),) and abs(theirs.mean() - ours.mean().value) < 5 * 2**0.5 * error, line


def passes():
    """get_marginal_ll is too high by log(drawn / asked) where n_mc_samples_per_pass does not divide n_mc_samples."""
    right, wrong = (trained().get_marginal_ll(n_mc_samples=1000, n_mc_samples_per_pass=c) for c in (200, 300))
    line = f"asked for 1,000: {right:.3f} in passes of 200, {wrong:.3f} of 300; log(1200 / 1000) = {math.log(1.2):.3f}"
    return abs(wrong - right - math.log(1.2)) < 0.02, line


def mean_of_means():
    """get_marginal_ll(return_mean=True), the default, is the mean of batch means: a smaller last batch counts for more."""
    mean = trained().get_marginal_ll(n_mc_samples=1000, n_mc_samples_per_pass=100)
    of_cells = each(n_mc_samples=1000)
    of_batches = sum(part.mean() for part in of_cells.split(128)) / 3
    line = f"300 cells, batches of 128, 128, 44: {mean:.2f}; mean over cells {of_cells.mean():.2f}"
    return abs(mean - of_batches) < 0.1 and abs(mean - of_cells.mean()) > 0.3, line


def signs():
    """get_elbo is the ELBO, larger is better; elbo_train in the history is minus the ELBO."""
    history, elbo = float(trained().history["elbo_train"].iloc[-1, 0]), float(trained().get_elbo())
    return abs(history + elbo) < 0.1 * abs(elbo) and elbo < 0, f"elbo_train at the end {history:.2f}, get_elbo {elbo:.2f}"


def annealed_loss():
    """train_loss in the history is the loss at the annealed weight of the KL; elbo_train is at weight 1."""
    epoch, history = 20, trained().history  # of 25 in which the weight rises
    loss, elbo, kl = (float(history[name].iloc[epoch, 0]) for name in ("train_loss", "elbo_train", "kl_local_train"))
    line = f"epoch 20 of 25 of warm-up: train_loss {loss:.3f}, elbo_train {elbo:.3f}, KL {kl:.3f}"
    return abs(loss - (elbo - (1 - epoch / 25) * kl)) < 1e-3, line


def warm_up():
    """With the defaults, more than 20,000 cells are trained to the end with the weight of the KL below 1."""
    num_epochs = get_max_epochs_heuristic(40_000)
    default = inspect.signature(TrainingPlan).parameters["n_epochs_kl_warmup"].default
    plan = TrainingPlan(trained().module)
    plan.trainer = type("Trainer", (), {"current_epoch": num_epochs - 1, "global_step": 0})()
    weight = float(plan.kl_weight)
    line = f"40,000 cells: {num_epochs} epochs, warm-up {default} epochs, weight in the last one {weight:.3f}"
    return weight < 1, line


def observed_library():
    """With the observed library size, the default, the likelihood of a cell is given its own total: no density of x."""
    grid = np.array([x for x in itertools.product(range(31), repeat=2) if sum(x)], dtype=np.float32)
    mass = []
    for observed in (True, False):
        scvi_model = train(counts(300, 2), num_epochs=20, use_observed_lib_size=observed)
        options = {"n_mc_samples": 200, "n_mc_samples_per_pass": 200, "return_mean": False}
        log_p = torch.as_tensor(scvi_model.get_marginal_ll(anndata.AnnData(grid), **options))
        mass.append(log_p.exp().sum().item())
    line = f"two genes, sum of p(x) over 0 < x1 + x2, each at most 30: {mass[0]:.2f} observed, {mass[1]:.2f} as a latent"
    return mass[0] > 1.1 > mass[1], line


def saved():
    """SCVI.load brings back the parameters that SCVI.save wrote."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trained().save(folder, overwrite=True)
        loaded = SCVI.load(folder, trained().adata, accelerator="cpu")
    pairs = zip(trained().module.parameters(), loaded.module.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    return same, f"parameters equal: {same}"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    checks = [per_cell, passes, mean_of_means, signs, annealed_loss, warm_up, observed_library, saved]
    run("scvi-tools", "1.4.2 and 1.5.1", checks)
