r"""
Counts
======

Counts of molecules, clicks or species vary more than Poisson counts do, and some data are counted longer than others. At the
end you know what a wrong likelihood of counts costs in nats, how a size factor enters a VAE and what the latents do without
one, and how to see both by ``pv.compare`` and on simulated data.
"""

# %%
# Cells
# -----
# A cell has a state :math:`z` of two numbers. Gene :math:`j` is read :math:`x_j` times, with a mean in proportion to how
# much of the cell was read at all, its size :math:`s`, as with the depth of sequencing:
#
# .. math:: z \sim N(0, I), \qquad m_j = s \exp(b_j + w_j^\top z), \qquad
#           \mathrm{E}[x_j] = m_j, \qquad \mathrm{Var}[x_j] = m_j + m_j^2 / \theta_j .
#
# The variance is that of negative binomial counts. For large :math:`\theta` they are Poisson counts; here :math:`\theta` is
# 2, as for many a gene. Everything is simulated, so the right answers are known.

import os
import warnings

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI
from torch import nn

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_CELLS, NUM_TEST, NUM_STEPS, NUM_PARTICLES = (200, 40, 30, 100) if SMOKE_TEST else (3000, 500, 1500, 300)
GENES, THETA = 50, 2.0
pyro.set_rng_seed(0)

true_state = torch.randn(NUM_CELLS, 2)
weight, bias = 0.4 * torch.randn(2, GENES), 0.5 + torch.randn(GENES)
size = (0.7 * torch.randn(NUM_CELLS, 1)).exp()
true_head = pv.nn.NegativeBinomial(THETA)
x = true_head(true_state @ weight + bias, size).sample()
print(f"counts of a cell: {x.sum(1).min():.0f} to {x.sum(1).max():.0f}; zeros: {(x == 0).float().mean():.0%}")

# %%
# A decoder of counts
# -------------------
# The size is *given*, like the label of a conditional VAE: the decoder takes it, and there is no density of it.
# ``WithSizeFactor`` multiplies the mean by it. The encoder sees log(1 + x), which is the input layer of the heads of counts,
# and the size.


def trained(size, likelihood, decoder=None):
    """Everything is trained from one start; a decoder that is given has nothing to learn."""
    pyro.set_rng_seed(0)
    posterior = pv.nn.Normal()
    encoder = nn.Sequential(pv.nn.MLP(GENES + 1, posterior.num_outputs(2), hidden=(64,)), posterior)
    network = pv.nn.MLP(2, likelihood.num_outputs(GENES), hidden=(64,))
    vae = pv.ConditionalVAE(
        encoder=pv.models.Concatenated(encoder, first=likelihood.input_layer()),
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
# Which counts, and with or without their size
# --------------------------------------------
# Four VAEs that differ in two things: Poisson, or negative binomial (NB) with a :math:`\theta` learned for each gene; with
# the size, or with a size of 1 for every cell, so that the latents have to find out how much was read. A fifth one has the
# decoder of the simulation, and learns its encoder alone: over many cells no model can be better.


class TrueDecoder(nn.Module):
    def forward(self, z, size):
        return true_head(z @ weight + bias, size)


def gene_wise():
    return pv.nn.NegativeBinomial("learned", theta_shape=(GENES,))


ones = torch.ones_like(size)
sizes = {"Poisson": ones, "NB": ones, "Poisson, sizes": size, "NB, sizes": size, "truth": size}
vaes = {
    "Poisson": trained(ones, pv.nn.Poisson()),
    "NB": trained(ones, gene_wise()),
    "Poisson, sizes": trained(size, pv.nn.Poisson()),
    "NB, sizes": trained(size, gene_wise()),
    "truth": trained(size, true_head, TrueDecoder()),
}


def log_evidence(name):
    vae = vaes[name]
    estimator = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=NUM_PARTICLES, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)  # about single cells, which the table counts
        return estimator(x[:NUM_TEST], sizes[name][:NUM_TEST])


found = {name: log_evidence(name) for name in vaes}
comparison = pv.compare(found)
print(comparison)

# %%
# Held-out cells, log p(x) by a proposal fitted to each, and differences cell by cell, which is why their errors are so much
# smaller than those of the means. The likelihood is worth tens of nats per cell, the size some more, and NB with sizes is
# all but the truth: what is left is what the decoder has not learned from the training cells.

mean = {name: float(record.log_evidence.mean()) for name, record in found.items()}
assert SMOKE_TEST or float(comparison.difference("NB, sizes", "Poisson, sizes").mean()) > 10
assert SMOKE_TEST or mean["truth"] - 1 < mean["NB, sizes"] < mean["truth"]

figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
pv.plots.plot_comparison(comparison, ax=ax)
plt.show()

# %%
# A warning on sizes. Here they are known from elsewhere, as a time of exposure is. Made from the counts, as the total of a
# cell over the mean total is, they are a part of the data: log p(x given its own total) is not log p(x), and comes out too
# high. Such models may be compared with one another on the same sizes, but not with one that has none.
#
# What the likelihood believes
# ----------------------------
# Simulate as many cells from each model as there are, at their sizes, and look at the genes: how high the highest counts go,
# and how often a gene is not read at all. Under a Poisson likelihood all that varies more than a Poisson count has to
# come from the latents, and two latents cannot do that for fifty genes, each on its own.
# (The highest counts of a few genes fall short under both: few training cells have states so far out.)


def of_genes(counts):
    rate = counts / size[:NUM_TEST]
    return rate.quantile(0.99, dim=0), (counts == 0).float().mean(0)


def simulated(name):
    return pv.simulate(vaes[name].model, x[:NUM_TEST], size[:NUM_TEST], seed=0).observed["obs"]


styles = {"Poisson, sizes": ("s", "white"), "NB, sizes": ("o", "0.7")}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
real = of_genes(x[:NUM_TEST])
for name, (marker, face) in styles.items():
    drawn = of_genes(simulated(name))
    for ax, truth, value in zip(axes, real, drawn, strict=True):
        ax.plot(truth, value, marker, color="black", markerfacecolor=face, markersize=5, label=f"drawn from {name}")
for ax, truth in zip(axes, real, strict=True):
    ends = [float(truth.min()), float(truth.max())]
    ax.plot(ends, ends, color="black", linewidth=0.8)
axes[0].set(xscale="log", yscale="log", xlabel="of held-out cells", ylabel="of simulated cells")
axes[0].set_title("99% quantile of the counts of a gene, over sizes")
axes[1].set(xlabel="of held-out cells", title="share of cells without a count of a gene")
axes[0].legend(frameon=False)
plt.show()

theta = vaes["NB, sizes"].decoder.head.theta.log_value.detach().exp()
print(f"theta of the genes, truth {THETA}: median {theta.median():.2f}, from {theta.min():.2f} to {theta.max():.2f}")
assert SMOKE_TEST or abs(theta.median() / THETA - 1) < 0.1

# %%
# What the latents do without a size
# ----------------------------------
# The size changes all genes alike, so a model that is not told spends its latents on it. Below, the posterior mean of each
# held-out cell; dark cells were read much. Without sizes the map shows how deep a cell was read; with sizes the state of the
# cell is left. How much of the true state or of the size a linear map reads off the two latents:


def explained(means, target):
    """R squared of a linear regression, mean over the columns of the target."""
    inputs = torch.cat([means, torch.ones(len(means), 1)], 1)
    residual = target - inputs @ torch.linalg.lstsq(inputs, target).solution
    return float(1 - (residual.var(0) / target.var(0)).mean())


# sphinx_gallery_thumbnail_number = 3
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", sharex=True, sharey=True)
log_size, state = size[:NUM_TEST].log(), true_state[:NUM_TEST]
print(f"{'R squared':<12}{'log size':>10}{'state':>8}")
for ax, name in zip(axes, ("NB", "NB, sizes"), strict=True):
    with torch.no_grad():
        means = vaes[name].encode(x[:NUM_TEST], sizes[name][:NUM_TEST]).mean
    of_size, of_state = explained(means, log_size), explained(means, state)
    print(f"{name:<12}{of_size:>10.2f}{of_state:>8.2f}")
    dots = ax.scatter(*means.T, c=log_size[:, 0], cmap="Greys", edgecolor="0.6", linewidth=0.4, s=22)
    ax.set(xlabel="latent 0", title=f"{name}\nR squared of log size {of_size:.2f}, of the state {of_state:.2f}")
axes[0].set_ylabel("latent 1")
figure.colorbar(dots, ax=axes, label="log size")
plt.show()
assert SMOKE_TEST or of_size < 0.1 < 0.8 < of_state

# %%
# What to try
# -----------
#
# - A third latent for the NB without sizes. Does it find room for the size, and what is left of the difference in log p(x)?
# - ``pv.nn.ZeroInflatedNegativeBinomial("learned", theta_shape=(GENES,))``. Nothing here is inflated: does ``pv.compare``
#   say so, or does it win by chance?
# - Sizes from the counts, ``x.sum(1, keepdim=True) / x.sum(1).mean()``. By how much does log p(x) rise, and over the truth?
# - Cells of two laboratories: a one-hot of the laboratory as further columns of y, after the size.
#
# Next: your own program, :doc:`10_your_own_model`. Which likelihood for which data: :doc:`/choosing`.
