"""Records for every plot, from one VAE of small images, with the long names that users give."""

import functools
import warnings

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

LONG = "encoder with two hidden layers"


def digits():
    """Training and test digits with their classes."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    return (x[:600], y[:600]), (x[600:660], y[600:660])


@functools.cache
def trained():
    """A VAE of 8x8 digits after a few epochs, its history, and a held-out history with a look an epoch."""
    pyro.set_rng_seed(0)
    (x, _), (held_out, _) = digits()
    vae = pv.mlp_vae(64, latent_dim=6, likelihood=pv.nn.Binomial(16), hidden=(64,))
    objective = pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(60))
    svi = SVI(vae.model, vae.guide, Adam({"lr": 3e-3}), objective)
    monitor = pv.Monitor(objective, progress=False)
    stopping = pv.EarlyStopping(vae.model, vae.guide, [(held_out,)], beta=objective.beta, every=12, patience=20)
    for step, batch in enumerate(monitor.watch(x.split(50) * 12), 1):
        svi.step(batch)
        if stopping(step):
            break
    return vae, monitor.history(), stopping.history()


@functools.cache
def record(name):
    """The record that a plot takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MAKE[name]()


def pair():
    vae = trained()[0]
    return vae.model, vae.guide


def loader():
    (x, y), _ = digits()
    return DataLoader(TensorDataset(x, y), 200)


def held_out_digits():
    return digits()[1][0]


@functools.cache
def gaps(seed=0):
    return pv.InferenceGaps(*pair(), num_particles=100, tolerance=0.2, seed=seed)(held_out_digits())


@functools.cache
def evidence():
    return pv.ImportanceSampling(*pair(), num_particles=1000, seed=0)(held_out_digits())


@functools.cache
def samples():
    check = pv.SampleCheck(*pair(), seed=0, image_shape=(8, 8))
    return check([held_out_digits()], train=[digits()[0][0]], evidence=evidence(), progress=False)


def compared():
    return pv.compare({LONG: gaps(), f"{LONG} and a flow": gaps(1), "prior": gaps(2)})


def factors():
    (x, y), _ = digits()
    values = torch.stack([y, y % 2, y // 5], 1)
    return pv.MutualInformationGap(*pair(), num_particles=2, seed=0)([(x, values)], progress=False)


def latents():
    return pv.AggregatedPosterior(*pair(), seed=0)(loader(), labels=lambda batch: batch[1], progress=False)


MAKE = {
    "plot_aggregated_posterior": latents,
    "plot_comparison": compared,
    "plot_calibration": lambda: pv.GuideCalibration(*pair(), num_particles=50, seed=0)(held_out_digits()),
    "plot_copies": samples,
    "plot_factors": factors,
    "plot_gaps": gaps,
    "plot_gaps_per_datum": gaps,
    "plot_gaps_side_by_side": lambda: {LONG: gaps(), f"{LONG} and a flow": gaps(1), "a third": gaps(2)},
    "plot_held_out": lambda: trained()[2],
    "plot_k_curve": lambda: evidence().curve,
    "plot_latents": latents,
    "plot_likelihood_and_looks": samples,
    "plot_manifold": lambda: pv.manifold(*pair(), held_out_digits()[:1], num_steps=8, seed=0),
    "plot_nearest_neighbours": samples,
    "plot_pareto_k": evidence,
    "plot_rate_distortion": lambda: pv.RateDistortion(*pair(), num_steps=40, num_chains=2, seed=0)(
        [held_out_digits()[:20]], progress=False
    ),
    "plot_reconstructions": lambda: pv.reconstruct(*pair(), held_out_digits(), seed=0),
    "plot_samples": lambda: pv.simulate(trained()[0].model, held_out_digits(), seed=0),
    "plot_surgery": lambda: pv.ELBOSurgery(*pair(), seed=0)(loader(), progress=False),
    "plot_training": lambda: trained()[1],
    "plot_traversals": lambda: pv.traverse(*pair(), held_out_digits()[:1], seed=0),
    "plot_units": lambda: pv.ActiveUnits(*pair(), seed=0)(loader(), progress=False),
}
