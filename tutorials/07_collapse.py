r"""
Posterior collapse and KL annealing
===================================

A latent is *collapsed* when its posterior equals the prior for all data: it costs
nothing and carries no information. You will see in closed form when collapse is right.
You will train a model that collapses although it should not, and compare four cures.
You will also see that a low KL does not make a good latent space.

Prerequisites: :doc:`02_first_vae` and :doc:`06_rate_distortion`; 1 to 2 minutes to run.
"""

# %%
# When collapse is right
# ----------------------
# Take the linear VAE with fixed noise, :math:`z \sim \mathrm{N}(0, I)` and
# :math:`x \mid z \sim \mathrm{N}(Wz + b, s^2 I)`. Let the covariance of the data have
# the eigenvalues :math:`l_1 \ge l_2 \ge \dots`. Along the eigenvector number :math:`j`,
# a latent of weight :math:`w` gives the model the variance :math:`w^2 + s^2`. Up to
# constants, the mean of :math:`\log p(x)` is then
#
# .. math:: -\tfrac12 \Big[ \log (w^2 + s^2) + \frac{l_j}{w^2 + s^2} \Big] .
#
# **If** :math:`l_j > s^2`, this is highest at :math:`w^2 = l_j - s^2`. Otherwise it is
# highest at :math:`w = 0`: the noise explains the whole variance, and the latent is
# collapsed at the optimum. With a weight :math:`\beta` of the KL, the same holds with
# :math:`\beta s^2` in the place of :math:`s^2`. A latent that is used has a KL of
# :math:`\tfrac12 \log (l_j / \beta s^2)` nats (`Lucas et al. (2019), "Don't blame the
# ELBO! A linear VAE perspective on posterior collapse"
# <https://arxiv.org/abs/1911.02469>`__).

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
NOISE, NUM_LATENTS = 0.1, 20  # NOISE is s^2
digits = torch.tensor(load_digits().data, dtype=torch.float) / 16
loader = DataLoader(TensorDataset(digits), 600)
covariance = digits.double().T.cov(correction=0)
eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)[:NUM_LATENTS]
# sphinx_gallery_start_ignore
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
# sphinx_gallery_end_ignore


def trained(beta, num_steps):
    """The units of a linear VAE after SVI: the KL of each latent, among others."""
    pyro.set_rng_seed(0)
    vae = pv.LinearVAE(64, NUM_LATENTS, scale=math.sqrt(NOISE))
    adam = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(vae.model, vae.guide, adam, pv.BetaTraceMeanField_ELBO(beta=beta))
    for _ in range(num_steps):
        svi.step(digits)
    return pv.ActiveUnits(vae.model, vae.guide, seed=0)(loader, progress=False)


def closed_form(beta):
    """The KL of each latent at the optimum, checked against `pv.exact`."""
    kl = (0.5 * (eigenvalues / (beta * NOISE)).log()).clamp(min=0)
    x = digits.double()
    best = pv.exact.LinearGaussian.fit_beta(x, NUM_LATENTS, NOISE, beta)
    # The weights of a collapsed latent are a column of zeros.
    collapsed = pv.exact.collapsed(x, NUM_LATENTS, NOISE, beta)
    assert torch.equal(collapsed, best.weight.norm(dim=0) < 1e-6)
    assert torch.equal(collapsed, kl == 0)
    assert torch.allclose(kl.sum(), best.rate(best.beta_posterior(x, beta)).mean())
    return kl


kls = {}
for beta, num_steps in ((1.0, 2000), (4.0, 1000)):
    units = trained(beta, 50 if SMOKE_TEST else num_steps)
    kls[beta] = kl, found = closed_form(beta), units.kl[units.order]
    print(
        f"beta {beta:g}: {int((kl > 0).sum())} of {NUM_LATENTS} eigenvalues above"
        f" beta s2; rate {float(kl.sum()):.3f} nats in closed form,"
        f" {float(found.sum()):.3f} after SVI"
    )
    assert SMOKE_TEST or abs(float(found.sum() - kl.sum())) < 0.1
# sphinx_gallery_start_ignore
figure, (spectrum, bars) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
number = torch.arange(1, NUM_LATENTS + 1)
for (beta, (kl, found)), marker, style, color in zip(
    kls.items(), "os", ("-", "--"), (BLUE, RED), strict=True
):
    label = f"$\\beta s^2$, $\\beta$ = {beta:g}"
    spectrum.axhline(beta * NOISE, color=color, linestyle=style, label=label)
    name = f"$\\beta$ = {beta:g}"
    bars.plot(number, kl, style, color=color, label=f"closed form, {name}")
    hollow = {"color": color, "markerfacecolor": "white"}
    bars.plot(number, found, marker, **hollow, label=f"after SVI, {name}")
spectrum.plot(number, eigenvalues, "o", color="black")
spectrum.set(yscale="log", xlabel="j", ylabel="eigenvalue of the covariance")
spectrum.set_title("A latent is used above the line")
spectrum.set_yticks([0.05, 0.1, 0.2, 0.4, 0.7], ["0.05", "0.1", "0.2", "0.4", "0.7"])
spectrum.minorticks_off()
bars.set(xlabel="latent, by KL", ylabel="KL to the prior, nats")
bars.set_title("Its KL is half of log(eigenvalue / $\\beta s^2$)")
for ax in (spectrum, bars):
    ax.set_xticks(range(2, 21, 2))
    ax.legend(frameon=False, fontsize="small")
plt.show()
# sphinx_gallery_end_ignore

# %%
# At :math:`\beta = 1`, eight of the twenty latents are collapsed, and this is no fault.
# In use they would cost more than they explain.
#
# When collapse is a failure of training
# --------------------------------------
# In the next data, latents are useful and collapse anyway. The data are strings of bits
# in three segments of ten. Each segment has a hidden bit, which decides whether its
# bits mostly repeat or mostly alternate. One step in ten does otherwise.
#
# The decoder writes one bit after another and sees the two bits before. These say most
# about the next bit, from the first step of training on and at no cost. The hidden bits
# would say more, but only through latents, and early in training these carry no
# information. The :math:`\log p(x)` of the source is known exactly. So is that of the
# best model that sees two bits and has no latents.

NUM_SEGMENTS, LENGTH, FLIP, WIDTH = 3, 10, 0.1, 8
NUM_BITS, NUM_UNITS = 1 + NUM_SEGMENTS * LENGTH, 8
NUM_EPOCHS = 2 if SMOKE_TEST else 20


def draw_strings(num, seed):
    generator = torch.Generator().manual_seed(seed)
    alternates = torch.rand(num, NUM_SEGMENTS, 1, generator=generator) < 0.5
    flips = torch.rand(num, NUM_SEGMENTS, LENGTH, generator=generator) < FLIP
    first = torch.rand(num, 1, generator=generator) < 0.5
    changes = alternates ^ flips
    return (torch.cat([first, changes.flatten(1)], 1).cumsum(1) % 2).float()


def exact_log_p(x):
    """log p(x) of the source and of the best model without latents, mean per string."""
    changes = (x[:, 1:] != x[:, :-1]).unflatten(1, (NUM_SEGMENTS, LENGTH))
    count = changes.sum(2)
    goes_on = (changes[..., 1:] == changes[..., :-1]).sum(2)
    alternating = count * math.log(1 - FLIP) + (LENGTH - count) * math.log(FLIP)
    repeating = count * math.log(FLIP) + (LENGTH - count) * math.log(1 - FLIP)
    # Two changes or no change in a row, within a segment:
    same = 1 - 2 * FLIP * (1 - FLIP)
    markov = goes_on * math.log(same) + (LENGTH - 1 - goes_on) * math.log(1 - same)
    # The first bit, and a hidden bit or a first change per segment, are fair coins.
    fair = (1 + NUM_SEGMENTS) * math.log(2)
    source = alternating.logaddexp(repeating).sum(1).mean()
    return float(source) - fair, float(markov.sum(1).mean()) - fair


train = draw_strings(1000 if SMOKE_TEST else 10_000, 1)
test = draw_strings(50 if SMOKE_TEST else 2000, 2)
scored = test[:400]  # log p(x) is estimated for these, which takes most of the time
source, without = exact_log_p(scored)
print(
    f"log p(x), nats per string: source {source:.3f},"
    f" best model without latents {without:.3f}"
)

# %%
# The model and the guide are plain Pyro.


class Decoder(nn.Module):
    """Logits of all bits. Each bit has a small network that sees z and two bits."""

    def __init__(self):
        super().__init__()
        lag = torch.arange(NUM_BITS).unsqueeze(1) - torch.arange(NUM_BITS)
        sees = ((lag > 0) & (lag <= 2)).float()
        self.register_buffer("sees", sees.repeat_interleave(WIDTH, 0))
        self.of_bits = nn.Linear(NUM_BITS, NUM_BITS * WIDTH)
        self.of_z = nn.Sequential(
            nn.Linear(NUM_UNITS, 64),
            nn.Tanh(),
            nn.Linear(64, NUM_BITS * WIDTH, bias=False),
        )
        self.out = nn.Parameter(torch.randn(NUM_BITS, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.zeros(NUM_BITS))

    def forward(self, x, z):
        weight, bias = self.of_bits.weight * self.sees, self.of_bits.bias
        of_bits = nn.functional.linear(x - 0.5, weight, bias)
        hidden = (of_bits + self.of_z(z)).tanh().unflatten(-1, (NUM_BITS, WIDTH))
        return (hidden * self.out).sum(-1) + self.bias


class StringVAE(nn.Module):
    """The model reads x: each bit is scored given the bits before it."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()
        self.encoder = nn.Sequential(
            nn.Linear(NUM_BITS, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 2 * NUM_UNITS),
            pv.nn.Normal(),
        )

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), NUM_UNITS), 1.0)
            z = pyro.sample("z", prior.to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(x, z))
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))


# %%
# A run that collapses
# --------------------
# All runs below have the same network, the same initial parameters and the same data.
# Only the cure differs. ``CollapseMonitor`` looks at the units of a batch from time to
# time during training, and it warns when they have collapsed.


def train_one(vae, objective, aggressive_steps):
    """Train a VAE, and return the history of the training."""
    batches = DataLoader(TensorDataset(train), 100, shuffle=True)
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
    optimizer = pyro.optim.ExponentialLR(options)
    svi = SVI(vae.model, vae.guide, optimizer, objective)
    aggressive = pv.AggressiveTraining(svi, batches, max_inner_steps=100)
    monitor = pv.Monitor(objective, progress=False)
    watch = pv.CollapseMonitor(vae.model, vae.guide, every=50)
    for _ in range(NUM_EPOCHS):
        for (x,) in monitor.watch(batches):
            if watch.num_calls < aggressive_steps:
                aggressive.step()
            else:
                svi.step(x)
            watch(x)
        optimizer.step()  # the learning rate falls from epoch to epoch
    return monitor.history()


def run(objective, aggressive_steps=0):
    """Train, and measure everything that is compared below."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = StringVAE()
    history = train_one(vae, objective, aggressive_steps)
    pair, held_out = (vae.model, vae.guide), DataLoader(TensorDataset(test), 400)
    estimator = pv.AdaptiveImportanceSampling(*pair, num_particles=200, seed=0)
    with warnings.catch_warnings():  # the table below counts these strings
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        evidence = estimator(scored)
    with torch.no_grad():  # probabilities of the bits at two draws from the prior
        one, other = (
            vae.decoder(test, torch.randn(len(test), NUM_UNITS)).sigmoid()
            for _ in range(2)
        )
    return {
        "history": history,
        "units": pv.ActiveUnits(*pair, seed=0)(held_out, progress=False),
        "surgery": pv.ELBOSurgery(*pair, seed=0)(held_out, progress=False),
        "evidence": evidence,
        "updates": objective.num_updates,
        "moves": float((one - other).abs().mean()),
    }


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", pv.errors.CollapseWarning)
    runs = {"no cure": run(pv.BetaTraceMeanField_ELBO())}
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
print(runs["no cure"]["units"].verdict())

# %%
# Why does training not leave this state? A decoder that ignores its latents has the
# same likelihood for all :math:`z`. Then only the KL acts on the encoder, and it moves
# the posterior to the prior. An encoder at the prior gives the decoder noise, and the
# decoder learns to ignore it. Each of the two is the best answer to the other. Early in
# training neither has learned anything, but the cost of the KL acts from the first
# step.
#
# Four cures
# ----------
# - **KL annealing** increases the weight of the KL from 0 to 1 over the first :math:`T`
#   steps. At step :math:`t` the weight is :math:`\beta_t = \min(1, t / T)`. So the
#   decoder learns to use the latents before they cost something (`Bowman et al. (2016),
#   "Generating sentences from a continuous space"
#   <https://arxiv.org/abs/1511.06349>`__).
# - **Cyclical annealing** repeats this several times. Every further cycle starts from
#   latents that are in use (`Fu et al. (2019), "Cyclical annealing schedule: a simple
#   approach to mitigating KL vanishing" <https://arxiv.org/abs/1903.10145>`__).
# - **Free bits**: the KL of a latent, in the mean over the batch, costs nothing below a
#   floor (`Kingma et al. (2016), "Improving variational inference with inverse
#   autoregressive flow" <https://arxiv.org/abs/1606.04934>`__).
# - **Aggressive training** takes many steps of the guide for each step of the model, in
#   the first part of the training. So the guide carries information before the model
#   learns to ignore it (`He et al. (2019), "Lagging inference networks and posterior
#   collapse in variational autoencoders" <https://arxiv.org/abs/1901.05534>`__).
#
# Both kinds of annealing and aggressive training end with the ELBO itself as the
# objective. Free bits change the objective. The last run below keeps
# :math:`\beta = 0.2` to the end, so that it certainly uses its latents.

steps = NUM_EPOCHS * len(train) // 100
linear = pv.LinearAnnealing(steps // 4)
cyclical = pv.CyclicalAnnealing(steps // 8, num_cycles=4)
aggressive_steps = 2 if SMOKE_TEST else 40
runs["linear annealing"] = run(pv.BetaTraceMeanField_ELBO(beta=linear))
runs["cyclical annealing"] = run(pv.BetaTraceMeanField_ELBO(beta=cyclical))
runs["free bits"] = run(pv.BetaTraceMeanField_ELBO(free_bits=0.5))
runs["aggressive"] = run(pv.BetaTraceMeanField_ELBO(), aggressive_steps)
runs["beta = 0.2"] = run(pv.BetaTraceMeanField_ELBO(beta=0.2))

# %%
# In the table, MI is the mutual information between latents and data, which
# :doc:`08_elbo_surgery` explains. The column "gain" has the gain of :math:`\log p(x)`
# over the run without a cure, with its sampling error under "+-". Both runs have the
# same strings, so the difference is taken string by string. The last column counts the
# strings whose Pareto k is too high, so that their :math:`\log p(x)` may be too low.

print(
    "gain: of log p(x) over no cure, paired, with its sampling error;"
    " k: strings of 400 with a high Pareto k\n"
)
names = (
    "run",
    "updates",
    "active",
    "rate",
    "MI",
    "ELBO",
    "log p(x)",
    "gain",
    "+-",
    "k",
)
widths = "{:20s}{:>8s}{:>8s}{:>8s}{:>7s}{:>9s}{:>10s}{:>8s}{:>7s}{:>5s}"
print(widths.format(*names))
baseline = runs["no cure"]["evidence"].log_evidence
for name, found in runs.items():
    units, evidence = found["units"], found["evidence"]
    rate = float(units.site_kl["z"].value)
    information = float(found["surgery"].mutual_information.value)
    gain = evidence.log_evidence - baseline
    print(
        f"{name:20s}{found['updates']:8d}{units.num_active:8d}{rate:8.2f}"
        f"{information:7.2f}{float(evidence.elbo.mean()):9.3f}"
        f"{float(evidence.log_evidence.mean()):10.3f}{float(gain.mean()):8.3f}"
        f"{float(gain.std()) / len(gain) ** 0.5:7.3f}"
        f"{int(evidence.doubts['tails'].sum()):5d}"
    )
# sphinx_gallery_start_ignore
figure, axes = plt.subplot_mosaic(
    [["rate", "judge"], ["beta", "judge"]],
    height_ratios=(3, 1),
    figsize=(12, 5),
    layout="constrained",
)
styles = ["-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1))]
colors = ["black", BLUE, SKY, ORANGE, GREEN, RED]
for (name, found), style, color, marker in zip(
    runs.items(), styles, colors, "ovs^Dx", strict=True
):
    history, evidence = found["history"], found["evidence"]
    rates = history.rate[: len(history) // 10 * 10].reshape(-1, 10).mean(1)
    line = {"linestyle": style, "color": color}
    axes["rate"].plot(torch.arange(len(rates)) * 10, rates, **line, label=name)
    if "annealing" in name:
        axes["beta"].plot(history.step, history.beta, **line)
    rate = float(found["units"].site_kl["z"].value)
    top, foot = evidence.log_evidence.mean(), evidence.elbo.mean()
    axes["judge"].plot([rate, rate], [foot, top], color=color, linewidth=1)
    axes["judge"].plot(rate, top, marker, color=color, markersize=8, label=name)
axes["rate"].set(ylabel="rate, nats per string", ylim=(0, 12))
axes["rate"].set_title("Are the latents in use?")
axes["beta"].set(xlabel="training step", ylabel="$\\beta$")
exact = {"color": "0.5", "zorder": 0}
axes["judge"].axhline(source, linestyle=":", **exact, label="the source, exact")
label = "best without latents, exact"
axes["judge"].axhline(without, linestyle="--", **exact, label=label)
axes["judge"].set(xlabel="rate, nats per string", ylabel="log p(x), nats per string")
axes["judge"].set_title("Does it help? (lines: from the ELBO to log p(x))")
for ax in (axes["rate"], axes["judge"]):
    ax.legend(frameon=False, fontsize="small")
plt.show()
# sphinx_gallery_end_ignore
# sphinx_gallery_thumbnail_number = 2

# %%
# All four cures are better than the best model without latents, by far more than their
# errors. They differ in speed, and aggressive training is not finished here: its rate
# still rises. The run of :math:`\beta = 0.2` has the highest rate by far, but its ELBO
# is **lower** than that of the collapsed run. So a high rate is no success either. (Its
# :math:`\log p(x)` is better than its ELBO suggests. The difference is a gap of the
# encoder and the family; see :doc:`03_three_gaps`.)
#
# A low KL does not make a good latent space
# ------------------------------------------
# It is often said that a low KL means a smooth, regular, disentangled latent space. The
# next table compares the collapsed run and a cured one in all the numbers that are said
# to show this. The row "moves" has the mean change of the probability of a bit between
# two draws from the prior.

two = [runs["no cure"], runs["linear annealing"]]
surgeries = [run["surgery"] for run in two]
rows = {
    "rate": [cut.kl.value for cut in surgeries],
    "KL of q(z) to the prior": [cut.marginal_kl.value for cut in surgeries],
    "total correlation": [cut.total_correlation.value for cut in surgeries],
    "moves": [run["moves"] for run in two],
    "mutual information": [cut.mutual_information.value for cut in surgeries],
    "log p(x)": [run["evidence"].log_evidence.mean() for run in two],
}
print(f"{'':32s}{'no cure':>10s}{'linear annealing':>18s}")
for name, (collapsed, cured) in rows.items():
    print(f"{name:32s}{float(collapsed):10.3f}{float(cured):18.3f}")

if not SMOKE_TEST:
    assert runs["no cure"]["units"].num_active == 0
    assert runs["linear annealing"]["units"].num_active > 4
    assert rows["log p(x)"][1] - rows["log p(x)"][0] > 1
    assert runs["no cure"]["evidence"].elbo.mean() - without < 0.1

# %%
# ``plot_units`` draws the KL of each unit of the two runs, and ``plot_surgery`` the
# parts of the KL of the cured one.

figure, axes = plt.subplots(
    1, 3, figsize=(14, 4), width_ratios=(1, 1, 1.5), layout="constrained"
)
pv.plots.plot_units(runs["no cure"]["units"], axes[0])
pv.plots.plot_units(runs["linear annealing"]["units"], axes[1])
pv.plots.plot_surgery(runs["linear annealing"]["surgery"], axes[2])
# sphinx_gallery_start_ignore
for ax, name in zip(axes, ("no cure", "linear annealing"), strict=False):
    highest = 1.1 * float(runs["linear annealing"]["units"].kl.max())
    ax.set(ylim=(0, highest), title=f"{name}:\n{ax.get_title()}")
plt.show()
# sphinx_gallery_end_ignore

# %%
# By the first four rows, the collapsed run is perfect. Its rate is zero, and its
# aggregated posterior is the prior. Its dimensions are independent, and its decoder is
# as smooth as possible, since it hardly changes with :math:`z`. But the latents carry
# no information, and :math:`\log p(x)` is that of a model without latents. **Judge a
# model by** :math:`\log p(x)`, **or by the ELBO where that is all there is, and not by
# its rate**, whether low or high. Then ask what the latents are used for.
#
# What to try
# -----------
# - Set ``pyro.set_rng_seed(1)`` in ``run``. Which of these results are chance?
# - Let the decoder see one bit, ``lag <= 1``, or four. With four there is less to gain
#   from latents.
# - Use ``beta=pv.LinearAnnealing(steps)``, which anneals to the end of the training. Is
#   that better than a quarter of it?
# - Use ``free_bits=2.0``, a floor of two nats for each of eight units. What happens to
#   the ELBO? (Problem 4 says what to expect.)
# - Set ``NOISE = 0.02`` in the first part. How many latents are in use, and what is the
#   rate? (In closed form all twenty are in use, with a rate of 19.7 nats.)
#
# Practice problems
# -----------------
#
# 1. Show that :math:`-\tfrac12 [\log (w^2 + s^2) + l / (w^2 + s^2)]` is highest at
#    :math:`w^2 = l - s^2` if :math:`l > s^2`, and at :math:`w = 0` otherwise.
# 2. Show that a latent in use has a KL of :math:`\tfrac12 \log (l / s^2)` in the mean
#    over the data, at :math:`\beta = 1`. An eigenvalue is 0.5 and :math:`s^2 = 0.1`:
#    what is the KL, and at which :math:`\beta` does the latent collapse?
# 3. Show that a guide at the prior and the best decoder that ignores :math:`z` are a
#    stationary point of the ELBO.
# 4. How many nats of information about the hidden bits are there? Compare with the KL
#    that is free of cost for ``free_bits=0.5`` and for ``free_bits=2.0``.
# 5. With :math:`\beta_t = \min(1, t / T)` for :math:`t = 0, 1, \dots`, what is the mean
#    weight of the KL over a training of 2000 steps with :math:`T = 500`?
#
# Answers
# -------
#
# 1. With :math:`v = w^2 + s^2`, the derivative by :math:`v` is :math:`(l - v) / 2 v^2`.
#    It is positive below :math:`v = l` and negative above. So the maximum is at
#    :math:`v = l` if :math:`v` can be that small, which is :math:`l > s^2`. Otherwise
#    it is at the least :math:`v`, which is :math:`s^2`.
# 2. With :math:`w^2 + s^2 = l`, the posterior has the mean :math:`w x / l` and the
#    variance :math:`s^2 / l`. The mean over the data of its squared mean is
#    :math:`w^2 / l`. So in :math:`\tfrac12 (\mu^2 + \sigma^2 - \log \sigma^2 - 1)` the
#    first two terms are :math:`w^2 / l + s^2 / l = 1`, and
#    :math:`-\tfrac12 \log (s^2 / l)` remains. For the numbers it is
#    :math:`\tfrac12 \log 5 = 0.80` nats. The latent collapses at :math:`\beta \ge 5`.
# 3. If the decoder ignores :math:`z`, then :math:`\mathrm{E}_q \log p(x \mid z)` does
#    not depend on the guide, and the KL has its minimum at the prior. So the gradient
#    of the guide is zero. A guide at the prior makes :math:`z` independent of
#    :math:`x`. To first order, a change of the decoder that depends on :math:`z` then
#    acts like its mean over :math:`z`. That is a change of a decoder without :math:`z`,
#    and the best decoder without :math:`z` has a zero gradient.
# 4. Three fair bits, so :math:`3 \log 2 = 2.08` nats. With a floor of 0.5 nats, up to
#    :math:`8 \cdot 0.5 = 4` nats are free of cost, with 2.0 it is 16. Most of these 16
#    nats carry nothing about the hidden bits. The ELBO counts all of them, so expect a
#    low ELBO, as for :math:`\beta = 0.2`.
# 5. The sum of the first 500 weights is :math:`(0 + 1 + \dots + 499) / 500 = 249.5`,
#    and 1500 weights are 1. The mean is :math:`1749.5 / 2000 = 0.875`.
#
# Next: :doc:`08_elbo_surgery`, what the KL term regularises.
