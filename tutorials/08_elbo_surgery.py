r"""
ELBO surgery: what the KL term really regularises
=================================================

A part of the KL of a VAE limits what the latents know about the data, and a part makes the crowd of all posteriors look like
the prior. At the end you can take a KL apart, say which part a penalty touches, tell a mutual information from its ceiling,
and know why samples can be bad although the KL is small.
"""

# sphinx_gallery_thumbnail_number = 3

# %%
# One KL, three parts
# -------------------
# Draw one of N data, :math:`n`, and then :math:`z \sim q(z|x_n)`. Without the number :math:`n`, such a :math:`z` comes from
# the *aggregated posterior* :math:`q(z) = \frac1N \sum_n q(z|x_n)`. Put it between the two densities of the KL (Hoffman and
# Johnson, 2016, `ELBO surgery <http://approximateinference.org/accepted/HoffmanJohnson2016.pdf>`__):
#
# .. math::
#
#    \frac1N \sum_n KL(q(z|x_n) \| p(z))
#    = \underbrace{E \log \frac{q(z|x_n)}{q(z)}}_{\text{mutual information of } z \text{ and } n}
#    + \underbrace{E \log \frac{q(z)}{p(z)}}_{\text{marginal KL}}.
#
# The first is what :math:`z` says about which datum it came from: one of N, so it is **at most log N**. The second says how
# far the crowd is from the prior, and splits again, with the product of the marginals in between (Chen et al., 2018,
# `arXiv:1802.04942 <https://arxiv.org/abs/1802.04942>`__):
#
# .. math::
#
#    E \log \frac{q(z)}{p(z)} = \underbrace{E \log \frac{q(z)}{\prod_d q(z_d)}}_{\text{total correlation}}
#    + \underbrace{\sum_d KL(q(z_d) \| p(z_d))}_{\text{dimension-wise KL}}.
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
PARTS = {"mutual_information": "0.9", "total_correlation": "0.65", "dimension_wise_kl": "0.4"}  # and shades to draw them in
pyro.set_rng_seed(0)


def cut(vae, x, num_particles=5, **options):
    """The surgery, quiet where it warns about ceilings and biases: this page is about them."""
    batches = DataLoader(TensorDataset(x), batch_size=64, shuffle=True, drop_last="aggregate" in options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.SurgeryWarning)
        return pv.ELBOSurgery(vae.model, vae.guide, num_particles=num_particles, **options)(batches, progress=False)


# %%
# Two Gaussians, by quadrature
# ----------------------------
# Two data whose posteriors are Gaussians in two dimensions, around :math:`(m, m)` and :math:`(-m, -m)`: an encoder that
# returns the datum as the mean. (The decoder plays no part in a KL.) A grid gives all three parts.
class Itself(nn.Module):
    def forward(self, x):
        return dist.Normal(x, 0.5).to_event(1)


def quadrature(means):
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    step = axis[1] - axis[0]
    each = dist.Normal(means.double()[:, :, None], 0.5).log_prob(axis).exp()  # (N, 2, grid)
    joint = each[:, 0, :, None] * each[:, 1, None, :]
    q, marginals = joint.mean(0), each.mean(0)
    own, mixed = torch.xlogy(joint, joint).sum() * step**2 / len(means), torch.xlogy(q, q).sum() * step**2
    singles = torch.xlogy(marginals, marginals).sum() * step
    priors = (marginals * dist.Normal(0.0, 1.0).log_prob(axis)).sum() * step
    return torch.stack([own - mixed, mixed - singles, singles - priors])


toy = pv.VAE(Itself(), nn.Sequential(nn.Identity(), pv.nn.Normal(1.0)), pv.nn.StandardNormal(2))
distances = torch.linspace(0.0, 2.0, 3 if SMOKE_TEST else 9)
exact = torch.stack([quadrature(torch.tensor([[m, m], [-m, -m]])) for m in distances.tolist()])
found = []
for m, truth in zip(distances, exact, strict=True):
    surgery = cut(toy, torch.stack([m.expand(2), -m.expand(2)]), num_particles=1000)
    parts = [getattr(surgery, name) for name in PARTS]
    found.append([float(part.value) for part in parts])
    for part, value in zip(parts, truth, strict=True):  # 0.01: far apart, no draw may have fallen in between
        assert abs(part.value - value) < 4.5 * part.std_error + 0.01

figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
ax.stackplot(distances, exact.T, colors=PARTS.values(), labels=PARTS)
ax.plot(distances, torch.tensor(found).cumsum(1), "ko", ms=4)
ax.axhline(math.log(2), color="black", ls=":", lw=1, label="log 2")
ax.set(xlabel="m, half of the distance in each dimension", ylabel="nats", title="Quadrature (areas) and ELBOSurgery (dots)")
ax.legend(loc="upper left", bbox_to_anchor=(0.0, 0.9), frameon=False)
plt.show()

# %%
# Far apart, :math:`z` tells the two data apart for certain, log 2 nats, and one coordinate tells the other, log 2 again.
# More separation gives no more information, only more of the rest. With N separate posteriors the ceiling is log N:
for n in (4, 16, 64):
    surgery = cut(toy, 20.0 * torch.stack([torch.arange(n), -torch.arange(n)], 1))
    print(f"log N = {math.log(n):.4f}. {surgery.verdict()}")
    assert abs(float(surgery.mutual_information.value) - math.log(n)) < 1e-3

# %%
# The digits
# ----------
# A VAE with two latents on scikit-learn's digits, whole numbers from 0 to 16, so the likelihood is a Binomial.
x, y = (torch.tensor(part, dtype=torch.float)[: 300 if SMOKE_TEST else None] for part in load_digits(return_X_y=True))
N, EPOCHS = len(x), 2 if SMOKE_TEST else 100
loader = DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)


def trained(latent_dim, objective):
    pyro.set_rng_seed(1)
    vae = pv.mlp_vae(64, latent_dim, likelihood=pv.nn.Binomial(16), hidden=(128,))
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / (EPOCHS * len(loader)))})
    svi = SVI(vae.model, vae.guide, optimizer, objective)
    for _ in range(EPOCHS):
        for batch, _ in loader:
            svi.step(batch)
    return vae


flat = trained(2, pv.BetaTraceMeanField_ELBO())
surgery = cut(flat, x)
print(surgery)

# %%
# Trap one: a batch knows at most log B
# -------------------------------------
# Often a batch stands for the data. But that is the surgery of a data set of B, whose ceiling is log B, 4.16 nats for 64:
# not noisy, but wrong, and a better encoder would not change it. The library's own minibatch estimate weighs the others up,
# so that log N is the ceiling; the logarithm still biases it.
#
# Trap two: more than log N is impossible
# ---------------------------------------
# Minibatch-weighted sampling divides the sum over a batch by N B in place of B, and so adds log N to trap one. Leaving out
# the datum that :math:`z` was drawn for has no ceiling either. A reading above log N is an error of the estimator, never a
# property of the model. That the parts add up to the KL proves nothing: they do for any wrong :math:`q(z)`.
deep = trained(8, pv.BetaTraceMeanField_ELBO())


def readings(vae):
    parts = [cut(vae, part).mutual_information.value for part in x[torch.randperm(N)].split(64) if len(part) == 64]
    by_batch = float(torch.stack(parts).mean())
    others = [cut(vae, x, aggregate=name).mutual_information.value for name in ("minibatch", "leave-one-out")]
    return [cut(vae, x).mutual_information.value, by_batch, by_batch + math.log(N), *others]


names = "all data", "batches of 64 alone", "minibatch-weighted", "aggregate='minibatch'", "aggregate='leave-one-out'"
ceilings = math.log(N), math.log(64), math.inf, math.log(N), math.inf
print(f"\n{'mutual information, nats':<28}{'2 latents':>12}{'8 latents':>12}{'ceiling':>10}")
for name, two, eight, ceiling in zip(names, readings(flat), readings(deep), ceilings, strict=True):
    print(f"{name:<28}{two:12.3f}{eight:12.3f}{ceiling:10.3f}")
    assert max(two, eight) < ceiling

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
pv.plots.plot_surgery(surgery, left).set_title("The KL of two latents")
pv.plots.plot_surgery(cut(deep, x), right).set_title("The KL of eight latents")
plt.show()

# %%
# With two latents, where the truth is below log N, a batch of 64 reads too little. With eight, the digits themselves are too
# few: the mutual information says how many there are, and what more data would turn into information counts as total
# correlation. The same encoder, seen through fewer digits:
for num in (N // 8, N // 2, N):
    part = cut(deep, x[torch.randperm(N)[:num]])
    print(f"N = {num:4d}: mutual information {part.mutual_information.value:6.3f} of at most {part.log_num_data:.3f}, "
          f"total correlation {part.total_correlation.value:6.3f}, KL {part.kl.value:.3f}")  # fmt: skip


# %%
# Holes: bad samples under a small KL
# -----------------------------------
# A model generates from :math:`p(z)`, but its decoder was trained on :math:`q(z)`. Suppose that they agree but for a hole, a
# region with a share :math:`h` of the prior where :math:`q(z)` is zero. The marginal KL is then only
#
# .. math:: KL(q(z) \| p(z)) = -\log(1 - h),
#
# 0.69 nats for a hole that swallows *half* of all samples, hardly a trace in a KL of 6 or 16. In general, a region with
# :math:`h` of the prior and :math:`h'` of :math:`q(z)` costs at least the KL between two coins. (More data would fill some.)
@torch.no_grad()
def log_ratio(vae, z):
    """log q(z) - log p(z), z of shape (M, D)."""
    log_q = torch.cat([vae.encode(x).log_prob(rows[:, None]).logsumexp(1) for rows in z.split(500)]) - math.log(N)
    return log_q - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)


samples, pictures = {}, {}
for name, vae in (("8 latents", deep), ("2 latents", flat)):
    sample = pv.AggregatedPosterior(vae.model, vae.guide, seed=0)(loader, labels=lambda batch: batch[1], progress=False)
    of_prior, of_q = log_ratio(vae, sample.prior), log_ratio(vae, sample.draws)
    h, h_q = (float((ratio < -math.log(10)).float().mean()) for ratio in (of_prior, of_q))
    least = float(torch.distributions.kl_divergence(dist.Bernoulli(h_q), dist.Bernoulli(h)))
    marginal = float(cut(vae, x).marginal_kl.value)
    decoded = vae.decode(sample.prior[of_prior.argsort()]).mean.detach()  # deepest holes first
    nearest = torch.cdist(decoded, x).min(1).values / 8  # root mean square over 64 pixels, grey levels
    inside = max(8, int(h * N))
    print(f"{name}: holes have {h:.1%} of the prior, {h_q:.1%} of q(z), so {least:.2f} nats of marginal KL {marginal:.2f}; "
          f"nearest digit {nearest[:inside].mean():.2f} from holes, {nearest[inside:].mean():.2f} elsewhere")  # fmt: skip
    assert least < marginal + 0.05
    samples[name], pictures[name] = sample, (decoded[inside:], decoded[:inside])

axis = torch.linspace(-3.2, 3.2, 100)
ratio = log_ratio(flat, torch.cartesian_prod(axis, axis)).view(100, 100).T
figure, axes = plt.subplot_mosaic([["means", "ratio", "pictures"]], figsize=(13, 4), layout="constrained")
pv.plots.plot_latents(samples["2 latents"], axes["means"])
shades = axes["ratio"].contourf(axis, axis, ratio.clamp(-6, 6), 12, cmap="gray")
axes["ratio"].contour(axis, axis, ratio, [-math.log(10)], colors="black")
figure.colorbar(shades, label="log q(z) - log p(z), nats")
axes["ratio"].set(title=f"Holes: dark, {h:.0%} of the prior", xlabel="latent[0]", ylabel="latent[1]")
rows = [some[torch.randperm(len(some))[:5]].view(5, 8, 8) for name in pictures for some in pictures[name]]
rows = [torch.cat([*nn.functional.pad(row, (1, 1, 1, 1))], 1) for row in rows]  # white between them
axes["pictures"].imshow(torch.cat(rows), cmap="gray_r")
axes["pictures"].set(title="Decoded draws of the prior", xticks=[])
axes["pictures"].set_yticks([4.5, 14.5, 24.5, 34.5], ["8 latents,\nelsewhere", "8, holes", "2, elsewhere", "2, holes"])
plt.show()

# %%
# What a penalty on the total correlation does
# --------------------------------------------
# ``pv.TotalCorrelationELBO`` weighs the middle part with beta; at beta = 1 it is the ELBO, the run above. Watch all parts,
# not the one that is punished: information goes as well, and the ELBO falls. Nor is a low KL in a unit a merit: the unit
# may have collapsed, so count the active ones.
runs = {1: deep, **{beta: trained(8, pv.TotalCorrelationELBO(dataset_size=N, beta=beta)) for beta in (5, 15)}}
objective, bars = pv.BetaTraceMeanField_ELBO(), []
for beta, vae in runs.items():
    surgery, units = cut(vae, x), pv.ActiveUnits(vae.model, vae.guide, seed=0)(loader, progress=False)
    objective.loss(vae.model, vae.guide, x)
    bars.append([float(getattr(surgery, name).value) for name in PARTS])
    print(f"beta {beta:2d}: KL {surgery.kl.value:6.3f}, its parts", *(f"{part:6.3f}" for part in bars[-1]),
          f" ELBO {objective.terms.per_datum().elbo:.1f}, {int(units.active.sum())} of 8 units active")  # fmt: skip

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 1.6))
bottom = torch.zeros(3)
for heights, (name, shade) in zip(torch.tensor(bars).T, PARTS.items(), strict=True):
    left.bar([f"beta {beta}" for beta in runs], heights, 0.6, bottom, color=shade, edgecolor="black", label=name)
    bottom = bottom + heights
left.axhline(math.log(N), color="black", ls=":", label="log N")
left.set(ylabel="nats per digit", title="The KL in parts", ylim=(0, 1.6 * float(bottom.max())))
left.legend(frameon=False)
pv.plots.plot_aggregated_posterior(samples["8 latents"], right)
plt.show()

# %%
# The picture on the right is a warning. Unit by unit the aggregated posterior of the first run is the prior, to a tenth of a
# nat or so. Jointly it is not, by all of its total correlation: no picture of single units shows a hole.
#
# What to try
# -----------
# - Batches of 256 in trap one: where does the reading of two latents go, and where can it not?
# - A wider decoder for two latents. Do the holes shrink, or the means spread out?
# - ``mutual_information=0.0`` in ``TotalCorrelationELBO``, which takes the first part off the bill. And log p(x)?
#
# Next: what a likelihood makes of squared errors and of looks, :doc:`09_likelihood_and_looks`.
