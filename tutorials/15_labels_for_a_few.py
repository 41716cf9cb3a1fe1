r"""
Labels for a few
================

Data are plenty and labels are dear. Here is a VAE whose latents are a class and a style, trained on 1437 digits of which 100
have a label. At the end you can train such a pair on both kinds of data in one batch, compare its classifier with one that
saw the labels alone, ask the model itself for a second opinion, and see for which classes log p(x) is low and the ELBO far
below it.
"""

# %%
# A class and a style
# -------------------
# A digit :math:`x` has a class :math:`y` and a style :math:`z`, and the encoder has a classifier beside it. Known as M2
# (`Kingma, Rezende, Mohamed and Welling 2014 <https://arxiv.org/abs/1406.5298>`__):
#
# .. math::
#
#    p(y) \, p(z) \, p(x \mid z, y), \qquad q(y \mid x) \, q(z \mid x, y)
#
# Where the label is known it is an observation, and the bound is one of :math:`\log p(x, y)`. Where it is not, it is a
# latent of ten values, and :math:`\log p(x) = \log \sum_y p(x, y)`:
#
# .. math::
#
#    \log p(x, y) &\ge \mathcal{L}(x, y) =
#        \mathrm{E}_{q(z \mid x, y)} \big[ \log p(x \mid z, y) + \log p(y) + \log p(z) - \log q(z \mid x, y) \big] \\
#    \log p(x) &\ge \sum_y q(y \mid x) \big[ \mathcal{L}(x, y) - \log q(y \mid x) \big]
#
# The first line does not contain the classifier. So the paper adds its cross-entropy on the labels, times :math:`\alpha`: a
# loss of its own, no part of any bound.

import copy
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_STEPS, NUM_TEST, NUM_PARTICLES = (10, 12, 20) if SMOKE_TEST else (800, 360, 200)
LABELS_PER_CLASS, LATENTS = 10, 4
pyro.set_rng_seed(0)

digits = load_digits()
pixels, labels = torch.tensor(digits.data, dtype=torch.float), torch.tensor(digits.target)
train, test, train_labels, test_labels = train_test_split(pixels, labels, test_size=360, random_state=0, stratify=labels)
test, test_labels = test[:NUM_TEST], test_labels[:NUM_TEST]
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
few = torch.cat([order[train_labels[order] == c][:LABELS_PER_CLASS] for c in range(10)])

# %%
# The pair is four networks. ``Concatenated`` joins x or z to the class, one-hot. Pixels are whole numbers from 0 to 16, so
# the likelihood is a Binomial.

likelihood = pv.nn.Binomial(16)
posterior = pv.nn.Normal()
classifier = nn.Sequential(likelihood.input_layer(), pv.nn.MLP(64, 10, hidden=(128,)))
untrained = copy.deepcopy(classifier)
vae = pv.SemiSupervisedVAE(
    classifier=classifier,
    encoder=pv.models.Concatenated(
        nn.Sequential(pv.nn.MLP(64 + 10, posterior.num_outputs(LATENTS), hidden=(128,)), posterior),
        first=likelihood.input_layer(),
    ),
    decoder=pv.models.Concatenated(nn.Sequential(pv.nn.MLP(LATENTS + 10, 64, hidden=(128,)), likelihood)),
    prior=pv.nn.StandardNormal(LATENTS),
    num_classes=10,
    alpha=50.0,
)

# %%
# Training
# --------
# A batch has the 100 digits with their labels and 100 others, whose label is -1. The guide enumerates the class, so the
# loss is an Enum one; everything else is as ever. (Showing the few labels in every batch weighs them more than the sum over
# all data would. With that sum, and a small :math:`\alpha`, the classes of the model drift away from the names that we gave
# them: a bound on log p(x) does not care what they are called.)

svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), pv.BetaTraceEnum_ELBO(max_plate_nesting=1))
y = torch.cat([train_labels[few], torch.full((100,), -1)])
for _ in range(NUM_STEPS):
    svi.step(torch.cat([train[few], train[torch.randint(len(train), (100,))]]), y)
vae.eval()

# %%
# The same classifier, from the same start, on the 100 labels alone:

optimizer = torch.optim.Adam(untrained.parameters(), lr=2e-3)
for _ in range(20 if SMOKE_TEST else 300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(untrained(train[few]), train_labels[few]).backward()
    optimizer.step()

# %%
# A second opinion
# ----------------
# The classifier is a part of the guide. The model has a word of its own: p(y given x) is in proportion to p(x, y), and
# log p(x, y) is what any estimator returns when it is given that label. Ten calls, one for each class, and Bayes' rule. The
# sum over the classes is p(x) again, which a call *without* labels estimates in one go.


def log_evidence(x, y=None):
    kind = pv.ImportanceSampling if SMOKE_TEST else pv.AdaptiveImportanceSampling
    estimator = kind(vae.model, vae.guide, num_particles=NUM_PARTICLES, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return estimator(x, y).log_evidence


by_class = torch.stack([log_evidence(test, torch.full((NUM_TEST,), c)) for c in range(10)], 1)  # log p(x, y)
summed, at_once = by_class.logsumexp(1), log_evidence(test)
print(f"mean log p(x): {summed.mean():.2f} as a sum over ten classes, {at_once.mean():.2f} at once, nats")
assert SMOKE_TEST or abs((summed - at_once).median()) < 0.05

opinions = {
    "100 labels alone": untrained(test).log_softmax(1).detach(),
    "q(y given x), the classifier": vae.classify(test).logits.detach(),
    "p(y given x), the model": by_class.log_softmax(1),
}
right = {name: log_p.argmax(1) == test_labels for name, log_p in opinions.items()}
print(f"{'':<30}{'right':>7}{'-log p of the true label':>27}")
for name, log_p in opinions.items():
    surprise = -log_p.gather(1, test_labels[:, None]).mean()
    print(f"{name:<30}{right[name].float().mean():>7.1%}{surprise:>22.2f} nats")
gain = right["q(y given x), the classifier"].float() - right["100 labels alone"].float()
print(f"classifier less labels alone: {gain.mean():+.1%} +- {gain.std() / NUM_TEST**0.5:.1%} (sampling error)")

# %%
# On these digits the 1337 without a label change the accuracy by no more than its error. (With other starts and other labels
# the classifier of the pair ended between 88% and 92%, so one run shows neither a gain nor a loss.) The bound says why: it
# asks a class to explain pixels, and a way of writing explains pixels as well as a digit does. The last column shows what
# that does to the opinions. 64 pixels speak for a class with many nats, so the model is nearly always certain, right or
# wrong.

# %%
# Style and class
# ---------------
# What a classifier cannot do: take the style of a digit, the mean of q(z given x, y), and decode it under each class. Slant,
# width and weight of the pen stay. Nobody has labelled a style.

# sphinx_gallery_thumbnail_number = 1
shown = torch.arange(6)
with torch.no_grad():
    styles = vae.encode(test[shown], test_labels[shown]).mean
    others = [vae.decode(styles, torch.full((len(shown),), c)).mean for c in range(10)]
images = torch.stack([test[shown], *others], 1).reshape(-1, 11, 8, 8)
figure, axes = plt.subplots(len(shown), 11, figsize=(7.4, 4.2), layout="constrained")
for row, line in zip(axes, images, strict=True):
    for ax, image in zip(row, line, strict=True):
        ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=16)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
for ax, title in zip(axes[0], ["digit", *range(10)], strict=True):
    ax.set_title(title)
figure.suptitle("a held-out digit, and its style under every class")
plt.show()

# %%
# Class by class
# --------------
# log p(x) of digits without their label, and how far the ELBO lies below it. All records here are per datum, so that a table
# by class is a mean over some of them. The classifier is part of the guide; where it is wrong the bound pays for it.

estimator = pv.InferenceGaps(vae.model, vae.guide, num_particles=NUM_PARTICLES, seed=0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about single digits, which the record counts
    gaps = estimator(test)
print(gaps)

classes = [c for c in range(10) if (test_labels == c).sum() > 1]


def by_label(values):
    """Means and their sampling errors, class by class."""
    parts = [values[test_labels == c] for c in classes]
    return [float(part.mean()) for part in parts], [float(part.std() / len(part) ** 0.5) for part in parts]


wrong = (~right["q(y given x), the classifier"]).float()
print(f"{'class':<8}{'log p(x)':>10}{'gap':>8}{'wrong':>8}")
for line in zip(classes, by_label(gaps.log_evidence)[0], by_label(gaps.inference)[0], by_label(wrong)[0], strict=True):
    print(f"{line[0]:<8}{line[1]:>10.1f}{line[2]:>8.2f}{line[3]:>8.0%}")

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
for ax, values, name in zip(axes, (gaps.log_evidence, gaps.inference), ("log p(x)", "log p(x) - ELBO"), strict=True):
    means, errors = by_label(values)
    ax.errorbar(classes, means, errors, fmt="ko", markersize=5, capsize=3)
    ax.set(xlabel="class", ylabel="nats", xticks=classes, title=f"{name}, mean and sampling error")
plt.show()

# %%
# The gap of a digit that the classifier gets wrong, beside that of one that it gets right:

means = [float(gaps.inference[mask].mean()) for mask in (wrong == 0, wrong == 1)]
print(f"gap of {int(NUM_TEST - wrong.sum())} digits with the right class: {means[0]:.2f} nats")
print(f"gap of {int(wrong.sum())} digits with a wrong one: {means[1]:.2f} nats")
assert SMOKE_TEST or means[1] > means[0]

# %%
# So a large gap hints at a wrong class, and needs no label to be seen. (In the split of the gap q* frees the style for each
# digit, not the class, so what the classifier loses counts as the family's. ``gaps.held`` names it.)

# %%
# What to try
# -----------
#
# - One label per class, then fifty. When does the classifier of the pair stop being ahead?
# - ``alpha=0.0``. Each class of the model is then some heap of digits: draw from it by ``vae.generate`` and see of which.
# - ``pv.SelfCheck(vae.model, vae.guide)(test, test_labels)``: are these estimates right on data whose log p(x, y) two bounds
#   enclose?
# - More latents. The style then takes over what the class was to say; watch the table of opinions.
#
# A decoder that is told the class of every datum: ``pv.ConditionalVAE``, :doc:`/choosing`. Next: counts, :doc:`17_counts`.
