r"""
Tables with holes
=================

Most tables have missing numbers. This tutorial shows which likelihood to maximise then,
how to fill in what is missing, and how to say how sure a filled-in number is. It also
shows why a table filled in with best guesses is a wrong table, and for which missing
numbers no model helps.

Prerequisites: :doc:`02_first_vae` and :doc:`04_evidence`; about 1 minute to run.
"""

# %%
# The likelihood of what was seen
# -------------------------------
# Write :math:`x = (o, h)` for a row of the table. The part :math:`o` was observed, and
# the part :math:`h` is missing ("holes"). In a latent variable model, the numbers of a
# row are independent given the latent :math:`z`. The density of :math:`o` is therefore
# easy to write down: the missing numbers are left out of the product.
#
# .. math::
#
#    p(o) = \int p(o \mid z) \, p(z) \, dz, \qquad
#    p(o \mid z) = \prod_{i \text{ observed}} p(x_i \mid z)
#
# This is the likelihood to maximise if the reason for a hole does not depend on the
# missing number. ``pv.MissingDataVAE`` takes NaN for a hole and observes the other
# numbers. Its encoder sees zeros in the holes, and a mask that marks them.

import math
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.impute import KNNImputer
from torch import nn

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_EPOCHS = 2 if SMOKE_TEST else 400
NUM_STEPS = 10 if SMOKE_TEST else 4000
NUM_PARTICLES = 100 if SMOKE_TEST else 2000
pyro.set_rng_seed(0)
# sphinx_gallery_start_ignore
BLUE, ORANGE = "#0072B2", "#E69F00"  # colours that colour-blind readers can tell apart
# sphinx_gallery_end_ignore


def imputed(vae, table, num_draws=0):
    """An `Imputation`. Its `doubts` count the rows whose weights have a heavy tail."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return pv.impute(
            vae.model,
            vae.guide,
            table,
            num_particles=NUM_PARTICLES,
            num_draws=num_draws,
            seed=0,
        )


# %%
# A model whose answer is known
# -----------------------------
# The first model has one latent and two observed numbers:
# :math:`z \sim \mathrm{N}(0, 1)` and :math:`x = w z + \varepsilon`, with
# :math:`w = (1, 1.5)` and noise :math:`\varepsilon` of standard deviation 0.6. Then
# :math:`x` is Gaussian with covariance :math:`C = w w^\top + 0.36 \, I`. If
# :math:`x_1` is observed and :math:`x_2` is missing, the answer is known:
#
# .. math::
#
#    \mathrm{E}[x_2 \mid x_1] = \frac{C_{21}}{C_{11}} \, x_1, \qquad
#    \mathrm{Var}[x_2 \mid x_1] = C_{22} - \frac{C_{21}^2}{C_{11}}
#
# ``pv.impute`` does not use this formula. For each row it fits a proposal to the
# posterior :math:`p(z \mid o)` and draws :math:`z` from it. It gives each draw an
# importance weight and averages :math:`\mathrm{E}[h \mid z]`. The variance follows from
# the law of total variance:
#
# .. math::
#
#    \mathrm{Var}[h \mid o] = \mathrm{E} \big[ \mathrm{Var}[h \mid z] \big]
#    + \mathrm{Var} \big[ \mathrm{E}[h \mid z] \big] ,
#
# where the outer mean and variance are over :math:`p(z \mid o)`.
#
# The encoder of this model is not trained. The imputed numbers depend on the model
# alone; the encoder is only where the search for a proposal starts.

slope, noise = torch.tensor([[1.0], [1.5]]), 0.6
linear = pv.MissingDataVAE(
    encoder=nn.Sequential(nn.Linear(2 * 2, 2), pv.nn.Normal()),
    decoder=nn.Sequential(nn.Linear(1, 2, bias=False), pv.nn.Normal(noise)),
    prior=pv.nn.StandardNormal(1),
)
linear.decoder[0].weight.data = slope
seen = torch.tensor([-1.5, 0.0, 1.5])
rows = torch.stack([seen, torch.full((3,), math.nan)], 1)
nothing_seen = torch.full((1, 2), math.nan)
result = imputed(linear, torch.cat([rows, nothing_seen]))

covariance = slope @ slope.T + noise**2 * torch.eye(2)
means = covariance[1, 0] / covariance[0, 0] * seen
variance = covariance[1, 1] - covariance[1, 0] ** 2 / covariance[0, 0]
spread = float(variance.sqrt())

print("  x_1   E[x_2 given x_1], error   closed form    sd   closed form")
for n in range(3):
    mean = float(result.mean["obs"][n, 1])
    error = float(result.std_error["obs"][n, 1])
    sd = float(result.stddev["obs"][n, 1])
    imputation = f"{seen[n]:5.1f} {mean:10.3f} +- {error:.3f} {means[n]:18.3f}"
    print(f"{imputation} {sd:8.3f} {spread:10.3f}")
    assert abs(mean - means[n]) < 5 * error + 0.01
    assert abs(sd / spread - 1) < (0.3 if SMOKE_TEST else 0.05)

# sphinx_gallery_start_ignore
figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
grid = torch.linspace(-4, 4, 121)
points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
joint = torch.distributions.MultivariateNormal(torch.zeros(2), covariance)
density = joint.log_prob(points).exp()
ax.contour(grid, grid, density, levels=5, colors="grey", linewidths=0.8)
for n in range(3):
    ax.axvline(seen[n], color="grey", linewidth=0.8, linestyle=":")
ax.errorbar(
    seen,
    result.mean["obs"][:3, 1],
    2 * result.stddev["obs"][:3, 1],
    fmt="o",
    color=BLUE,
    capsize=4,
    label="imputed, two standard deviations",
)
ax.set(xlabel="x_1, observed", ylabel="x_2, missing", xlim=(-3, 3), ylim=(-4, 4))
ax.set_title("what x_1 says about x_2")
ax.legend(frameon=False, loc="upper left")
plt.show()
# sphinx_gallery_end_ignore

# %%
# The contours show the joint density of the two numbers. A dotted line marks each
# observed :math:`x_1`.
#
# In the last row of the table both numbers are missing. The density of nothing is 1, so
# :math:`\log p(o) = 0`. The imputed numbers are the mean of the model, which is 0.

log_p, mean = result.evidence.log_evidence[3], result.mean["obs"][3]
print(f"nothing seen: log p = {log_p:.3f} nats, mean {mean.tolist()}")
assert abs(float(log_p)) < 0.1

# %%
# MIWAE on the iris table
# -----------------------
# The next table is real: 150 flowers, with four lengths each, standardised. Half of the
# numbers are removed at random and kept aside, to judge the imputation by. The model is
# trained on the table with holes alone. The objective is the importance-weighted bound
# with :math:`K = 20` draws (`Mattei and Frellsen (2019), "MIWAE: Deep Generative
# Modelling and Imputation of Incomplete Data Sets"
# <https://arxiv.org/abs/1812.02633>`__):
#
# .. math::
#
#    \mathcal{L}_K = \mathrm{E} \, \log \frac1K \sum_k
#    \frac{p(o \mid z_k) \, p(z_k)}{q(z_k \mid o)} \le \log p(o)
#
# ``pv.ImportanceWeightedELBO`` computes this bound without any change. The likelihood
# is Student's t, which allows for flowers far from the others.

iris = load_iris()
complete = torch.tensor(iris.data, dtype=torch.float)
complete = (complete - complete.mean(0)) / complete.std(0)
holes = torch.rand(complete.shape) < 0.5
table = complete.masked_fill(holes, math.nan)


def trained(vae, data, num_epochs, num_particles=20):
    loss = pv.ImportanceWeightedELBO(num_particles=num_particles)(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(data)).split(64):
            optimizer.zero_grad()
            (loss(data[rows]) / len(rows)).backward()
            optimizer.step()
    return vae.eval()


vae = pv.mlp_missing_vae(
    4,
    latent_dim=2,
    likelihood=pv.nn.StudentT(),
    hidden=(128, 128),
    activation=nn.Tanh,
)
trained(vae, table, NUM_EPOCHS)
result = imputed(vae, table, num_draws=100)
print(result)

# %%
# The lines below ``doubts`` count the rows whose importance weights may be unreliable.
# :doc:`04_evidence` explains these diagnostics.
#
# Compare three guesses at the same holes. The mean of a column ignores the rest of the
# row. Both the ten nearest neighbours and MIWAE use the rest of the row.

neighbours = KNNImputer(n_neighbors=10).fit_transform(table)
column_means = torch.where(holes, table.nanmean(0), table)
guesses = {
    "column mean": column_means,
    "10 neighbours": torch.tensor(neighbours, dtype=torch.float),
    "MIWAE": result.mean["obs"],
}
errors = {}
for name, guess in guesses.items():
    errors[name] = float((guess - complete)[holes].square().mean())
    print(f"{name:14} mean squared error {errors[name]:.3f}")
assert SMOKE_TEST or errors["MIWAE"] < 0.55 < 0.8 < errors["column mean"]

# %%
# Does it know how sure it is?
# ----------------------------
# For each hole, ``pv.impute`` returned 100 draws of the missing number. The share of
# these draws below the removed number differs from hole to hole. If the draws have the
# right distribution, this share is uniformly distributed between 0 and 1. The left
# panel below tests this: the solid line should follow the dotted diagonal. A single
# guess per hole cannot be tested in this way.
#
# The draws nearly pass. Their intervals are a little too narrow. The reason is that the
# networks were fitted to only 150 rows, and the draws treat the fitted networks as the
# truth. ``stddev`` and ``reliable`` ignore this uncertainty as well. You can measure
# its effect on your own data as it is done here: hide numbers that you have, impute
# them, and compare.

below = (result.draws["obs"] < complete).double().mean(0)[holes].sort().values
levels = torch.linspace(0, 1, len(below))
inside, shares = {}, []
for level in (0.5, 0.8, 0.95):
    lowest, highest = (1 - level) / 2, (1 + level) / 2
    inside[level] = float(((below > lowest) & (below < highest)).double().mean())
    shares.append(f"{level:.0%} interval: {inside[level]:.0%} of {len(below)} holes")
print("  ".join(shares))
assert SMOKE_TEST or abs(inside[0.8] - 0.8) < 0.15

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
axes[0].plot(levels, below, color=BLUE)
axes[0].plot([0, 1], [0, 1], color="grey", linestyle=":")
axes[0].set(xlabel="share of the holes", ylabel="share of draws below the number")
axes[0].set_title("calibration of the draws")
guess, sd = result.mean["obs"][holes], result.stddev["obs"][holes]
axes[1].errorbar(
    guess,
    complete[holes],
    xerr=sd,
    fmt=".",
    color=BLUE,
    ecolor="lightgrey",
    elinewidth=0.8,
)
axes[1].plot([-2.5, 2.5], [-2.5, 2.5], color="grey", linestyle=":")
axes[1].set(xlabel="imputed, with its standard deviation", ylabel="the removed number")
axes[1].set_title("hole by hole")
plt.show()
# sphinx_gallery_end_ignore

# %%
# A table of best guesses is a wrong table
# ----------------------------------------
# The posterior mean is the guess with the smallest squared error. It is nevertheless
# wrong to compute anything else from a table that is filled in with means. Every
# imputed mean lies on the curve that the model found. A table of means therefore has
# too little spread, and its columns are too strongly correlated. Draws scatter as real
# flowers do.
#
# *Multiple imputation* computes the wanted number once on each drawn table. The spread
# of these results is the uncertainty that the holes cause, given the model (`Rubin
# (1987), "Multiple Imputation for Nonresponse in Surveys"
# <https://doi.org/10.1002/9780470316696>`__).

WIDTH, LENGTH = 1, 2  # columns: width of the sepal, length of the petal


def looked_at(x):
    """Standard deviation of the sepal's width; its correlation with petal length."""
    pair = x[:, [WIDTH, LENGTH]]
    return [float(x[:, WIDTH].std()), float(torch.corrcoef(pair.T)[0, 1])]


drawn = torch.tensor([looked_at(each) for each in result.draws["obs"]])
found = {
    "complete": looked_at(complete),
    "column means": looked_at(column_means),
    "imputed means": looked_at(result.mean["obs"]),
}
found["100 drawn tables"] = drawn.mean(0).tolist()
print("                    sd of sepal width   correlation with petal length")
for name, (width, correlation) in found.items():
    print(f"{name:18} {width:14.2f} {correlation:22.2f}")
print(f"between drawn tables the correlation varies by {drawn[:, 1].std():.2f}")

# sphinx_gallery_start_ignore
same = {"sharex": True, "sharey": True}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", **same)
touched = holes[:, [WIDTH, LENGTH]].any(1)
shown = {
    "complete": complete,
    "filled in with the mean": result.mean["obs"],
    "one drawn table": result.draws["obs"][0],
}
kinds = (
    (~touched, BLUE, "o", "both observed"),
    (touched, ORANGE, "^", "one or both missing"),
)
for ax, (name, x) in zip(axes, shown.items(), strict=True):
    for rows, color, marker, label in kinds:
        points = x[rows]
        ax.plot(
            points[:, LENGTH],
            points[:, WIDTH],
            marker,
            color=color,
            markersize=3.5,
            label=label,
        )
    ax.set(title=name, xlabel="petal length", xlim=(-2.6, 2.6), ylim=(-3.4, 3.4))
axes[0].set_ylabel("sepal width")
axes[0].legend(frameon=False, fontsize="small", loc="lower left")
plt.show()
# sphinx_gallery_end_ignore

# %%
# Half a digit
# ------------
# The same class fits other kinds of numbers too. The pixels
# of these 8x8 digits are counts from 0 to 16, so the likelihood is Binomial. The model
# is trained on digits with random holes: in each digit, between none and two thirds of
# the pixels are hidden. Then it gets the upper halves of test digits, which it has
# never seen. The mean of the missing half is a blur of all the digits that would fit.
# Each draw is one of them.

digits = torch.tensor(load_digits().data, dtype=torch.float)
train, test = digits[:1500], digits[1500:1510].clone()
likelihood = pv.nn.Binomial(16)
pixels = pv.mlp_missing_vae(64, latent_dim=8, likelihood=likelihood, hidden=(128,))
loss = pv.ImportanceWeightedELBO(num_particles=5)(pixels.model, pixels.guide)
optimizer = torch.optim.Adam(loss.parameters(), lr=2e-3)
for _ in range(NUM_STEPS):
    batch = train[torch.randint(len(train), (100,))]
    share = torch.rand(len(batch), 1) * 2 / 3
    optimizer.zero_grad()
    loss(batch.masked_fill(torch.rand(batch.shape) < share, math.nan)).backward()
    optimizer.step()
pixels.eval()
halves = test.clone()
halves[:, 32:] = math.nan
result = imputed(pixels, halves, num_draws=4)

# sphinx_gallery_thumbnail_number = 4

# sphinx_gallery_start_ignore


def show(ax, images, title):
    framed = nn.functional.pad(images.reshape(-1, 8, 8), (1, 1, 1, 1), value=math.nan)
    sheet = framed.permute(1, 0, 2).reshape(10, -1).numpy()
    image = ax.imshow(sheet, cmap="gray_r", interpolation="nearest")
    image.cmap.set_bad("lightgrey")
    ax.set_title(title, fontsize="medium")
    ax.set_axis_off()


figure, axes = plt.subplots(6, 1, figsize=(7, 6), layout="constrained")
show(axes[0], test, "test digits")
show(axes[1], halves, "what was observed")
show(axes[2], result.mean["obs"], "mean of what is missing")
show(axes[3], result.stddev["obs"], "its standard deviation")
for ax, draw in zip(axes[4:], result.draws["obs"], strict=False):
    show(ax, draw, "a draw")
plt.show()
# sphinx_gallery_end_ignore

# %%
# What no model can repair
# ------------------------
# All of this assumes that the reason for a hole does not depend on the missing number.
# To see what happens otherwise, take the linear model and let :math:`x_2` be missing
# wherever it is *large*. The observed numbers then have another distribution. No fit to
# them shows that anything is wrong. Even with the true model, the imputed means are too
# low, and more rows do not help.

draws = linear.generate(4000)
reasons = {"at random": torch.rand(4000) < 0.3, "if x_2 > 1": draws[:, 1] > 1.0}
for reason, gone in reasons.items():
    holed = draws.clone()
    holed[gone, 1] = math.nan
    result = imputed(linear, holed[gone][:200])
    error = (result.mean["obs"][:, 1] - draws[gone][:200, 1]).mean()
    found = f"{float(gone.double().mean()):.0%} of x_2"
    print(f"missing {reason:10}: {found}, mean error of the imputation {error:+.2f}")
    assert (abs(error) < 0.25) == (reason == "at random")

# %%
# If you suspect such a reason, model it. Observe the mask as well, with a probability
# that depends on the number; in a Pyro program of your own this takes one more sample
# statement. Then see how far the answer moves.
#
# What to try
# -----------
#
# - Use ``pv.nn.Normal()`` in place of Student's t on the iris table. How do
#   :math:`\log p(o)` and the squared error change?
# - Train with ``num_particles=1``, which is the usual ELBO of a VAE. From how many
#   draws on does the squared error stop falling?
# - Add the kind of flower as a fifth column, with some kinds missing. The likelihood of
#   such a table is ``pv.nn.Heterogeneous``. How often does ``result.draws`` fill in the
#   right kind?
# - Impute the left halves of the digits, or every second row. Which pixels have the
#   largest standard deviation?
#
# Practice problems
# -----------------
#
# 1. In the linear model, :math:`x_1 = 1` is observed. Compute the mean and the standard
#    deviation of :math:`x_2` by hand.
# 2. Compute the same variance by the law of total variance. Use that the posterior of
#    :math:`z` given :math:`x_1` has variance :math:`1 / (1 + 1 / 0.36)`.
# 3. Suppose that :math:`x_2` is missing in all rows and is filled in with its mean
#    given :math:`x_1`. What are the standard deviation of the imputed column and its
#    correlation with :math:`x_1`, and what are the true ones?
# 4. Suppose that :math:`x_2` is missing wherever :math:`x_1` is large, and that
#    :math:`x_1` is always observed. Is :math:`p(o)` still the right likelihood?
#
# .. raw:: html
#
#    <details><summary>Answers</summary>
#
# 1. :math:`C_{11} = 1.36`, :math:`C_{21} = 1.5` and :math:`C_{22} = 2.61`. The mean is
#    :math:`1.5 / 1.36 = 1.10`. The variance is :math:`2.61 - 1.5^2 / 1.36 = 0.956`, and
#    the standard deviation 0.978, as in the first table above.
# 2. The posterior variance of :math:`z` is 0.265. The mean of
#    :math:`\mathrm{Var}[x_2 \mid z]` is 0.36. The variance of
#    :math:`\mathrm{E}[x_2 \mid z] = 1.5 z` is :math:`1.5^2 \cdot 0.265 = 0.596`. The
#    sum is 0.956 again.
# 3. The imputed column is :math:`1.5 / 1.36 \cdot x_1`. Its standard deviation is
#    :math:`1.5 / \sqrt{1.36} = 1.29` instead of :math:`\sqrt{2.61} = 1.62`. It is a
#    multiple of :math:`x_1`, so its correlation with :math:`x_1` is 1 instead of
#    :math:`1.5 / \sqrt{1.36 \cdot 2.61} = 0.80`. Both errors point the same way as
#    those of the iris table.
# 4. Yes. The probability of the hole depends on an observed number alone. It is a
#    factor that depends neither on the model's parameters nor on :math:`x_2`, so it
#    changes neither the maximum of the likelihood nor the posterior of :math:`x_2`.
#
# .. raw:: html
#
#    </details>
#
# All ways to mark missing numbers, also in programs of your own: :doc:`/missing_data`.
# Where the importance weights come from, and when to believe them: :doc:`04_evidence`.
