r"""
From a gap to a better model
============================

The ELBO of a VAE is nine nats below log p(x), and nearly all of that is the encoder's
amortization gap. Is the encoder trained too little, is it too small, or has it learnt
its training data by heart? At the end you can tell these three apart. You can also
repair the encoder without touching the model, and then train the model on from there
without training too long.

Prerequisites: :doc:`03_three_gaps` and :doc:`10_your_own_model`; 1 to 2 minutes to run.
"""

# %%
# Three reasons for an amortization gap
# -------------------------------------
# For one datum (one data point) :math:`x`, let :math:`q` be the Gaussian that the
# encoder returns. Let :math:`q^*` be the best member of the same family for this datum.
# The amortization gap is :math:`A = \mathcal{L}[q^*] - \mathcal{L}[q]`, where
# :math:`\mathcal{L}` is the ELBO (:doc:`03_three_gaps`). An encoder may miss
# :math:`q^*` for three reasons (Zhang, Hayes and Barber 2022, `Generalization Gap in
# Amortized Inference <https://arxiv.org/abs/2205.11640>`__):
#
# - *Optimisation*: its training has not converged.
# - *Capacity*: the network cannot represent the map from :math:`x` to :math:`q^*`.
# - *Generalisation*: it does well on its training data and worse on new data.
#
# These cannot be told apart while the model is trained too, because :math:`q^*` changes
# with the model. So hold the model fixed, train the encoder further, and measure
# :math:`A` before and after, on training and on test data:
#
# .. math::
#
#    A_\text{test}^\text{before}
#    = \underbrace{A_\text{train}^\text{before} - A_\text{train}^\text{after}}
#      _{\text{optimisation}}
#    + \underbrace{A_\text{train}^\text{after}}_{\text{capacity}}
#    + \underbrace{A_\text{test}^\text{before} - A_\text{train}^\text{before}}
#      _{\text{generalisation}} .
#
# A gap of zero is possible in principle. With independent data, the :math:`q^*` of a
# datum is a function of that datum alone (Margossian and Blei 2024, `Amortized
# Variational Inference: When and Why? <https://arxiv.org/abs/2307.11018>`__).

# sphinx_gallery_thumbnail_number = 2

import copy
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
NUM_UPDATES, NUM_EPOCHS = (20, 2) if SMOKE_TEST else (2000, 200)
# The printed records count the data that these warnings are about.
warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
warnings.simplefilter("ignore", pv.errors.ConvergenceWarning)
pyro.set_rng_seed(0)

# %%
# A VAE of digits
# ---------------
# The images have 8x8 pixels, whole numbers from 0 to 16, so the likelihood is a
# Binomial with 16 trials per pixel. The data are split into three sets. *Training* data
# train. *Held-out* data decide when to stop, so they can no longer give an unbiased
# result. All reported numbers come from *test* data, which nothing else uses.

digits = torch.tensor(load_digits().data, dtype=torch.float)
train, held_out = digits[:1300], digits[1300:1500]
test = digits[1500:1540] if SMOKE_TEST else digits[1500:]
train_loader = DataLoader(TensorDataset(train), batch_size=100, shuffle=True)
held_out_loader = DataLoader(TensorDataset(held_out), batch_size=300)
test_loader = DataLoader(TensorDataset(test), batch_size=300)


class Encoder(nn.Module):
    def __init__(self, net, name):
        super().__init__()
        self.net, self.name = net, name

    def forward(self, x):
        pyro.module(self.name, self)
        loc, log_scale = self.net(x / 16).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


decoder = nn.Sequential(nn.Linear(8, 100), nn.Softplus(), nn.Linear(100, 64))
small = nn.Sequential(nn.Linear(64, 100), nn.Softplus(), nn.Linear(100, 16))
encoder = Encoder(small, "encoder")


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 8), 1.0).to_event(1))
        pyro.sample("obs", dist.Binomial(16, logits=decoder(z)).to_event(1), obs=x)


# %%
# Train model and encoder together, then ask ``diagnose`` what to change first.

adam = pyro.optim.Adam({"lr": 2e-3})
svi = SVI(model, encoder, adam, pv.BetaTraceMeanField_ELBO())
for _ in range(NUM_UPDATES):
    svi.step(train[torch.randint(len(train), (100,))])

options = {"num_particles": 50 if SMOKE_TEST else 300, "progress": False}
few = {"num_data": 40 if SMOKE_TEST else 300, **options}
page = pv.diagnose(model, encoder, train=train_loader, test=test_loader, **few)
print(page.headline, page.advice, sep="\n")

# %%
# The diagnosis puts the model first: what it loses on new digits is more than the whole
# inference gap. This tutorial ends with the model, too. It repairs the encoder before
# that, because the ELBO trains the model on latents that the encoder draws.
#
# The first repair: train the encoder further
# -------------------------------------------
# ``refit_guide`` trains the guide in place and holds the model fixed. The learning rate
# falls to 2 % of its first value over the run. With a large constant rate, the noise of
# the updates would add to the gap and look like missing capacity.


def falling(rate):
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}}
    schedule["gamma"] = 0.02 ** (1 / NUM_EPOCHS)
    return pv.FusedOptim(torch.optim.lr_scheduler.ExponentialLR, schedule)


before = copy.deepcopy(encoder.state_dict())
weights = [value.clone() for value in decoder.state_dict().values()]
further = {"test": test_loader, "num_epochs": NUM_EPOCHS, "seed": 0, **few}
trained_on = pv.refit_guide(model, encoder, train_loader, falling(5e-3), **further)
print(trained_on)

# %%
# Each number has two errors. The *Monte Carlo* error is over random draws, for these
# data. The *sampling* error is over the choice of data. At the end of the record stand
# the parts of the gap:
#
# - *Optimisation* is what the same network gained on training data by more training.
# - *Capacity* is the gap that is left on training data. It is an upper bound, because
#   the training may still not have converged.
# - *Generalisation* is how much larger the gap is on test data than on training data.
#   Its sampling error is the largest: it compares two different sets of digits.
#
# The model has not changed. Its weights are equal to the last bit, and the two
# estimates of log p(x) agree within their errors.

decoder_now = decoder.state_dict().values()
assert all(torch.equal(*pair) for pair in zip(weights, decoder_now, strict=True))
moved = trained_on.changes["log_evidence"]
assert abs(moved.value) < 5 * moved.std_error + 0.02
parts, gap = trained_on.parts, trained_on.test_after.summary()["amortization"]
left = parts["capacity"].value + parts["generalisation after"].value
assert abs(left - gap.value) < 1e-3

# %%
# The second repair: train on simulated data
# ------------------------------------------
# Longer training on the same data does not remove the loss on new data. But the task of
# the encoder is to invert the *model*, and the model can simulate any number of data.
# With ``simulated=1``, each batch of digits is followed by a batch of new data drawn
# from the model. The encoder starts again from where the first repair started, so that
# the two repairs can be compared.

encoder.load_state_dict(before)
mixed = {"simulated": 1, **further}
simulated = pv.refit_guide(model, encoder, train_loader, falling(5e-3), **mixed)
print(simulated)

# %%
# The third repair: a larger encoder
# ----------------------------------
# ``other=`` replaces the guide by another one for the same model, and compares the two.
# The new encoder has a second hidden layer and is trained from its initial weights. A
# larger encoder memorises more, so held-out digits decide when to stop, and simulated
# data are used again.

layers = nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()
larger = Encoder(nn.Sequential(*layers, nn.Linear(256, 16)), "larger encoder")
replacing = {"other": larger, "held_out": held_out_loader, **mixed}
handed_over = pv.refit_guide(model, encoder, train_loader, falling(3e-3), **replacing)
print(handed_over)

# sphinx_gallery_start_ignore
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
pv.plots.plot_held_out(handed_over.history, ax=ax)
plt.show()
# sphinx_gallery_end_ignore

# %%
# All four encoders side by side, on test data. The approximation gap, which is the part
# of the family, is the same for all four: they share the model and the family.

kept = {
    "as trained": trained_on.test_before,
    "trained on": trained_on.test_after,
    "and simulated": simulated.test_after,
    "and larger": handed_over.test_after,
}
if not SMOKE_TEST:
    gap_of = {name: record.amortization.mean() for name, record in kept.items()}
    assert gap_of["trained on"] < 0.75 * gap_of["as trained"]
    assert gap_of["and larger"] < 0.4 * gap_of["as trained"]

# sphinx_gallery_start_ignore
figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
pv.plots.plot_gaps_side_by_side(kept, ax=ax)
plt.show()
# sphinx_gallery_end_ignore

# %%
# Back to the model
# -----------------
# None of these repairs made a better *model*: log p(x) is unchanged. They brought the
# ELBO nearer to log p(x). Now train the model further, with a guide that is nearer to
# its posteriors. There are few training data, so the question is when to stop. The ELBO
# of the held-out digits decides. Each look uses the same digits and the same noise, so
# that a rise can be compared with its error.

svi = SVI(model, larger, pyro.optim.Adam({"lr": 5e-4}), pv.BetaTraceMeanField_ELBO())
stopping = pv.EarlyStopping(model, larger, held_out_loader, every=50, patience=5)
for step in range(NUM_UPDATES):
    svi.step(train[torch.randint(len(train), (100,))])
    if stopping(step):
        break
stopping.look(step)  # needed if it never stopped: the last state may be the best
stopping.restore_best()
print(stopping)

# %%
# Is the model better now? ``compare`` takes the differences in log p(x) digit by digit,
# on the test data. Both models see the same digits, so the differences between easy and
# hard digits cancel. It says whether the gain holds for digits in general, and whether
# the ELBO says the same.

after = pv.InferenceGaps(model, larger, num_particles=few["num_particles"])
gaps = pv.evaluate(after, test_loader, seed=1, progress=False)
comparison = pv.compare({"before": handed_over.test_after, "trained on": gaps})
print(comparison)

# sphinx_gallery_start_ignore
figure, ax = plt.subplots(figsize=(7, 2.5), layout="constrained")
comparison.plot(ax)
plt.show()
# sphinx_gallery_end_ignore

# %%
# What to try
# -----------
# - Use an encoder with ten hidden units for the same model. Which part grows?
# - Refit with ``train[:100]`` instead of all training digits. Which part grows now, and
#   what does ``simulated=4`` do about it?
# - Use another encoder that ends in ``pv.nn.MultivariateNormal``. What does ``other=``
#   say about the family?
# - Use a constant learning rate. How many nats does *capacity* seem to gain? (Problem 2
#   has the reason.)
#
# Practice problems
# -----------------
#
# 1. Verify the identity of the three parts in general, and with the numbers of the
#    first repair.
# 2. Gradient descent with noise:
#    :math:`\theta \leftarrow \theta - \eta (h \theta + \varepsilon)`, where :math:`h`
#    is the curvature of the loss :math:`\tfrac12 h \theta^2` and :math:`\varepsilon`
#    has mean zero and variance :math:`\sigma^2`. What loss is left after many steps,
#    for small :math:`\eta`?
# 3. An encoder is trained on data simulated from the model. Show that it minimises the
#    mean of :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x))` over the *model's*
#    data. When is this also best for real data?
# 4. Fourteen looks have the same true ELBO and independent errors of standard deviation
#    :math:`s`. How far above the truth is the best of them, on average? Why are the
#    final numbers taken from test data?
#
# Answers
# -------
#
# 1. :math:`A_\text{train}^\text{before}` and :math:`A_\text{train}^\text{after}` occur
#    twice with opposite signs, and :math:`A_\text{test}^\text{before}` is left. With
#    numbers: :math:`2.093 + 3.012 + 3.521 = 8.626`.
# 2. The stationary variance of :math:`\theta` satisfies
#    :math:`v = (1 - \eta h)^2 v + \eta^2 \sigma^2`, so
#    :math:`v \approx \eta \sigma^2 / 2h` and the loss left is
#    :math:`\tfrac12 h v \approx \eta \sigma^2 / 4`. It is proportional to the learning
#    rate. Hence the rate that falls.
# 3. Minus the ELBO is :math:`\mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)) - \log p(x)`,
#    and :math:`\log p(x)` does not depend on the encoder. Take the mean over simulated
#    :math:`x`. An encoder that reaches :math:`q^*` for every datum is best for both.
#    One with too little capacity must choose which data to serve, and simulated data
#    are not the real ones.
# 4. The mean of the largest of 14 independent standard normals is 1.70, so
#    :math:`1.7 s`. The selection makes the held-out ELBO of the chosen state too high.
#    Test data took no part in it.
#
# What the verdicts of the page mean: :doc:`/diagnosis`.
