r"""
The optimal posterior and the three gaps
========================================

The ELBO lies below log p(x), and the distance has two parts: what the encoder leaves behind, and what the variational
family cannot reach. At the end you can compute both in closed form for a model with one latent, measure both for a VAE of
handwritten digits, and tell whether a step of training raised log p(x) or closed a gap.
"""

# %%
# Three gaps
# ----------
# For any distribution :math:`q` over the latents :math:`z` of one datum :math:`x`
#
# .. math::
#
#    \mathcal{L}[q] = \mathrm{E}_q[\log p(x, z) - \log q(z)] = \log p(x) - \mathrm{KL}(q(z) \,\|\, p(z \mid x)) .
#
# The best :math:`q` of all is the posterior, and there the ELBO is log p(x). We do not get there, for two reasons. The
# *family* of :math:`q`, Gaussians say, may not contain the posterior: its best member for this datum, :math:`q^*`, stays
# below. And the *encoder*, one function for all data, does not return :math:`q^*` but some other member. So
# (`Cremer, Li and Duvenaud 2018 <https://arxiv.org/abs/1801.03558>`__)
#
# .. math::
#
#    \underbrace{\log p(x) - \mathcal{L}[q]}_{\text{inference gap}}
#    = \underbrace{\mathcal{L}[q^*] - \mathcal{L}[q]}_{\text{amortization gap: the encoder}}
#    + \underbrace{\log p(x) - \mathcal{L}[q^*]}_{\text{approximation gap: the family}} .

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
# A lamp of unknown brightness is watched for a second, and :math:`x` photons arrive. Its log-brightness has a broad prior,
# :math:`z \sim \mathrm{N}(0, 3^2)`, and :math:`x \mid z \sim \mathrm{Poisson}(e^z)`. The posterior is no Gaussian: if no
# photon came, the lamp may be as dark as it likes, but it cannot be bright.
#
# As an encoder we take what one might write down without thinking: a count estimates the brightness, and its relative error
# is one over its square root. The half keeps it finite at zero.

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
# For :math:`q = \mathrm{N}(m, s^2)` all expectations are known, :math:`\mathrm{E}_q e^z = e^{m + s^2/2}` above all:
#
# .. math::
#
#    \mathcal{L}(m, s) = x m - e^{m + s^2/2} - \log x! - \frac{m^2 + s^2}{2 \cdot 3^2} - \log 3 + \log s + \tfrac12 .
#
# :math:`q^*` is the top of this hill, which L-BFGS climbs. log p(x) is an integral over one number, and
# ``pv.ExactEvidence`` does it by quadrature. So all three gaps are known before anything is drawn.


def elbo(x, loc, scale):
    likelihood = x * loc - (loc + scale.square() / 2).exp() - (x + 1).lgamma()
    return likelihood - (loc.square() + scale.square()) / (2 * PRIOR_SCALE**2) - math.log(PRIOR_SCALE) + scale.log() + 0.5


loc, log_scale = (torch.zeros_like(counts).requires_grad_() for _ in range(2))
climb = torch.optim.LBFGS([loc, log_scale], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")


def negative_elbos():
    climb.zero_grad()
    loss = -elbo(counts, loc, log_scale.exp()).sum()
    loss.backward()
    return loss


climb.step(negative_elbos)
best = loc.detach(), log_scale.detach().exp()
log_evidence = pv.ExactEvidence(model, guide, seed=0)(counts).log_evidence
bound, optimum = elbo(counts, *encoder(counts)), elbo(counts, *best)
exact = {"amortization": optimum - bound, "approximation": log_evidence - optimum, "inference": log_evidence - bound}

# %%
# ``pv.InferenceGaps`` knows none of this. It gets the two programs, fits :math:`q^*` to every datum by gradient steps on
# noisy ELBOs, and measures both bounds on fresh draws with common noise, so that their difference is sharper than either.
# Each number comes with its Monte Carlo error.

num_particles = 5_000 if SMOKE_TEST else 100_000
measured = pv.InferenceGaps(model, guide, evidence=pv.ExactEvidence, num_particles=num_particles, seed=0)(counts)
print("photons   gap              exact   measured")
for name, values in exact.items():
    for count, truth, value, error in zip(counts, values, getattr(measured, name), measured.std_errors[name], strict=True):
        print(f"{count:7.0f}   {name:<14} {truth:7.4f}   {value:.4f} +- {error:.4f}")
        assert abs(value - truth) < 5 * error + 0.003  # the fit of q* may end 0.003 nats below its top

# %%
# The picture shows the datum without a photon. On the left the densities. On the right *every* Gaussian, by location and
# scale, with the distance of its ELBO from log p(x): a landscape whose lowest point, the star, is not at zero. Its height is
# the approximation gap. How far up the slope the encoder stands is the amortization gap, most of the whole here: this
# encoder expects too bright a lamp. No encoder gets below the star. A richer family would add a dimension to the map.

z = torch.linspace(-11, 5, 801, dtype=torch.float64)
posterior = (dist.Normal(0 * z, PRIOR_SCALE).log_prob(z) - z.exp() - log_evidence[0]).exp()  # log p(0 | z) = -exp(z)
locs, scales = torch.meshgrid(torch.linspace(-5, 1, 121), torch.linspace(0.3, 3.5, 121), indexing="xy")
height = log_evidence[0] - elbo(counts[0], locs.double(), scales.double())

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
left.fill_between(z, posterior, color="0.85", label="posterior")
levels = [0.1, 0.2, 0.5, 1, 2, 5, 10]
right.contourf(locs, scales, height, levels=[0, *levels, 1e9], colors=[str(1 - 0.08 * i) for i in range(8)])
right.clabel(right.contour(locs, scales, height, levels=levels, colors="black", linewidths=0.8), fmt="%g", fontsize=8)
for name, q, gap, style, mark, place in (
    ("q*", best, "approximation", "k-", "*", (-4.8, 2.9)),
    ("the encoder's q", encoder(counts), "inference", "k--", "X", (-1.7, 2.9)),
):
    left.plot(z, dist.Normal(q[0][0], q[1][0]).log_prob(z).exp(), style, label=name)
    right.plot(q[0][0], q[1][0], color="black", marker=mark, markersize=13)
    box, text = {"facecolor": "white", "edgecolor": "none"}, f"{name}: {exact[gap][0]:.3f} nats"
    right.annotate(text, (q[0][0], q[1][0]), place, arrowprops={"arrowstyle": "-"}, bbox=box)
left.set(xlabel="z, log-brightness", ylabel="density", ylim=(0, None), title="No photon: posterior and two Gaussians")
left.legend(frameon=False, loc="upper left")
right.set(xlabel="location m", ylabel="scale s", title="log p(x) - ELBO of every Gaussian, nats")
plt.show()

# %%
# The same gaps of a VAE
# ----------------------
# Handwritten digits, 8 by 8 pixels of 0 to 16. They are whole numbers, so the honest likelihood is a Binomial with 16
# trials. (Divided by 16 and put under a Bernoulli, the same pixels have a loss, but no log p(x) that a gap could end at.)
# Eight latents are too many for quadrature: from here on log p(x) is estimated from below, by importance sampling from a
# proposal fitted to each digit, and the gaps built on it are low by as much as it is.
#
# One run of training, stopped five times to measure the gaps on digits that it never sees. Warnings about single digits
# are held back in the loop; each record counts those digits itself, in ``evidence.doubts``.

CHECKPOINTS = [1, 2] if SMOKE_TEST else [4, 12, 40, 100, 200]  # epochs
pixels = torch.tensor(load_digits().data, dtype=torch.float32)
train, test = train_test_split(pixels, test_size=24 if SMOKE_TEST else 360, random_state=0)
batches = DataLoader(TensorDataset(train), batch_size=100, shuffle=True)
held_out = DataLoader(TensorDataset(test), batch_size=120)

vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(128,))
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), pv.BetaTraceMeanField_ELBO())


def on_held_out(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pv.evaluate(estimator, held_out, seed=0, progress=False)


def gaps_of(guide):
    return on_held_out(pv.InferenceGaps(vae.model, guide, num_particles=100 if SMOKE_TEST else 500))


history = []
for epoch in range(1, CHECKPOINTS[-1] + 1):
    for (x,) in batches:
        svi.step(x)
    if epoch in CHECKPOINTS:
        history.append(gaps_of(vae.guide))
gaps = history[-1]
print(gaps)
figure, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
pv.plots.plot_gaps_per_datum(gaps, ax=ax)
plt.show()

# %%
# The last line is the verdict; it claims no more than the intervals allow. "Monte Carlo" is the error for these digits,
# "sampling" what other digits would change. Encoder and family are compared on the same digits, so the first one counts.
# Digit by digit, the picture says: the family's part is thin everywhere, the encoder's grows to tens of nats on a few.
#
# The gap is not the family's alone
# ---------------------------------
# One often reads that the log-likelihood gap, log p(x) minus ELBO, is the price of a Gaussian family. Test it: keep the
# model and the family and change the encoder only. The decoder is frozen, and a copy of the encoder is trained on, half on
# the training digits and half on digits drawn from the model, which are free and of which there is no end.

trained_on = copy.deepcopy(vae)
negative_elbo = pv.BetaTraceMeanField_ELBO()(trained_on.model, trained_on.guide)
optimizer = torch.optim.Adam(trained_on.encoder.parameters(), lr=1e-3)  # and of nothing else
for _ in range(20 if SMOKE_TEST else 3000):
    x = torch.cat([trained_on.generate(100), train[torch.randint(len(train), (100,))]])
    optimizer.zero_grad()
    negative_elbo(x).backward()
    optimizer.step()
gaps_after = gaps_of(trained_on.guide)

print(f"{'nats per held-out digit':<24}{'encoder of the VAE':>20}{'trained on':>12}{'change':>9}")
for (name, before), after in zip(gaps.summary().items(), gaps_after.summary().values(), strict=True):
    print(f"{name:<24}{before.value:>20.3f}{after.value:>12.3f}{after.value - before.value:>9.3f}")

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for ax, record, name in zip(axes, (gaps, gaps_after), ("Encoder of the VAE", "Same model, encoder trained on"), strict=True):
    pv.plots.plot_gaps(record, ax=ax).set_title(name)
limits = [limit for ax in axes for limit in ax.get_ylim()]
plt.setp(axes, ylim=(min(limits), max(limits)))
plt.show()

# %%
# ``log_evidence`` belongs to the model and ``optimal_elbo`` to the model and the family: both are what they were, although
# each was estimated anew from another guide. The log-likelihood gap has shrunk all the same, by two nats, all of it
# amortization. So the size of that gap says little about Gaussians until the encoder's part is taken off. What a richer
# family can gain on this model is the short bar.

if not SMOKE_TEST:
    assert abs(gaps.log_evidence.mean() - gaps_after.log_evidence.mean()) < 0.02
    assert gaps_after.inference.mean() < gaps.inference.mean() - 1

# %%
# Does a step raise log p(x), or does it close the gap?
# -----------------------------------------------------
# Between two checkpoints the ELBO rises by the rise of log p(x) plus what the gap has closed. A curve of the loss cannot
# tell one from the other; these columns can. Look at the last one: at the end the ELBO *hides* progress of the model,
# because the encoder does not keep up on digits that it has not seen.

print(f"{'epochs':>10}{'ELBO':>10}{'log p(x)':>10}   since the line above: {'ELBO':>8}{'log p(x)':>10}{'gap closed':>12}")
for i, (epoch, now) in enumerate(zip(CHECKPOINTS, history, strict=True)):
    line = f"{epoch:>10}{now.elbo.mean():>10.2f}{now.log_evidence.mean():>10.2f}"
    if i > 0:
        rises = [(getattr(now, n) - getattr(history[i - 1], n)).mean() for n in ("elbo", "log_evidence", "inference")]
        line += f"{rises[0]:>33.2f}{rises[1]:>10.2f}{-rises[2]:>12.2f}"
    print(line)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for name, style, label in (("log_evidence", "k-o", "log p(x)"), ("elbo", "k--s", "ELBO")):
    left.plot(CHECKPOINTS, [getattr(record, name).mean() for record in history], style, label=label)
parts = [[getattr(record, name).mean().item() for record in history] for name in ("approximation", "amortization")]
names = ["the family's: approximation", "the encoder's: amortization"]
areas = right.stackplot(CHECKPOINTS, *parts, colors=["0.95", "0.75"], edgecolor="black", labels=names)
areas[1].set_hatch("//")
left.set(ylabel="nats per held-out digit", title="One run of training: both rise ...")
right.set(ylabel="log p(x) - ELBO, nats", ylim=(0, None), title="... and the gap between them, in its parts")
for ax in (left, right):
    ax.set(xscale="log", xlabel="epochs")
    ax.set_xticks(CHECKPOINTS, [str(epoch) for epoch in CHECKPOINTS])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="best")
plt.show()

# %%
# Why log p(x) needs a fitted proposal
# ------------------------------------
# An estimate of log p(x) that is too low hides a part of the gaps. The usual one draws from the encoder's :math:`q`
# (`Burda, Grosse and Salakhutdinov 2016 <https://arxiv.org/abs/1509.00519>`__):
#
# .. math::
#
#    \mathcal{L}_K = \mathrm{E} \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k)}, \qquad
#    \mathrm{ELBO} = \mathcal{L}_1 \le \mathcal{L}_2 \le \dots \le \log p(x) ,
#
# and so it inherits the mistakes of the encoder. ``pv.AdaptiveImportanceSampling`` spends a part of its budget on fitting a
# proposal to each digit first. Here both get the same number of decoder evaluations, and the guide then ten times as many.
# All are lower bounds in expectation: the highest is nearest to the truth.

fitted = on_held_out(pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=100 if SMOKE_TEST else 1000))
records = {"fitted to each digit": fitted}
for times in (1, 10):
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=times * round(fitted.cost))
    records[f"guide as it is, x {times}"] = on_held_out(estimator)

print(f"{'proposal':<22}{'cost':>7}{'log p(x)':>10}{'Monte Carlo error':>19}{'median ESS':>12}{'Pareto k high':>15}")
for name, record in records.items():
    mean, high = record.mean(), record.doubts["tails"].double().mean()
    print(
        f"{name:<22}{record.cost:>7.0f}{mean.value:>10.3f}{mean.std_error:>19.3f}{record.ess.median():>12.0f}{high:>15.0%}"
    )

# %%
# The guide's Monte Carlo error is tiny beside what is missing. Weights that are small on most draws, and enormous where
# nobody drew, look steady. Their *Pareto k*, the index of their tail, sees it: above 0.5 they have no variance, above 0.7 no
# number of draws that one can pay for will do. On the left :math:`\mathcal{L}_K` from one run. With weights of finite
# variance the last doubling of K brings about what is still missing; here ten times as much is.

guide_as_it_is = record
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
pv.plots.plot_k_curve(guide_as_it_is.curve, ax=axes[0])
axes[0].axhline(fitted.mean().value, color="black", linestyle="--")
axes[0].annotate("fitted proposal", (2, fitted.mean().value), (0, -12), textcoords="offset points")
for ax, record, name in zip(axes[1:], (guide_as_it_is, fitted), ("guide as it is", "fitted proposal"), strict=True):
    pv.plots.plot_pareto_k(record, ax=ax).set_title(f"{name}, K = {record.num_particles}")
plt.show()

# %%
# What to try
# -----------
#
# - ``posterior=pv.nn.MultivariateNormal()`` as the head of the encoder: a full covariance. What happens to the
#   approximation gap, and what to the amortization gap?
# - The gaps on training digits, which the encoder has seen: how much of its gap is overfitting?
# - In the lamp, give the guide the star's location and scale for every count. Which gap is zero now, and for which count?
# - ``evidence=functools.partial(pv.ImportanceSampling, num_particles=5000)`` in ``pv.InferenceGaps``: which gaps shrink, and
#   why is that no good news?
#
# Next: how an estimate of log p(x) errs, and when to bet on one: :doc:`04_evidence`.
