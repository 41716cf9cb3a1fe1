r"""
ELBO surgery: what the KL term regularises
==========================================

One part of the KL of a VAE limits what the latents know about the data. Another part
makes the mixture of all posteriors resemble the prior. You will learn to divide a KL
into these parts, and to tell which part a penalty changes. You will also learn to tell
a mutual information from its upper limit, and why samples can be bad although the KL is
small.

Prerequisites: :doc:`06_rate_distortion` and :doc:`07_collapse`; about 1 minute to run.
"""

# %%
# One KL, three parts
# -------------------
# Draw one of the :math:`N` data, with number :math:`n`, and then draw
# :math:`z \sim q(z \mid x_n)`. For a reader who does not know :math:`n`, this :math:`z`
# comes from the *aggregated posterior* :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`.
# This density divides the KL into two parts (`Hoffman and Johnson (2016), "ELBO
# surgery: yet another way to carve up the variational evidence lower bound"
# <http://approximateinference.org/accepted/HoffmanJohnson2016.pdf>`__):
#
# .. math::
#
#    \frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, p(z))
#    = \underbrace{\mathrm{E}_q \log
#    \frac{q(z \mid x_n)}{q(z)}}_{\text{mutual information of } z \text{ and } n}
#    + \underbrace{\mathrm{E}_q \log \frac{q(z)}{p(z)}}_{\text{marginal KL}} .
#
# The mutual information is what :math:`z` says about the datum (data point) that it
# came from. There are :math:`N` data, so it is **at most** :math:`\log N`. The marginal
# KL is the divergence of the aggregated posterior from the prior. With the product of
# the marginals it divides again (`Chen et al. (2018), "Isolating sources of
# disentanglement in variational autoencoders" <https://arxiv.org/abs/1802.04942>`__):
#
# .. math::
#
#    \mathrm{E}_q \log \frac{q(z)}{p(z)}
#    = \underbrace{\mathrm{E}_q \log
#    \frac{q(z)}{\prod_d q(z_d)}}_{\text{total correlation}}
#    + \underbrace{\sum_d
#    \mathrm{KL}(q(z_d) \,\|\, p(z_d))}_{\text{dimension-wise KL}} .
#
# The total correlation measures how much the dimensions of :math:`z` depend on each
# other. The dimension-wise KL compares each dimension with its prior. All parts are in
# nats.

import math
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
PARTS = ("mutual_information", "total_correlation", "dimension_wise_kl")
pyro.set_rng_seed(0)
# sphinx_gallery_thumbnail_number = 3
# sphinx_gallery_start_ignore
COLORS = dict(zip(PARTS, ("#56B4E9", "#E69F00", "#009E73"), strict=True))
HATCHES = ("", "//", "..")
# sphinx_gallery_end_ignore


def cut(vae, x, num_particles=5, **options):
    """The surgery, without its warnings about limits and biases."""
    whole = "aggregate" in options  # drop the last batch, which is smaller
    data = TensorDataset(x)
    batches = DataLoader(data, batch_size=64, shuffle=True, drop_last=whole)
    surgery = pv.ELBOSurgery(
        vae.model, vae.guide, num_particles=num_particles, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.SurgeryWarning)
        return surgery(batches, progress=False)


# %%
# Two Gaussians, by quadrature
# ----------------------------
# The first example has two data with two latents each. Their posteriors are Gaussians
# around :math:`(m, m)` and :math:`(-m, -m)`: the encoder returns the datum as the mean.
# The decoder has no influence on a KL. A sum over a grid gives all three parts.


class Identity(nn.Module):
    def forward(self, x):
        return dist.Normal(x, 0.5).to_event(1)


def quadrature(means):
    """Mutual information, total correlation and dimension-wise KL."""
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    step = axis[1] - axis[0]
    # Shape (N, 2, grid):
    each = dist.Normal(means.double()[:, :, None], 0.5).log_prob(axis).exp()
    joint = each[:, 0, :, None] * each[:, 1, None, :]
    q, marginals = joint.mean(0), each.mean(0)
    own = torch.xlogy(joint, joint).sum() * step**2 / len(means)
    mixed = torch.xlogy(q, q).sum() * step**2
    singles = torch.xlogy(marginals, marginals).sum() * step
    priors = (marginals * dist.Normal(0.0, 1.0).log_prob(axis)).sum() * step
    return torch.stack([own - mixed, mixed - singles, singles - priors])


decoder = nn.Sequential(nn.Identity(), pv.nn.Normal(1.0))
toy = pv.VAE(Identity(), decoder, pv.nn.StandardNormal(2))
distances = torch.linspace(0.0, 2.0, 3 if SMOKE_TEST else 9)
exact = torch.stack(
    [quadrature(torch.tensor([[m, m], [-m, -m]])) for m in distances.tolist()]
)
found = []
for m, truth in zip(distances, exact, strict=True):
    surgery = cut(toy, torch.stack([m.expand(2), -m.expand(2)]), num_particles=1000)
    parts = [getattr(surgery, name) for name in PARTS]
    found.append([float(part.value) for part in parts])
    for part, value in zip(parts, truth, strict=True):
        # 0.01, because for a large m no draw may have fallen between the two.
        assert abs(part.value - value) < 4.5 * part.std_error + 0.01
# sphinx_gallery_start_ignore
figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
areas = ax.stackplot(distances, exact.T, colors=COLORS.values(), labels=PARTS)
for area, hatch in zip(areas, HATCHES, strict=True):
    area.set(hatch=hatch, edgecolor="white", linewidth=0)
ax.plot(distances, torch.tensor(found).cumsum(1), "ko", ms=4)
ax.axhline(math.log(2), color="black", ls=":", lw=1, label="log 2")
ax.set(xlabel="m, half of the distance in each dimension", ylabel="nats")
ax.set_title("Quadrature (areas) and ELBOSurgery (dots)")
ax.legend(loc="upper left", bbox_to_anchor=(0.0, 0.9), frameon=False)
plt.show()
# sphinx_gallery_end_ignore

# %%
# For a large :math:`m`, one draw :math:`z` tells with certainty which of the two data
# it came from. This is the mutual information of :math:`\log 2` nats. One coordinate of
# :math:`z` tells the other's sign, which is the total correlation of :math:`\log 2`. A
# larger distance adds no information: only the dimension-wise KL grows. With :math:`N`
# separate posteriors the limit is :math:`\log N`:

for n in (4, 16, 64):
    surgery = cut(toy, 20.0 * torch.stack([torch.arange(n), -torch.arange(n)], 1))
    print(f"log N = {math.log(n):.4f}. {surgery.verdict()}")
    assert abs(float(surgery.mutual_information.value) - math.log(n)) < 1e-3

# %%
# The digits
# ----------
# The next model is a VAE with two latents for the digits of scikit-learn. Its
# likelihood is a Binomial, since a pixel is a whole number from 0 to 16.

x, y = (
    torch.tensor(part, dtype=torch.float)[: 300 if SMOKE_TEST else None]
    for part in load_digits(return_X_y=True)
)
N, EPOCHS = len(x), 2 if SMOKE_TEST else 100
loader = DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)


def trained(latent_dim, objective):
    pyro.set_rng_seed(1)
    likelihood = pv.nn.Binomial(16)
    vae = pv.mlp_vae(64, latent_dim, likelihood=likelihood, hidden=(128,))
    decay = 0.1 ** (1 / (EPOCHS * len(loader)))
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": decay})
    svi = SVI(vae.model, vae.guide, optimizer, objective)
    for _ in range(EPOCHS):
        for batch, _ in loader:
            svi.step(batch)
    return vae


flat = trained(2, pv.BetaTraceMeanField_ELBO())
surgery = cut(flat, x)
print(surgery)

# %%
# First mistake: a batch in the place of the data
# -----------------------------------------------
# Often the sum over the data in :math:`q(z)` is replaced by the sum over a batch of
# :math:`B`. But that is the surgery of a data set of :math:`B` data, and its limit is
# :math:`\log B`, 4.16 nats for 64. The result is not noisy but wrong, and a better
# encoder would not change it. The minibatch estimate of the library gives the other
# data of the batch a higher weight, so that its limit is :math:`\log N`. It is still
# biased by the logarithm.
#
# Second mistake: more than log N
# -------------------------------
# *Minibatch-weighted sampling* divides the sum over a batch by :math:`N B` instead of
# :math:`B`. So it adds :math:`\log N` to the first mistake. A *leave-one-out* estimate,
# without the datum that :math:`z` was drawn for, has no limit either. A result above
# :math:`\log N` is an error of the estimator, never a property of the model. The parts
# add up to the KL for any wrong :math:`q(z)` as well, so a correct sum is no proof of
# correct parts.
#
# The next cell compares these estimates for two latents and for eight.

deep = trained(8, pv.BetaTraceMeanField_ELBO())


def readings(vae):
    """The mutual information by five estimates."""
    batches = [part for part in x[torch.randperm(N)].split(64) if len(part) == 64]
    parts = [cut(vae, part).mutual_information.value for part in batches]
    by_batch = float(torch.stack(parts).mean())
    minibatch, leave_one_out = (
        cut(vae, x, aggregate=name).mutual_information.value
        for name in ("minibatch", "leave-one-out")
    )
    all_data = cut(vae, x).mutual_information.value
    return all_data, by_batch, by_batch + math.log(N), minibatch, leave_one_out


ceilings = {
    "all data": math.log(N),
    "batches of 64 alone": math.log(64),
    "minibatch-weighted": math.inf,
    "aggregate='minibatch'": math.log(N),
    "aggregate='leave-one-out'": math.inf,
}
columns = readings(flat), readings(deep)
print(
    f"\n{'mutual information, nats':<28}{'2 latents':>12}{'8 latents':>12}"
    f"{'ceiling':>10}"
)
for (name, ceiling), two, eight in zip(ceilings.items(), *columns, strict=True):
    print(f"{name:<28}{two:12.3f}{eight:12.3f}{ceiling:10.3f}")
    assert max(two, eight) < ceiling

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
pv.plots.plot_surgery(surgery, left)
pv.plots.plot_surgery(cut(deep, x), right)
# sphinx_gallery_start_ignore
left.set_title("The KL of two latents")
right.set_title("The KL of eight latents")
plt.show()
# sphinx_gallery_end_ignore

# %%
# With two latents the true mutual information is below :math:`\log N`, and a batch of
# 64 gives too little. With eight latents, there are too few digits: the mutual
# information is near :math:`\log N`, so it only counts the digits. What would be
# information with more data appears as total correlation. The next cell uses the same
# encoder with fewer digits.

for num in (N // 8, N // 2, N):
    part = cut(deep, x[torch.randperm(N)[:num]])
    print(
        f"N = {num:4d}: mutual information {part.mutual_information.value:6.3f}"
        f" of at most {part.log_num_data:.3f},"
        f" total correlation {part.total_correlation.value:6.3f},"
        f" KL {part.kl.value:.3f}"
    )

# %%
# Holes: bad samples with a small KL
# ----------------------------------
# A model generates from :math:`p(z)`, but its decoder was trained on draws from
# :math:`q(z)`. Suppose that :math:`q(z)` is proportional to :math:`p(z)` except for a
# *hole*, a region where :math:`q(z)` is zero. With a share :math:`h` of the prior in
# the hole, the marginal KL is only
#
# .. math:: \mathrm{KL}(q(z) \,\|\, p(z)) = -\log(1 - h) .
#
# A hole with *half* of all samples costs 0.69 nats, which is hardly visible in a KL of
# 6 or 16. In general, a region with the share :math:`h` of the prior and :math:`h'` of
# :math:`q(z)` costs at least the KL between two coins of these probabilities.
#
# The next cell finds the regions where :math:`q(z)` is less than a tenth of the prior.
# It prints their shares, the least marginal KL that they cost, and the distance of
# decoded draws to the nearest digit, inside and outside of the holes. (With more data,
# some of the holes would be filled.)


@torch.no_grad()
def log_ratio(vae, z):
    """log q(z) - log p(z), z of shape (M, D)."""
    encoded = vae.encode(x)
    log_sums = [encoded.log_prob(rows[:, None]).logsumexp(1) for rows in z.split(500)]
    log_q = torch.cat(log_sums) - math.log(N)
    return log_q - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)


samples, pictures = {}, {}
for name, vae in (("8 latents", deep), ("2 latents", flat)):
    collect = pv.AggregatedPosterior(vae.model, vae.guide, seed=0)
    sample = collect(loader, labels=lambda batch: batch[1], progress=False)
    of_prior, of_q = log_ratio(vae, sample.prior), log_ratio(vae, sample.draws)
    h, h_q = (float((v < -math.log(10)).float().mean()) for v in (of_prior, of_q))
    coins = dist.Bernoulli(h_q), dist.Bernoulli(h)
    least = float(torch.distributions.kl_divergence(*coins))
    marginal = float(cut(vae, x).marginal_kl.value)
    # Draws of the prior, those in the deepest holes first:
    decoded = vae.decode(sample.prior[of_prior.argsort()]).mean.detach()
    # Root mean square over 64 pixels, in grey levels:
    nearest = torch.cdist(decoded, x).min(1).values / 8
    inside = max(8, int(h * N))
    print(
        f"{name}: holes have {h:.1%} of the prior, {h_q:.1%} of q(z),"
        f" so {least:.2f} nats of marginal KL {marginal:.2f};"
        f" nearest digit {nearest[:inside].mean():.2f} from holes,"
        f" {nearest[inside:].mean():.2f} elsewhere"
    )
    assert least < marginal + 0.05
    samples[name], pictures[name] = sample, (decoded[inside:], decoded[:inside])

# %%
# For two latents, the next figure shows the posterior means of the digits (left) and
# the holes in the plane of the latents (middle). The images are decoded draws from the
# prior, inside and outside of the holes.

figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
pv.plots.plot_latents(samples["2 latents"], axes[0])
# sphinx_gallery_start_ignore
axis = torch.linspace(-3.2, 3.2, 100)
ratio = log_ratio(flat, torch.cartesian_prod(axis, axis)).view(100, 100).T
shades = axes[1].contourf(axis, axis, ratio.clamp(-6, 6), 12, cmap="cividis")
axes[1].contour(axis, axis, ratio, [-math.log(10)], colors="white", linestyles="--")
figure.colorbar(shades, label="log q(z) - log p(z), nats")
axes[1].set(xlabel="latent[0]", ylabel="latent[1]")
axes[1].set_title(f"Holes (dashed edge): {h:.0%} of the prior")
rows = [
    some[torch.randperm(len(some))[:5]].view(5, 8, 8)
    for name in pictures
    for some in pictures[name]
]
# White lines between the images:
rows = [torch.cat([*nn.functional.pad(row, (1, 1, 1, 1))], 1) for row in rows]
axes[2].imshow(torch.cat(rows), cmap="gray_r")
axes[2].set(title="Decoded draws from the prior", xticks=[])
kinds = ["8 latents,\nelsewhere", "8, holes", "2, elsewhere", "2, holes"]
axes[2].set_yticks([4.5, 14.5, 24.5, 34.5], kinds)
plt.show()
# sphinx_gallery_end_ignore

# %%
# What a penalty on the total correlation does
# --------------------------------------------
# ``pv.TotalCorrelationELBO`` gives the total correlation a weight :math:`\beta`. At
# :math:`\beta = 1` it is the ELBO, which is the run above. Compare all parts, not only
# the one with the penalty: the mutual information falls as well, and so does the ELBO.
# Nor is a low KL of a unit a merit. The unit may have collapsed, so count the active
# ones.

runs = {1: deep}
for beta in (5, 15):
    runs[beta] = trained(8, pv.TotalCorrelationELBO(dataset_size=N, beta=beta))

objective, bars = pv.BetaTraceMeanField_ELBO(), []
for beta, vae in runs.items():
    surgery = cut(vae, x)
    units = pv.ActiveUnits(vae.model, vae.guide, seed=0)(loader, progress=False)
    objective.loss(vae.model, vae.guide, x)
    bars.append([float(getattr(surgery, name).value) for name in PARTS])
    parts = " ".join(f"{part:6.3f}" for part in bars[-1])
    print(
        f"beta {beta:2d}: KL {surgery.kl.value:6.3f}, its parts {parts}"
        f"  ELBO {objective.terms.per_datum().elbo:.1f},"
        f" {int(units.active.sum())} of 8 units active"
    )

# %%
# The left plot has the parts of the KL for the three runs. The right plot shows the
# aggregated posterior of the first run, unit by unit, beside the prior.

figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 1.6)
)
pv.plots.plot_aggregated_posterior(samples["8 latents"], right)
# sphinx_gallery_start_ignore
bottom = torch.zeros(3)
places = [f"$\\beta$ = {beta}" for beta in runs]
for heights, (name, color), hatch in zip(
    torch.tensor(bars).T, COLORS.items(), HATCHES, strict=True
):
    style = {"color": color, "hatch": hatch, "edgecolor": "white", "label": name}
    left.bar(places, heights, 0.6, bottom, **style)
    bottom = bottom + heights
left.axhline(math.log(N), color="black", ls=":", label="log N")
left.set(ylabel="nats per digit", ylim=(0, 1.6 * float(bottom.max())))
left.set_title("The KL in parts")
left.legend(frameon=False)
plt.show()
# sphinx_gallery_end_ignore

# %%
# Do not conclude from the right plot that the aggregated posterior is the prior. Unit
# by unit this is true, to a tenth of a nat or so. Jointly it is false, by the whole
# total correlation: no picture of single units shows a hole.
#
# What to try
# -----------
# - Use batches of 256 in the first mistake. How close does the result for two latents
#   come to that of all data? (Its limit is :math:`\log 256 = 5.55` nats.)
# - Use a wider decoder for two latents. Do the holes shrink, or do the means spread?
# - Use ``mutual_information=0.0`` in ``TotalCorrelationELBO``, which removes the first
#   part from the loss. What happens to :math:`\log p(x)`?
#
# Practice problems
# -----------------
#
# 1. Derive both divisions of the KL at the top of this page.
# 2. Show that the mutual information is at most :math:`\log N`. When is it equal?
# 3. Show that minibatch-weighted sampling adds exactly :math:`\log N` to the result of
#    batches alone. Check it with the table.
# 4. Derive :math:`-\log(1 - h)` for the hole. Which marginal KL has a hole with 90% of
#    the prior?
# 5. In the example of two Gaussians, let :math:`m` be large. Why is the total
#    correlation :math:`\log 2`? What would it be with three latents, and posteriors
#    around :math:`(m, m, m)` and :math:`(-m, -m, -m)`?
#
# Answers
# -------
#
# 1. Write :math:`\log \frac{q(z \mid x_n)}{p(z)}` as :math:`\log \frac{q(z \mid
#    x_n)}{q(z)} + \log \frac{q(z)}{p(z)}` and take the mean over :math:`n` and
#    :math:`z`. For the second, write :math:`\log \frac{q(z)}{p(z)}` as :math:`\log
#    \frac{q(z)}{\prod_d q(z_d)} + \sum_d \log \frac{q(z_d)}{p(z_d)}`. The prior is a
#    product over the dimensions, and the mean of a function of :math:`z_d` needs only
#    :math:`q(z_d)`.
# 2. The sum :math:`q(z)` contains the term :math:`q(z \mid x_n) / N`, so
#    :math:`q(z \mid x_n) / q(z) \le N`. It is equal where the posteriors do not
#    overlap.
# 3. The estimate of :math:`q(z)` is that of the batch, times :math:`1 / N`. The mutual
#    information has minus its logarithm, which is :math:`\log N` larger. In the table,
#    :math:`11.374 - 3.880 = 7.494 = \log 1797`.
# 4. Outside of the hole :math:`q(z) = p(z) / (1 - h)`, and all draws of :math:`q` are
#    there. So :math:`\log \frac{q(z)}{p(z)} = -\log(1 - h)` for all of them. With
#    :math:`h = 0.9` it is :math:`\log 10 = 2.30` nats.
# 5. In each dimension the marginal is a mixture of two separate Gaussians with weights
#    of one half. The product of the two marginals has four separate Gaussians, each
#    with the weight 1/4. Two of them are in :math:`q(z)`, each with the weight 1/2. So
#    :math:`\log \frac{q(z)}{q(z_1) q(z_2)} = \log 2` at every draw. With three latents
#    the weights are 1/8 and 1/2, which gives :math:`2 \log 2`.
#
# Next: what a likelihood makes of squared errors and of the look of samples,
# :doc:`09_likelihood_and_looks`.
