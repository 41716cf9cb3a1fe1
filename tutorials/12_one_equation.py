r"""
One equation, many fields
=========================

A Bayesian regression, an information bottleneck, a world model, a diffusion model and the fine-tuning of a language model:
each is a short Pyro program that maximises an ELBO. At the end you can say what datum, rate and distortion are in each, and
read all of them with the same few tools. A model says :math:`p(z)` and :math:`p(x|z)`, a guide :math:`q(z|x)`, and

.. math:: \log p(x) \ge \mathrm{ELBO} = -(D + R), \qquad D = -E_q \log p(x|z), \qquad R = KL(q(z|x) \,\|\, p(z)).

Fields differ in what is a datum, in what is fixed, and in the weight on :math:`R`. Two functions train and read them all.
"""

# sphinx_gallery_thumbnail_number = 2
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, config_enumerate
from pyro.optim import ClippedAdam
from sklearn.datasets import load_digits, make_moons
from torch import nn

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ


def train(model, guide, data, num_steps, batch_size, lr=5e-3):
    num_steps = 10 if SMOKE_TEST else num_steps  # the learning rate falls to a thirtieth on the way
    svi = SVI(model, guide, ClippedAdam({"lr": lr, "lrd": 30 ** (-1 / num_steps)}), pv.BetaTraceMeanField_ELBO())
    for _ in range(num_steps):
        rows = torch.randint(len(data[0]), (batch_size,)) if batch_size else slice(None)
        svi.step(*(part[rows] for part in data))


def read(name, model, guide, data, **options):
    """Prints nats per datum: D by 100 draws each, the bound on log p(x) by 50. Returns the rates by site."""
    objective = pv.BetaTraceMeanField_ELBO(num_particles=2 if SMOKE_TEST else 100)
    with torch.random.fork_rng():
        objective.loss(model, guide, *data)
    evidence = pv.ImportanceSampling(model, guide, num_particles=50, seed=0, **options)(*data)
    distortion, rates = -objective.terms.reconstruction, torch.stack(list(objective.terms.kl.values())) / len(evidence)
    print(f"{name}: D {distortion / len(evidence):.3f}, R {rates.sum():.3f}, log p(x) > {evidence.mean()}")
    return rates


def net(num_inputs, num_outputs):
    return nn.Sequential(nn.Linear(num_inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, num_outputs))


# %%
# Bayesian regression: the data set is one datum
# ----------------------------------------------
# Here :math:`z` are weights, shared by all points: no point has a :math:`p(x)` of its own, only all of them together. The
# library refuses to guess that, and says what to write.
pyro.set_rng_seed(0)
x = torch.linspace(-1, 1, 20)
y = torch.sin(3 * x) + 0.3 * torch.randn(20)


def regression(name, num_weights, predict):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(num_weights), 1.0).to_event(1))
        with pyro.plate("points", len(x)):
            pyro.sample("y", dist.Normal(predict(x, w), 0.3), obs=y)

    def guide(x, y):
        loc = pyro.param(f"{name}.loc", torch.zeros(num_weights))
        scale = pyro.param(f"{name}.scale", torch.full((num_weights,), 0.4), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    return model, guide


cubic = regression("cubic", 4, lambda x, w: w @ torch.stack([x**p for p in range(4)]))
train(*cubic, (x, y), 800, None, lr=0.03)
try:
    pv.InferenceGaps(*cubic)(x, y)
except pv.errors.GlobalLatentError as refusal:
    print(refusal)

# %%
# With ``datum_plate=None`` the call is the datum. As all is linear and Gaussian, the evidence is one Gaussian density in 20
# dimensions, and what the best mean-field guide misses of it is known too. The library finds both.
linear = pv.exact.LinearGaussian(torch.stack([x**p for p in range(4)], 1), torch.zeros(20), torch.tensor(0.09))
truth, missed = linear.log_evidence(y[None]), linear.approximation_gap()
gaps = pv.InferenceGaps(*cubic, datum_plate=None, seed=0)(x, y)
print(f"log p(y) {float(truth):.3f}, {float(gaps.log_evidence):.3f}; gap {missed:.3f}, {float(gaps.approximation):.3f}")
assert bool((gaps.log_evidence - truth).abs() < 4.5 * gaps.std_errors["log_evidence"])
assert bool((gaps.approximation - missed).abs() < 4.5 * gaps.std_errors["approximation"])
read("Bayesian regression", *cubic, (x, y), datum_plate=None)

# %%
# A neural network is the same program with another ``predict``. With two weights, :math:`y = c \tanh(3 a x)`, quadrature
# still gives log p(y). The posterior has two mirror images, :math:`(a, c)` and :math:`(-a, -c)`, with H hidden units
# :math:`2^H H!`. Chains that start at the guide, on one of two, lose :math:`\log 2 = 0.693` nats with a small error bar.
# Both estimators below search first, and found both images with each of ten seeds.
tiny = regression("tiny", 2, lambda x, w: w[..., 1:] * torch.tanh(3 * w[..., :1] * x))
train(*tiny, (x, y), 800, None, lr=0.03)
for estimator in (pv.ExactEvidence, pv.AnnealedImportanceSampling, pv.AdaptiveImportanceSampling):
    evidence = estimator(*tiny, datum_plate=None, seed=4)(x, y)
    print(f"{estimator.__name__:<28} log p(y) {float(evidence.log_evidence):.3f} +- {float(evidence.std_error):.3f}")

# %%
# An information bottleneck: the label is the datum
# -------------------------------------------------
# The label is explained, and the guide alone sees the picture: :math:`D` is the cross-entropy of a classifier, and :math:`R`
# bounds what :math:`z` knows of the picture (Alemi et al., 2017, `arXiv:1612.00410 <https://arxiv.org/abs/1612.00410>`__).
# Nothing has :math:`D + R` below the entropy of labels, log 10. Up to there a nat of :math:`R` buys one of :math:`D`, and
# :math:`\beta = 1` is an edge (Kolchinsky et al., 2019, `arXiv:1808.07593 <https://arxiv.org/abs/1808.07593>`__).
order, nets = torch.randperm(1797), {}
pixels, labels = (torch.tensor(part)[order] for part in load_digits(return_X_y=True))
training = list(zip((pixels[:1400].float() / 16).split(100), labels[:1400].split(100), strict=True))
pixels, labels = pixels[1400:].float() / 16, labels[1400:]  # held out


def bottleneck(beta):
    encoder, classifier = nets[beta] = net(64, 4), net(2, 10)

    def model(x, y):
        pyro.module("classifier", classifier)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Categorical(logits=classifier(z)), obs=y)

    def guide(x, y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


sweep = pv.beta_sweep(
    bottleneck, training, (0.1, 0.6) if SMOKE_TEST else (0.01, 0.1, 0.3, 0.5, 0.7, 1.2), num_epochs=1 if SMOKE_TEST else 60,
    optimizer=lambda: ClippedAdam({"lr": 3e-3}), evidence=lambda *pair: pv.ImportanceSampling(*pair, num_particles=50),
    args=tuple, test_loader=[(pixels, labels)], seed=0, progress=False,
)  # fmt: skip
read("information bottleneck", *sweep.pairs[1], (pixels, labels))
floor = float(dist.Categorical(labels.bincount().float()).entropy())
assert bool((sweep.rate + sweep.distortion > floor - 4.5 * sweep.std_errors["elbo"]).all())
accuracy = [float((head(body(pixels)[:, :2]).argmax(-1) == labels).float().mean()) for body, head in nets.values()]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot([0, floor], [floor, 0], "k-", lw=0.8, label="D + R = entropy of the labels")
pv.plots.plot_rate_distortion(sweep, left, label="trained at each beta")
right.plot(sweep.rate, accuracy, "ks--")
right.set(xlabel="rate, nats per label", ylabel="accuracy, held out", ylim=(0, 1), title="What the rate buys, up to log 10")
plt.show()

# %%
# A world model: the datum is an episode
# --------------------------------------
# A pendulum with a motor is filmed twelve times: :math:`x_t`, its tip with noise, and the motor's action :math:`a_t`. Angle
# and speed are hidden. A state moves by :math:`p(z_t|z_{t-1}, a_{t-1})`, and the guide corrects it by what it sees. There is
# a rate per step, the news in a picture (Hafner et al., 2019, `arXiv:1811.04551 <https://arxiv.org/abs/1811.04551>`__).
STEPS, PAST, STATE = 12, 5, 3


def pendulum(num, kick=0.0):
    angle, speed, tips = torch.randn(num), torch.randn(num), []
    actions = torch.randint(-1, 2, (num, STEPS // 3)).repeat_interleave(3, 1).float()
    for t in range(STEPS):
        angle = angle + 0.3 * speed
        tips.append(torch.stack([angle.sin(), -angle.cos()], -1))
        speed = speed + 0.6 * (actions[:, t] - angle.sin()) + kick * (t == 6)  # a kick is nobody's action
    tips = torch.stack(tips, 1)
    return actions.unsqueeze(-1), tips + 0.05 * torch.randn_like(tips), tips


parts = move, push, look, correct = net(STATE, STATE), nn.Linear(1, STATE), net(STATE, 2), net(STATE + 2, 2 * STATE)


def ahead(z, actions, t):
    return z + move(z) + push(actions[:, t - 1]) if t else torch.zeros(len(actions), STATE)


def world(actions, x=None):
    pyro.module("world", nn.ModuleList(parts))
    log_step, log_noise = pyro.param("log_step", torch.zeros(STEPS, STATE)), pyro.param("log_noise", torch.tensor(-2.0))
    with pyro.plate("data", len(actions)):
        z = None
        for t in range(STEPS):
            z = pyro.sample(f"z_{t}", dist.Normal(ahead(z, actions, t), log_step[t].exp()).to_event(1))
            picture = dist.Normal(look(z), log_noise.exp()).to_event(1)
            pyro.sample(f"x_{t}", picture, obs=None if x is None else x[:, t])


def watch(actions, x):
    with pyro.plate("data", len(actions)):
        z = None
        for t in range(STEPS):
            guess = ahead(z, actions, t)
            shift, log_scale = correct(torch.cat([guess, x[:, t] - look(guess)], -1)).chunk(2, -1)
            z = pyro.sample(f"z_{t}", dist.Normal(guess + shift, (log_scale - 2).exp()).to_event(1))


train(world, watch, pendulum(2000)[:2], 1200, 100)
(actions, x, tips), kicked = pendulum(500), pendulum(500, kick=1.0)[:2]
usual = read("world model", world, watch, (actions, x))
surprised = read("world model, kicked", world, watch, kicked)
seen = Predictive(watch, num_samples=50, return_sites=[f"z_{t}" for t in range(PAST)])(actions, x)
states = seen | Predictive(world, seen)(actions)  # five pictures encoded, the rest imagined from the actions alone
future = torch.stack([look(states[f"z_{t}"]).detach() for t in range(STEPS)], 2)  # 50 draws, episodes, steps, 2
miss = (future.mean(0) - tips).square().sum(-1).mean(0).sqrt()[PAST:]
print(f"imagined: misses the tip after 1, 3, 7 steps by {miss[0]:.3f} {miss[2]:.3f} {miss[6]:.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
one = int((tips[:, PAST:] - tips[:, PAST - 1 : PAST]).square().sum((1, 2)).argmax())
left.plot(future[:, one, :, 0].T, color="0.75", lw=0.6)
left.plot(tips[one, :, 0], "k-", lw=2)
left.plot(x[one, :PAST, 0], "ko", mfc="white")
left.set(xlabel="step", ylabel="horizontal position of the tip", title="Seen (circles), imagined (grey) and true (black)")
right.bar(torch.arange(STEPS) - 0.2, usual, 0.4, color="white", edgecolor="black", label="usual episodes")
right.bar(torch.arange(STEPS) + 0.2, surprised, 0.4, color="0.4", edgecolor="black", label="kicked before step 7")
right.set(xlabel="step t", ylabel="rate of z_t, nats", ylim=(0, 6), title="The news in each picture")
right.legend(frameon=False)
plt.show()

# %%
# A diffusion model: the guide is fixed
# -------------------------------------
# The guide adds noise to a datum in fifteen steps, :math:`z_t = \alpha_t x + \sigma_t \epsilon`, and has no parameters. The
# model walks back: from :math:`z_t` it guesses :math:`x`, and draws :math:`z_{t-1}` as the guide would from the guess. Each
# step costs a KL between Gaussians: the ELBO is a distortion and a chain of rates (Ho et al., 2020, `arXiv:2006.11239
# <https://arxiv.org/abs/2006.11239>`__). The guide is written backwards too, so that both sides of a KL have one parent.
LAST = 14
log_snr = torch.linspace(6, -5, LAST + 1)  # z_0 is nearly the datum, z_14 nearly noise
alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
keep, fresh = alpha[1:] / alpha[:-1], 1 - alpha[1:] ** 2 * sigma[:-1] ** 2 / (alpha[:-1] * sigma[1:]) ** 2
a, b, v = keep * (sigma[:-1] / sigma[1:]) ** 2, alpha[:-1] * fresh, fresh * sigma[:-1] ** 2


def noising(x):  # z_t given z_{t+1} and x is N(a z_{t+1} + b x, v)
    with pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{LAST}", dist.Normal(alpha[LAST] * x, sigma[LAST]).to_event(1))
        for t in reversed(range(LAST)):
            z = pyro.sample(f"z_{t}", dist.Normal(a[t] * z + b[t] * x, v[t].sqrt()).to_event(1))


def diffusion(network=None):
    waves = 2 * torch.randn(2, 24)

    def guess(z, t):  # the mean of x given z_t: alpha z if x is N(0, I), and what the network adds
        features = [z, (z @ waves).sin(), (z @ waves).cos(), torch.eye(LAST + 1)[t].expand(*z.shape[:-1], -1)]
        return alpha[t] * z - (sigma[t] * network(torch.cat(features, -1)) if network else 0.0)

    def model(x):
        pyro.module("network", network or nn.Identity())
        doubt = pyro.param("doubt", sigma**2, constraint=dist.constraints.positive)  # Var(x | z_t), right for N(0, I)
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{LAST}", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            for t in reversed(range(LAST)):
                variance = v[t] + b[t] ** 2 * doubt[t + 1]
                z = pyro.sample(f"z_{t}", dist.Normal(a[t] * z + b[t] * guess(z, t + 1), variance.sqrt()).to_event(1))
            pyro.sample("x", dist.Normal(guess(z, 0), doubt[0].sqrt()).to_event(1), obs=x)

    return model


# %%
# Without a network this is exact for data from :math:`N(0, I)`: each step back is the true one, :math:`p(x, z) / q(z|x)` is
# :math:`p(x)` for every draw, and one particle gives :math:`\log p(x)` to rounding. The rate of a step is :math:`\log(v_p /
# v_q)` in two dimensions, of its variances without and with :math:`x`.
noise = torch.randn(2000, 2)
evidence = pv.ImportanceSampling(diffusion(), noising, num_particles=1, seed=0)(noise)
assert torch.allclose(evidence.log_evidence, dist.Normal(0.0, 1.0).log_prob(noise).sum(-1), atol=1e-3)
rates = read("diffusion, Gaussian data", diffusion(), noising, (noise,))
ratio = torch.cat([1 + b**2 * sigma[1:] ** 2 / v, 1 / sigma[LAST:] ** 2]).flip(0)
assert bool(((rates - ratio.log()).abs() < 4.5 * (1 - 1 / ratio) / 2000**0.5).all())  # errors of a mean over 2,000 data

moons = torch.tensor(make_moons(4000, noise=0.08, random_state=0)[0], dtype=torch.float)
moons = (moons - moons.mean(0)) / moons.std(0)
trained = diffusion(net(51 + LAST, 2))
train(trained, noising, (moons,), 2000, 256)
rates_moons = read("diffusion, two moons", trained, noising, (moons[:1000],))
drawn = pv.simulate(trained, moons, seed=0).observed["x"]

figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=(1, 1, 2))
for ax, points, name in ((axes[0], moons, "data"), (axes[1], drawn, "drawn by the model")):
    ax.scatter(*points[:2000].T, s=2, color="black", alpha=0.5)
    ax.set(title=name, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[])
steps = torch.arange(LAST + 1)
axes[2].bar(steps - 0.2, rates, 0.4, color="white", edgecolor="black", label="Gaussian data")
axes[2].bar(steps + 0.2, rates_moons, 0.4, color="0.4", edgecolor="black", label="two moons")
axes[2].plot(steps - 0.2, ratio.log(), "k_", ms=10, label="Gaussian data, closed form")
axes[2].set(xlabel="steps back, from the noise to the datum", ylabel="rate, nats per datum", title="A chain of rates")
axes[2].legend(frameon=False)
plt.show()

# %%
# Fine-tuning a language model: the reward is a log-likelihood
# ------------------------------------------------------------
# Answers shall earn a reward and stay near a model :math:`p`: maximise :math:`E_\pi\, r(y) - \tau\, KL(\pi \| p)`. That is
# an ELBO with beta :math:`= \tau`: the policy is the guide, :math:`e^{r/\tau}` a tempered likelihood, the best policy a
# posterior, the best value :math:`\tau \log Z` (Korbak et al., 2022, `arXiv:2205.11275
# <https://arxiv.org/abs/2205.11275>`__).
prior = torch.tensor([0.30, 0.25, 0.15, 0.10, 0.08, 0.06, 0.04, 0.02])
reward = torch.tensor([0.0, 0.5, 1.0, 0.0, 2.0, 1.0, 3.0, 4.0])


def answers():
    pyro.factor("reward", reward[pyro.sample("answer", dist.Categorical(prior))])


@config_enumerate
def policy():
    pyro.sample("answer", dist.Categorical(logits=pyro.param("logits", prior.log())))


for tau in (4.0, 2.0, 1.0, 0.5):
    objective = pv.BetaTraceEnum_ELBO(beta=tau, max_plate_nesting=0)
    svi = SVI(answers, policy, pyro.optim.Adam({"lr": 0.1}), objective)
    for _ in range(300):
        svi.step()
    tilted, terms = prior.log() + reward / tau, objective.terms
    assert bool((pyro.param("logits").softmax(0) - tilted.softmax(0)).abs().max() < 0.01)
    best, value = tau * tilted.logsumexp(0), terms.reconstruction - tau * terms.kl_sum
    print(f"tau {tau}: reward {terms.reconstruction:.3f}, KL {terms.kl_sum:.3f}, value {value:.4f}, tau log Z {best:.4f}")

# %%
# What to try
# -----------
# - Regression: eight weights instead of four. The evidence hardly moves, the best ELBO falls. Whose gap is that?
# - World model: kicks in training too. Diffusion: 5 and 40 steps. What happens to the rates?
# - Fine-tuning: a reward of 10 for one answer, and a small tau. What does the KL tend to?
#
# Next: back to the start with a model of your own, :doc:`quickstart`.
