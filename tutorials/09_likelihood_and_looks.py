r"""
Likelihood is not looks
=======================

How well a model reconstructs, how likely it finds the data, and how good its samples look are three questions. At the end
you know what a squared error leaves out of log p(x), why Gaussian decoders blur and what a matching scale does about it,
how to catch a model that copies its training data, and why a model whose samples are noise 99 times in 100 can have the
better log p(x).
"""

# %%
# The digits of scikit-learn have 8x8 pixels, whole numbers from 0 to 16. A Gaussian is a density, and a density on whole
# numbers has no bound: put a narrow peak on each. So Gaussians get :math:`y = x + u`, with uniform noise :math:`u` of one
# level's width. By Jensen's inequality :math:`\mathrm{E}_u \log p(x + u) \le \log \int p(x + u) \, du`, the log-probability
# of a whole number, so that nats of Gaussians and of discrete likelihoods may stand in one table (`Theis, van den Oord and
# Bethge 2016 <https://arxiv.org/abs/1511.01844>`__).

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

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_STEPS, NUM_TEST, NUM_PARTICLES = (60, 40, 100) if SMOKE_TEST else (3000, 360, 500)
pyro.set_rng_seed(0)

pixels = torch.tensor(load_digits().data, dtype=torch.float)
real = pixels + torch.rand(pixels.shape) - 0.5
train, test, real_train, real_test = train_test_split(pixels, real, test_size=360, random_state=0)
test, real_test = test[:NUM_TEST], real_test[:NUM_TEST]


def trained(likelihood, data):
    """A VAE with 8 latents; only the likelihood differs between one and another."""
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
    """`Evidence`. A few in a hundred digits have heavy-tailed weights: somewhat low, by far less than what is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return pv.AdaptiveImportanceSampling(model, guide, num_particles=NUM_PARTICLES, seed=0)(data)


def show(ax, images, title, num_rows=1):
    framed = torch.nn.functional.pad(images.reshape(num_rows, -1, 8, 8), (1, 1, 1, 1), value=math.nan)
    ax.imshow(framed.permute(0, 2, 1, 3).reshape(10 * num_rows, -1).numpy(), cmap="gray_r", interpolation="nearest")
    ax.set_title(title, fontsize="medium")
    ax.set_axis_off()


def draws(model, data, seed):
    return pv.simulate(model, data, seed=seed).observed["obs"]


# %%
# Squared error is a likelihood, at one scale
# -------------------------------------------
# Take a decoder with mean :math:`m(z)` and one scale :math:`s` for all :math:`X = 64` pixels, and write :math:`e` for the
# mean squared error per pixel. Then
#
# .. math::
#
#    \log p(x \mid z) = -X \Big( \frac{e}{2 s^2} + \log s + \tfrac12 \log 2\pi \Big),
#    \qquad \text{largest at } s^2 = e, \text{ where it is } -\tfrac{X}{2} (\log 2\pi e + 1)
#
# Minimising :math:`\tfrac12 (x - m)^2` of pixels scaled to [0, 1] is this with :math:`s` equal to the whole range, 16
# levels: eight times what the errors of these digits are. The weight :math:`1 / s^2` of the error falls by 64, the KL costs
# what it did, and the encoder does not find it worth a nat to say which digit it sees. That is where blur comes from: the
# decoder answers with the mean of all digits that it cannot tell apart. ``pv.nn.Normal("learned")`` learns :math:`s`, and
# must end at the root of the mean error on the training data.

wide, matching = (trained(pv.nn.Normal(scale), real_train) for scale in (16.0, "learned"))
scale = float(matching.decoder[1].scale.detach())
root = float((real_train - matching.reconstruct(real_train)).square().mean().sqrt())
print(f"learned scale: {scale:.3f} levels; root of the mean squared error on the training data: {root:.3f}")
assert SMOKE_TEST or abs(scale / root - 1) < 0.03

# %%
# Now keep the network and change nothing but the number :math:`s`. Encoder, means and squared error stay; log p(x) does not.
# One network, three scales, three models.

means = pv.reconstruct(matching.model, matching.guide, real_test, seed=0).means["obs"]
error = float((real_test - means).square().mean())


def log_likelihood(s):
    """log p(x given z), mean over the digits, nats."""
    return -64 * (error / (2 * s**2) + math.log(s) + 0.5 * math.log(2 * math.pi))


found = {s: float(dist.Normal(means, s).log_prob(real_test).sum(1).mean()) for s in (scale / 2, scale, 16.0)}
rescaled = {s: copy.deepcopy(matching) for s in found}
print("  scale   mean squared error   log p(x given z)   log p(x)")
for s, vae in rescaled.items():
    assert abs(found[s] - log_likelihood(s)) < 1e-3 * abs(found[s])
    torch.nn.init.constant_(vae.decoder[1].log_scale, math.log(s))
    log_p = log_evidence(vae.model, vae.guide, real_test).mean()
    print(f"{s:7.2f} {error:20.2f} {found[s]:18.1f} {float(log_p.value):10.1f}")

figure, axes = plt.subplots(4, 1, figsize=(6.5, 6.4), layout="constrained", height_ratios=(3, 1, 1, 1))
grid = torch.logspace(-0.3, 1.4, 100).tolist()
axes[0].plot(grid, [log_likelihood(s) for s in grid], color="black")
axes[0].plot(list(found), list(found.values()), "ko")
axes[0].axvline(error**0.5, color="black", linewidth=0.8, linestyle=":")
axes[0].set(xscale="log", ylim=(-450, -100), xlabel="scale, levels", ylabel="log p(x given z), nats")
axes[0].set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
axes[0].set_title("one decoder, one squared error; dotted: its root")
for ax, (s, vae) in zip(axes[1:], rescaled.items(), strict=True):
    show(ax, draws(vae.model, real_test[:12], seed=0), f"draws at scale {s:.2f}")
plt.show()

# %%
# Which error belongs to which likelihood
# ---------------------------------------
# Four VAEs with the same networks: the wide Gaussian, the matching one, a Binomial with 16 trials, and a discretised
# logistic with a scale per pixel (`Kingma et al. 2016 <https://arxiv.org/abs/1606.04934>`__). ``pv.SampleCheck`` looks at
# held-out digits and as many samples: reconstruction error at one draw of the guide, its rank correlation with log p(x),
# sharpness (variance of the Laplacian) of data, means and draws, and how far a sample is from the nearest training digit.

vaes = {
    "Normal, scale 16": (wide, real_train, real_test),
    "Normal, learned": (matching, real_train, real_test),
    "Binomial": (trained(pv.nn.Binomial(16), train), train, test),
    "logistic": (trained(pv.nn.DiscretizedLogistic(17), train), train, test),
}
looks = {}
print("                        mean   mean squ.    rank         sharpness of")
print("likelihood          log p(x)      error    corr.    data    means    draws")
for name, (vae, seen, held_out) in vaes.items():
    evidence = log_evidence(vae.model, vae.guide, held_out)
    check = pv.SampleCheck(vae.model, vae.guide, seed=0)
    look = looks[name] = check([held_out], train=[seen], evidence=evidence, progress=False)
    sharp = [float(look.mean_sharpness()[kind].value) for kind in ("data", "sample_means", "sample_draws")]
    log_p, mse, rank = look.log_evidence.mean(), look.reconstruction_error.mean(), look.rank_correlation().value
    print(f"{name:17} {log_p:10.1f} {mse:10.2f} {rank:8.2f} {sharp[0]:7.0f} {sharp[1]:8.0f} {sharp[2]:8.0f}")

# %%
# Read the last two rows: the Binomial has the *lower* squared error and the *worse* log p(x), by more than ten nats. Its
# scale is tied to its mean; the logistic knows which pixels it is sure of, and no squared error sees that. Sharpness of
# means tells about means: the wide Gaussian's are blurred, yet its draws are the sharpest of all, being static. Draws are
# the model, means a summary of it.

first, second = looks["logistic"], looks["Binomial"]
assert SMOKE_TEST or first.log_evidence.mean() > second.log_evidence.mean() + 10
assert SMOKE_TEST or first.reconstruction_error.mean() > second.reconstruction_error.mean()

# sphinx_gallery_thumbnail_number = 5
figure, axes = plt.subplots(len(vaes) + 1, 1, figsize=(7, 4.7), layout="constrained")
show(axes[0], test[:14], "held-out digits")
for ax, (name, look) in zip(axes[1:], looks.items(), strict=True):
    log_p, mse = float(look.log_evidence.mean()), float(look.reconstruction_error.mean())
    show(ax, draws(vaes[name][0].model, test[:14], 1), f"draws, {name}: log p(x) {log_p:.0f} nats, squared error {mse:.1f}")
plt.show()

# %%
# Digit by digit it is the same story. Where the encoder says nothing (scale 16), log p(x) *is* the error, and the ranks
# agree. The better the likelihood, the less they do. On the right two digits that the logistic reconstructs equally well.

look = looks["logistic"]
size = look.reconstruction_error.log()
difference = look.log_evidence.unsqueeze(1) - look.log_evidence
pair = divmod(int(difference.where((size.unsqueeze(1) - size).abs() < 0.05, -math.inf).argmax()), NUM_TEST)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 3, 2))
for ax, name in zip(axes[:2], ("Normal, scale 16", "logistic"), strict=True):
    pv.plots.plot_likelihood_and_looks(looks[name], ax=ax)
    ax.set_title(f"{name}\n{ax.get_title()}", fontsize="medium")
axes[1].plot(look.reconstruction_error[list(pair)], look.log_evidence[list(pair)], "k.", markersize=12)
values = " and ".join(f"{float(value):.0f}" for value in look.log_evidence[list(pair)])
show(axes[2], test[list(pair)], f"one error, log p(x)\n{values} nats", num_rows=2)
plt.show()

# %%
# A model that memorises
# ----------------------
# What has the best samples of all? The training data. Let a latent pick one of the :math:`M` training digits, and blur it a
# little: :math:`p(y) = \frac1M \sum_j \mathrm{N}(y; y_j, s^2)`, a kernel density estimate. The posterior of the latent is a
# softmax of distances, so we can write down the exact guide, and two particles give log p(x) without any error.

memory, held_out, width = real_train.double(), real_test.double(), 0.5


def memorising(x):
    with pyro.plate("data", len(x)):
        which = pyro.sample("which", dist.Categorical(x.new_ones(len(memory))))
        pyro.sample("obs", dist.Normal(memory[which], width).to_event(1), obs=x)


def remembering(x):
    with pyro.plate("data", len(x)):
        pyro.sample("which", dist.Categorical(logits=-torch.cdist(x, memory).square() / (2 * width**2)))


def closed_form(s):
    log_p = dist.Normal(memory, s).to_event(1).log_prob(held_out.unsqueeze(1))
    return log_p.logsumexp(1) - math.log(len(memory))


evidence = pv.ImportanceSampling(memorising, remembering, num_particles=2, seed=0)(held_out)
assert float((evidence.log_evidence - closed_form(width)).abs().max()) < 1e-8
check = pv.SampleCheck(memorising, remembering, seed=0)
copied = check([held_out], train=[memory], evidence=evidence, progress=False)
print(copied)
assert float(copied.probability_nearer().value) == 1.0

# %%
# Sharp samples, a good reconstruction, and hundreds of nats below any VAE here. ``SampleCheck`` says why: every sample is
# nearer to a training digit than any held-out digit is (`Meehan, Chaudhuri and Dasgupta 2020
# <https://arxiv.org/abs/2004.05675>`__). Use draws for such a test: means are smoother than any datum, and look like copies
# where nothing was copied. Widen the memory to two levels, and its log p(x) is about that of the Gaussian VAE: with one
# scale for all pixels, most of the nats are about noise.

figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=(3, 3, 4))
widths, best = torch.logspace(-0.4, 0.8, 13).tolist(), float(looks["Normal, learned"].log_evidence.mean())
axes[0].plot(widths, [float(closed_form(s).mean()) for s in widths], "k.-", label="memory of the training digits")
axes[0].axhline(best, color="black", linestyle=":", label="VAE, Normal, learned")
axes[0].set(xscale="log", ylim=(-700, -100), xlabel="width, levels", ylabel="log p(x), nats")
axes[0].set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
axes[0].minorticks_off()
axes[0].legend(frameon=False, loc="lower right")
pv.plots.plot_nearest_neighbours(copied, ax=axes[1])
pv.plots.plot_copies(copied, ax=axes[2])
plt.show()

# %%
# Better log p(x), worse samples
# ------------------------------
# Now the other way round. Let a model be the logistic VAE with probability 1 %, and noise otherwise. Whatever the noise,
# :math:`\log p_\text{mix}(x) \ge \log \big( 0.01 \, p(x) \big) = \log p(x) - 4.6`: no digit loses more than 4.6 nats (Theis
# et al. again). The choice is marked for enumeration: it is summed out of log p(x), and drawn for samples. And since it has
# two values, :math:`p_\text{mix}(x) = 0.01 \, p(x) + 0.99 \, p_\text{noise}(x)` checks the estimate.

good = vaes["logistic"][0]
network, head = good.decoder
noise = torch.cat([torch.zeros(64), torch.full((64,), 2.0)])  # location in the middle, a wide scale


def mixture(x):
    with pyro.plate("data", len(x)):
        is_good = pyro.sample("is_good", dist.Bernoulli(torch.tensor(0.01)), infer={"enumerate": "parallel"})
        z = pyro.sample("latent", good.prior())
        pyro.sample("obs", head(torch.where(is_good.bool().unsqueeze(-1), network(z), noise)), obs=x)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("is_good", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
        pyro.sample("latent", good.encode(x))


log_good = looks["logistic"].log_evidence
log_mixture = torch.logaddexp(log_good + math.log(0.01), head(noise).log_prob(test) + math.log(0.99))
assert bool((log_mixture >= log_good - math.log(100) - 1e-4).all())
evidence = log_evidence(mixture, mixture_guide, test)
assert abs(float((evidence.log_evidence - log_mixture).median())) < 0.05  # a mean would count a missed mode: 05_modes

looks["99% noise"] = pv.SampleCheck(mixture, mixture_guide, seed=0)([test], train=[train], progress=False)
log_ps = {"logistic": log_good, "99% noise": log_mixture, "Binomial": looks["Binomial"].log_evidence}
print("                log p(x)   P(sample nearer to the training data)")
for name, log_p in log_ps.items():
    print(f"{name:12} {log_p.mean():11.2f}   {looks[name].probability_nearer()}")

figure, axes = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained")
for ax, name, model in zip(axes, ("99% noise", "Binomial"), (mixture, vaes["Binomial"][0].model), strict=True):
    show(ax, draws(model, train[:100], 3), f"{name}: log p(x) = {log_ps[name].mean():.1f} nats", num_rows=10)
plt.show()

# %%
# The left one has the better log p(x). Where pixels come in thousands 4.6 nats are nothing, so no log p(x) can vouch for
# samples; and copies have a terrible one, so samples cannot vouch for log p(x). Report both, and say which you mean.
#
# What to try
# -----------
#
# - ``pv.nn.Normal("optimal")`` in place of ``"learned"``. Does it end at the same scale?
# - ``pv.nn.Normal()``, a scale per pixel. What happens to log p(x), error and rank correlation? Leave out the noise
#   :math:`u`: where does log p(x) end?
# - The memorising model at the width with the best log p(x). Does ``SampleCheck`` still call it a copy?
# - The logistic trained on 100 digits for long. When does ``probability_nearer`` rise above one half?
#
# Where log p(x) comes from, and when to believe it: :doc:`04_evidence`. Next: your own program through all of this,
# :doc:`10_your_own_model`.
