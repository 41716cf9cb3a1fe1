r"""
Labels for a few
================

Often data are plentiful and labels are expensive. This tutorial trains a VAE whose
latents are a class and a style, on 1437 digits of which 100 have a label. Data with and
without a label share one batch. You will compare its classifier with one that was
trained on the labels alone, and ask the model itself for the class by Bayes' rule. At
the end, :math:`\log p(x)` and the gap of the ELBO are listed class by class.

Prerequisites: :doc:`02_first_vae` and :doc:`03_three_gaps`; about 2 minutes to run.
"""

# %%
# A class and a style
# -------------------
# The model explains a digit :math:`x` by a
# class :math:`y` and a style :math:`z`. The guide consists of a classifier
# :math:`q(y \mid x)` and an encoder :math:`q(z \mid x, y)`. This pair is known as M2
# (`Kingma, Rezende, Mohamed and Welling (2014), "Semi-Supervised Learning with Deep
# Generative Models" <https://arxiv.org/abs/1406.5298>`__):
#
# .. math::
#
#    p(y) \, p(z) \, p(x \mid z, y), \qquad q(y \mid x) \, q(z \mid x, y)
#
# For a digit with a label, the label is an observation, and the bound is one on
# :math:`\log p(x, y)`. For a digit without a label, :math:`y` is a latent with ten
# values, and :math:`\log p(x) = \log \sum_y p(x, y)`. The two bounds are
#
# .. math::
#
#    \log p(x, y) &\ge \mathcal{L}(x, y) =
#        \mathrm{E}_{q(z \mid x, y)} \big[ \log p(x \mid z, y) + \log p(y)
#        + \log p(z) - \log q(z \mid x, y) \big] \\
#    \log p(x) &\ge \sum_y q(y \mid x) \big[ \mathcal{L}(x, y) - \log q(y \mid x) \big]
#
# The first bound does not contain the classifier, so labels would not train it. The
# paper therefore adds the cross-entropy of the classifier on the labels, times
# :math:`\alpha`. This term is a separate loss and not part of any bound.

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
pixels = torch.tensor(digits.data, dtype=torch.float)
labels = torch.tensor(digits.target)
train, test, train_labels, test_labels = train_test_split(
    pixels,
    labels,
    test_size=360,
    random_state=0,
    stratify=labels,
)
test, test_labels = test[:NUM_TEST], test_labels[:NUM_TEST]
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
few = torch.cat(
    [order[train_labels[order] == c][:LABELS_PER_CLASS] for c in range(10)],
)

# %%
# The pair is made of four networks. ``Concatenated`` joins :math:`x` or :math:`z` to
# the class, which is one-hot encoded. Pixels are whole numbers from 0 to 16, so the
# likelihood is Binomial.

likelihood = pv.nn.Binomial(16)
posterior = pv.nn.Normal()
classifier = nn.Sequential(likelihood.input_layer(), pv.nn.MLP(64, 10, hidden=(128,)))
untrained = copy.deepcopy(classifier)
to_style = pv.nn.MLP(64 + 10, posterior.num_outputs(LATENTS), hidden=(128,))
to_pixels = pv.nn.MLP(LATENTS + 10, 64, hidden=(128,))
vae = pv.SemiSupervisedVAE(
    classifier=classifier,
    encoder=pv.models.Concatenated(
        nn.Sequential(to_style, posterior),
        first=likelihood.input_layer(),
    ),
    decoder=pv.models.Concatenated(nn.Sequential(to_pixels, likelihood)),
    prior=pv.nn.StandardNormal(LATENTS),
    num_classes=10,
    alpha=50.0,
)

# %%
# Training
# --------
# A batch holds the 100 digits with their labels and 100 other digits, whose label is
# -1, which means "unknown". The guide enumerates the class: it computes the sum over
# :math:`y` exactly. The loss is therefore an Enum one; the rest of the training loop is
# the usual one.
#
# The few labels are in every batch, so they count for more than in the sum over all
# data. With the plain sum and a small :math:`\alpha`, the classes of the model would
# drift away from our names for them. The reason is that a bound on :math:`\log p(x)`
# does not depend on what the classes are called.

optimizer = pyro.optim.Adam({"lr": 2e-3})
loss = pv.BetaTraceEnum_ELBO(max_plate_nesting=1)
svi = SVI(vae.model, vae.guide, optimizer, loss)
y = torch.cat([train_labels[few], torch.full((100,), -1)])
for _ in range(NUM_STEPS):
    others = train[torch.randint(len(train), (100,))]
    svi.step(torch.cat([train[few], others]), y)
vae.eval()

# %%
# For comparison, the same classifier is trained from the same start on the 100 labels
# alone:

optimizer = torch.optim.Adam(untrained.parameters(), lr=2e-3)
for _ in range(20 if SMOKE_TEST else 300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(untrained(train[few]), train_labels[few]).backward()
    optimizer.step()

# %%
# The model's own answer
# ----------------------
# The classifier is part of the guide. The model has an answer as well, by Bayes' rule:
# :math:`p(y \mid x)` is proportional to :math:`p(x, y)`. Any estimator returns
# :math:`\log p(x, y)` when it is given the label :math:`y`. Ten calls, one per class,
# are enough. The sum of :math:`p(x, y)` over the classes is :math:`p(x)`, and a call
# *without* labels estimates :math:`p(x)` directly. The two must agree.


def log_evidence(x, y=None):
    kind = pv.ImportanceSampling if SMOKE_TEST else pv.AdaptiveImportanceSampling
    estimator = kind(vae.model, vae.guide, num_particles=NUM_PARTICLES, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return estimator(x, y).log_evidence


classes = range(10)
by_class = [log_evidence(test, torch.full((NUM_TEST,), c)) for c in classes]
by_class = torch.stack(by_class, 1)  # log p(x, y), one column per class
summed, at_once = by_class.logsumexp(1), log_evidence(test)
as_a_sum = f"{summed.mean():.2f} as a sum over ten classes"
print(f"mean log p(x): {as_a_sum}, {at_once.mean():.2f} at once, nats")
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
ours = right["q(y given x), the classifier"].float()
gain = ours - right["100 labels alone"].float()
error = gain.std() / NUM_TEST**0.5
found = f"{gain.mean():+.1%} +- {error:.1%} (sampling error)"
print(f"classifier less labels alone: {found}")

# %%
# On these digits, the 1337 digits without a label change the accuracy by less than its
# sampling error. One run cannot show a gain or a loss: with other starts and other
# labels, the classifier of the pair ended between 88% and 92%. The bound explains why
# there is no clear gain. It asks the class to explain pixels, and a style of writing
# explains pixels as well as the identity of the digit does.
#
# The last column shows how sure each of the three is. The likelihood of 64 pixels
# differs between classes by many nats. The model is therefore nearly always certain,
# whether it is right or wrong, and pays for its wrong answers in the last column.

# %%
# Style and class
# ---------------
# The pair can also do what a classifier cannot. Take
# the style of a digit, which is the mean of :math:`q(z \mid x, y)`, and decode it under
# each class. Slant, width and stroke weight stay the same. No digit had a label for its
# style.

# sphinx_gallery_thumbnail_number = 1
shown = torch.arange(6)
with torch.no_grad():
    styles = vae.encode(test[shown], test_labels[shown]).mean
    each_class = [torch.full((len(shown),), c) for c in range(10)]
    others = [vae.decode(styles, y).mean for y in each_class]
# sphinx_gallery_start_ignore
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
# sphinx_gallery_end_ignore

# %%
# Class by class
# --------------
# ``pv.InferenceGaps`` estimates :math:`\log p(x)` of digits without their label, and by
# how much the ELBO is lower. Both numbers are per datum, so a mean over the digits of
# one class is one line of code. The classifier is part of the guide: where it is wrong,
# the ELBO is low.

estimator = pv.InferenceGaps(
    vae.model,
    vae.guide,
    num_particles=NUM_PARTICLES,
    seed=0,
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about single digits, which the record counts
    gaps = estimator(test)
print(gaps)

classes = [c for c in range(10) if (test_labels == c).sum() > 1]


def by_label(values):
    """Means and their sampling errors, class by class."""
    parts = [values[test_labels == c] for c in classes]
    means = [float(part.mean()) for part in parts]
    return means, [float(part.std() / len(part) ** 0.5) for part in parts]


wrong = (~right["q(y given x), the classifier"]).float()
columns = [by_label(v)[0] for v in (gaps.log_evidence, gaps.inference, wrong)]
print(f"{'class':<8}{'log p(x)':>10}{'gap':>8}{'wrong':>8}")
for c, log_p, gap, share in zip(classes, *columns, strict=True):
    print(f"{c:<8}{log_p:>10.1f}{gap:>8.2f}{share:>8.0%}")

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
drawn = {"log p(x)": gaps.log_evidence, "log p(x) - ELBO": gaps.inference}
for ax, (name, values) in zip(axes, drawn.items(), strict=True):
    means, errors = by_label(values)
    ax.errorbar(
        classes,
        means,
        errors,
        fmt="o",
        color="#0072B2",
        markersize=5,
        capsize=3,
    )
    ax.set(xlabel="class", ylabel="nats", xticks=classes)
    ax.set_title(f"{name}, mean and sampling error")
plt.show()
# sphinx_gallery_end_ignore

# %%
# Compare the gap of the digits that the classifier gets wrong with the gap of those
# that it gets right:

means = [float(gaps.inference[mask].mean()) for mask in (wrong == 0, wrong == 1)]
num_wrong = int(wrong.sum())
print(f"gap of {NUM_TEST - num_wrong} digits with the right class: {means[0]:.2f} nats")
print(f"gap of {num_wrong} digits with a wrong one: {means[1]:.2f} nats")
assert SMOKE_TEST or means[1] > means[0]

# %%
# A large gap is thus a hint of a wrong class, and it can be measured without a label.
#
# The split of the gap needs care here. The best guide :math:`q^*` of each digit frees
# the style but keeps the class probabilities of the classifier. What the classifier
# loses is therefore counted as a loss of the family. ``gaps.held`` names what is kept.
#
# What to try
# -----------
#
# - Train with one label per class, and with fifty. When does the classifier of the pair
#   do better than the one that was trained on the labels alone?
# - Set ``alpha=0.0``. The classes of the model no longer follow our names. Draw from
#   each class by ``vae.generate`` and see what it holds.
# - Run ``pv.SelfCheck(vae.model, vae.guide)(test, test_labels)``. It tells whether
#   these estimates are right on simulated data, whose :math:`\log p(x, y)` is enclosed
#   by two bounds.
# - Use more latents. The style then takes over what the class should explain. Watch the
#   table of the three classifiers.
#
# Practice problems
# -----------------
#
# 1. Derive the bound on :math:`\log p(x)` from that on :math:`\log p(x, y)`.
# 2. Which :math:`q(y \mid x)` maximises the bound on :math:`\log p(x)`, and what is the
#    bound then?
# 3. By how much does a classifier that is certain of the class :math:`y` lower the
#    bound below its maximum, even if :math:`y` is right?
# 4. The model's :math:`-\log p(y \mid x)` of the true label has a mean of several nats,
#    although most of its answers are right. How is that possible?
#
# .. raw:: html
#
#    <details><summary>Answers</summary>
#
# 1. By Jensen's inequality, :math:`\log p(x) = \log \sum_y p(x, y)` is at least
#    :math:`\sum_y q(y \mid x) \big[ \log p(x, y) - \log q(y \mid x) \big]`. Replacing
#    :math:`\log p(x, y)` by its own bound :math:`\mathcal{L}(x, y)` lowers this
#    further.
# 2. Let :math:`r(y)` be proportional to :math:`e^{\mathcal{L}(x, y)}`. The bound is
#    :math:`\log \sum_y e^{\mathcal{L}(x, y)} - \mathrm{KL}(q(y \mid x) \,\|\, r)`. So
#    the best :math:`q(y \mid x)` is :math:`r`, for which the KL is zero.
# 3. The bound is then :math:`\mathcal{L}(x, y)`. By problem 2 it is lower than the
#    maximum by :math:`-\log r(y)`. If :math:`r(y) = 0.9`, this is 0.1 nats.
# 4. The mean is dominated by few digits. A confident wrong answer costs tens of nats.
#    If 14% of the answers cost 30 nats each and the others nothing, the mean is 4.2
#    nats.
#
# .. raw:: html
#
#    </details>
#
# A decoder that is told the class of every datum is a ``pv.ConditionalVAE``; see
# :doc:`/choosing`. Next: counts, :doc:`17_counts`.
