r"""
Counts
======

Counts of molecules, clicks or species vary more than Poisson counts do, and some data
are counted for longer than others. This tutorial measures what a wrong likelihood of
counts costs in nats. It shows how a size factor enters a VAE, and what the latents do
without one. Both are seen by ``pv.compare`` and on simulated data.

Prerequisites: :doc:`02_first_vae` and :doc:`04_evidence`; about 1 minute to run.
"""

# %%
# Cells
# -----
# The data are simulated cells, so the right answers are known. A cell has a state
# :math:`z` of two numbers. Gene :math:`j` is counted :math:`x_j` times. The mean count
# is proportional to the *size* :math:`s` of the cell, which says how much of the cell
# was read at all. In real data this is the depth of sequencing. The model is
#
# .. math::
#
#    z \sim \mathrm{N}(0, I), \qquad m_j = s \exp(b_j + w_j^\top z), \qquad
#    \mathrm{E}[x_j] = m_j, \qquad \mathrm{Var}[x_j] = m_j + m_j^2 / \theta_j .
#
# The variance is that of negative binomial counts. For large :math:`\theta` they become
# Poisson counts, whose variance is equal to the mean. Here :math:`\theta = 2`, as for
# many genes.

import os
import warnings

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI
from torch import nn

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_CELLS, NUM_TEST = (200, 40) if SMOKE_TEST else (3000, 500)
NUM_STEPS, NUM_PARTICLES = (30, 100) if SMOKE_TEST else (1500, 300)
GENES, THETA = 50, 2.0
pyro.set_rng_seed(0)

true_state = torch.randn(NUM_CELLS, 2)
weight, bias = 0.4 * torch.randn(2, GENES), 0.5 + torch.randn(GENES)
size = (0.7 * torch.randn(NUM_CELLS, 1)).exp()
true_head = pv.nn.NegativeBinomial(THETA)
x = true_head(true_state @ weight + bias, size).sample()
total, zeros = x.sum(1), (x == 0).float().mean()
print(f"counts of a cell: {total.min():.0f} to {total.max():.0f}; zeros: {zeros:.0%}")

# %%
# A decoder of counts
# -------------------
# The size is *given*, like the label in a conditional VAE. It is an input of the
# decoder, and the model has no density for it. ``WithSizeFactor`` multiplies the mean
# by the size. The encoder sees the size and :math:`\log(1 + x)`, which is what the
# ``input_layer()`` of a likelihood of counts computes.


def trained(size, likelihood, decoder=None):
    """A VAE trained from the same start. A decoder that is passed has no parameters."""
    pyro.set_rng_seed(0)
    posterior = pv.nn.Normal()
    to_state = pv.nn.MLP(GENES + 1, posterior.num_outputs(2), hidden=(64,))
    network = pv.nn.MLP(2, likelihood.num_outputs(GENES), hidden=(64,))
    vae = pv.ConditionalVAE(
        encoder=pv.models.Concatenated(
            nn.Sequential(to_state, posterior),
            first=likelihood.input_layer(),
        ),
        decoder=decoder or pv.models.WithSizeFactor(network, likelihood),
        prior=pv.nn.StandardNormal(2),
    )
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / NUM_STEPS)})
    svi = SVI(vae.model, vae.guide, optimizer, pv.BetaTraceMeanField_ELBO())
    for _ in range(NUM_STEPS):
        rows = torch.randint(NUM_TEST, NUM_CELLS, (200,))
        svi.step(x[rows], size[rows])
    return vae.eval()


# %%
# Which likelihood, with or without the size
# ------------------------------------------
# Four VAEs differ in two things:
#
# - The likelihood is Poisson, or negative binomial (NB) with a :math:`\theta` that is
#   learned for each gene.
# - The size is given, or it is set to 1 for every cell. In the second case the latents
#   have to find out how much of the cell was read.
#
# A fifth VAE has the decoder of the simulation and learns its encoder alone. Averaged
# over many cells, no model can have a higher :math:`\log p(x)`.


class TrueDecoder(nn.Module):
    def forward(self, z, size):
        return true_head(z @ weight + bias, size)


def gene_wise():
    return pv.nn.NegativeBinomial("learned", theta_shape=(GENES,))


ones = torch.ones_like(size)
sizes = {
    "Poisson": ones,
    "NB": ones,
    "Poisson, sizes": size,
    "NB, sizes": size,
    "truth": size,
}
vaes = {
    "Poisson": trained(ones, pv.nn.Poisson()),
    "NB": trained(ones, gene_wise()),
    "Poisson, sizes": trained(size, pv.nn.Poisson()),
    "NB, sizes": trained(size, gene_wise()),
    "truth": trained(size, true_head, TrueDecoder()),
}


def log_evidence(name):
    estimator = pv.AdaptiveImportanceSampling(
        vaes[name].model,
        vaes[name].guide,
        num_particles=NUM_PARTICLES,
        seed=0,
    )
    with warnings.catch_warnings():
        # The warnings are about single cells, which the table below counts.
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return estimator(x[:NUM_TEST], sizes[name][:NUM_TEST])


found = {name: log_evidence(name) for name in vaes}
comparison = pv.compare(found)
print(comparison)

# %%
# All numbers are of held-out cells. The estimator fits a proposal to each cell. The
# differences are taken cell by cell, so what makes a cell hard for both models cancels.
# For this reason the errors of the differences are much smaller than those of the
# means.
#
# The likelihood is worth tens of nats per cell, and the size is worth some more. NB
# with sizes comes within 0.2 nats of the truth. The rest is what the decoder has not
# learned from the training cells.

mean = {name: float(record.log_evidence.mean()) for name, record in found.items()}
gain = comparison.difference("NB, sizes", "Poisson, sizes").mean()
assert SMOKE_TEST or float(gain) > 10
assert SMOKE_TEST or mean["truth"] - 1 < mean["NB, sizes"] < mean["truth"]

# sphinx_gallery_start_ignore
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
pv.plots.plot_comparison(comparison, ax=ax)
plt.show()
# sphinx_gallery_end_ignore

# %%
# A warning about sizes: here they are known from elsewhere, as a time of exposure is.
# Often they are computed from the counts instead, as the total of a cell divided by the
# mean total. Then they are a part of the data. The number
# :math:`\log p(x \mid \text{total})` is not :math:`\log p(x)`, and it is too high. Such
# models may be compared with one another on the same sizes, but not with a model
# without sizes.
#
# What each likelihood implies for the counts
# -------------------------------------------
# Simulate as many cells from each model as were held out, at the same sizes. Then
# compare two properties of each gene: how high its highest counts are, and in how many
# cells it is not counted at all.
#
# Under a Poisson likelihood, all variation beyond that of a Poisson count has to come
# from the latents. Two latents cannot produce such variation in fifty genes
# independently. (Both models fall short of the highest counts of a few genes. The
# reason is that few training cells have states so far from the mean.)


def of_genes(counts):
    rate = counts / size[:NUM_TEST]
    return rate.quantile(0.99, dim=0), (counts == 0).float().mean(0)


def simulated(name):
    model = vaes[name].model
    return pv.simulate(model, x[:NUM_TEST], size[:NUM_TEST], seed=0).observed["obs"]


real = of_genes(x[:NUM_TEST])
drawn = {name: of_genes(simulated(name)) for name in ("Poisson, sizes", "NB, sizes")}

# sphinx_gallery_start_ignore
styles = {"Poisson, sizes": ("s", "#E69F00"), "NB, sizes": ("o", "#0072B2")}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
for name, (marker, color) in styles.items():
    for ax, truth, value in zip(axes, real, drawn[name], strict=True):
        ax.plot(
            truth,
            value,
            marker,
            color=color,
            markeredgecolor="white",
            markersize=5.5,
            label=f"drawn from {name}",
        )
for ax, truth in zip(axes, real, strict=True):
    ends = [float(truth.min()), float(truth.max())]
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.set(xlabel="of held-out cells", ylabel="of simulated cells")
axes[0].set(xscale="log", yscale="log")
axes[0].set_title("99% quantile of the counts of a gene, over sizes")
axes[1].set_title("share of cells without a count of a gene")
axes[0].legend(frameon=False)
plt.show()
# sphinx_gallery_end_ignore

theta = vaes["NB, sizes"].decoder.head.theta.log_value.detach().exp()
values = f"median {theta.median():.2f}, from {theta.min():.2f} to {theta.max():.2f}"
print(f"theta of the genes, truth {THETA}: {values}")
assert SMOKE_TEST or abs(theta.median() / THETA - 1) < 0.1

# %%
# Each marker is one gene. On the black line, simulated and held-out cells agree.
#
# What the latents do without a size
# ----------------------------------
# The size changes all genes alike. A model that is not told the size uses its latents
# for it. The figure shows the posterior mean of each held-out cell; dark cells are
# large ones. Without sizes, the map of the latents shows how much of a cell was read.
# With sizes, it shows the state of the cell. The table says how much of the true state
# and of the size a linear regression can predict from the two latents.


def explained(means, target):
    """R squared of a linear regression, mean over the columns of the target."""
    inputs = torch.cat([means, torch.ones(len(means), 1)], 1)
    residual = target - inputs @ torch.linalg.lstsq(inputs, target).solution
    return float(1 - (residual.var(0) / target.var(0)).mean())


# sphinx_gallery_thumbnail_number = 3
log_size, state = size[:NUM_TEST].log(), true_state[:NUM_TEST]
latents, r_squared = {}, {}
print(f"{'R squared':<12}{'log size':>10}{'state':>8}")
for name in ("NB", "NB, sizes"):
    with torch.no_grad():
        latents[name] = vaes[name].encode(x[:NUM_TEST], sizes[name][:NUM_TEST]).mean
    of_size = explained(latents[name], log_size)
    of_state = explained(latents[name], state)
    r_squared[name] = of_size, of_state
    print(f"{name:<12}{of_size:>10.2f}{of_state:>8.2f}")
assert SMOKE_TEST or of_size < 0.1 < 0.8 < of_state

# sphinx_gallery_start_ignore
same = {"sharex": True, "sharey": True}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", **same)
for ax, name in zip(axes, latents, strict=True):
    dots = ax.scatter(
        *latents[name].T,
        c=log_size[:, 0],
        cmap="cividis_r",
        edgecolor="0.6",
        linewidth=0.4,
        s=22,
    )
    of_size, of_state = r_squared[name]
    ax.set_xlabel("latent 0")
    values = f"of log size {of_size:.2f}, of the state {of_state:.2f}"
    ax.set_title(f"{name}\nR squared {values}")
axes[0].set_ylabel("latent 1")
figure.colorbar(dots, ax=axes, label="log size")
plt.show()
# sphinx_gallery_end_ignore

# %%
# What to try
# -----------
#
# - Add a third latent to the NB model without sizes. Does it hold the size then, and
#   how much of the difference in :math:`\log p(x)` is left?
# - Use ``pv.nn.ZeroInflatedNegativeBinomial("learned", theta_shape=(GENES,))``. These
#   data have no additional zeros. Does ``pv.compare`` say so, or does this model win by
#   chance?
# - Compute sizes from the counts: ``x.sum(1, keepdim=True) / x.sum(1).mean()``. By how
#   much does :math:`\log p(x)` rise, and does it rise above the truth?
# - Simulate cells of two laboratories. Pass the laboratory one-hot encoded, as further
#   columns of the condition after the size.
#
# Practice problems
# -----------------
#
# 1. A negative binomial count is a Poisson count whose rate is drawn from a Gamma
#    distribution with mean :math:`m` and variance :math:`m^2 / \theta`. Derive the
#    variance of the count.
# 2. A gene has :math:`m = 10` and :math:`\theta = 2`. Compare the standard deviation of
#    its count with that of a Poisson count of the same mean.
# 3. What is the probability of a count of zero for both, as a formula and for
#    :math:`m = 10`, :math:`\theta = 2`?
# 4. The decoder without sizes is a smooth function of two latents. Why does it have a
#    lower :math:`\log p(x)` than the decoder with sizes, however wide its network is?
# 5. Sizes are computed from the counts, as totals. Why is
#    :math:`\log p(x \mid \text{total})` at least :math:`\log p(x)` under a model that
#    generates both?
#
# .. raw:: html
#
#    <details><summary>Answers</summary>
#
# 1. Let :math:`r` be the rate. By the law of total variance, :math:`\mathrm{Var}[x]` is
#    :math:`\mathrm{E}[\mathrm{Var}[x \mid r]] + \mathrm{Var}[\mathrm{E}[x \mid r]]`.
#    Both the mean and the variance of :math:`x` given :math:`r` are :math:`r`. So the
#    sum is :math:`\mathrm{E}[r] + \mathrm{Var}[r] = m + m^2 / \theta`.
# 2. The variance is :math:`10 + 100 / 2 = 60`, so the standard deviation is 7.7. That
#    of the Poisson count is :math:`\sqrt{10} = 3.2`.
# 3. It is :math:`(1 + m / \theta)^{-\theta}` for the negative binomial and
#    :math:`e^{-m}` for Poisson. For these numbers it is :math:`6^{-2} = 2.8\%` against
#    0.005%.
# 4. A cell is described by three numbers: its size and its two-dimensional state. A
#    smooth function of two latents cannot follow all three. The model has to treat the
#    part that is left out as noise, so its distribution of the counts is wider.
# 5. The total is a function of :math:`x`, so
#    :math:`p(x) = p(x \mid \text{total}) \, p(\text{total})`. The probability of the
#    total is at most 1, so its logarithm is at most zero.
#
# .. raw:: html
#
#    </details>
#
# Next: your own program, :doc:`10_your_own_model`. Which likelihood for which data:
# :doc:`/choosing`.
