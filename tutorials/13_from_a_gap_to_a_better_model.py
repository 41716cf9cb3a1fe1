r"""
From a gap to a better model
============================

An encoder stays nine nats short of what its own family could do. Is it trained too little, too small, or has it learnt its
data by heart? At the end you can tell the three apart, repair what can be repaired without touching the model, and train
the model on from there without training too long.
"""

# %%
# Three reasons for an amortization gap
# -------------------------------------
# For one datum the amortization gap is :math:`A = \mathcal{L}[q^*] - \mathcal{L}[q]`: what the encoder's :math:`q` loses on
# the best member :math:`q^*` of its own family (:doc:`03_three_gaps`). An encoder may miss :math:`q^*` for three reasons.
# It has not been *optimised* to the end. It has not the *capacity* for the map from :math:`x` to :math:`q^*`. Or it does
# well on the data it was trained on and does not *generalise*
# (`Zhang, Hayes and Barber 2022 <https://arxiv.org/abs/2205.11640>`__).
#
# As long as the model moves they cannot be told apart: it moves :math:`q^*` with it. So hold the model still, train the
# encoder further, and measure :math:`A` before and after, on training and on test data:
#
# .. math::
#
#    A_\text{test}^\text{before}
#    = \underbrace{A_\text{train}^\text{before} - A_\text{train}^\text{after}}_{\text{optimisation}}
#    + \underbrace{A_\text{train}^\text{after}}_{\text{capacity}}
#    + \underbrace{A_\text{test}^\text{before} - A_\text{train}^\text{before}}_{\text{generalisation}} .
#
# There is nothing in principle that forbids a gap of zero: with independent data the :math:`q^*` of a datum is a function of
# that datum alone (`Margossian and Blei 2024 <https://arxiv.org/abs/2307.11018>`__).

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
warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)  # the printed records count these data
warnings.simplefilter("ignore", pv.errors.ConvergenceWarning)
pyro.set_rng_seed(0)

# %%
# A VAE of digits
# ---------------
# 8x8 pixels of 0 to 16, so a Binomial of 16 trials. Three sets this time: *held-out* data will decide when to stop, and what
# decides is used up by that. So the numbers come from *test* data, which nothing else sees.

digits = torch.tensor(load_digits().data, dtype=torch.float)
train, held_out, test = digits[:1300], digits[1300:1500], digits[1500:1540] if SMOKE_TEST else digits[1500:]
train_loader = DataLoader(TensorDataset(train), batch_size=100, shuffle=True)
held_out_loader, test_loader = (DataLoader(TensorDataset(x), batch_size=300) for x in (held_out, test))


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
encoder = Encoder(nn.Sequential(nn.Linear(64, 100), nn.Softplus(), nn.Linear(100, 16)), "encoder")


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 8), 1.0).to_event(1))
        pyro.sample("obs", dist.Binomial(16, logits=decoder(z)).to_event(1), obs=x)


svi = SVI(model, encoder, pyro.optim.Adam({"lr": 2e-3}), pv.BetaTraceMeanField_ELBO())
for _ in range(NUM_UPDATES):
    svi.step(train[torch.randint(len(train), (100,))])

options = {"num_particles": 50 if SMOKE_TEST else 300, "progress": False}
few = {"num_data": 40 if SMOKE_TEST else 300, **options}
page = pv.diagnose(model, encoder, train=train_loader, test=test_loader, **few)
print(page.headline, page.advice, sep="\n")

# %%
# The page puts the model first: it loses more on new digits than all of the gap. That is where we are going, and the way
# leads through the encoder. A model is trained by what its guide shows it.
#
# The first repair: train on
# --------------------------
# ``refit_guide`` trains the guide in place and holds the model still. The learning rate falls to nothing over the run: an
# encoder that is shaken by a large step looks like one that is too small.


def falling(rate):
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}, "gamma": 0.02 ** (1 / NUM_EPOCHS)}
    return pv.FusedOptim(torch.optim.lr_scheduler.ExponentialLR, options)


before = copy.deepcopy(encoder.state_dict())
weights = [value.clone() for value in decoder.state_dict().values()]
further = {"test": test_loader, "num_epochs": NUM_EPOCHS, "seed": 0, **few}
trained_on = pv.refit_guide(model, encoder, train_loader, falling(5e-3), **further)
print(trained_on)

# %%
# Read it from below. *Optimisation* is what the same network could have had all along. *Capacity* is what it leaves on its
# own training data, or what this training has not reached: an upper bound. *Generalisation* is what it loses on digits that
# it has not seen, with the sampling error, for these are different digits.
#
# The model has stood still: its weights are the same to the last bit, and the two estimates of log p(x) differ by no more
# than their errors.

assert all(torch.equal(old, new) for old, new in zip(weights, decoder.state_dict().values(), strict=True))
moved = trained_on.changes["log_evidence"]
assert abs(moved.value) < 5 * moved.std_error + 0.02
parts, gap = trained_on.parts, trained_on.test_after.summary()["amortization"]
assert abs(parts["capacity"].value + parts["generalisation after"].value - gap.value) < 1e-3

# %%
# The second repair: more data than there are
# -------------------------------------------
# What is lost on new data is not mended by longer training on the old. But the encoder's task is to invert the *model*, and
# the model makes as many data as one likes. ``simulated=1``: after each batch of digits, one that is drawn from the model,
# new every time. We start again from where the first repair did, so that the two can be compared.

encoder.load_state_dict(before)
simulated = pv.refit_guide(model, encoder, train_loader, falling(5e-3), simulated=1, **further)
print(simulated)

# %%
# The third repair: a larger encoder
# ----------------------------------
# ``other=`` hands the model over to another guide, and measures the old one beside it. Here it has a second hidden layer,
# and starts from nothing. Held-out digits say when to stop, as a larger encoder learns more by heart; ``simulated`` holds
# against it.

layers = nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 16)
larger = Encoder(nn.Sequential(*layers), "larger encoder")
handed_over = pv.refit_guide(
    model, encoder, train_loader, falling(3e-3), other=larger, held_out=held_out_loader, simulated=1, **further
)
print(handed_over)

figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
pv.plots.plot_held_out(handed_over.history, ax=ax)
plt.show()

# %%
# All of them side by side, on test data. The family's part, above, is the same for all: the model is, and the family is.

figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
kept = {
    "as trained": trained_on.test_before,
    "trained on": trained_on.test_after,
    "and simulated": simulated.test_after,
    "and larger": handed_over.test_after,
}
pv.plots.plot_gaps_side_by_side(kept, ax=ax)
plt.show()

# %%
# On to the model
# ---------------
# None of this has made a better *model*: log p(x) is what it was. It made its ELBO honest. Now the model may learn again,
# with a guide that shows it where its posteriors are. Its data are few, so the question is when to stop. The held-out ELBO
# says so: the same digits and the same noise at each look, so that a rise can be told from its error.

svi = SVI(model, larger, pyro.optim.Adam({"lr": 5e-4}), pv.BetaTraceMeanField_ELBO())
stopping = pv.EarlyStopping(model, larger, held_out_loader, every=50, patience=5)
for step in range(NUM_UPDATES):
    svi.step(train[torch.randint(len(train), (100,))])
    if stopping(step):
        break
stopping.look(step)  # where it was not stopped: the end may be the best
stopping.restore_best()
print(stopping)

# %%
# Is it a better model? By log p(x) of test digits, datum by datum: the same digits in both, so that what makes one digit
# harder than another drops out. ``compare`` says whether digits at large can be claimed to be likelier, and whether the ELBO
# says the same.

gaps = pv.evaluate(pv.InferenceGaps(model, larger, num_particles=few["num_particles"]), test_loader, seed=1, progress=False)
comparison = pv.compare({"before": handed_over.test_after, "trained on": gaps})
print(comparison)

figure, ax = plt.subplots(figsize=(7, 2.5), layout="constrained")
comparison.plot(ax)
plt.show()

if not SMOKE_TEST:
    gap_of = {name: float(record.amortization.mean()) for name, record in kept.items()}
    assert gap_of["trained on"] < 0.75 * gap_of["as trained"] and gap_of["and larger"] < 0.4 * gap_of["as trained"]

# %%
# What to try
# -----------
#
# - An encoder with ten hidden units. Which part grows?
# - ``train[:100]`` in the place of all training digits. Which part grows now, and what does ``simulated=4`` do about it?
# - ``pv.nn.MultivariateNormal`` as the head of another encoder: what does ``other=`` say about the family?
# - A constant learning rate. How many nats does *capacity* seem to gain, and are they real?
#
# What the verdicts of the page mean: :doc:`/diagnosis`.
