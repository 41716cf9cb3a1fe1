r"""
The optimal posterior and the three gaps
========================================

The ELBO lies below log p(x), and the distance has two parts. One is due to the encoder,
the other to the variational family. This tutorial computes both in closed form for a
model with one latent, and measures both for a VAE of handwritten digits. It then shows
whether a step of training raised log p(x) or closed a gap.

Prerequisites: :doc:`01_the_bound`, :doc:`02_first_vae`; about 1 minute to run.
"""

# %%
# Three gaps
# ----------
# For any distribution :math:`q` over the latents :math:`z` of one data point :math:`x`
# (a *datum*)
#
# .. math::
#
#    \mathcal{L}[q] = \mathrm{E}_q[\log p(x, z) - \log q(z)]
#    = \log p(x) - \mathrm{KL}(q(z) \,\|\, p(z \mid x)) .
#
# The best :math:`q` of all is the posterior, and there the ELBO is :math:`\log p(x)`. A
# VAE does not reach it, for two reasons:
#
# - The *family* of :math:`q`, say all diagonal Gaussians, may not contain the
#   posterior. Its best member for this datum is called :math:`q^*`.
# - The *encoder* is one function for all data. For this datum it need not return
#   :math:`q^*`, but some other member.
#
# So the distance is a sum (`Cremer, Li and Duvenaud 2018
# <https://arxiv.org/abs/1801.03558>`__):
#
# .. math::
#
#    \underbrace{\log p(x) - \mathcal{L}[q]}_{\text{inference gap}}
#    = \underbrace{\mathcal{L}[q^*] - \mathcal{L}[q]}_{\text{amortization gap}}
#    + \underbrace{\log p(x) - \mathcal{L}[q^*]}_{\text{approximation gap}} .
#
# The amortization gap is the encoder's part, the approximation gap the family's part.

# sphinx_gallery_thumbnail_number = 1

import copy
import math
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
pyro.set_rng_seed(0)

# %%
# All three in closed form
# ------------------------
# A lamp of unknown brightness is watched for a second, and :math:`x` photons arrive.
# Its log-brightness has a broad prior, :math:`z \sim \mathrm{N}(0, 3^2)`, and
# :math:`x \mid z \sim \mathrm{Poisson}(e^z)`. The posterior is not Gaussian. If no
# photon came, the lamp may be arbitrarily dark, but it cannot be bright.
#
# The encoder is a rule of thumb: the count estimates the brightness, and the relative
# error of a count is one over its square root. Adding a half keeps both finite at zero.

PRIOR_SCALE = 3.0
counts = torch.tensor([0.0, 1.0, 3.0, 10.0], dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), PRIOR_SCALE))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def encoder(x):
    return (x + 0.5).log(), (x + 0.5).rsqrt()  # location and scale


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(*encoder(x)))


# %%
# For :math:`q = \mathrm{N}(m, s^2)` all expectations are known, in particular
# :math:`\mathrm{E}_q e^z = e^{m + s^2/2}`:
#
# .. math::
#
#    \mathcal{L}(m, s) = {} & x m - e^{m + s^2/2} - \log x! \\
#    & - \frac{m^2 + s^2}{2 \cdot 3^2} - \log 3 + \log s + \tfrac12 .
#
# :math:`q^*` is the maximum of this function, which the optimiser L-BFGS finds.
# :math:`\log p(x)` is an integral over one number, which ``pv.ExactEvidence`` computes
# by quadrature. So all three gaps are known without any draws.


def elbo(x, loc, scale):
    likelihood = x * loc - (loc + scale.square() / 2).exp() - (x + 1).lgamma()
    prior = -(loc.square() + scale.square()) / (2 * PRIOR_SCALE**2)
    return likelihood + prior - math.log(PRIOR_SCALE) + scale.log() + 0.5


loc, log_scale = (torch.zeros_like(counts).requires_grad_() for _ in range(2))
optimizer = torch.optim.LBFGS(
    [loc, log_scale],
    max_iter=200,
    tolerance_grad=1e-10,
    line_search_fn="strong_wolfe",
)


def negative_elbos():
    optimizer.zero_grad()
    loss = -elbo(counts, loc, log_scale.exp()).sum()
    loss.backward()
    return loss


optimizer.step(negative_elbos)
best = loc.detach(), log_scale.detach().exp()
log_evidence = pv.ExactEvidence(model, guide, seed=0)(counts).log_evidence
bound, optimum = elbo(counts, *encoder(counts)), elbo(counts, *best)
exact = {
    "amortization": optimum - bound,
    "approximation": log_evidence - optimum,
    "inference": log_evidence - bound,
}

# %%
# ``pv.InferenceGaps`` gets only the two programs. It fits :math:`q^*` to every datum by
# gradient steps on noisy ELBOs. Then it measures both bounds on fresh draws with common
# noise, so that their difference has a smaller error than either. Each number comes
# with its Monte Carlo error, the error from the random draws.

estimator = pv.InferenceGaps(
    model,
    guide,
    evidence=pv.ExactEvidence,
    num_particles=5_000 if SMOKE_TEST else 100_000,
    seed=0,
)
measured = estimator(counts)
print("photons   gap              exact   measured")
for name, values in exact.items():
    found, errors = getattr(measured, name), measured.std_errors[name]
    for count, truth, value, error in zip(counts, values, found, errors, strict=True):
        print(f"{count:7.0f}   {name:<14} {truth:7.4f}   {value:.4f} +- {error:.4f}")
        # The fit of q* may end 0.003 nats below the maximum.
        assert abs(value - truth) < 5 * error + 0.003

# %%
# The figure shows the datum without a photon: on the left the densities, on the right
# *every* Gaussian, by its location and scale. The contours are the distance from its
# ELBO to :math:`\log p(x)`. The star is :math:`q^*`, where the distance is smallest. It
# is not zero there: this is the approximation gap. The cross is the encoder. How much
# further from :math:`\log p(x)` it is than the star, is the amortization gap.
#
# Here the amortization gap is the larger part, because this encoder expects a lamp that
# is too bright. No encoder can do better than the star. A richer family would contain
# distributions that are not on this map.

# sphinx_gallery_start_ignore
BLUE, ORANGE = "#0072B2", "#D55E00"
z = torch.linspace(-11, 5, 801, dtype=torch.float64)
log_prior = dist.Normal(0 * z, PRIOR_SCALE).log_prob(z)
posterior = (log_prior - z.exp() - log_evidence[0]).exp()  # log p(0 | z) = -exp(z)
location, scale = torch.linspace(-5, 1, 121), torch.linspace(0.3, 3.5, 121)
locs, scales = torch.meshgrid(location, scale, indexing="xy")
height = log_evidence[0] - elbo(counts[0], locs.double(), scales.double())

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.fill_between(z, posterior, color="0.85", label="posterior")
levels = [0.1, 0.2, 0.5, 1, 2, 5, 10]
greys = [str(1 - 0.08 * i) for i in range(8)]
right.contourf(locs, scales, height, levels=[0, *levels, 1e9], colors=greys)
lines = right.contour(locs, scales, height, levels, colors="black", linewidths=0.8)
right.clabel(lines, fmt="%g", fontsize=8)
marks = (
    ("q*", best, "approximation", "-", BLUE, "*", (-4.8, 2.9)),
    ("the encoder's q", encoder(counts), "inference", "--", ORANGE, "X", (-1.7, 2.9)),
)
for name, q, gap, line, color, mark, place in marks:
    density = dist.Normal(q[0][0], q[1][0]).log_prob(z).exp()
    left.plot(z, density, line, color=color, label=name)
    right.plot(q[0][0], q[1][0], color=color, marker=mark, markersize=13)
    right.annotate(
        f"{name}: {exact[gap][0]:.3f} nats",
        (q[0][0], q[1][0]),
        place,
        arrowprops={"arrowstyle": "-"},
        bbox={"facecolor": "white", "edgecolor": "none"},
    )
left.set(xlabel="z, log-brightness", ylabel="density", ylim=(0, None))
left.set_title("No photon: posterior and two Gaussians")
left.legend(frameon=False, loc="upper left")
right.set(xlabel="location m", ylabel="scale s")
right.set_title("log p(x) - ELBO of every Gaussian, nats")
# sphinx_gallery_end_ignore
plt.show()

# %%
# The same gaps of a VAE
# ----------------------
# The data are handwritten digits of 8 by 8 pixels. The pixels are whole numbers from 0
# to 16, so the likelihood is a Binomial with 16 trials. (Divided by 16 and given to a
# Bernoulli, the same pixels have a loss, but no :math:`\log p(x)`.)
#
# Eight latents are too many for quadrature. From here on, :math:`\log p(x)` is
# estimated from below, by importance sampling from a proposal that is fitted to each
# digit. What this estimate lacks is missing from the inference gap and from the
# approximation gap as well.
#
# We train once and stop five times, to measure the gaps on digits that are not used in
# training. Warnings about single digits are silenced in the loop. Each record counts
# those digits itself, in ``evidence.doubts``.

CHECKPOINTS = [1, 2] if SMOKE_TEST else [4, 12, 40, 100, 200]  # epochs
num_test = 24 if SMOKE_TEST else 360
pixels = torch.tensor(load_digits().data, dtype=torch.float32)
train, test = train_test_split(pixels, test_size=num_test, random_state=0)
batches = DataLoader(TensorDataset(train), batch_size=100, shuffle=True)
held_out = DataLoader(TensorDataset(test), batch_size=120)

vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(128,))
objective = pv.BetaTraceMeanField_ELBO()
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), objective)


def on_held_out(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pv.evaluate(estimator, held_out, seed=0, progress=False)


def gaps_of(guide):
    num_particles = 100 if SMOKE_TEST else 500
    return on_held_out(pv.InferenceGaps(vae.model, guide, num_particles=num_particles))


history = []
for epoch in range(1, CHECKPOINTS[-1] + 1):
    for (x,) in batches:
        svi.step(x)
    if epoch in CHECKPOINTS:
        history.append(gaps_of(vae.guide))

# %%
# The gaps at the end of the training:

gaps = history[-1]
print(gaps)

# %%
# The last line is the verdict. It claims no more than the confidence intervals allow.
# "Monte Carlo" is the error for these digits. "Sampling" is the error of a statement
# about all digits. The encoder and the family are compared on the same digits, so the
# Monte Carlo error is the one that counts here.

figure, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
pv.plots.plot_gaps_per_datum(gaps, ax=ax)
plt.show()

# %%
# The figure has one column per digit. The family's part is small for every digit. The
# encoder's part reaches tens of nats for a few of them.
#
# The gap is not due to the family alone
# --------------------------------------
# One often reads that :math:`\log p(x)` minus the ELBO is the price of a Gaussian
# family. To test this, keep the model and the family, and change only the encoder. A
# copy of the encoder is trained further while the decoder stays as it is. Half of its
# data are training digits. The other half are drawn from the model, which can supply as
# many as one likes.

trained_on = copy.deepcopy(vae)
negative_elbo = pv.BetaTraceMeanField_ELBO()(trained_on.model, trained_on.guide)
# Only the encoder's parameters are trained.
optimizer = torch.optim.Adam(trained_on.encoder.parameters(), lr=1e-3)
for _ in range(20 if SMOKE_TEST else 3000):
    chosen = trained_on.generate(100), train[torch.randint(len(train), (100,))]
    optimizer.zero_grad()
    negative_elbo(torch.cat(chosen)).backward()
    optimizer.step()
gaps_after = gaps_of(trained_on.guide)

# %%
# What has changed?

print(f"{'nats per held-out digit':<24}{'encoder of the VAE':>20}", end="")
print(f"{'trained on':>12}{'change':>9}")
before, after = gaps.summary(), gaps_after.summary()
for name in before:
    old, new = before[name].value, after[name].value
    print(f"{name:<24}{old:>20.3f}{new:>12.3f}{new - old:>9.3f}")

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
titles = ("Encoder of the VAE", "Same model, encoder trained on")
for ax, record, title in zip(axes, (gaps, gaps_after), titles, strict=True):
    pv.plots.plot_gaps(record, ax=ax).set_title(title)
limits = [limit for ax in axes for limit in ax.get_ylim()]
plt.setp(axes, ylim=(min(limits), max(limits)))
# sphinx_gallery_end_ignore
plt.show()

# %%
# ``log_evidence`` depends on the model alone, and ``optimal_elbo`` on the model and the
# family. Neither has changed, although each was estimated again, starting from another
# guide. But the inference gap has shrunk by two nats, and all of this is amortization.
# So the size of the inference gap says little about Gaussians, as long as it contains
# the encoder's part. What a richer family can gain on this model is the approximation
# gap, about 0.6 nats.

if not SMOKE_TEST:
    rise = gaps_after.log_evidence.mean() - gaps.log_evidence.mean()
    assert abs(rise) < 0.02
    assert gaps_after.inference.mean() < gaps.inference.mean() - 1

# %%
# Does a step raise log p(x), or does it close the gap?
# -----------------------------------------------------
# Between two checkpoints the ELBO rises by the rise of :math:`\log p(x)` plus the
# amount by which the gap has closed. A curve of the loss cannot separate the two. The
# columns of this table do.

print(f"{'epochs':>10}{'ELBO':>10}{'log p(x)':>10}   since the line above: ", end="")
print(f"{'ELBO':>8}{'log p(x)':>10}{'gap closed':>12}")
previous = None
for epoch, now in zip(CHECKPOINTS, history, strict=True):
    line = f"{epoch:>10}{now.elbo.mean():>10.2f}{now.log_evidence.mean():>10.2f}"
    if previous is not None:
        rise = (now.elbo - previous.elbo).mean()
        of_evidence = (now.log_evidence - previous.log_evidence).mean()
        closed = (previous.inference - now.inference).mean()
        line += f"{rise:>33.2f}{of_evidence:>10.2f}{closed:>12.2f}"
    print(line)
    previous = now

# %%
# Look at the last number. At the end of the training the gap grows again. The model
# still improves on held-out digits, but the encoder does not keep up on digits that it
# has not seen. So the ELBO shows less progress than the model has made.

# sphinx_gallery_start_ignore
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
curves = (
    ("log_evidence", "-o", BLUE, "log p(x)"),
    ("elbo", "--s", ORANGE, "ELBO"),
)
for name, look, color, label in curves:
    values = [getattr(record, name).mean() for record in history]
    left.plot(CHECKPOINTS, values, look, color=color, label=label)
approximation = [record.approximation.mean().item() for record in history]
amortization = [record.amortization.mean().item() for record in history]
labels = ["approximation gap (family)", "amortization gap (encoder)"]
colors = ["#56B4E9", "#E69F00"]
parts = approximation, amortization
areas = right.stackplot(CHECKPOINTS, *parts, colors=colors, labels=labels)
areas[1].set(hatch="//", edgecolor="black")
left.set(ylabel="nats per held-out digit", title="One run of training: both rise ...")
right.set(ylabel="log p(x) - ELBO, nats", ylim=(0, None))
right.set_title("... and the gap between them, in its parts")
for ax in (left, right):
    ax.set(xscale="log", xlabel="epochs")
    ax.set_xticks(CHECKPOINTS, [str(epoch) for epoch in CHECKPOINTS])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="best")
# sphinx_gallery_end_ignore
plt.show()

# %%
# Why log p(x) needs a fitted proposal
# ------------------------------------
# An estimate of :math:`\log p(x)` that is too low hides a part of the gaps. The usual
# estimate draws from the encoder's :math:`q` (`Burda, Grosse and Salakhutdinov 2016
# <https://arxiv.org/abs/1509.00519>`__):
#
# .. math::
#
#    \mathcal{L}_K = \mathrm{E} \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k)},
#    \qquad
#    \mathcal{L}[q] = \mathcal{L}_1 \le \mathcal{L}_2 \le \dots \le \log p(x) .
#
# Its quality depends on the encoder, whose mistakes it inherits.
# ``pv.AdaptiveImportanceSampling`` first spends a part of its budget on fitting a
# proposal to each digit. Below, both get the same number of decoder evaluations. Then
# the guide as it is gets ten times as many. All are lower bounds in expectation, so the
# highest is the nearest to the truth.

num_particles = 100 if SMOKE_TEST else 1000
estimator = pv.AdaptiveImportanceSampling(
    vae.model,
    vae.guide,
    num_particles=num_particles,
)
fitted = on_held_out(estimator)
records = {"fitted to each digit": fitted}
for times in (1, 10):
    budget = times * round(fitted.cost)
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=budget)
    records[f"guide as it is, x {times}"] = on_held_out(estimator)

print(f"{'proposal':<22}{'cost':>7}{'log p(x)':>10}{'Monte Carlo error':>19}", end="")
print(f"{'median ESS':>12}{'Pareto k high':>15}")
for name, record in records.items():
    mean, high = record.mean(), record.doubts["tails"].double().mean()
    print(f"{name:<22}{record.cost:>7.0f}{mean.value:>10.3f}", end="")
    print(f"{mean.std_error:>19.3f}{record.ess.median():>12.0f}{high:>15.0%}")

# %%
# The guide's Monte Carlo error is tiny compared with what is missing. If weights are
# small on most draws, and enormous in a region that no draw has reached, the estimate
# looks precise. Two diagnostics in the table show the fault. The *ESS* (effective
# sample size) is the number of equally weighted draws that would be worth as much. The
# *Pareto k* is the index of the tail of the weights. Above 0.5 the weights have no
# finite variance. Above 0.7 (a little less for few draws) no affordable number of
# draws is enough.
#
# The left panel shows :math:`\mathcal{L}_K` of the guide as it is, from one run. With
# weights of finite variance, what is still missing is about as much as the last
# doubling of :math:`K` has gained. Here ten times as much is missing.

guide_as_it_is = records["guide as it is, x 10"]
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
pv.plots.plot_k_curve(guide_as_it_is.curve, ax=axes[0])
pv.plots.plot_pareto_k(guide_as_it_is, ax=axes[1])
pv.plots.plot_pareto_k(fitted, ax=axes[2])
# sphinx_gallery_start_ignore
level = fitted.mean().value
axes[0].axhline(level, color="black", linestyle="--")
below = {"xytext": (0, -12), "textcoords": "offset points"}
axes[0].annotate("fitted proposal", (2, level), **below)
axes[1].set_title(f"guide as it is, K = {guide_as_it_is.num_particles}")
axes[2].set_title(f"fitted proposal, K = {fitted.num_particles}")
# sphinx_gallery_end_ignore
plt.show()

# %%
# What to try
# -----------
#
# - Use ``posterior=pv.nn.MultivariateNormal()`` as the head of the encoder, a full
#   covariance. What happens to the approximation gap, and what to the amortization gap?
# - Measure the gaps on training digits, which the encoder has seen. How much of its gap
#   is overfitting?
# - In the lamp, let the guide return the location and scale of the star for every
#   count. Which gap is zero now, and for which count? (Problem 3 has the answer.)
# - Use ``evidence=functools.partial(pv.ImportanceSampling, num_particles=5000)`` in
#   ``pv.InferenceGaps``. Which gaps shrink, and why is that not good news? (Problem 4
#   has the answer.)
#
# Practice problems
# -----------------
#
# 1. Derive :math:`\mathcal{L}(m, s)` of the lamp. Which terms come from the likelihood,
#    which from the prior, and which from :math:`-\mathrm{E}_q \log q`?
# 2. Set the derivatives of :math:`\mathcal{L}(m, s)` to zero. Show that :math:`q^*`
#    satisfies :math:`1 / s^2 = 1/9 + x - m / 9`.
# 3. In the lamp, a guide returns :math:`q^*` of the datum without a photon for every
#    count. For which counts is its amortization gap zero? Is its approximation gap
#    another one than before?
# 4. An estimate of :math:`\log p(x)` is too low by 1 nat on average. By how much are
#    the three gaps wrong?
# 5. From epoch 100 to epoch 200 the held-out ELBO rises by 4.3 nats and :math:`\log
#    p(x)` by 4.6 nats. What do you conclude, and what would you train next?
#
# Answers
# -------
#
# 1. The likelihood gives :math:`x m - e^{m + s^2 / 2} - \log x!`. The prior gives
#    :math:`-(m^2 + s^2) / (2 \cdot 9) - \log 3 - \frac12 \log 2 \pi`. The last term is
#    the entropy :math:`\log s + \frac12 + \frac12 \log 2 \pi`, and the two
#    :math:`\log 2 \pi` cancel.
# 2. The derivative in :math:`m` gives :math:`e^{m + s^2/2} = x - m / 9`. The derivative
#    in :math:`s` gives :math:`1 / s^2 = e^{m + s^2/2} + 1/9`. Insert the first into the
#    second.
# 3. For zero photons alone, since :math:`q^*` differs between counts. The approximation
#    gap has not changed for any count, because it does not depend on the guide but on
#    its family.
# 4. The inference gap and the approximation gap are both too small by 1 nat. The
#    amortization gap is right, because it does not contain :math:`\log p(x)`. A smaller
#    gap is then only a worse estimate.
# 5. The inference gap has grown by 0.3 nats, on digits that the encoder has not seen.
#    The model still improves, so train the encoder further, as above with digits that
#    are drawn from the model.
#
# Next: how an estimate of :math:`\log p(x)` errs, and how far to trust it:
# :doc:`04_evidence`.
