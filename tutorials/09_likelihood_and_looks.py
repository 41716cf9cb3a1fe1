r"""
Likelihood is not looks
=======================

How well a model reconstructs, how likely it finds the data, and how good its samples
look are three different questions. At the end you know what a squared error leaves out
of log p(x), why Gaussian decoders blur, and how a matching scale helps. You can catch a
model that copies its training data. You have also seen a model with the better log p(x)
whose samples are noise 99 times in 100.

Prerequisites: :doc:`02_first_vae` and :doc:`04_evidence`; about 1 minute to run.
"""

# %%
# Densities and probabilities in one table
# ----------------------------------------
# The digits of scikit-learn have 8x8 pixels, whole numbers from 0 to 16. A Gaussian is
# a density, and on whole numbers a density has no bound: it can put an ever narrower
# peak on each of them. So the Gaussian models get :math:`y = x + u`, where the noise
# :math:`u` is uniform on :math:`[-\tfrac12, \tfrac12]`, one level wide. By Jensen's
# inequality
#
# .. math:: \mathrm{E}_u \log p(x + u) \le \log \int p(x + u) \, du ,
#
# and the right-hand side is the log-probability of a whole number :math:`x`. So the
# Gaussians' log-densities can be compared with the log-probabilities of discrete
# likelihoods (Theis, van den Oord and Bethge 2016, `A note on the evaluation of
# generative models <https://arxiv.org/abs/1511.01844>`__). All are in nats, that is, by
# the natural logarithm.

import copy
import math
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pyro_vae as pv

# sphinx_gallery_thumbnail_number = 5
SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_STEPS, NUM_TEST, NUM_PARTICLES = (60, 40, 100) if SMOKE_TEST else (3000, 360, 500)
pyro.set_rng_seed(0)

pixels = torch.tensor(load_digits().data, dtype=torch.float)
real = pixels + torch.rand(pixels.shape) - 0.5
split = train_test_split(pixels, real, test_size=360, random_state=0)
train, test, real_train, real_test = split
test, real_test = test[:NUM_TEST], real_test[:NUM_TEST]


def trained(likelihood, data):
    """A VAE with 8 latents. Only the likelihood differs between calls."""
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(64, latent_dim=8, likelihood=likelihood, hidden=(128,))
    objective = pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(NUM_STEPS // 5))
    loss = objective(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=2e-3)
    for objective.num_updates in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(data[torch.randint(len(data), (100,))]).backward()
        optimizer.step()
    return vae.eval()


def log_evidence(model, guide, data):
    """log p(x) per datum, a lower bound: an `Evidence`.

    A few in a hundred digits have heavy-tailed weights, so their estimate is too low,
    but by far less than the differences that are compared here.
    """
    options = {"num_particles": NUM_PARTICLES, "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return pv.AdaptiveImportanceSampling(model, guide, **options)(data)


def draws(model, data, seed):
    """As many samples from the model as there are data."""
    return pv.simulate(model, data, seed=seed).observed["obs"]


# sphinx_gallery_start_ignore
BLUE, VERMILION = "#0072B2", "#D55E00"


def show(ax, images, title, num_rows=1):
    images = images.reshape(num_rows, -1, 8, 8)
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=math.nan)
    mosaic = framed.permute(0, 2, 1, 3).reshape(10 * num_rows, -1)
    ax.imshow(mosaic.numpy(), cmap="gray_r", interpolation="nearest")
    ax.set_title(title, fontsize="medium")
    ax.set_axis_off()


# sphinx_gallery_end_ignore

# %%
# Squared error is a likelihood, at one scale
# -------------------------------------------
# Take a decoder with mean :math:`m(z)` and one scale :math:`s` for all :math:`X = 64`
# pixels. Write :math:`\mathrm{MSE}` for the mean squared error per pixel. Then
#
# .. math::
#
#    \log p(x \mid z)
#    = -X \Big( \frac{\mathrm{MSE}}{2 s^2} + \log s + \tfrac12 \log 2\pi \Big) .
#
# This is largest at :math:`s^2 = \mathrm{MSE}`, where it is
#
# .. math:: -\tfrac{X}{2} \big( \log (2\pi \, \mathrm{MSE}) + 1 \big) .
#
# Many programs scale pixels to [0, 1] and minimise :math:`\tfrac12 (x - m)^2`. That is
# this likelihood with :math:`s` equal to the whole range, 16 levels. The errors of
# these digits are about 2 levels, eight times smaller. So the squared error has 1/64 of
# the weight :math:`1 / s^2` that matches its errors, while the KL keeps its full
# weight. The encoder then gains too little from telling digits apart. For digits with
# the same latents, the best decoder returns their mean, and a mean of different digits
# is blurred.
#
# ``pv.nn.Normal("learned")`` learns :math:`s`. It should end at the root of the mean
# squared error on the training data.

wide = trained(pv.nn.Normal(16.0), real_train)
matching = trained(pv.nn.Normal("learned"), real_train)
scale = float(matching.decoder[1].scale.detach())
root = float((real_train - matching.reconstruct(real_train)).square().mean().sqrt())
print(f"learned scale: {scale:.3f} levels", end="; ")
print(f"root of the mean squared error on the training data: {root:.3f}")
assert SMOKE_TEST or abs(scale / root - 1) < 0.03

# %%
# Now keep the network and change only the number :math:`s`. Encoder, means and squared
# error stay the same, but log p(x) does not. One network with three scales is three
# models.

means = pv.reconstruct(matching.model, matching.guide, real_test, seed=0).means["obs"]
error = float((real_test - means).square().mean())


def log_likelihood(s):
    """log p(x given z), mean over the digits, nats."""
    return -64 * (error / (2 * s**2) + math.log(s) + 0.5 * math.log(2 * math.pi))


found = {}
for s in (scale / 2, scale, 16.0):
    found[s] = float(dist.Normal(means, s).log_prob(real_test).sum(1).mean())
rescaled = {s: copy.deepcopy(matching) for s in found}
print("  scale   mean squared error   log p(x given z)   log p(x)")
for s, vae in rescaled.items():
    assert abs(found[s] - log_likelihood(s)) < 1e-3 * abs(found[s])
    torch.nn.init.constant_(vae.decoder[1].log_scale, math.log(s))
    log_p = log_evidence(vae.model, vae.guide, real_test).mean()
    print(f"{s:7.2f} {error:20.2f} {found[s]:18.1f} {float(log_p.value):10.1f}")

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(
    4,
    1,
    figsize=(6.5, 6.4),
    layout="constrained",
    height_ratios=(3, 1, 1, 1),
)
grid = torch.logspace(-0.3, 1.4, 100).tolist()
axes[0].plot(grid, [log_likelihood(s) for s in grid], color=BLUE)
axes[0].plot(list(found), list(found.values()), "o", color="black")
axes[0].axvline(error**0.5, color=VERMILION, linewidth=1.2, linestyle=":")
axes[0].set(xscale="log", ylim=(-450, -100))
axes[0].set(xlabel="scale, levels", ylabel="log p(x given z), nats")
axes[0].set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
axes[0].set_title("One decoder and one squared error; dotted: its root")
for ax, (s, vae) in zip(axes[1:], rescaled.items(), strict=True):
    samples = draws(vae.model, real_test[:12], seed=0)
    show(ax, samples, f"draws at scale {s:.2f}")
plt.show()
# sphinx_gallery_end_ignore

# %%
# Which error belongs to which likelihood
# ---------------------------------------
# Now compare four VAEs with the same networks:
#
# - the Gaussian with scale 16;
# - the Gaussian with the learned scale;
# - a Binomial with 16 trials;
# - a discretised logistic with a scale per pixel (Kingma et al. 2016, `Improving
#   Variational Inference with Inverse Autoregressive Flow
#   <https://arxiv.org/abs/1606.04934>`__).
#
# ``pv.SampleCheck`` compares held-out digits with equally many samples. It measures
#
# - the reconstruction error, at one draw of the guide, and its rank correlation with
#   log p(x);
# - the sharpness (variance of the Laplacian) of data, of means and of draws;
# - the distance from a sample to the nearest training digit.

vaes = {
    "Normal, scale 16": (wide, real_train, real_test),
    "Normal, learned": (matching, real_train, real_test),
    "Binomial": (trained(pv.nn.Binomial(16), train), train, test),
    "logistic": (trained(pv.nn.DiscretizedLogistic(17), train), train, test),
}
looks = {}
for name, (vae, seen, held_out) in vaes.items():
    evidence = log_evidence(vae.model, vae.guide, held_out)
    check = pv.SampleCheck(vae.model, vae.guide, seed=0)
    looks[name] = check([held_out], train=[seen], evidence=evidence, progress=False)

# %%

print("                        mean   mean squ.    rank         sharpness of")
print("likelihood          log p(x)      error    corr.    data    means    draws")
for name, look in looks.items():
    sharpness = look.mean_sharpness()
    kinds = ("data", "sample_means", "sample_draws")
    sharp = [float(sharpness[kind].value) for kind in kinds]
    log_p, mse = look.log_evidence.mean(), look.reconstruction_error.mean()
    rank = look.rank_correlation().value
    print(f"{name:17} {log_p:10.1f} {mse:10.2f} {rank:8.2f}", end="")
    print(f" {sharp[0]:7.0f} {sharp[1]:8.0f} {sharp[2]:8.0f}")

# %%
# Read the last two rows. The Binomial has the *lower* squared error and the *worse*
# log p(x), by more than ten nats. The scale of a Binomial is determined by its mean.
# The logistic can state, pixel by pixel, how sure it is, and no squared error measures
# that.
#
# The sharpness of means describes means only. The means of the wide Gaussian are
# blurred, yet its draws are the sharpest of all, because they are mostly noise. The
# draws are what the model claims about data. The means are a summary of it.

first, second = looks["logistic"], looks["Binomial"]
errors = [look.reconstruction_error.mean() for look in (first, second)]
assert SMOKE_TEST or errors[0] > errors[1]
log_ps = [look.log_evidence.mean() for look in (first, second)]
assert SMOKE_TEST or log_ps[0] > log_ps[1] + 10

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(len(vaes) + 1, 1, figsize=(7, 4.7), layout="constrained")
show(axes[0], test[:14], "held-out digits")
for ax, (name, look) in zip(axes[1:], looks.items(), strict=True):
    log_p = float(look.log_evidence.mean())
    mse = float(look.reconstruction_error.mean())
    title = f"draws, {name}: log p(x) {log_p:.0f} nats, squared error {mse:.1f}"
    show(ax, draws(vaes[name][0].model, test[:14], 1), title)
plt.show()
# sphinx_gallery_end_ignore

# %%
# The same comparison digit by digit. At scale 16 the encoder says almost nothing about
# the digit, so log p(x) is the squared error up to constants, and the ranks agree. The
# better the likelihood, the less they agree. On the right are two digits that the
# logistic reconstructs equally well. They are the pair whose log p(x) differs most.

look = looks["logistic"]
size = look.reconstruction_error.log()
difference = look.log_evidence.unsqueeze(1) - look.log_evidence
equally_well = (size.unsqueeze(1) - size).abs() < 0.05
largest = int(difference.where(equally_well, -math.inf).argmax())
pair = list(divmod(largest, NUM_TEST))

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(
    1,
    3,
    figsize=(10, 3.6),
    layout="constrained",
    width_ratios=(3, 3, 2),
)
for ax, name in zip(axes[:2], ("Normal, scale 16", "logistic"), strict=True):
    pv.plots.plot_likelihood_and_looks(looks[name], ax=ax)
    ax.set_title(f"{name}\n{ax.get_title()}", fontsize="medium")
x, y = look.reconstruction_error[pair], look.log_evidence[pair]
axes[1].plot(x, y, ".", color=VERMILION, markersize=12)
values = " and ".join(f"{float(value):.0f}" for value in y)
show(axes[2], test[pair], f"one error, log p(x)\n{values} nats", num_rows=2)
plt.show()
# sphinx_gallery_end_ignore

# %%
# A model that memorises
# ----------------------
# Which model has the best samples of all? One that returns its training data. Let a
# latent pick one of the :math:`M` training digits :math:`y_j`, and add a little noise:
#
# .. math:: p(y) = \frac1M \sum_{j=1}^M \mathrm{N}(y; y_j, s^2) .
#
# This is a kernel density estimate. The posterior of the latent is a softmax of squared
# distances, so the exact guide can be written down. Every importance weight is then
# equal to p(x), and two particles give log p(x) without any error.

memory, held_out, width = real_train.double(), real_test.double(), 0.5


def memorising(x):
    with pyro.plate("data", len(x)):
        prior = dist.Categorical(x.new_ones(len(memory)))
        which = pyro.sample("which", prior)
        pyro.sample("obs", dist.Normal(memory[which], width).to_event(1), obs=x)


def remembering(x):
    logits = -torch.cdist(x, memory).square() / (2 * width**2)
    with pyro.plate("data", len(x)):
        pyro.sample("which", dist.Categorical(logits=logits))


def closed_form(s):
    kernels = dist.Normal(memory, s).to_event(1)
    log_p = kernels.log_prob(held_out.unsqueeze(1))
    return log_p.logsumexp(1) - math.log(len(memory))


exactly = pv.ImportanceSampling(memorising, remembering, num_particles=2, seed=0)
evidence = exactly(held_out)
assert float((evidence.log_evidence - closed_form(width)).abs().max()) < 1e-8
check = pv.SampleCheck(memorising, remembering, seed=0)
copied = check([held_out], train=[memory], evidence=evidence, progress=False)
print(copied)
assert float(copied.probability_nearer().value) == 1.0

# %%
# The samples are sharp, the reconstruction is good, and log p(x) is hundreds of nats
# below that of any VAE here. ``SampleCheck`` says why: every sample is nearer to a
# training digit than any held-out digit is. The test is that of Meehan, Chaudhuri and
# Dasgupta (2020, `A Non-Parametric Test to Detect Data-Copying in Generative Models
# <https://arxiv.org/abs/2004.05675>`__). Use draws for such a test, not means. Means
# are smoother than any datum, and can look like copies where nothing was copied.
#
# With a width of two levels, log p(x) of the memory is about that of the Gaussian VAE.
# Both have one scale for all pixels, and most of the nats are spent on noise.

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(
    1,
    3,
    figsize=(12, 3.4),
    layout="constrained",
    width_ratios=(3, 3, 4),
)
widths = torch.logspace(-0.4, 0.8, 13).tolist()
log_ps = [float(closed_form(s).mean()) for s in widths]
axes[0].plot(widths, log_ps, ".-", color=BLUE, label="memory of the training digits")
best = float(looks["Normal, learned"].log_evidence.mean())
axes[0].axhline(best, color=VERMILION, linestyle="--", label="VAE, Normal, learned")
axes[0].set(xscale="log", ylim=(-700, -100))
axes[0].set(xlabel="width, levels", ylabel="log p(x), nats")
axes[0].set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
axes[0].minorticks_off()
axes[0].legend(frameon=False, loc="lower right")
pv.plots.plot_nearest_neighbours(copied, ax=axes[1])
pv.plots.plot_copies(copied, ax=axes[2])
plt.show()
# sphinx_gallery_end_ignore

# %%
# Better log p(x), worse samples
# ------------------------------
# The opposite case is possible too. Let a model be the logistic VAE with probability 1
# %, and noise otherwise. Whatever the noise is,
#
# .. math::
#
#    \log p_\text{mix}(x) \ge \log \big( 0.01 \, p(x) \big) = \log p(x) - 4.6 .
#
# So no digit loses more than 4.6 nats (Theis, van den Oord and Bethge 2016, again). The
# choice is marked for enumeration: log p(x) sums over both of its values, and samples
# draw it. Since there are two values,
# :math:`p_\text{mix}(x) = 0.01 \, p(x) + 0.99 \, p_\text{noise}(x)` checks the
# estimate.

good = vaes["logistic"][0]
network, head = good.decoder
middle, wide_scale = torch.zeros(64), torch.full((64,), 2.0)
noise = torch.cat([middle, wide_scale])  # of the location and of the scale
summed = {"enumerate": "parallel"}


def mixture(x):
    with pyro.plate("data", len(x)):
        prior = dist.Bernoulli(torch.tensor(0.01))
        is_good = pyro.sample("is_good", prior, infer=summed)
        z = pyro.sample("latent", good.prior())
        raw = torch.where(is_good.bool().unsqueeze(-1), network(z), noise)
        pyro.sample("obs", head(raw), obs=x)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("is_good", dist.Bernoulli(torch.tensor(0.5)), infer=summed)
        pyro.sample("latent", good.encode(x))


log_good = looks["logistic"].log_evidence
log_noise = head(noise).log_prob(test)
log_mixture = torch.logaddexp(log_good + math.log(0.01), log_noise + math.log(0.99))
assert bool((log_mixture >= log_good - math.log(100) - 1e-4).all())
evidence = log_evidence(mixture, mixture_guide, test)
# The median: a mean would be moved by a digit of which one mode was missed (05_modes).
assert abs(float((evidence.log_evidence - log_mixture).median())) < 0.05

# %%
# How does the mixture compare with the Binomial VAE, by log p(x) and by its samples?

check = pv.SampleCheck(mixture, mixture_guide, seed=0)
looks["99% noise"] = check([test], train=[train], progress=False)
log_ps = {
    "logistic": log_good,
    "99% noise": log_mixture,
    "Binomial": looks["Binomial"].log_evidence,
}
print("                log p(x)   P(sample nearer to the training data)")
for name, log_p in log_ps.items():
    print(f"{name:12} {log_p.mean():11.2f}   {looks[name].probability_nearer()}")

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained")
models = {"99% noise": mixture, "Binomial": vaes["Binomial"][0].model}
for ax, (name, model) in zip(axes, models.items(), strict=True):
    title = f"{name}: log p(x) = {log_ps[name].mean():.1f} nats"
    show(ax, draws(model, train[:100], 3), title, num_rows=10)
plt.show()
# sphinx_gallery_end_ignore

# %%
# The model on the left has the better log p(x). For images with thousands of pixels,
# 4.6 nats are negligible, so a good log p(x) does not guarantee good samples. The model
# that copies has a very low log p(x), so good samples do not guarantee a good log p(x)
# either. Report both, and say which one a claim is about.
#
# What to try
# -----------
# - Use ``pv.nn.Normal("optimal")`` instead of ``"learned"``. Does it end at the same
#   scale?
# - Use ``pv.nn.Normal()``, which has a scale per pixel. What happens to log p(x), to
#   the error and to the rank correlation?
# - Train the same model without the noise :math:`u`. Where does log p(x) end? (Problem
#   2 has the reason.)
# - Give the memorising model the width with the best log p(x). Does ``SampleCheck``
#   still call it a copy?
# - Train the logistic on 100 digits for long. When does ``probability_nearer`` rise
#   above one half?
#
# Practice problems
# -----------------
#
# 1. Let :math:`r = \mathrm{MSE} / s^2`. Show that a wrong scale costs
#    :math:`\tfrac{X}{2} (r - 1 - \log r)` nats of :math:`\log p(x \mid z)`. Check the
#    row of scale 16.
# 2. A pixel is 0 in every digit. Show that a Gaussian density on it has no upper bound
#    without the noise :math:`u`, and is at most 0 nats with it.
# 3. The mixture has the good model with probability :math:`\epsilon`. How small may
#    :math:`\epsilon` be before the bound :math:`\log p(x) + \log \epsilon` falls below
#    the Binomial's log p(x)?
# 4. Show that the memory gives each of its own training digits at least -21.7 nats at
#    width 0.5. What does the difference to the held-out digits say?
#
# Answers
# -------
#
# 1. Subtract the formula at :math:`s` from its value at :math:`s^2 = \mathrm{MSE}`. For
#    :math:`s = 16` and :math:`\mathrm{MSE} = 4.65`, :math:`r = 0.0182`, so the cost is
#    :math:`32 \, (0.0182 - 1 + 4.008) = 96.8` nats. The optimum is -140.0 nats, and the
#    table has -236.8.
# 2. With mean 0 the density at 0 is :math:`1 / (s \sqrt{2\pi})`, which grows without
#    bound as :math:`s` falls. With the noise,
#    :math:`\mathrm{E}_u \log p(x + u) \le \log \int p(x + u) \, du \le \log 1 = 0`.
# 3. The logistic is :math:`95.93 - 84.81 = 11.12` nats better. So the bound allows
#    :math:`\epsilon = e^{-11.12} = 1.5 \cdot 10^{-5}`, one good sample in 67,500.
# 4. Keep only the term :math:`y_j = y` of the sum:
#    :math:`\log p(y) \ge -\log 1437 - 32 \log(2\pi \cdot 0.25) = -7.3 - 14.4`. Held-out
#    digits get -653.5 nats, more than 600 nats less. That is the mark of a model that
#    has memorised: its log p(x) on training data says nothing about new data.
#
# For how to estimate log p(x) and when to trust it, see :doc:`04_evidence`. Next: use
# all of this on your own program, :doc:`10_your_own_model`.
