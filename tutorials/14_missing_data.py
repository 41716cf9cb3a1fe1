r"""
Tables with holes
=================

Numbers are missing from most tables. At the end you know what a model should be fitted to when they are, how to fill in what
is missing and say how sure that is, why a table that is filled in with its best guesses is a wrong table, and which holes no
model can mend.
"""

# %%
# Write :math:`x = (o, h)` for a row: :math:`o` was seen, :math:`h` is missing. A latent variable model gives the density of
# what was seen for nothing. Given :math:`z` the numbers are independent, so those that are missing are left out of the
# product:
#
# .. math::
#
#    p(o) = \int p(o \mid z) \, p(z) \, dz, \qquad p(o \mid z) = \prod_{i \text{ seen}} p(x_i \mid z)
#
# That is the likelihood to maximise if the reason for a hole does not depend on the number in it. ``pv.MissingDataVAE``
# takes NaN for a hole and observes the rest. Its encoder sees zeros in the holes, and the mask.

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
NUM_EPOCHS, NUM_STEPS, NUM_PARTICLES = (2, 10, 100) if SMOKE_TEST else (400, 4000, 2000)
pyro.set_rng_seed(0)


def imputed(vae, table, num_draws=0):
    """`Imputation`. With half of a row missing the posterior may have heavy tails, and `reliable` says in which rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return pv.impute(vae.model, vae.guide, table, num_particles=NUM_PARTICLES, num_draws=num_draws, seed=0)


# %%
# A model whose answer is known
# -----------------------------
# One latent, two numbers: :math:`z \sim \mathrm{N}(0, 1)`, :math:`x = w z + \varepsilon` with :math:`w = (1, 1.5)` and noise
# of scale 0.6. Then :math:`x` is Gaussian with covariance :math:`C = w w^\top + 0.36 \, I`, and what is missing has a
# textbook answer:
#
# .. math::
#
#    \mathrm{E}[x_2 \mid x_1] = \frac{C_{21}}{C_{11}} \, x_1, \qquad
#    \mathrm{Var}[x_2 \mid x_1] = C_{22} - \frac{C_{21}^2}{C_{11}}
#
# ``pv.impute`` does not know that. It draws :math:`z` from proposals that are fitted to :math:`p(z \mid o)` of each row,
# weighs the draws, and averages :math:`\mathrm{E}[x \mid z]`. The spread follows from the law of total variance:
#
# .. math::
#
#    \mathrm{Var}[h \mid o] = \mathrm{E} \big[ \mathrm{Var}[h \mid z] \big] + \mathrm{Var} \big[ \mathrm{E}[h \mid z] \big]
#
# The encoder here is not even trained. Answers are the model's; the encoder is where the search for them starts.

slope, noise = torch.tensor([[1.0], [1.5]]), 0.6
linear = pv.MissingDataVAE(
    encoder=nn.Sequential(nn.Linear(2 * 2, 2), pv.nn.Normal()),
    decoder=nn.Sequential(nn.Linear(1, 2, bias=False), pv.nn.Normal(noise)),
    prior=pv.nn.StandardNormal(1),
)
linear.decoder[0].weight.data = slope
seen = torch.tensor([-1.5, 0.0, 1.5])
rows = torch.stack([seen, torch.full((3,), math.nan)], 1)
result = imputed(linear, torch.cat([rows, torch.full((1, 2), math.nan)]))
covariance = slope @ slope.T + noise**2 * torch.eye(2)
means = covariance[1, 0] / covariance[0, 0] * seen
spread = float((covariance[1, 1] - covariance[1, 0] ** 2 / covariance[0, 0]).sqrt())

print("  x_1   E[x_2 given x_1], error   closed form    sd   closed form")
for n in range(3):
    mean, error, sd = (float(part["obs"][n, 1]) for part in (result.mean, result.std_error, result.stddev))
    print(f"{seen[n]:5.1f} {mean:10.3f} +- {error:.3f} {means[n]:18.3f} {sd:8.3f} {spread:10.3f}")
    assert abs(mean - means[n]) < 5 * error + 0.01 and abs(sd / spread - 1) < (0.3 if SMOKE_TEST else 0.05)

figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
grid = torch.linspace(-4, 4, 121)
points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
density = torch.distributions.MultivariateNormal(torch.zeros(2), covariance).log_prob(points).exp()
ax.contour(grid, grid, density, levels=5, colors="grey", linewidths=0.8)
for n in range(3):
    ax.axvline(seen[n], color="grey", linewidth=0.8, linestyle=":")
height = result.mean["obs"][:3, 1]
ax.errorbar(seen, height, 2 * result.stddev["obs"][:3, 1], fmt="ko", capsize=4, label="imputed, two standard deviations")
ax.set(xlabel="x_1, seen", ylabel="x_2, missing", xlim=(-3, 3), ylim=(-4, 4), title="what x_1 says about x_2")
ax.legend(frameon=False, loc="upper left")
plt.show()

# %%
# The last row had no number at all. Its log p(o) is that of nothing, zero, and its imputation is the model's own mean.

print(f"nothing seen: log p = {result.evidence.log_evidence[3]:.3f} nats, mean {result.mean['obs'][3].tolist()}")
assert abs(float(result.evidence.log_evidence[3])) < 0.1

# %%
# MIWAE on the iris table
# -----------------------
# Now a table that nobody simulated: 150 flowers, four lengths each, standardised. Half of the numbers are taken away at
# random, and kept aside to judge by. The model learns from the holed table alone, by the importance-weighted bound of 20
# draws (`Mattei and Frellsen 2019 <https://arxiv.org/abs/1812.02633>`__):
#
# .. math::
#
#    \mathcal{L}_K = \mathrm{E} \, \log \frac1K \sum_k \frac{p(o \mid z_k) \, p(z_k)}{q(z_k \mid o)} \le \log p(o)
#
# ``pv.ImportanceWeightedELBO`` needs no change for that. The likelihood is Student's t, for flowers far out.

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


vae = pv.mlp_missing_vae(4, latent_dim=2, likelihood=pv.nn.StudentT(), hidden=(128, 128), activation=nn.Tanh)
trained(vae, table, NUM_EPOCHS)
result = imputed(vae, table, num_draws=100)
print(result)

# %%
# Three guesses at the same holes. The mean of a column ignores the row. Ten neighbours and MIWAE both look at it.

neighbours = torch.tensor(KNNImputer(n_neighbors=10).fit_transform(table), dtype=torch.float)
column_means = torch.where(holes, table.nanmean(0), table)
errors = {}
for name, guess in {"column mean": column_means, "10 neighbours": neighbours, "MIWAE": result.mean["obs"]}.items():
    errors[name] = float((guess - complete)[holes].square().mean())
    print(f"{name:14} mean squared error {errors[name]:.3f}")
assert SMOKE_TEST or errors["MIWAE"] < 0.55 < 0.8 < errors["column mean"]

# %%
# Does it know how sure it is?
# ----------------------------
# For each hole there are 100 draws. If they are right, the number that was taken away falls below a share :math:`u` of them
# in a share :math:`u` of the holes. It is the test that a single guess cannot take.
#
# These draws pass it nearly: their intervals are a little narrow. The networks were fitted to 150 rows, and the draws are
# given the networks: that these may be wrong is not in them. It never is in ``stddev`` or ``reliable`` either. Hide numbers
# that you have, impute them and look, as here.

below = (result.draws["obs"] < complete).double().mean(0)[holes].sort().values
levels = torch.linspace(0, 1, len(below))
inside = {
    level: float(((below > (1 - level) / 2) & (below < (1 + level) / 2)).double().mean()) for level in (0.5, 0.8, 0.95)
}
print("  ".join(f"{level:.0%} interval: {share:.0%} of {len(below)} holes" for level, share in inside.items()))
assert SMOKE_TEST or abs(inside[0.8] - 0.8) < 0.15

figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
axes[0].plot(levels, below, color="black")
axes[0].plot([0, 1], [0, 1], color="grey", linestyle=":")
axes[0].set(xlabel="share of the holes", ylabel="share of draws below the number", title="calibration of the draws")
guess, sd = result.mean["obs"][holes], result.stddev["obs"][holes]
axes[1].errorbar(guess, complete[holes], xerr=sd, fmt=".", color="black", ecolor="lightgrey", elinewidth=0.8)
axes[1].plot([-2.5, 2.5], [-2.5, 2.5], color="grey", linestyle=":")
axes[1].set(xlabel="imputed, with its standard deviation", ylabel="the number that was taken away", title="hole by hole")
plt.show()

# %%
# A table of best guesses is a wrong table
# ----------------------------------------
# The mean has the smallest squared error, and is the wrong thing to compute anything else from. Where a number is missing,
# the mean sits on the curve that the model found, so that the filled-in table has too little spread and its columns follow
# each other too closely. Draws scatter as the flowers do. Compute what you want on each drawn table. How much the answers
# differ is what the holes cost, given the model (multiple imputation, `Rubin 1987
# <https://doi.org/10.1002/9780470316696>`__).

WIDTH, LENGTH = 1, 2  # of sepal and petal


def looked_at(x):
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

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharex=True, sharey=True)
touched = holes[:, [WIDTH, LENGTH]].any(1)
shown = {"complete": complete, "filled in with the mean": result.mean["obs"], "one drawn table": result.draws["obs"][0]}
for ax, (name, x) in zip(axes, shown.items(), strict=True):
    for rows, color, label in ((~touched, "black", "both seen"), (touched, "tab:orange", "one or both missing")):
        ax.plot(x[rows, LENGTH], x[rows, WIDTH], ".", color=color, label=label)
    ax.set(title=name, xlabel="petal length", xlim=(-2.6, 2.6), ylim=(-3.4, 3.4))
axes[0].set_ylabel("sepal width")
axes[0].legend(frameon=False, fontsize="small", loc="lower left")
plt.show()

# %%
# Half a digit
# ------------
# The same class, other numbers: 8x8 digits whose pixels are counts from 0 to 16, under a Binomial. It trains on digits with
# random holes, a third to all of the pixels seen, and then gets the upper halves of digits that it never saw. The mean of
# what is missing is a blur of all digits that would fit; each draw is one of them.

digits = torch.tensor(load_digits().data, dtype=torch.float)
train, test = digits[:1500], digits[1500:1510].clone()
pixels = pv.mlp_missing_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(128,))
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


def show(ax, images, title):
    framed = nn.functional.pad(images.reshape(-1, 8, 8), (1, 1, 1, 1), value=math.nan)
    image = ax.imshow(framed.permute(1, 0, 2).reshape(10, -1).numpy(), cmap="gray_r", interpolation="nearest")
    image.cmap.set_bad("lightgrey")
    ax.set_title(title, fontsize="medium")
    ax.set_axis_off()


# sphinx_gallery_thumbnail_number = 4
figure, axes = plt.subplots(6, 1, figsize=(7, 6), layout="constrained")
show(axes[0], test, "test digits")
show(axes[1], halves, "what was seen")
show(axes[2], result.mean["obs"], "mean of what is missing")
show(axes[3], result.stddev["obs"], "its standard deviation")
for ax, draw in zip(axes[4:], result.draws["obs"], strict=False):
    show(ax, draw, "a draw")
plt.show()

# %%
# What no model mends
# -------------------
# All of this needs holes that do not depend on the number in them. Take the linear model, and let :math:`x_2` be missing
# wherever it is *large*. What was seen has another distribution then, and no fit to it shows that anything is wrong. Given
# the true model, the imputed means are too low by the same amount in any row, however many rows there are.

draws = linear.generate(4000)
for reason, gone in {"at random": torch.rand(4000) < 0.3, "if x_2 > 1": draws[:, 1] > 1.0}.items():
    holed = draws.clone()
    holed[gone, 1] = math.nan
    result = imputed(linear, holed[gone][:200])
    error = (result.mean["obs"][:, 1] - draws[gone][:200, 1]).mean()
    print(f"missing {reason:10}: {float(gone.double().mean()):.0%} of x_2, mean error of the imputation {error:+.2f}")
    assert (abs(error) < 0.25) == (reason == "at random")

# %%
# If you suspect such a reason, model it: observe the mask as well, with a probability that depends on the number (a sample
# statement more in a program of your own), and see how far the answer moves.
#
# What to try
# -----------
#
# - ``pv.nn.Normal()`` in place of the Student's t on iris. What do log p(o) and the error say?
# - ``trained(..., num_particles=1)`` is the VAE's own bound. With how many draws does the error stop falling?
# - ``pv.nn.Heterogeneous`` with the kind of flower as a fifth column of classes, some of it missing. ``result.draws`` fills
#   it in; does it classify?
# - The left halves of the digits, or every second row. Which pixels have the largest standard deviation?
#
# All ways to say what is missing, in programs of your own too: :doc:`/missing_data`. Where the weights come from, and when
# to believe them: :doc:`04_evidence`.
