r"""
Rate, distortion and beta
=========================

The negative ELBO is the sum of a rate and a distortion, and beta is the weight of the
rate. You will train VAEs from beta = 0, an autoencoder whose latent space has holes, to
a beta so large that the latents carry no information. You will learn why only the loss
at beta = 1 is a bound on log p(x) that is worth reporting. You will also see why a
larger beta does not give latents a clearer meaning.

Prerequisites: :doc:`02_first_vae` and :doc:`03_three_gaps`; about 1 minute to run.
"""

# %%
# Rate and distortion
# -------------------
# The negative ELBO of a datum (data point) is *distortion* plus *rate*, in nats:
#
# .. math::
#
#    -\mathcal{L}[q] = \underbrace{-\mathrm{E}_q \log p(x \mid z)}_{D}
#    + \underbrace{\mathrm{KL}(q(z \mid x) \,\|\, p(z))}_{R} .
#
# :math:`D` measures what is lost about the datum, and :math:`R` is the cost of its
# latents. The weight :math:`\beta` gives the loss :math:`D + \beta R`. Every pair of
# model and guide is a point :math:`(R, D)` in a plane. All points of equal loss are on
# a line of slope :math:`-\beta`. The best pair is where the lowest such line touches
# the set of points that can be reached. So along the boundary of this set
#
# .. math:: \frac{dD}{dR} = -\beta
#
# (`Alemi et al. (2018), "Fixing a broken ELBO" <https://arxiv.org/abs/1711.00464>`__).
# At the optimum, one more nat of rate lowers the distortion by :math:`\beta` nats. At
# :math:`\beta = 1` the line through the point is :math:`D + R = -\mathcal{L}[q]`. It
# shows how good the bound on :math:`\log p(x)` is.

import math
import os
import warnings

import matplotlib.pyplot as plt
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
# Other people wrote the last fifth of the digits:
train, test = pixels[:1437], pixels[1437 :: 20 if SMOKE_TEST else 3]
# sphinx_gallery_start_ignore
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
# sphinx_gallery_end_ignore

# %%
# A curve in closed form
# ----------------------
# Every quantity of the linear VAE is known. For a given decoder, the best encoder at
# :math:`\beta` is the Gaussian :math:`q_\beta \propto p(z) \, p(x \mid z)^{1/\beta}`.
# Its rate and distortion come from ``rate_distortion``. The next cell checks the slope
# by differentiating both by :math:`\beta`.

x = pixels.double() / 16
linear = pv.exact.LinearGaussian.fit(x, latent_dim=10)
# Entry 20 is beta = 1:
beta = torch.logspace(-1, 1.5, 51, dtype=torch.float64, requires_grad=True)
curve = linear.rate_distortion(x, beta)
by_beta = [
    torch.autograd.grad(part.sum(), beta, retain_graph=True)[0]
    for part in (curve.distortion, curve.rate)
]
slope = by_beta[0] / by_beta[1]
assert torch.allclose(slope, -beta, rtol=1e-6)
beta, rate, distortion = (v.detach() for v in (beta, curve.rate, curve.distortion))

# %%
# This curve belongs to one decoder with its best encoders. A decoder that may change
# with :math:`\beta` does better. ``fit_beta`` gives the optimum of the loss
# :math:`D + \beta R` over decoder *and* encoder. Its :math:`\log p(x)` is known as
# well: the model of :math:`\beta = 1` is the best, and every other model is worse.


def trained_at(beta):
    """Rate, distortion and log p(x) of the best linear VAE, means over the data."""
    best = pv.exact.LinearGaussian.fit_beta(x, 10, linear.variance, beta)
    guide = best.beta_posterior(x, beta)
    return (
        best.rate(guide).mean(),
        best.distortion(x, guide).mean(),
        best.log_evidence(x).mean(),
    )


trained = zip(*map(trained_at, beta), strict=True)
best_rate, best_distortion, log_evidence = (torch.stack(column) for column in trained)
elbo, loss = -(best_distortion + best_rate), best_distortion + beta * best_rate
assert int(log_evidence.argmax()) == int(elbo.argmax()) == 20
assert torch.allclose(elbo[20], log_evidence[20])  # the encoder is exact there

# %%
# In the table, "one decoder" is the curve of the first cell, and "own decoder" has a
# decoder for each :math:`\beta`. "-loss" is :math:`-(D + \beta R)`.

names = ("beta", "one decoder: R", "D", "dD/dR", "own decoder: R", "D")
names = (*names, "ELBO", "log p(x)", "-loss")
print(("{:>6s}{:>16s}" + 2 * "{:>9s}" + "{:>16s}" + 4 * "{:>9s}").format(*names))
columns = (beta, rate, distortion, slope, best_rate, best_distortion)
columns = (*columns, elbo, log_evidence, -loss)
for row in torch.stack(columns, 1)[::5].tolist():
    cells = "{:6.2f}{:16.2f}" + 2 * "{:9.2f}" + "{:16.2f}" + 4 * "{:9.2f}"
    print(cells.format(*row))
# sphinx_gallery_start_ignore
figure, (plane, over_beta) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plane.plot(rate, distortion, ":", color=ORANGE, linewidth=2, label="one decoder")
own = "decoder and encoder for each $\\beta$"
plane.plot(best_rate, best_distortion, "-", color=BLUE, label=own)
least = float(-elbo[20])
line = "D + R = least negative ELBO, slope -1"
plane.plot([0, 22], [least, least - 22], "--", color="0.5", label=line)
plane.plot(best_rate[20], best_distortion[20], "o", color="black")
plane.set(xlim=(0, 22), ylim=(-45, 20), title="Linear VAE of the digits, exact")
plane.set(xlabel="rate, nats per datum", ylabel="distortion, nats per datum")
plane.legend(frameon=False, fontsize="small")
over_beta.plot(beta, log_evidence, "-", color=BLUE, label="log p(x)")
over_beta.plot(beta, elbo, "--", color=GREEN, label="ELBO = -(D + R)")
minus_loss = "minus the loss, -(D + $\\beta$ R)"
over_beta.plot(beta, -loss, ":", color=RED, linewidth=2, label=minus_loss)
over_beta.axvline(1, color="0.8", zorder=0)
over_beta.set(xscale="log", xlabel="$\\beta$", ylabel="nats per datum", ylim=(-45, 45))
over_beta.set_title("Minus the loss is not log p(x)")
over_beta.legend(frameon=False, fontsize="small")
plt.show()
# sphinx_gallery_end_ignore

# %%
# Below :math:`\beta = 1`, minus the loss is above the :math:`\log p(x)` of *every*
# model in the figure, so it bounds nothing. Above :math:`\beta = 1` it is a lower
# bound, but a poor one. Report the ELBO or, better, :math:`\log p(x)`.
# ``objective.terms`` and ``Monitor`` give the true ELBO for any :math:`\beta`.
#
# Digits, from autoencoder to collapse
# ------------------------------------
# Now the model is a VAE with networks, 8 latents and a Binomial likelihood, since a
# pixel is a whole number from 0 to 16. It is trained anew for every :math:`\beta`.
# ``beta_sweep`` trains, keeps every pair of model and guide, and measures rate,
# distortion and :math:`\log p(x)` on test digits.


def make_pair(beta, latent_dim=8):
    vae = pv.mlp_vae(64, latent_dim, likelihood=pv.nn.Binomial(16), hidden=(128,))
    return vae.model, vae.guide


def adam():
    return pyro.optim.Adam({"lr": 2e-3})


loader = DataLoader(TensorDataset(train), 100, shuffle=True)
test_loader = DataLoader(TensorDataset(test), 100)
options = {"num_epochs": NUM_EPOCHS, "optimizer": adam, "progress": False, "seed": 0}
with warnings.catch_warnings(record=True) as doubts:
    warnings.simplefilter("always")
    sweep = pv.beta_sweep(make_pair, loader, BETAS, test_loader=test_loader, **options)

# %%
# The first lines of the output are warnings. For some digits the importance weights
# have a heavy tail, or the posterior has a mode without a proposal. Their
# :math:`\log p(x)` may be too low. The slopes below the table are between neighbouring
# values of :math:`\beta`. If the training data were all data, each slope would lie
# between the negatives of its two betas.

for doubt in doubts:
    print(str(doubt.message).split(":")[0])
print(sweep)
print(
    "\nslope between neighbours, which would lie between minus the two betas"
    " if training data were all data:"
)
for i, slope in enumerate((sweep.distortion.diff() / sweep.rate.diff()).tolist()):
    print(f"beta {BETAS[i]:g} to {BETAS[i + 1]:g}: {slope:.2f}")

# %%
# What do these models generate? Each row of the figure belongs to one :math:`\beta`. It
# shows the mean of the likelihood at the same twelve draws from the prior.

z = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
images = [model.decoder(z).mean.detach() for model, _ in sweep.pairs]
# sphinx_gallery_start_ignore
figure, axes = plt.subplots(
    len(BETAS), 1, figsize=(8, 0.75 * len(BETAS)), layout="constrained"
)
for ax, beta, row in zip(axes, BETAS, images, strict=True):
    padded = torch.nn.functional.pad(row.reshape(12, 8, 8), (0, 1))
    sheet = padded.permute(1, 0, 2).reshape(8, -1)
    ax.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=16)
    ax.set(xticks=[], yticks=[])
    ax.set_ylabel(f"{beta:g}", rotation=0, ha="right", va="center")
    ax.spines[:].set_visible(False)
figure.suptitle("Samples from the prior: $\\beta$ from 0 (an autoencoder) to 16")
plt.show()
# sphinx_gallery_end_ignore
# sphinx_gallery_thumbnail_number = 2

# %%
# How far are these samples from data? ``SampleCheck`` draws data from the model and
# computes the distance of each to the nearest training digit. It does the same for
# held-out digits. If samples were distributed like digits, the sample would be the
# nearer one in half of the comparisons. At :math:`\beta = 0` it almost never is.
#
# This comparison alone cannot judge a model. It prefers :math:`\beta = 16`, where
# :math:`\log p(x)` is far lower. Samples that all resemble a mean digit are near to
# every digit.

names = ("beta", "sample to nearest", "held-out to nearest", "P(sample nearer)")
print("{:>6s}{:>20s}{:>22s}{:>20s}".format(*names))
for beta, (model, guide) in zip(BETAS, sweep.pairs, strict=True):
    check = pv.SampleCheck(model, guide, seed=0)
    looks = check(test_loader, train=loader, progress=False)
    sample, held_out = looks.sample_distance.median(), looks.data_distance.median()
    nearer = float(looks.probability_nearer().value)
    print(f"{beta:6g}{float(sample):20.1f}{float(held_out):22.1f}{nearer:20.3f}")

# %%
# Holes in the latent space
# -------------------------
# Why are samples noise at :math:`\beta = 0`? Nothing in the loss ties the latents to
# the prior. A model with two latents makes this visible. The *aggregated posterior*
# :math:`q(z)` is the mixture of the posteriors of all training digits. A *hole* is a
# region where the prior has mass and :math:`q(z)` has almost none. The decoder was
# never trained there. The numbers printed below are the shares of the prior in regions
# where :math:`q(z)` is less than a hundredth of it.

# Estimates of log p(x) are not used here, so this evaluation is kept short:
brief = {
    "evidence": pv.ImportanceSampling,
    "test_loader": DataLoader(TensorDataset(test[:10]), 10),
}


def make_flat_pair(beta):
    return make_pair(beta, latent_dim=2)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
    flat = pv.beta_sweep(make_flat_pair, loader, (0.0, 1.0), **options, **brief)

# %%
# The density of :math:`q(z)` is computed on a grid over the plane of the two latents.

axis = torch.linspace(-3, 3, 40 if SMOKE_TEST else 150)
square = torch.cartesian_prod(axis, axis)


@torch.no_grad()
def log_aggregated(guide):
    """log q(z) on the grid."""
    of_each_digit = guide.encoder(train).log_prob(square.unsqueeze(1))
    return torch.logsumexp(of_each_digit, 1) - math.log(len(train))


log_prior = flat.pairs[0][0].prior().log_prob(square)
for beta, (_, guide) in zip((0, 1), flat.pairs, strict=True):
    empty = log_aggregated(guide) < log_prior - math.log(100)
    holes = float(log_prior.exp()[empty].sum() / log_prior.exp().sum())
    print(
        f"beta = {beta}: q(z) is less than a hundredth of the prior"
        f" on {100 * holes:.0f} % of the prior"
    )
    assert SMOKE_TEST or (holes > 0.9) == (beta == 0)

# %%
# The figure has a row for each :math:`\beta`. On the left are the posterior means of
# the digits, marked by their class, and draws from the prior in grey. In the middle is
# :math:`q(z)`. At :math:`\beta = 0` it consists of narrow peaks with almost nothing
# between them. On the right are decoded latents from the 5% to the 95% quantile of the
# prior.

coded = DataLoader(TensorDataset(train, digit[: len(train)]), 500)
figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
for (model, guide), (means, density, sheet) in zip(flat.pairs, axes, strict=True):
    collect = pv.AggregatedPosterior(model, guide, seed=0)
    sample = collect(coded, labels=lambda batch: batch[1], progress=False)
    pv.plots.plot_latents(sample, means)
    walk = pv.manifold(model, guide, train[:1], num_steps=10, seed=0)
    pv.plots.plot_manifold(walk, sheet)
    # sphinx_gallery_start_ignore
    mixture = log_aggregated(guide).exp()
    image = mixture.reshape(len(axis), -1).T.numpy()
    where = {"origin": "lower", "extent": (-3, 3, -3, 3)}
    vmax = float(mixture.quantile(0.98))
    density.imshow(image, **where, cmap="Greys", vmax=vmax)
    prior = log_prior.reshape(len(axis), -1).exp()
    lines = {"colors": RED, "linestyles": "--"}
    density.contour(axis, axis, prior, levels=3, **lines)
    density.set(xlabel="latent[0]", ylabel="latent[1]")
    density.set_title("q(z), and the prior (dashed)")
    sheet.set(title="decoded, from 5 % to 95 % of the prior")
    # sphinx_gallery_end_ignore
# sphinx_gallery_start_ignore
for beta, ax in zip((0, 1), axes[:, 0], strict=True):
    ax.set_title(f"$\\beta$ = {beta}: posterior means, and prior (grey)")
plt.show()
# sphinx_gallery_end_ignore

# %%
# One decoder with its best encoders
# ----------------------------------
# ``RateDistortion`` estimates the curve of one trained decoder with its best encoders
# :math:`q_\beta`. It uses annealed chains that go from the prior (rate zero) to the
# posterior (:math:`\beta = 1`). Here the decoder is that of the VAE of
# :math:`\beta = 1`.

model, guide = sweep.pairs[BETAS.index(1.0)]
chains = {"num_steps": 300, "num_chains": 8}
if SMOKE_TEST:
    chains = {"num_steps": 50, "num_chains": 2}
estimator = pv.RateDistortion(model, guide, seed=0, **chains)
curve = estimator(test_loader, progress=False)
print(curve)

# %%
# The encoder of the VAE is the cross in the left plot. Its distance from the curve is
# the inference gap. The squares are the other pairs of the sweep. Where the rate is
# high they are above the curve, since their encoders are not the best. Where the rate
# is low they are below the curve, since their decoders were trained for a low rate.

figure, (plane, over_beta) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
pv.plots.plot_rate_distortion(curve, plane)
pv.plots.plot_rate_distortion(sweep, plane)
# sphinx_gallery_start_ignore
plane.set(xlim=(0, 28), ylim=(80, 200), title="Test digits: the plane")
plane.legend(loc="upper right", frameon=False, fontsize="small")
shown, loss = sweep.beta.tolist(), sweep.distortion + sweep.beta * sweep.rate
places = range(len(shown))
over_beta.plot(places, sweep.log_evidence, "o-", color=BLUE, label="log p(x)")
over_beta.plot(places, sweep.elbo, "s--", color=GREEN, label="ELBO")
over_beta.plot(places, -loss, "^:", color=RED, label=minus_loss)
over_beta.set_xticks(places, [f"{beta:g}" for beta in shown])
top = float(sweep.log_evidence.max())
over_beta.set(xlabel="$\\beta$", ylabel="nats per datum", ylim=(top - 60, top + 25))
over_beta.set_title("Test digits: which $\\beta$ is best?")
over_beta.legend(frameon=False, fontsize="small")
plt.show()
# sphinx_gallery_end_ignore

# %%
# The ELBO is highest at :math:`\beta = 1`, where minus the loss is the ELBO. There
# :math:`\log p(x)` is highest too, by a small difference. That is not a law: the ELBO
# also favours posteriors that the guide can match, and a :math:`\beta` a little below 1
# does so less. At :math:`\beta = 0`, minus the loss is above the :math:`\log p(x)` of
# every model here, and it has no meaning.
#
# A larger beta does not give latents a clearer meaning
# -----------------------------------------------------
# Values of :math:`\beta` above 1 are known for *disentangling*: one latent per factor
# of variation (`Higgins et al. (2017), "beta-VAE: Learning basic visual concepts with a
# constrained variational framework" <https://openreview.net/forum?id=Sy2fzU9gl>`__).
# ``MutualInformationGap`` (MIG) measures this where the factors are known. It is 1 if
# each factor is in one latent and in no other.
#
# The example has two factors of ten levels each. They are mixed into twenty numbers by
# orthogonal directions of lengths 2 and 1, plus noise. The model is the linear VAE with
# four latents, at its exact optimum for every :math:`\beta`.

levels = torch.linspace(-1.5, 1.5, 10)
tens = torch.arange(10.0)
factors = torch.cartesian_prod(tens, tens).repeat(10, 1)  # (1000, 2)
generator = torch.Generator().manual_seed(0)
directions = torch.linalg.qr(torch.randn(20, 2, generator=generator))[0]
noise = 0.2 * torch.randn(1000, 20, generator=torch.Generator().manual_seed(1))
NOISE_SCALE = 0.25  # of the model


def rotation(weight, angle):
    """Turns the first two latents by `angle` away from the factors."""
    u, _, v = torch.linalg.svd(weight[:, :2].T @ directions.double())
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = u @ v @ torch.tensor([[cos, -sin], [sin, cos]]).double()
    return turn


@torch.no_grad()
def linear_vae(weight, bias, beta):
    """The linear VAE of this decoder, with its best encoder at beta."""
    scaled = weight.T / (beta * NOISE_SCALE**2)
    precision = torch.eye(4, dtype=torch.float64) + scaled @ weight
    backward = torch.linalg.solve(precision, scaled)
    vae = pv.LinearVAE(20, 4, scale=NOISE_SCALE)
    vae.decoder[0].weight.copy_(weight)
    vae.decoder[0].bias.copy_(bias)
    vae.encoder.linear.weight.copy_(backward)
    vae.encoder.linear.bias.copy_(-backward @ bias)
    vae.encoder.log_scale.copy_(-0.5 * precision.diagonal().log())
    return vae


def optimum(x, beta):
    """The exact optimum of D + beta R."""
    return pv.exact.LinearGaussian.fit_beta(x.double(), 4, NOISE_SCALE**2, beta)


unequal = levels[factors.long()] * torch.tensor([2.0, 1.0]) @ directions.T + noise
over_beta = {}
for beta in (1.0, 4.0, 16.0, 64.0):
    best = optimum(unequal, beta)
    over_beta[f"beta {beta:g}"] = linear_vae(best.weight, best.bias, beta)

# %%
# A second set of data has directions of *equal* length. Its optimum at
# :math:`\beta = 1` is turned by several angles away from the factors.

equal = levels[factors.long()] @ directions.T + noise
best, turned = optimum(equal, 1.0), {}
for angle in (0, 15, 30, 45):
    weight = best.weight @ rotation(best.weight, math.radians(angle))
    turned[f"{angle} degrees"] = linear_vae(weight, best.bias, 1.0)


@torch.no_grad()
def measure(x, vae):
    """log p(x), ELBO, MIG, total correlation, and what the units do."""
    data = DataLoader(TensorDataset(x, factors), 500)
    pair, quiet = (vae.model, vae.guide), {"progress": False}
    exact = vae.exact()
    elbo = exact.elbo(x, vae.encode(x)).mean()
    mig = pv.MutualInformationGap(*pair, seed=0)(data, **quiet).mig.value
    parts = pv.ELBOSurgery(*pair, seed=0)(data, **quiet)
    numbers = (exact.log_evidence(x).mean(), elbo, mig, parts.total_correlation.value)
    return [float(v) for v in numbers], pv.ActiveUnits(*pair, seed=0)(data, **quiet)


rows = {name: measure(unequal, vae) for name, vae in over_beta.items()}
rows |= {name: measure(equal, vae) for name, vae in turned.items()}

# %%
# The first four rows are for lengths 2 and 1, the last four for equal lengths. TC is
# the total correlation, the dependence between the latents under :math:`q(z)`.

names = ("", "log p(x)", "ELBO", "MIG", "TC", "active")
print("{:12s}{:>10s}{:>9s}{:>8s}{:>8s}{:>8s}   KL of each latent".format(*names))
for name, (numbers, units) in rows.items():
    print("{:12s}{:10.2f}{:9.2f}{:8.3f}{:8.3f}".format(name, *numbers), end="")
    print(
        f"{units.num_active:8d}   {' '.join(f'{kl:.2f}' for kl in units.kl.tolist())}"
    )

migs = [rows[name][0][2] for name in over_beta]
assert migs == sorted(migs, reverse=True)
elbos = [rows[name][0][1] for name in turned]
assert max(elbos) - min(elbos) < 0.01

# %%
# - **A larger beta lowers the MIG here.** Factors with orthogonal directions of
#   different lengths are found at :math:`\beta = 1`, as the principal axes. A larger
#   :math:`\beta` only adds noise. Where the eigenvalue of a factor is below
#   :math:`\beta` times the noise variance, its latent collapses. Then this factor is
#   lost, and the MIG falls.
# - **The lowest KL and a total correlation of zero belong to latents without
#   information.** A collapsed dimension agrees with the prior perfectly.
#   :doc:`07_collapse` is about such dimensions.
# - **With equal lengths, the loss cannot find the factors.** Latents turned by any
#   angle have the same :math:`\log p(x)`, the same ELBO, rate and distortion. The MIG
#   falls from its best value to almost zero. Chance decides which angle a training
#   finds: without assumptions about the factors, no loss can know them (`Locatello et
#   al. (2019), "Challenging common assumptions in the unsupervised learning of
#   disentangled representations" <https://arxiv.org/abs/1811.12359>`__). The TC does
#   change with the angle here, since these factors are not Gaussian. But it is not a
#   part of this loss at any :math:`\beta`.
#
# What to try
# -----------
# - Use ``likelihood=pv.nn.Normal(0.2)`` for ``pixels / 16``. The scale of a Normal
#   likelihood has the role of :math:`\beta`. (Problem 4 shows why.)
# - Pass ``beta_sweep`` an annealed weight, ``objective=lambda beta:
#   pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(500, end=beta))``. Does the way
#   to :math:`\beta` change the result?
# - ``pv.TotalCorrelationELBO`` weighs the parts of the KL separately. Does it separate
#   the factors of equal length?
# - Use a wider encoder, ``hidden=(400,)``. How much closer to the curve are the
#   squares?
#
# Practice problems
# -----------------
#
# 1. The boundary of the points that can be reached is a smooth decreasing curve
#    :math:`D(R)`. Show that the minimum of :math:`D + \beta R` on it has the slope
#    :math:`-\beta`.
# 2. For a fixed decoder, show that the encoder with the least :math:`D + \beta R` is
#    :math:`q_\beta \propto p(z) \, p(x \mid z)^{1/\beta}`. What is the least loss?
# 3. Show that :math:`-(D + \beta R)` is a lower bound on :math:`\log p(x)` for
#    :math:`\beta \ge 1`. Find a row of the first table that shows that this is false
#    for :math:`\beta < 1`.
# 4. The likelihood is Normal with a fixed variance :math:`s^2`. Show that training it
#    with :math:`\beta` gives the same optimum as a variance of :math:`\beta s^2` with
#    the plain ELBO.
# 5. The levels of a factor have the variance 0.917. At which :math:`\beta` do the
#    latents of the two factors of lengths 2 and 1 collapse? The noise adds
#    :math:`0.2^2` to each eigenvalue, and the model has a noise variance of
#    :math:`0.25^2`.
#
# Answers
# -------
#
# 1. The derivative of :math:`D(R) + \beta R` by :math:`R` is :math:`D'(R) + \beta`. It
#    is zero at the minimum.
# 2. Let :math:`Z` be the integral of :math:`p(z) \, p(x \mid z)^{1/\beta}`. Then
#    :math:`D + \beta R = \beta \, \mathrm{KL}(q \,\|\, q_\beta) - \beta \log Z`. This
#    is least at :math:`q = q_\beta`, and its value there is :math:`-\beta \log Z`.
# 3. :math:`-(D + \beta R) = \mathcal{L}[q] - (\beta - 1) R`. Since :math:`R \ge 0`,
#    this is at most :math:`\mathcal{L}[q] \le \log p(x)` for :math:`\beta \ge 1`. The
#    row of :math:`\beta = 0.10` has 32.32 for minus the loss and 17.43 for
#    :math:`\log p(x)`.
# 4. Up to constants, :math:`D = \mathrm{E}_q \|x - \mu(z)\|^2 / 2 s^2`. Dividing the
#    loss by :math:`\beta` does not move its optimum. It gives
#    :math:`\mathrm{E}_q \|x - \mu(z)\|^2 / 2 \beta s^2 + R`.
# 5. The eigenvalues are :math:`4 \cdot 0.917 + 0.04 = 3.71` and
#    :math:`0.917 + 0.04 = 0.957`. Divided by 0.0625 they are 59 and 15. In the table
#    one latent is active at :math:`\beta = 16` and none at :math:`\beta = 64`.
#
# Next: :doc:`07_collapse`, which explains why latents collapse.
