"""
Rate, distortion and beta
=========================

The ELBO is a sum of two things that pull against each other, and beta is the price of the one in units of the other. At the
end you will have walked the whole way from an autoencoder, whose latent space is full of holes, to latents that say nothing,
will know why beta = 1 is the only price whose result is a bound on log p(x) worth reporting, and why a larger beta does not
make latents mean more.
"""

# %%
# Two costs
# ---------
# The negative ELBO of a datum is *distortion* plus *rate*, in nats:
#
# .. math:: -\mathrm{ELBO} = \underbrace{-E_q \log p(x \mid z)}_{D} + \underbrace{\mathrm{KL}(q(z \mid x) \,\|\, p(z))}_{R} .
#
# D is what is lost about the datum, R what its latents cost. ``beta`` weighs them: the loss is :math:`D + \beta R`. Draw
# every pair of model and guide as a point (R, D). All points of equal loss lie on a line of slope :math:`-\beta`, and the
# best pair is where the lowest such line touches the set of what can be reached. So along the boundary
#
# .. math:: \frac{dD}{dR} = -\beta
#
# (`Alemi et al. 2018 <https://arxiv.org/abs/1711.00464>`__): at the optimum one more nat of rate buys beta nats of
# distortion. At beta = 1 the price of a nat is a nat, and the line through the point, :math:`D + R = -\mathrm{ELBO}`, says
# how good the bound on log p(x) is.

import math
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_EPOCHS = 2 if SMOKE_TEST else 100
BETAS = (0.0, 1.0, 16.0) if SMOKE_TEST else (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
pyro.set_rng_seed(0)
pixels, digit = (torch.tensor(part) for part in load_digits(return_X_y=True))
pixels = pixels.float()
train, test = pixels[:1437], pixels[1437 :: 20 if SMOKE_TEST else 3]  # the last fifth was written by other people

# %%
# A curve in closed form
# ----------------------
# In the linear VAE everything is known. For a given decoder the best encoder at price beta is :math:`q_\beta \propto p(z)
# \, p(x \mid z)^{1/\beta}`, a Gaussian, and ``rate_distortion`` has its rate and distortion. The slope comes from
# differentiating both by beta.

x = pixels.double() / 16
linear = pv.exact.LinearGaussian.fit(x, latent_dim=10)
beta = torch.logspace(-1, 1.5, 51, dtype=torch.float64, requires_grad=True)  # the 21st is 1
curve = linear.rate_distortion(x, beta)
by_beta = [torch.autograd.grad(part.sum(), beta, retain_graph=True)[0] for part in (curve.distortion, curve.rate)]
slope = by_beta[0] / by_beta[1]
assert torch.allclose(slope, -beta, rtol=1e-6)
beta, rate, distortion = (column.detach() for column in (beta, curve.rate, curve.distortion))

# %%
# That is one decoder under its best encoders. If the decoder may follow, both get better together: ``fit_beta`` is the
# optimum of the loss :math:`D + \beta R` over decoder *and* encoder. Its log p(x) is known as well, and there the price
# shows: the best model is that of beta = 1, and every other one is worse.


def trained_at(beta):
    """Rate, distortion and log p(x) of the best linear VAE with this noise; means over the data."""
    best = pv.exact.LinearGaussian.fit_beta(x, 10, linear.variance, beta)
    guide = best.beta_posterior(x, beta)
    return best.rate(guide).mean(), best.distortion(x, guide).mean(), best.log_evidence(x).mean()


best_rate, best_distortion, log_evidence = (torch.stack(column) for column in zip(*map(trained_at, beta), strict=True))
elbo, loss = -(best_distortion + best_rate), best_distortion + beta * best_rate
assert int(log_evidence.argmax()) == int(elbo.argmax()) == 20
assert torch.allclose(elbo[20], log_evidence[20])  # the encoder is exact there
names = ("beta", "one decoder: R", "D", "dD/dR", "own decoder: R", "D", "ELBO", "log p(x)", "-loss")
print(("{:>6s}{:>16s}" + 2 * "{:>9s}" + "{:>16s}" + 4 * "{:>9s}").format(*names))
columns = (beta, rate, distortion, slope, best_rate, best_distortion, elbo, log_evidence, -loss)
for row in torch.stack(columns, 1)[::5].tolist():
    print(("{:6.2f}{:16.2f}" + 2 * "{:9.2f}" + "{:16.2f}" + 4 * "{:9.2f}").format(*row))

figure, (plane, over_beta) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
pv.plots.plot_rate_distortion(pv.exact.LinearGaussianCurve(beta, rate, distortion), plane, label="one decoder")
plane.plot(best_rate, best_distortion, "k-", label="decoder and encoder for each beta")
plane.plot([0, 22], [-elbo[20], -elbo[20] - 22], color="0.6", label="D + R = least -ELBO, slope -1")
plane.plot(best_rate[20], best_distortion[20], "ko")
plane.set(xlim=(0, 22), ylim=(-45, 20), title="Linear VAE of the digits, exact")
plane.legend(frameon=False, fontsize="small")
over_beta.plot(beta, log_evidence, "k-", label="log p(x)")
over_beta.plot(beta, elbo, "k--", label="ELBO = -(D + R)")
over_beta.plot(beta, -loss, "k:", label="minus the loss, -(D + beta R)")
over_beta.axvline(1, color="0.8", zorder=0)
over_beta.set(xscale="log", xlabel="beta", ylabel="nats per datum", ylim=(-45, 45), title="Minus the loss is no log p(x)")
over_beta.legend(frameon=False, fontsize="small")
plt.show()

# %%
# Below 1 minus the loss lies above the log p(x) of *any* model on the picture: it bounds nothing. Above 1 it is a lower
# bound, and a poor one. Report the ELBO or, better, log p(x); ``objective.terms`` and ``Monitor`` have the true ELBO
# whatever beta is.
#
# Digits, from autoencoder to collapse
# ------------------------------------
# Now with networks: a VAE with 8 latents and a Binomial likelihood (a pixel is a whole number from 0 to 16), trained afresh
# at every beta. ``beta_sweep`` trains, keeps every pair, and measures rate, distortion and log p(x), here on test digits.


def make_pair(beta, latent_dim=8):
    vae = pv.mlp_vae(64, latent_dim, likelihood=pv.nn.Binomial(16), hidden=(128,))
    return vae.model, vae.guide


def adam():
    return pyro.optim.Adam({"lr": 2e-3})


loader, test_loader = DataLoader(TensorDataset(train), 100, shuffle=True), DataLoader(TensorDataset(test), 100)
options = {"num_epochs": NUM_EPOCHS, "optimizer": adam, "progress": False, "seed": 0}
with warnings.catch_warnings(record=True) as doubts:
    warnings.simplefilter("always")
    sweep = pv.beta_sweep(make_pair, loader, BETAS, test_loader=test_loader, **options)
for doubt in doubts:  # one for a beta at which the weights of some digits have a heavy tail
    print(str(doubt.message).split(":")[0])
print(sweep)
print("\nslope between neighbours, which would lie between minus the two betas if training data were all data:")
for i, slope in enumerate((sweep.distortion.diff() / sweep.rate.diff()).tolist()):
    print(f"beta {BETAS[i]:g} to {BETAS[i + 1]:g}: {slope:.2f}")

# %%
# And what comes out of them: means of the likelihood at the same twelve draws from the prior, one row per beta.

z = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
figure, axes = plt.subplots(len(BETAS), 1, figsize=(8, 0.75 * len(BETAS)), layout="constrained")
for ax, beta, (model, _) in zip(axes, BETAS, sweep.pairs, strict=True):
    images = model.decoder(z).mean.detach().reshape(12, 8, 8)
    sheet = torch.nn.functional.pad(images, (0, 1)).permute(1, 0, 2).reshape(8, -1)
    ax.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=16)
    ax.set(xticks=[], yticks=[])
    ax.set_ylabel(f"{beta:g}", rotation=0, ha="right", va="center")
    ax.spines[:].set_visible(False)
figure.suptitle("Samples from the prior: beta from 0 (an autoencoder) to 16")
plt.show()
# sphinx_gallery_thumbnail_number = 2

# %%
# How far from data are they? ``SampleCheck`` draws data from the model and takes the distance to the nearest training digit,
# beside that of held-out digits. If samples are distributed like digits, a sample is the nearer one half of the time; at
# beta = 0 it almost never is. No judge of a model by itself, though: it likes beta = 16 best, whose log p(x) is far lower,
# because samples that all look like a mean digit are near to everything.

print(f"{'beta':>6s}{'sample to nearest':>20s}{'held-out to nearest':>22s}{'P(sample nearer)':>20s}")
for beta, (model, guide) in zip(BETAS, sweep.pairs, strict=True):
    looks = pv.SampleCheck(model, guide, seed=0)(test_loader, train=loader, progress=False)
    medians = float(looks.sample_distance.median()), float(looks.data_distance.median())
    print(f"{beta:6g}{medians[0]:20.1f}{medians[1]:22.1f}{float(looks.probability_nearer().value):20.3f}")

# %%
# Holes
# -----
# Why are samples noise at beta = 0? Nothing in the loss ties the latents to the prior. With two latents one can see it: the
# codes of the digits (left, numbers by class) leave the prior (grey). In the middle the aggregated posterior :math:`q(z)`,
# the mixture of the posteriors of all training digits, where the prior is: at beta = 0 needles with nothing in between.
# Where the prior has mass and q(z) has not is a hole; the decoder was never asked for anything there (right). As a number:
# the share of the prior where q(z) is less than a hundredth of it.

coded = DataLoader(TensorDataset(train, digit[: len(train)]), 500)
plain = {"evidence": pv.ImportanceSampling, "test_loader": DataLoader(TensorDataset(test[:10]), 10)}  # of no interest here
axis = torch.linspace(-3, 3, 40 if SMOKE_TEST else 150)
square = torch.cartesian_prod(axis, axis)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
    flat = pv.beta_sweep(lambda beta: make_pair(beta, 2), loader, (0.0, 1.0), **options, **plain)
figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
for beta, (model, guide), (codes, density, sheet) in zip((0, 1), flat.pairs, axes, strict=True):
    sample = pv.AggregatedPosterior(model, guide, seed=0)(coded, labels=lambda batch: batch[1], progress=False)
    pv.plots.plot_latents(sample, codes)
    codes.get_legend().remove()
    codes.set(title=f"beta = {beta}: posterior means, and prior (grey)")
    with torch.no_grad():
        mixture = torch.logsumexp(guide.encoder(train).log_prob(square.unsqueeze(1)), 1) - math.log(len(train))
    prior = model.prior().log_prob(square)
    holes = float(prior.exp()[mixture < prior - math.log(100)].sum() / prior.exp().sum())
    print(f"beta = {beta}: q(z) is less than a hundredth of the prior on {100 * holes:.0f} % of the prior")
    assert SMOKE_TEST or (holes > 0.9) == (beta == 0)
    image = mixture.exp().reshape(len(axis), -1).T.numpy()
    density.imshow(image, origin="lower", extent=(-3, 3, -3, 3), cmap="Greys", vmax=np.quantile(image, 0.98))
    density.contour(axis, axis, prior.reshape(len(axis), -1).exp(), levels=3, colors="C3", linestyles="--")
    density.set(xlabel="latent[0]", ylabel="latent[1]", title="q(z), and the prior (dashed)")
    pv.plots.plot_manifold(pv.manifold(model, guide, train[:1], num_steps=10, seed=0), sheet)
    sheet.set(title="decoded, from 5 % to 95 % of the prior")
plt.show()

# %%
# One model, all of its encoders
# ------------------------------
# ``RateDistortion`` draws the curve of one trained decoder under its best encoders, :math:`q_\beta` as above, by annealed
# chains that pass from the prior (no rate) to the posterior (beta = 1). Here for the VAE of beta = 1. Its own encoder, the
# cross, does not reach the curve: the inference gap. The other pairs of the sweep lie above it where the rate is high, since
# their encoders are not the best, and below it where the rate is low, since their decoders were trained for that.

model, guide = sweep.pairs[BETAS.index(1.0)]
chains = {"num_steps": 50, "num_chains": 2} if SMOKE_TEST else {"num_steps": 300, "num_chains": 8}
curve = pv.RateDistortion(model, guide, seed=0, **chains)(test_loader, progress=False)
print(curve)
figure, (plane, over_beta) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
pv.plots.plot_rate_distortion(curve, plane)
pv.plots.plot_rate_distortion(sweep, plane)
plane.set(xlim=(0, 28), ylim=(80, 200), title="Test digits: the plane")
plane.legend(loc="upper right", frameon=False, fontsize="small")
shown, loss = sweep.beta.tolist(), sweep.distortion + sweep.beta * sweep.rate
places = range(len(shown))
over_beta.plot(places, sweep.log_evidence, "ko-", label="log p(x)")
over_beta.plot(places, sweep.elbo, "ks--", label="ELBO")
over_beta.plot(places, -loss, "k^:", label="minus the loss, -(D + beta R)")
over_beta.set_xticks(places, [f"{beta:g}" for beta in shown])
top = float(sweep.log_evidence.max())
over_beta.set(xlabel="beta", ylabel="nats per datum", ylim=(top - 60, top + 25), title="Test digits: which beta is best?")
over_beta.legend(frameon=False, fontsize="small")
plt.show()

# %%
# The ELBO is best at beta = 1, which is what the loss asks for there, and so is log p(x), by little. (The second is no law:
# the ELBO also asks for posteriors that the guide can follow, and a beta a little below 1 asks less.) At beta = 0 minus the
# loss beats the log p(x) of every model here, and means nothing.
#
# A larger beta does not make latents mean more
# ---------------------------------------------
# beta above 1 is known for *disentangling*: one latent per factor of variation (`Higgins et al. 2017
# <https://openreview.net/forum?id=Sy2fzU9gl>`__). ``MutualInformationGap`` (MIG) measures it where the factors are known: 1
# if each factor is in one latent and in no other. Take two factors of ten levels, mixed into twenty numbers by orthogonal
# directions of lengths 2 and 1, plus noise, and again the linear VAE with its exact optimum for every beta, with four
# latents.

levels = torch.linspace(-1.5, 1.5, 10)
factors = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0)).repeat(10, 1)  # (1000, 2)
directions = torch.linalg.qr(torch.randn(20, 2, generator=torch.Generator().manual_seed(0)))[0]
noise = 0.2 * torch.randn(1000, 20, generator=torch.Generator().manual_seed(1))


def linear_vae(x, beta, angle=None):
    """The optimum of D + beta R as a pair; with an angle, its first two latents turned by so much away from the factors."""
    best = pv.exact.LinearGaussian.fit_beta(x.double(), 4, 0.25**2, beta)
    turn = torch.eye(4, dtype=torch.float64)
    if angle is not None:
        u, _, v = torch.linalg.svd(best.weight[:, :2].T @ directions.double())
        rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        turn[:2, :2] = u @ v @ rotation.double()
    weight = best.weight @ turn
    precision = torch.eye(4, dtype=torch.float64) + weight.T @ weight / (beta * best.variance)
    backward = torch.linalg.solve(precision, weight.T / (beta * best.variance))
    vae = pv.LinearVAE(20, 4, scale=0.25)
    decoder, encoder = vae.decoder[0], vae.encoder
    with torch.no_grad():
        for parameter, value in (
            (decoder.weight, weight),
            (decoder.bias, best.bias),
            (encoder.linear.weight, backward),
            (encoder.linear.bias, -backward @ best.bias),
            (encoder.log_scale, -0.5 * precision.diagonal().log()),
        ):
            parameter.copy_(value)
    return vae


@torch.no_grad()
def show(name, x, vae):
    data = DataLoader(TensorDataset(x, factors), 500)
    mig = pv.MutualInformationGap(vae.model, vae.guide, seed=0)(data, progress=False).mig
    parts = pv.ELBOSurgery(vae.model, vae.guide, seed=0)(data, progress=False)
    units = pv.ActiveUnits(vae.model, vae.guide, seed=0)(data, progress=False)
    elbo, log_evidence = vae.exact().elbo(x, vae.encode(x)).mean(), vae.exact().log_evidence(x).mean()
    numbers = f"{log_evidence:10.2f}{elbo:9.2f}{float(mig.value):8.3f}{float(parts.total_correlation.value):8.3f}"
    print(f"{name:12s}{numbers}{units.num_active:8d}   {' '.join(f'{kl:.2f}' for kl in units.kl.tolist())}")
    return float(mig.value), float(elbo)


print(f"{'':12s}{'log p(x)':>10s}{'ELBO':>9s}{'MIG':>8s}{'TC':>8s}{'active':>8s}   KL of each latent")
unequal = levels[factors.long()] * torch.tensor([2.0, 1.0]) @ directions.T + noise
over_beta = [show(f"beta {beta:g}", unequal, linear_vae(unequal, beta)) for beta in (1.0, 4.0, 16.0, 64.0)]
equal = levels[factors.long()] @ directions.T + noise
turned = [show(f"{angle} degrees", equal, linear_vae(equal, 1.0, math.radians(angle))) for angle in (0, 15, 30, 45)]
assert all(lower[0] < higher[0] for higher, lower in zip(over_beta, over_beta[1:], strict=False))
assert max(elbo for _, elbo in turned) - min(elbo for _, elbo in turned) < 0.01

# %%
# - **A larger beta lowers the MIG here.** Factors with orthogonal directions and different lengths are found at beta = 1,
#   as the principal axes. What beta adds is noise, and at the beta where the eigenvalue of a factor falls below beta times
#   the noise variance its latent dies: one factor is gone, and the MIG with it.
# - **The lowest KL and a total correlation (TC) of zero are those of latents that say nothing.** A collapsed dimension
#   agrees with the prior perfectly. :doc:`07_collapse` is about that.
# - **Where the lengths are equal the loss is blind.** Turned by any angle, the latents have the same log p(x), the same
#   ELBO, rate and distortion, and the MIG falls from its best to nothing. Which of these a training finds is chance:
#   without assumptions about the factors no loss can know them (`Locatello et al. 2019
#   <https://arxiv.org/abs/1811.12359>`__). The TC does see the turn here, since these factors are not Gaussian, but it is
#   no part of the loss at any beta.
#
# What to try
# -----------
# - ``likelihood=pv.nn.Normal(0.2)`` for ``pixels / 16``: a wider or narrower noise of a Normal likelihood is a beta in
#   disguise.
# - ``objective=lambda beta: pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(500, end=beta))`` in ``beta_sweep``: does the
#   way to beta matter for where it ends?
# - ``pv.TotalCorrelationELBO`` weighs the parts of the KL apart. Does it separate the factors of equal length?
# - A wider encoder, ``hidden=(400,)``: how far do the squares come down towards the curve?
#
# Next: :doc:`07_collapse`, latents that collapse although nobody asked for it.
