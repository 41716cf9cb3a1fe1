"""What beta does on real digits, in numbers: at 0 an autoencoder, whose latent space has nothing to do with its prior."""

import pyro
import pytest
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits

import pyro_vae as pv

STEPS = 1000


def trained(digits, beta):
    torch.manual_seed(0)
    vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(100,))
    objective = pv.BetaTraceMeanField_ELBO(beta=beta)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), objective)
    for _ in range(STEPS):
        svi.step(digits[torch.randint(len(digits), (100,))])
    svi.evaluate_loss(digits)
    return vae, objective.terms.per_datum()


def distance_to_data(samples, digits):
    """Root mean square per pixel to the nearest digit, the median sample."""
    return float(torch.cdist(samples, digits).min(1).values.median()) / 8


@pytest.mark.slow
def test_at_beta_zero_the_rate_explodes_and_prior_samples_are_noise():
    data = torch.tensor(load_digits().data, dtype=torch.float)
    digits, held_out = data[:1500], data[1500:]
    autoencoder, without = trained(digits, 0.0)
    vae, with_kl = trained(digits, 1.0)
    noise = digits.flatten()[torch.randint(digits.numel(), (500, 64))]  # pixels of all digits, shuffled
    means = {name: v.decode(v.prior().sample((500,))).mean.detach() for name, v in (("0", autoencoder), ("1", vae))}
    figures = {
        "rate at beta 0": float(without.kl_sum),
        "rate at beta 1": float(with_kl.kl_sum),
        "distortion at beta 0": -float(without.reconstruction),
        "distortion at beta 1": -float(with_kl.reconstruction),
        "ELBO at beta 0": float(without.elbo),
        "ELBO at beta 1": float(with_kl.elbo),
        "prior samples at beta 0 to the nearest digit": distance_to_data(means["0"], digits),
        "prior samples at beta 1 to the nearest digit": distance_to_data(means["1"], digits),
        "held-out digits to the nearest digit": distance_to_data(held_out, digits),
        "shuffled pixels to the nearest digit": distance_to_data(noise, digits),
    }
    print("", *(f"{name}: {value:.2f}" for name, value in figures.items()), sep="\n")
    assert figures["rate at beta 0"] > 5 * figures["rate at beta 1"]
    assert figures["distortion at beta 0"] < figures["distortion at beta 1"]
    assert figures["ELBO at beta 0"] < figures["ELBO at beta 1"] - 50
    # Held-out digits are as far from the nearest digit as a good sample should be; what comes on top is error.
    near = figures["held-out digits to the nearest digit"]
    excess = [figures[f"prior samples at beta {beta} to the nearest digit"] - near for beta in (0, 1)]
    assert excess[0] > 2 * excess[1] > 0
