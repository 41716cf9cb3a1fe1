r"""
Sequences: deep Markov models
=============================

A sequence has a latent state per step, and the states depend on one another. At the end you can build such a pair from
networks, train it on sequences of unequal lengths, and say how far its ELBO is from log p(x). A Kalman filter checks every
number of a linear model; then a network takes the place of the matrix, and finds an oscillator in noisy data.
"""

# %%
# A model with a state
# --------------------
# A *deep Markov model* (`Krishnan, Shalit and Sontag 2017 <https://arxiv.org/abs/1609.09869>`__) has a state :math:`z_t` per
# step. The next state depends on the present one alone, and what is seen depends on the present state alone:
#
# .. math:: p(x, z) = p(z_1) \, p(x_1 \mid z_1) \prod_{t=2}^{T} p(z_t \mid z_{t-1}) \, p(x_t \mid z_t) .
#
# A datum is a whole sequence, and :math:`\log p(x)` is a number per sequence, in nats.
#
# Begin with a model whose answers are known: a mass on a spring, pushed about by noise. Its state is position and velocity.
# A step turns it by 30 degrees and shrinks it a little; we see the position, with noise.

import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_TEST, NUM_STEPS, NUM_PARTICLES = (3, 2, 50) if SMOKE_TEST else (100, 700, 500)
MAX_LENGTH, LONGEST = (3, 4) if SMOKE_TEST else (12, 20)  # of the sequences of both parts
pyro.set_rng_seed(0)

angle = math.pi / 6
turn = 0.97 * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
see = torch.tensor([[1.0, 0.0]])
push, noise = 0.3, 0.5  # standard deviations of a step and of what is seen


class Linear(nn.Module):
    """N(W z, scale^2): a network that returns a distribution."""

    def __init__(self, weight, scale):
        super().__init__()
        self.weight, self.log_scale = nn.Parameter(weight), nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, z):
        return dist.Normal(z @ self.weight.T, self.log_scale.exp()).to_event(1)


# %%
# ``MarkovVAE`` is made of five modules. Three are the model: the distribution of the first state, of the next state given
# one, and of what is seen. Two are the guide, which goes through the states in the same order,
#
# .. math:: q(z \mid x) = q(z_1 \mid x) \prod_{t=2}^{T} q(z_t \mid z_{t-1}, x) ,
#
# and is told about :math:`x` by an *encoder*, a recurrent network that makes a vector of features :math:`h_t` for each
# step. The *combiner* turns :math:`z_{t-1}` and :math:`h_t` into a distribution. ``BackwardGRU`` reads the sequence from its
# end, so that :math:`h_t` knows of :math:`x_t, \dots, x_T`.


def pair(encoder):
    combiner = pv.models.Concatenated(nn.Sequential(pv.nn.MLP(2 + 32, 4, hidden=(32,)), pv.nn.Normal()))
    vae = pv.MarkovVAE(
        initial=pv.nn.StandardNormal(2),
        transition=Linear(turn, push),
        decoder=Linear(see, noise),
        encoder=encoder,
        combiner=combiner,
    )
    vae.model.requires_grad_(False)  # the truth, for now: only the guide learns
    return vae


backward = pair(pv.nn.BackwardGRU(1, 32))
print(backward)

# %%
# Sequences of unequal lengths
# ----------------------------
# Sequences of a batch are padded to one length, and the pair is told where each of them ends: ``model(x, lengths)``. States
# and observations behind the end are masked. Whatever stands in the padding, even NaN, changes nothing.


def sequences(number):
    lengths = torch.randint(1, MAX_LENGTH + 1, (number,))
    padding = torch.arange(MAX_LENGTH) >= lengths[:, None]
    return backward.generate(number, MAX_LENGTH).masked_fill(padding[..., None], torch.nan), lengths


x, lengths = sequences(NUM_TEST)
print(x[:3, :, 0], lengths[:3], sep="\n")

# %%
# The Kalman filter (`Kalman 1960 <https://doi.org/10.1115/1.3662552>`__) goes through a sequence once. It keeps the normal
# distribution of the present state given all that was seen, and adds up the density of each next observation. Their sum is
# :math:`\log p(x)`, exactly.


def kalman(x, lengths, turn, push, see, noise):
    """log p(x), (B,). `push` and `noise` are standard deviations of each number."""
    mean, cov = torch.zeros(len(x), 2), torch.eye(2)
    total = torch.zeros(len(x))
    for t in range(x.shape[1]):
        spread = see @ cov @ see.T + noise**2 * torch.eye(1)
        error = torch.where((t < lengths)[:, None], x[:, t] - mean @ see.T, 0.0)
        log_prob = dist.MultivariateNormal(torch.zeros(1), spread).log_prob(error)
        total = total + torch.where(t < lengths, log_prob, 0.0)
        gain = cov @ see.T @ torch.linalg.inv(spread)
        mean, cov = (mean + error @ gain.T) @ turn.T, turn @ (cov - gain @ see @ cov) @ turn.T + push**2 * torch.eye(2)
    return total


exact = kalman(x, lengths, turn, push, see, noise)
evidence = pv.AdaptiveImportanceSampling(backward.model, backward.guide, num_particles=NUM_PARTICLES, seed=0)
untrained = evidence(x, lengths)
print(untrained)

# %%
# This guide has learned nothing, and its ELBO is far off. But the proposals are fitted to each sequence, all of its states
# together, and need the guide only for a start: the estimate agrees with the filter, sequence by sequence, within its own
# errors.


def check(found, right):
    error = found.log_evidence - right
    off = error / found.std_error
    print(f"largest error {error.abs().max():.3f} nats; in units of the stated one: spread {off.std():.2f}")
    assert off.abs().max() < 4.5  # of 100 sequences: false alarms in 7e-4 of seeds


check(untrained, exact)

# %%
# What a guide must see
# ---------------------
# Given :math:`z_{t-1}`, the past says nothing more about :math:`z_t`, but the present and the *future* do. So a guide that
# reads backwards can be the posterior, and one that reads forwards, as a filter does, cannot: its :math:`z_t` does not know
# what comes next. Train both in the same way, on fresh sequences.


class ForwardGRU(nn.Module):
    """Feature t knows x_1, ..., x_t. What lies behind the end of a sequence is read last, and harms nobody."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 32, batch_first=True)

    def forward(self, x, lengths):
        return self.gru(x)[0]


def train(vae, batches, lr):
    """The KL of each step by its formula; the learning rate falls to a fiftieth."""
    optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / NUM_STEPS)})
    svi = SVI(vae.model, vae.guide, optim, pv.BetaTraceMeanField_ELBO())
    for _ in range(NUM_STEPS):
        svi.step(*batches())


forward = pair(ForwardGRU())
for vae in (forward, backward):
    train(vae, lambda: sequences(100), lr=0.03)

# %%
# The gaps of sequences of 1 to 12 steps, two of each length. "Amortization" is what a guide of the same form would gain
# if it were fitted to each sequence alone; "approximation" is what this form lacks, in which the two numbers of a state are
# independent given the state before.

of_each = torch.arange(1, MAX_LENGTH + 1).repeat(1 if SMOKE_TEST else 2)
seen = backward.generate(len(of_each), MAX_LENGTH)
truth = kalman(seen, of_each, turn, push, see, noise)
gaps = {}
for name, vae in {"reads forwards": forward, "reads backwards": backward}.items():
    gaps[name] = pv.InferenceGaps(vae.model, vae.guide, num_particles=20 if SMOKE_TEST else 500, seed=0)(seen, of_each)
    means = [getattr(gaps[name], part).mean() for part in ("amortization", "approximation")]
    exact_gap = (truth - gaps[name].elbo).mean()
    print(f"{name}: amortization {means[0]:.2f}, approximation {means[1]:.2f}; the whole gap by the filter {exact_gap:.2f}")
    print(gaps[name].verdict())

# %%
# Most of the forward guide's gap is the *encoder's*, and rightly so: what an encoder is shown belongs to it, and no size
# makes up for a future that it does not see. (:doc:`10_your_own_model` has an encoder that was not shown a mask.)
#
# Among the longest sequences are a few whose fit had not converged within its budget. The record then withholds the error of
# the split, as the last line says. The whole gap does not depend on these fits, and the filter confirms it.
#
# To see it in a single sequence: the exact posterior of each position is normal as well, from the joint normal distribution
# of all states and observations. The forward guide comes late to every turn. On the right, the gaps of all sequences.


def posterior(x):
    """Mean and standard deviation of each position given a whole sequence (T, 1), exactly."""
    size = len(x)
    steps = torch.eye(2 * size)
    for t in range(1, size):
        steps[2 * t : 2 * t + 2] += turn @ steps[2 * t - 2 : 2 * t]
    spread = torch.diag(torch.cat([torch.ones(2), torch.full((2 * size - 2,), push**2)]))
    states = steps @ spread @ steps.T
    positions = states[::2]
    gain = positions[:, ::2] @ torch.linalg.inv(positions[:, ::2] + noise**2 * torch.eye(size))
    return gain @ x[:, 0], (positions[:, ::2] - gain @ positions[:, ::2]).diagonal().sqrt()


def guide_moments(vae, x):
    """The same of a guide, from 2,000 draws."""
    drawn = poutine.trace(vae.guide).get_trace(x.expand(2000, -1, -1))
    path = torch.stack([drawn.nodes[f"latent_{t}"]["value"][:, 0] for t in range(1, len(x) + 1)])
    return path.mean(1).detach(), path.std(1).detach()


one, axis = seen[-1], torch.arange(1, MAX_LENGTH + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=[3, 2])
mean, width = posterior(one)
left.fill_between(axis, mean - 2 * width, mean + 2 * width, color="0.85", label="posterior, 2 standard deviations")
left.plot(axis, one, "o", color="black", markersize=4, label="data")
for vae, color, name in ((forward, "C1", "reads forwards"), (backward, "C0", "reads backwards")):
    mean, width = guide_moments(vae, one)
    left.plot(axis, torch.stack([mean - 2 * width, mean + 2 * width], -1), color=color, linewidth=1.2)
    left.plot(axis, mean, color=color, linewidth=2, label=name)
    right.plot(of_each, truth - gaps[name].elbo, "o", color=color, markersize=5, label=name)
left.set(xlabel="step", ylabel="position")
right.set(xlabel="length of the sequence", ylabel="log p(x) - ELBO, nats", ylim=(0, None))
left.legend(frameon=False, fontsize=9)
right.legend(frameon=False)
plt.show()

# %%
# A nonlinear one
# ---------------
# Now the model is not known. The data come from an oscillator of `van der Pol (1926)
# <https://doi.org/10.1080/14786442608564127>`__, which swings at one amplitude wherever it starts, slowly near its turning
# points and fast between them; again one noisy number is seen per step.

NUM_TRAIN = 1000


def oscillator(number, num_steps):
    """Observations, (number, num_steps, 1), .5 units of time apart, after a time in which the start is forgotten."""
    position, speed = torch.randn(2, number)
    kept = []
    for _ in range(num_steps + 20):
        for _ in range(20):
            push = 0.1 * math.sqrt(0.025) * torch.randn(number)
            position, speed = position + 0.025 * speed, speed + 0.025 * (2 * (1 - position**2) * speed - position) + push
        kept.append(position + 0.2 * torch.randn(number))
    return torch.stack(kept[20:], -1).unsqueeze(-1)


data, held_out = oscillator(NUM_TRAIN, LONGEST), oscillator(NUM_TEST, LONGEST)
data_lengths, held_out_lengths = (torch.randint(LONGEST // 2, LONGEST + 1, (number,)) for number in (NUM_TRAIN, NUM_TEST))


def batch():
    rows = torch.randint(NUM_TRAIN, (64,))
    longest = int(data_lengths[rows].max())
    return data[rows, :longest], data_lengths[rows]  # a batch may be cut to its longest sequence


# %%
# Two models with two latents. One has a matrix for the step, as above, which is learned this time. In the other one a
# network says how far the state moves.


class Moved(nn.Module):
    """N(z + network(z), scale^2)."""

    def __init__(self, network):
        super().__init__()
        self.network, self.log_scale = network, nn.Parameter(torch.full((2,), -1.0))

    def forward(self, z):
        return dist.Normal(z + self.network(z), self.log_scale.exp()).to_event(1)


def learned(transition):
    combiner = pv.models.Concatenated(nn.Sequential(pv.nn.MLP(2 + 32, 4, hidden=(32,)), pv.nn.Normal()))
    return pv.MarkovVAE(
        initial=pv.nn.StandardNormal(2),
        transition=transition,
        decoder=Linear(torch.randn(1, 2), 0.5),
        encoder=pv.nn.BackwardGRU(1, 32),
        combiner=combiner,
    )


models = {
    "linear": learned(Linear(turn.clone(), 0.5)),
    "nonlinear": learned(Moved(pv.nn.MLP(2, 2, hidden=(32,), activation=nn.Tanh))),
}
found = {}
for name, vae in models.items():
    train(vae, batch, lr=0.01)
    estimator = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=2 * NUM_PARTICLES, seed=0)
    found[name] = estimator(held_out, held_out_lengths)

# %%
# Of the linear one the filter knows log p(x), whatever parameters were learned: the estimates for held-out sequences of 10
# to 20 steps can be checked once more. Of the other one nobody does; but the same estimator says how sure it is, and which
# sequences it doubts.

line, look = models["linear"].transition, models["linear"].decoder
with torch.no_grad():
    right = kalman(held_out, held_out_lengths, line.weight, line.log_scale.exp(), look.weight, look.log_scale.exp())
check(found["linear"], right)
comparison = pv.compare(found)
print(comparison)

# %%
# What it has learned
# -------------------
# On the left, sequences three times as long as any in training: those of the oscillator, and draws from both models. The
# best matrix gets the period about right and no more: what keeps a linear model going is its noise, so it has no amplitude
# of its own. On the right, the latent plane of the nonlinear model; arrows are the steps of the network. From wherever they
# start they lead to one closed curve. The oscillator has such a curve too, and no matrix has.

# sphinx_gallery_thumbnail_number = 2
figure = plt.figure(figsize=(10, 5.4), layout="constrained")
grid = figure.add_gridspec(3, 2, width_ratios=[3, 2])
drawn = {"data": oscillator(3, 60), **{name: vae.generate(3, 60) for name, vae in models.items()}}
for row, (name, values) in enumerate(drawn.items()):
    axes = figure.add_subplot(grid[row, 0])
    axes.plot(values[..., 0].T + 6 * torch.arange(3), color={"data": "black", "linear": "C1", "nonlinear": "C0"}[name])
    axes.set(yticks=[], ylabel=name, ylim=(-4, 17), xlim=(0, 59))
    axes.set_xticks([0, 20, 40] if row == 2 else [], labels=None)
axes.set_xlabel("step")
plane = figure.add_subplot(grid[:, 1])
network = models["nonlinear"].transition.network
with torch.no_grad():
    paths = [3 * torch.randn(12, 2)]
    for _ in range(200):
        paths.append(paths[-1] + network(paths[-1]))
    paths = torch.stack(paths)
    reach = 1.3 * paths[100:].abs().amax()
    lattice = torch.cartesian_prod(*[torch.linspace(-reach, reach, 17)] * 2)
    arrows = network(lattice)
plane.quiver(*lattice.T, *arrows.T, color="0.6", angles="xy", width=0.004)
plane.plot(*paths[100:].flatten(0, 1).T, ".", color="C0", markersize=2.5)
plane.set(xlabel="latent 1", ylabel="latent 2", aspect="equal", title="steps of the nonlinear model, without noise")
plt.show()

if not SMOKE_TEST:
    assert (truth - gaps["reads backwards"].elbo).mean() < 1 < 2 < (truth - gaps["reads forwards"].elbo).mean()
    assert found["nonlinear"].log_evidence.mean() > found["linear"].log_evidence.mean() + 3

# %%
# What to try
# -----------
#
# - Leave the future out of the encoder of the nonlinear model (``ForwardGRU``), train, and compare log p(x): what did the
#   model lose with the guide?
# - Let the combiner see :math:`h_t` alone. Which gap grows, amortization or approximation, and why?
# - Counts instead of numbers: ``decoder=nn.Sequential(nn.Linear(2, 1), pv.nn.Poisson())``, and
#   ``encoder=pv.nn.BackwardGRU(1, 32, first=pv.nn.Log1p())``.
# - Give the linear model four latents. Does a bigger matrix find the curve?
#
# Your own sequence models need no class of ours: :doc:`10_your_own_model`.
