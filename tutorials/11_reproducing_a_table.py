r"""
Reproducing a paper's table
===========================

A table of Burda, Grosse and Salakhutdinov (2016) has a VAE and an importance-weighted
autoencoder that differ by about one nat. At the end you know how close a short run
comes to that table, and what must be stated beside such a number for it to mean
anything. You will have run the whole protocol yourself on small digits.

Prerequisites: :doc:`01_the_bound` and :doc:`04_evidence`; about 1 minute to run.
"""

# sphinx_gallery_thumbnail_number = 1
import json
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NAMES = {"vae": "VAE", "iwae": "IWAE, 5 particles"}
# sphinx_gallery_start_ignore
BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
# sphinx_gallery_end_ignore

# %%
# What was run
# ------------
# The paper is Burda, Grosse and Salakhutdinov (2016), `Importance Weighted Autoencoders
# <https://arxiv.org/abs/1509.00519>`__. Its appendix D uses MNIST with pixels made
# binary once and for all (Larochelle and Murray 2011, `The Neural Autoregressive
# Distribution Estimator <https://proceedings.mlr.press/v15/larochelle11a.html>`__).
# There are 50,000 images for training and 10,000 for testing. The encoder has layers of
# 784, 200, 200 and 50 units with tanh, and the decoder has the same in reverse. The VAE
# maximises the ELBO. The importance-weighted autoencoder (IWAE) maximises
#
# .. math::
#
#    \mathcal{L}_K
#    = \mathrm{E}_q \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)} ,
#    \qquad \mathcal{L}[q] = \mathcal{L}_1 \le \mathcal{L}_K \le \log p(x) ,
#
# with :math:`K = 5`. Here :math:`\mathcal{L}[q]` is the ELBO. The table has two numbers
# per model. One is the negative log-likelihood (NLL), estimated by
# :math:`-\mathcal{L}_{5000}`. The other is the number of active units: latent units
# whose posterior mean has a variance over the data above 0.01.
#
# The program ``tutorials/experiments/burda_mnist.py`` repeated this for both models. It
# spent 22 minutes of one processor on each, instead of 3280 epochs, and evaluated every
# fifth test image. Its results are stored beside it as JSON.

# A page of the docs has no __file__.
here = Path(__file__).parent if "__file__" in globals() else Path()
files = {name: here / f"experiments/burda_mnist_{name}.json" for name in NAMES}
runs = {name: json.loads(path.read_text()) for name, path in files.items()}
paper = {"vae": (88.71, 19), "iwae": (87.63, 22)}  # -L_5000 and active units

print(f"{'nats per image':<18}{'paper':>7}{'-L_5000':>8}{'MC err':>8}", end="")
print(f"{'sampling':>9}{'differ':>7}{'fitted':>8}{'-ELBO':>7}", end="")
print(f"{'units':>6}{'paper':>6}{'epochs':>7}")
for name, run in runs.items():
    published, units = paper[name]
    (bound, error, sampling, _), fitted = run["L_5000"], run["adaptive"][0]
    print(f"{NAMES[name]:<18}{published:7.2f}{-bound:8.2f}{error:8.3f}", end="")
    print(f"{sampling:9.2f}{-bound - published:+7.2f}{-fitted:8.2f}", end="")
    print(f"{-run['elbo'][0]:7.2f}{run['active_units']:6}{units:6}", end="")
    print(f"{run['epochs']:7.0f}")

# %%
# Two columns are errors. "MC err" is the Monte Carlo error, over the random draws.
# "sampling" is the sampling error, over the choice of test images.
#
# The order of the models and the size of the gain are those of the paper. The IWAE has
# the lower ELBO, the better NLL and more active units. Compared by the same estimator,
# :math:`\mathcal{L}_{5000}`, both runs are 1.2 nats worse than the paper. That is the
# price of 22 minutes.
#
# The column "fitted" is another estimate of log p(x) for the same two models. It uses a
# proposal that is fitted to each image. Both estimates are lower bounds of
# :math:`\log p(x)` in expectation, so the smaller NLL is nearer to the truth. Two
# things follow:
#
# - :math:`\mathcal{L}_{5000}` misses about as much of log p(x) as separates our runs
#   from the paper's.
# - It misses more for the VAE than for the IWAE. So a part of the gain in such a table
#   measures how well the guide serves as a proposal, and not how well the model fits
#   the data.
#
# The paper's own numbers must miss something, too. How much is unknown, because its
# models cannot be evaluated with fitted proposals.

# sphinx_gallery_start_ignore
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for row, (name, run) in enumerate(runs.items()):
    hide = "_" * row  # one legend for both rows
    bound, fitted = run["L_5000"], run["adaptive"]
    label = hide + "paper, -L_5000"
    left.plot(paper[name][0], row - 0.2, "s", color="black", mfc="white", label=label)
    bars = {"xerr": 2 * bound[2], "capsize": 3, "label": hide + "here, -L_5000"}
    left.errorbar(-bound[0], row, fmt="o", color=BLUE, **bars)
    bars = {"xerr": 2 * fitted[2], "capsize": 3, "label": hide + "here, fitted"}
    left.errorbar(-fitted[0], row + 0.2, fmt="D", color=VERMILION, **bars)
    lengths = [-bound[0] - paper[name][0], fitted[0] - bound[0]]
    colours = {"color": [BLUE, ORANGE], "edgecolor": "black"}
    drawn = right.barh([row - 0.15, row + 0.15], lengths, 0.28, **colours)
    labels = [f"{lengths[0]:+.2f} to the paper", f"{lengths[1]:+.2f} missed by L_5000"]
    right.bar_label(drawn, labels, padding=3)
left.set_title("NLL (bars: two sampling errors)")
right.set_title("Two distances of about a nat")
for ax in (left, right):
    ax.set(yticks=(0, 1), yticklabels=NAMES.values(), ylim=(1.6, -0.6))
    ax.set_xlabel("nats per image")
left.legend(frameon=False)
right.set_xlim(0, 2.2)
plt.show()
# sphinx_gallery_end_ignore

# %%
# The bars on the left are long. We used 2,000 of the 10,000 images, which makes another
# test set, and that alone moves a mean by about half a nat. Two models on the *same*
# images can be compared far more precisely, as the last section shows.
#
# What IWAE-5000 misses
# ---------------------
# How do we know that the estimator misses this much? A linear VAE shows it, because its
# :math:`\log p(x)` is known in closed form. Its guide is trained, and its ELBO may be
# nats below log p(x). The cell below measures what 5,000 particles of the guide still
# miss, and what 500 particles of fitted proposals miss.

torch.manual_seed(0)
grey = torch.tensor(load_digits().data, dtype=torch.float) / 16
classes = torch.tensor(load_digits().target)
order = torch.randperm(len(grey))
rows_train, rows_test = order[:1437], order[1437:]
few = grey[rows_test][:20] if SMOKE_TEST else grey[rows_test][:100]
K = 200 if SMOKE_TEST else 5000


def quietly(estimator, data):
    """Evidence, without warnings of a high Pareto k.

    Such a k says that the importance weights have heavy tails and the estimate may be
    off. How far off is the subject here, so the warnings are not shown.
    """
    loader = DataLoader(TensorDataset(data), batch_size=120)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return pv.evaluate(estimator, loader, progress=False)


def classic(vae, data, num_particles, **options):
    """log p(x) by the bound L_K, with the guide as the proposal."""
    options = {"num_particles": num_particles, "seed": 0, **options}
    estimator = pv.ImportanceSampling(vae.model, vae.guide, **options)
    return quietly(estimator, data)


def by_fitted(vae, data):
    """log p(x) by a proposal that is fitted to each datum."""
    estimator = pv.AdaptiveImportanceSampling(vae.model, vae.guide, seed=0)
    return quietly(estimator, data)


# %%

missing = {}
for latent_dim in (2, 50) if SMOKE_TEST else (2, 10, 20, 35, 50):
    pyro.set_rng_seed(0)
    linear = pv.LinearVAE(64, latent_dim)
    adam = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(linear.model, linear.guide, adam, pv.BetaTraceMeanField_ELBO())
    for _ in range(30 if SMOKE_TEST else 600):
        svi.step(grey[rows_train][torch.randint(len(rows_train), (100,))])
    truth = float(linear.exact().log_evidence(few).mean())
    guide, fitted = classic(linear, few, K), by_fitted(linear, few)
    means = [evidence.mean() for evidence in (guide, fitted)]
    missing[latent_dim] = [(truth - float(m.value), float(m.std_error)) for m in means]
    (loss, error), (rest, rest_error) = missing[latent_dim]
    elbo_misses = truth - guide.elbo.mean()
    print(f"{latent_dim:2d} latents: the ELBO misses {elbo_misses:6.3f} nats", end="")
    print(f", L_{K} {loss:6.3f} +- {error:.3f}", end="")
    print(f", fitted proposals {rest:6.3f} +- {rest_error:.3f}")
    assert abs(rest) < 4.5 * rest_error + 0.005  # and the rounding of float32

# sphinx_gallery_start_ignore
figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
styles = {
    f"L_{K}, guide as it is": {"fmt": "o-", "color": BLUE},
    "fitted proposals, K = 500": {"fmt": "s--", "color": VERMILION},
}
for which, (label, style) in enumerate(styles.items()):
    values, errors = zip(*(both[which] for both in missing.values()), strict=True)
    twice = [2 * error for error in errors]
    ax.errorbar(list(missing), values, twice, capsize=3, label=label, **style)
ax.set(xlabel="latents of a linear VAE", ylabel="missed of log p(x), nats")
ax.set_title("What an importance-weighted NLL misses")
ax.legend(frameon=False)
plt.show()
# sphinx_gallery_end_ignore

# %%
# The table in miniature
# ----------------------
# Now the same protocol on scikit-learn's digits:
#
# - Each pixel is made 0 or 1 once, at random, with its grey value as the probability of
#   a 1.
# - The layers have 64, 50, 50 and 10 units with tanh, and the same in reverse. The
#   initial weights are Glorot's.
# - Adam has the paper's epsilon, and batches have 20 digits.
# - The schedule is the paper's, :math:`3^i` passes at rate :math:`10^{-3 - i/7}`, but
#   for :math:`i = 0` to 4 instead of 7.
#
# After each stage, both bounds are measured on the test digits.

pixels = torch.bernoulli(grey)
train, test = pixels[rows_train], pixels[rows_test]
STAGES = 2 if SMOKE_TEST else 5


def build():
    torch.manual_seed(0)
    layers = {"hidden": (50, 50), "activation": nn.Tanh}
    vae = pv.mlp_vae(64, latent_dim=10, likelihood=pv.nn.Bernoulli(), **layers)
    for layer in vae.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return vae


def fit(vae, objective):
    """Epochs so far, -ELBO and -L_100 on the test digits, after every stage."""
    curve, epochs = [], 0
    loss = objective(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, eps=1e-4)
    for i in range(STAGES):
        optimizer.param_groups[0]["lr"] = 1e-3 * 10 ** (-i / 7)
        for _ in range(3**i):
            for rows in torch.randperm(len(train)).split(20):
                optimizer.zero_grad()
                loss(train[rows]).backward()
                optimizer.step()
        epochs += 3**i
        bounds = classic(vae, test, 100)
        curve.append((epochs, -float(bounds.elbo.mean()), -float(bounds.mean().value)))
    return curve


objectives = {
    "vae": pv.BetaTraceMeanField_ELBO(),
    "iwae": pv.ImportanceWeightedELBO(num_particles=5),
}
pairs, curves, bounds, fitted = {}, {}, {}, {}
for name, objective in objectives.items():
    pairs[name] = vae = build()
    curves[name] = fit(vae, objective)
    bounds[name], fitted[name] = classic(vae, test, K), by_fitted(vae, test)

# %%
# The table of the two models. Its last line is the gain of the IWAE as a mean of
# differences, digit by digit.

print(f"{'nats per digit':<20}{'-ELBO':>8}{f'-L_{K}':>9}{'MC err':>8}", end="")
print(f"{'sampling':>9}{'fitted':>8}{'MC err':>8}{'units':>7}")
for name, vae in pairs.items():
    activity = pv.ActiveUnits(vae.model, vae.guide, seed=0)
    units = activity(DataLoader(TensorDataset(test), 120), progress=False)
    elbo, one, two = bounds[name].elbo.mean(), bounds[name].mean(), fitted[name].mean()
    print(f"{NAMES[name]:<20}{-elbo:>8.3f}{-one.value:>9.3f}", end="")
    print(f"{one.std_error:>8.3f}{one.sampling_error:>9.3f}", end="")
    print(f"{-two.value:>8.3f}{two.std_error:>8.3f}", end="")
    print(f"{int(units.active.sum()):>7}")
    assert float(elbo) < float(one.value)
gain = bounds["iwae"].log_evidence - bounds["vae"].log_evidence
error = torch.hypot(bounds["iwae"].std_error, bounds["vae"].std_error)
print("gain of the IWAE, digit by digit:", pv.Estimate.over_data(gain, error))

# %%
# The paper's pattern appears here, too. The IWAE has the lower ELBO, the better
# :math:`\log p(x)` and more active units. Note the errors. The sampling error of each
# mean is two thirds of the gain. The sampling error of the difference, on the same
# digits, is far smaller.
#
# With ten latents :math:`\mathcal{L}_{5000}` misses nothing. How much it misses depends
# on the number of latents, and has to be checked for each model.
#
# What must be stated beside a number
# -----------------------------------
# **The number of particles K.** Each :math:`\mathcal{L}_K` is a different lower bound.
# The middle panel below shows how far they lie apart.
#
# **The binarisation.** The same trained VAE gets another NLL on other pixels. The last
# of the four lines is a common mistake: grey pixels under a Bernoulli. Its value looks
# like the others, but it is not the log p(x) of any data, and the record says so.

vae, shades = pairs["vae"], grey[rows_test]
versions = {
    "as trained": test,
    "drawn again": torch.bernoulli(shades),
    "cut at 1/2": shades.round(),
}
for label, data in versions.items():
    print(f"{label:<12} NLL {-classic(vae, data, K).mean().value:.2f}")
print(classic(vae, shades, K, check_support=False))

# %%
# **Which test data, and in which order.** The test file of binary MNIST is sorted by
# digit, so its first 500 images are all zeros. The right panel shows how the NLL
# differs between the classes.

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
left, middle, right = axes
for name, line, colour in (("vae", "--", BLUE), ("iwae", "-", VERMILION)):
    style = {"ls": line, "color": colour}
    epochs, elbos, bounds_100 = zip(*curves[name], strict=True)
    left.plot(epochs, elbos, marker="x", label=f"{NAMES[name]}: -ELBO", **style)
    left.plot(epochs, bounds_100, marker="o", label=f"{NAMES[name]}: -L_100", **style)
    curve = bounds[name].curve
    heights = [-float(mean.value) for mean in curve.means()]
    middle.plot(curve.num_particles, heights, "o", ms=3, label=NAMES[name], **style)
    level = -float(fitted[name].mean().value)
    middle.axhline(level, color=colour, ls=":", lw=1.5)
nll, digit = -fitted["iwae"].log_evidence, classes[rows_test]
by_class = [float(nll[digit == c].mean()) for c in range(10)]
right.bar(range(10), by_class, color="#56B4E9", edgecolor="black")
right.axhline(sum(by_class) / 10, color="black", ls=":")
left.set(xscale="log", xlabel="epochs", ylabel="nats per test digit")
left.set_title("After each stage")
middle.set(xscale="log", xlabel="K", ylabel="-L_K, nats")
middle.set_title("An NLL needs its K (dotted: fitted proposals)")
right.set(xticks=range(10), xlabel="digit", ylabel="NLL of the IWAE, nats")
right.set_title("An NLL needs its test set (dotted: mean)")
left.legend(frameon=False, fontsize="small")
middle.legend(frameon=False)
plt.show()
# sphinx_gallery_end_ignore

# %%
# What to try
# -----------
# The answers are of one run each.
#
# - Use 50 particles in the objective of the miniature. In the paper, the NLL falls
#   further, to 87.10. Does it here? (Yes. The NLL goes from 23.79 to 23.56 nats, while
#   the ELBO falls by 2.6 nats more.)
# - Use ``gradient="dreg"`` for the IWAE, with K = 50 (Tucker et al. 2019, `Doubly
#   Reparameterized Gradient Estimators for Monte Carlo Objectives
#   <https://arxiv.org/abs/1810.04152>`__). (The NLL is 23.52 nats, another 0.039
#   better, with a sampling error of 0.013 for the difference on the same digits.)
# - Use fifty latents in the miniature. How much does :math:`\mathcal{L}_{5000}` miss
#   now? (Still nothing that the errors show: both estimates are 24.68 for the VAE and
#   24.12 for the IWAE. Its ELBO is 2.3 nats below log p(x), where the linear VAE with
#   fifty latents had 7.5.)
# - Run ``burda_mnist.py`` with the paper's data and a longer budget.
#
# Practice problems
# -----------------
#
# 1. Show that :math:`\mathcal{L}_K \le \mathcal{L}_{K+1}`.
# 2. In the first table, :math:`\mathcal{L}_{5000}` misses 1.02 nats of what the fitted
#    proposals find for the VAE. Suppose the loss fell like :math:`1/K` from there on.
#    How many particles would bring it to 0.01 nats?
# 3. What would the sampling error of the first table be with all 10,000 test images?
# 4. In the miniature, the means of the two models have sampling errors of 0.202 and
#    0.204 nats, and the mean difference has 0.025. What is the correlation of log p(x)
#    between the models, over digits? How many digits would each model need for the same
#    error if they were evaluated on different digits?
# 5. Take :math:`x \in [0, 1]` under a Bernoulli "density"
#    :math:`\pi^x (1 - \pi)^{1 - x}`. Show that its integral is not one. What is it for
#    :math:`\pi = \tfrac12`?
#
# Answers
# -------
#
# 1. The mean of :math:`K + 1` weights is the mean of the :math:`K + 1` means that leave
#    out one weight each. By Jensen's inequality, the logarithm of the former is at
#    least the mean of the logarithms of the latter. The expectation of each of these is
#    :math:`\mathcal{L}_K`.
# 2. :math:`5000 \cdot 1.02 / 0.01 = 510{,}000`. The law :math:`1/K` holds only where
#    the loss is already small, so this is a lower estimate.
# 3. :math:`0.55 / \sqrt 5 = 0.25` nats.
# 4. From :math:`0.025^2 = 0.202^2 + 0.204^2 - 2 \rho \cdot 0.202 \cdot 0.204`, the
#    correlation is :math:`\rho = 0.992`. On different digits the error of the
#    difference is :math:`\sqrt{0.202^2 + 0.204^2} = 0.287`, that is 11.5 times as
#    large. So it takes :math:`11.5^2 = 132` times as many digits, about 47,000.
# 5. The integral is :math:`(2\pi - 1) / \log \frac{\pi}{1 - \pi}`, which tends to
#    :math:`\tfrac12` for :math:`\pi \to \tfrac12`. So the "density" sums to less than
#    one, and its logarithm cannot be compared with a log p(x).
#
# Next: the same bound in other fields, :doc:`12_one_equation`.
