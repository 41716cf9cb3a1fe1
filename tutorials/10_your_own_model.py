r"""
Bring your own Pyro model
=========================

This package asks for no neural network in the model, no pixels, and no class of its
own. Here an exam is analysed with two plain functions: nested plates, a mask for
questions that were not asked, and parameters that all students share. At the end you
can put such a pair through ``pv.diagnose``, read every line of its page, act on it, and
see the verdict change.

Prerequisites: :doc:`03_three_gaps`; about 1 minute to run.
"""

# %%
# An exam
# -------
# A student has two skills, maths and reading. Some questions need one of them, and word
# problems need both. The probability of a right answer to question :math:`j` is
#
# .. math::
#
#    p(x_j = 1 \mid z) = \mathrm{sigmoid}(
#        a_{j1} z_\mathrm{maths} + a_{j2} z_\mathrm{reading} + b_j) ,
#    \qquad z_\mathrm{maths}, z_\mathrm{reading} \sim \mathrm{N}(0, 1) ,
#
# with *loadings* :math:`a_j \ge 0` (more skill does no harm) and *easiness*
# :math:`b_j`. This is item response theory, which has been used to design and mark
# tests for decades (Reckase 2009, `Multidimensional Item Response Theory
# <https://doi.org/10.1007/978-0-387-89976-3>`__). The loadings are what an examiner
# wants to know, because they say what a question measures. Each student is asked about
# three quarters of the questions.
#
# In the words of this package, a *datum* (one data point) is a student, and its
# *latents* are the two skills. The exam is simulated, so the true loadings are known.

# sphinx_gallery_thumbnail_number = 2
import math
import os
import re
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_TRAIN, NUM_TEST, NUM_EPOCHS = (100, 20, 2) if SMOKE_TEST else (5000, 300, 120)
NUM_PARTICLES = 100 if SMOKE_TEST else 300
pyro.set_rng_seed(0)

# Four questions of maths, four of reading, and sixteen word problems that need both.
lengths = torch.tensor([1.4, 1.8, 2.2, 2.6])
angles = torch.linspace(0.5, math.pi / 2 - 0.5, 8)
directions = torch.stack([angles.cos(), angles.sin()], -1)
pure = torch.cat([lengths.outer(axis) for axis in torch.eye(2)])
words = torch.cat([length * directions for length in (1.8, 3.0)])
true_loading = torch.cat([pure, words])
needs = (true_loading > 0).float()  # known: which skills a question needs
true_ease = torch.randn(len(needs))

skills = torch.randn(NUM_TRAIN + NUM_TEST, 2)
right = torch.bernoulli((skills @ true_loading.T + true_ease).sigmoid())
asked = torch.rand(right.shape) < 0.75
answers = right * asked  # 1: right; 0: wrong, or not asked
train_set = TensorDataset(answers[:NUM_TRAIN], asked[:NUM_TRAIN])
test_set = TensorDataset(answers[NUM_TRAIN:], asked[NUM_TRAIN:])
train, test = DataLoader(train_set, 200, shuffle=True), DataLoader(test_set, 100)

# %%
# The model, in plain Pyro
# ------------------------
# Students are one plate, and questions are another plate inside it. The mask leaves out
# the log-probability of questions that were not asked. The *datum plate* is the one
# that all latents and observations share, here ``"students"``. The library finds it
# from the program. Every number below is per student: it sums over the inner plate and
# leaves out what is masked.


def model(answers, asked):
    first = torch.ones(len(needs), 2)
    loading = needs * pyro.param("loading", first, constraint=constraints.positive)
    ease = pyro.param("ease", torch.zeros(len(needs)))
    with pyro.plate("students", len(answers), dim=-2):
        maths = pyro.sample("maths", dist.Normal(torch.zeros(()), 1.0))
        reading = pyro.sample("reading", dist.Normal(torch.zeros(()), 1.0))
        questions = pyro.plate("questions", len(needs), dim=-1)
        with questions, poutine.mask(mask=asked):
            logits = maths * loading[:, 0] + reading * loading[:, 1] + ease
            pyro.sample("answer", dist.Bernoulli(logits=logits), obs=answers)


# %%
# The guide is written by hand. A network reads the answers of a student and returns a
# Gaussian for each skill, and the two are independent. Training uses Pyro's ``SVI`` and
# ``Trace_ELBO`` as usual.


def network(num_inputs, width=64):
    return nn.Sequential(
        nn.Linear(num_inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 5),
    )


def guide_of(encoder, inputs, chain=False, second="reading"):
    """A guide whose encoder is shown `inputs(answers, asked)`.

    `chain` and `second` are for later sections.
    """

    def guide(answers, asked):
        pyro.module("encoder", encoder)
        numbers = encoder(inputs(answers, asked)).unsqueeze(-2).unbind(-1)
        loc_m, log_scale_m, loc_r, log_scale_r, slope = numbers  # (B, 1) each
        with pyro.plate("students", len(answers), dim=-2):
            maths = pyro.sample("maths", dist.Normal(loc_m, log_scale_m.exp()))
            shift = slope * (maths - loc_m) if chain else 0.0
            pyro.sample(second, dist.Normal(loc_r + shift, log_scale_r.exp()))

    return guide


def trainer(model, guide, num_steps, lr, elbo):
    """Pyro's SVI. The learning rate falls to 1% of its first value at the end."""
    adam = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / num_steps)})
    return SVI(model, guide, adam, elbo)


def fit(guide):
    """Train model and guide from scratch.

    `pyro.param` and `pyro.module` store values by name, so the old ones must go first.
    """
    pyro.clear_param_store()
    svi = trainer(model, guide, NUM_EPOCHS * len(train), 5e-3, Trace_ELBO())
    for _ in range(NUM_EPOCHS):
        for batch in train:
            svi.step(*batch)


def answers_alone(answers, asked):
    return answers


# %%
# One call, one page
# ------------------
# ``diagnose`` needs the two programs and the two loaders. A batch of the loaders is a
# list ``[answers, asked]``. The option ``args=tuple`` says that these are the arguments
# of model and guide, in this order. For later use we keep the page, the parameters of
# the model, and draws of the guide for one student.

options = {
    "args": tuple,
    "num_data": NUM_TEST,
    "num_particles": NUM_PARTICLES,
    "progress": False,
}
kept = {}


def fitted():
    return needs * pyro.param("loading").detach(), pyro.param("ease").detach()


def fit_and_diagnose(name, guide):
    fit(guide)
    page = pv.diagnose(model, guide, train=train, test=test, **options)
    one_student = [part[:1].expand(250, -1) for part in test_set.tensors]
    sites = poutine.trace(guide).get_trace(*one_student).nodes
    draws = [sites[skill]["value"] for skill in ("maths", "reading")]
    kept[name] = page, fitted(), [draw.detach().squeeze(-1) for draw in draws]
    return page


page = fit_and_diagnose("answers", guide_of(network(len(needs)), answers_alone))
print(page)

# %%
# From the top:
#
# - *Diagnosis* says what to change first. It also says how much of the inference gap,
#   which is log p(x) minus the ELBO, has this cause.
# - *First* is general advice for this cause. It does not know your program (see below).
# - *The latents are used*: the skills carry more than one nat of information about the
#   student. If they carried none, the verdict would be posterior collapse, and no gap
#   would matter.
# - *The estimates can be trusted* rests on three checks. The importance weights behind
#   log p(x) have no heavy tails. The fits per student have converged. No bias was seen
#   on students simulated from the model, whose log p(x) lies between two known bounds.
# - *The larger part of the gap* comes with Monte Carlo errors: how much the number
#   would change with other random draws for the same students.
# - *The guide is not calibrated*: on students simulated from the model, where the true
#   skills are known, the guide's intervals hold the truth too rarely.
# - *Test minus training data* is what model and encoder lose on students they were not
#   trained on. It comes with sampling errors: how much the number would change with
#   other students. The encoder loses a little, because it has memorised some of its
#   students.
# - The table has the ELBO, the optimal ELBO, log p(x) and their differences. The
#   optimal ELBO belongs to :math:`q^*`, the best member of the guide's family, which is
#   fitted to each student separately.
# - *Left out*: distances between answer sheets with missing answers are not defined, so
#   nearest neighbours are not computed.
#
# With two skills, log p(x) is an integral over the plane. A sum over a grid, in plain
# PyTorch, agrees with the page.

axis = torch.linspace(-5.5, 5.5, 111)
grid = torch.cartesian_prod(axis, axis)
log_cell = 2 * (axis[1] - axis[0]).log()  # of the area of a cell
log_prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1) + log_cell


def log_joint_on_grid(answers, asked, loading, ease):
    """log p(x, z) for all students and all points of the grid: (B, 111 * 111)."""
    logits = grid @ loading.T + ease  # `answers` are 0 where nothing was asked
    return log_prior + answers @ logits.T - asked.float() @ softplus(logits).T


by_grid = log_joint_on_grid(*test_set.tensors, *fitted()).logsumexp(-1).mean()
estimate = page.test.summary()["log_evidence"]
print(f"mean log p(x): {estimate.value:.4f} +- {estimate.std_error:.4f}", end="")
print(f" on the page, {by_grid:.4f} on the grid, nats")
# The error of the grid itself is below 1e-5.
assert abs(estimate.value - by_grid) < 4.5 * estimate.std_error

# %%
# ``page.plot()`` draws the same results. The second panel shows the students one by
# one. The family's part is similar for all students. The encoder's part is more than a
# nat for some.

page.plot()
plt.show()

# %%
# Following the advice
# --------------------
# The advice has three parts: train the encoder further, show it more, or make it
# bigger. This encoder has been trained for long. A bigger network is the next idea that
# most people have, so here is one that is four times as wide.

wide = network(len(needs), width=256)
page = fit_and_diagnose("answers, wide net", guide_of(wide, answers_alone))
print(page.headline, page.advice, sep="\n")

# %%
# That made it worse. The bigger network memorises more of its students, and the page
# says so. The right advice was to show the encoder more, because the fault is in its
# *input*. Our encoder sees a 0 for a wrong answer and also a 0 for a question that was
# never asked. A network of any size cannot tell these two apart. So show it the mask:


def answers_and_mask(answers, asked):
    """Right 1, wrong -1, not asked 0; and the mask."""
    return torch.cat([(2 * answers - 1) * asked, asked], -1)


small = network(2 * len(needs))
page = fit_and_diagnose("answers and mask", guide_of(small, answers_and_mask))
print(page.headline, page.advice, sep="\n")

# %%
# The small network is enough, and the verdict has changed to the *family*. A student
# who solves a word problem is good at maths or at reading. So the two skills are
# correlated in the posterior, which two independent Gaussians cannot represent. The
# advice is a richer family. With two scalar sites that takes one line: reading given
# maths. Any joint Gaussian can be written in this form.

encoder = network(2 * len(needs))
guide = guide_of(encoder, answers_and_mask, chain=True)
page = fit_and_diagnose("mask and chain", guide)
print(page.headline, page.advice, page.test.family, sep="\n")

# %%
# The last line lists the numbers that were fitted per student to find the best member
# of the family: locations and scales. The slope of the chain was not fitted. So an
# error of the encoder in the slope counts as the family's.
#
# What it was worth
# -----------------
# The gaps were a few per cent of the ELBO. But look at the last two columns. The
# *model* was trained through these guides. Each gap that was closed raised its log p(x)
# and brought its loadings nearer to the truth.

truth = log_joint_on_grid(*test_set.tensors, true_loading, true_ease)
truth = truth.logsumexp(-1).mean()
print(f"{'':<18}{'culprit':<19}{'ELBO':>8}{'encoder':>9}{'family':>8}", end="")
print(f"{'log p(x)':>10}{'error of loadings':>19}")
for name, (diagnosis, (loading, _), _) in kept.items():
    means = {key: float(mean.value) for key, mean in diagnosis.test.summary().items()}
    error = (loading - true_loading)[needs > 0].square().mean().sqrt()
    print(f"{name:<18}{diagnosis.culprit:<19}{means['elbo']:>8.3f}", end="")
    print(f"{means['amortization']:>9.3f}{means['approximation']:>8.3f}", end="")
    print(f"{means['log_evidence']:>10.3f}{error:>19.2f}")
print(f"{'the true model':<62}{truth:>10.3f}{0:>19.2f}")
if not SMOKE_TEST:
    culprits = [diagnosis.culprit for diagnosis, _, _ in kept.values()]
    assert culprits == ["encoder", "overfitted encoder", "family", "none"]

# %%
# The upper row shows one student: contours of the posterior, and draws of the guide as
# dots. The lower row shows the loadings of the questions: circles where they truly are,
# dots where training put them. An independent guide fits best where the skills are not
# correlated in the posterior. So training changed the model towards such posteriors. It
# moved each word problem towards the skill that the problem needs more, and away from
# the other. An examiner would have believed these loadings.

# sphinx_gallery_start_ignore
shown = ["answers", "answers and mask", "mask and chain"]
figure, axes = plt.subplots(
    2,
    3,
    figsize=(10, 7),
    sharex="row",
    sharey="row",
    layout="constrained",
)
levels, blues = [0.05, 0.2, 0.5, 0.8, 1], ["#E3F0F8", "#B9DAEE", "#86BFE0", "#56A3D0"]
for name, above, below in zip(shown, *axes, strict=True):
    diagnosis, (loading, ease), draws = kept[name]
    first_student = (part[:1] for part in test_set.tensors)
    posterior = log_joint_on_grid(*first_student, loading, ease).softmax(-1)
    posterior = posterior.reshape(111, 111).T
    above.contourf(axis, axis, posterior / posterior.max(), levels=levels, colors=blues)
    above.plot(*draws, ".", color="#D55E00", markersize=2.5)
    above.set(xlabel="maths", xlim=(-2.2, 1.6), ylim=(-1.9, 1.9))
    above.set_title(f"{name}\nculprit: {diagnosis.culprit}")
    moves = torch.stack([true_loading, loading]).permute(2, 0, 1)
    below.plot(*moves, color="0.6", linewidth=1)
    below.plot(*true_loading.T, "o", color="black", mfc="white", label="true")
    below.plot(*loading.T, "o", color="#0072B2", markersize=4, label="found")
    below.set(xlabel="loading on maths", aspect="equal")
axes[0, 0].set_ylabel("reading")
axes[1, 0].set_ylabel("loading on reading")
axes[1, 0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0.05, 0.1))
plt.show()
# sphinx_gallery_end_ignore

# %%
# Keep the page
# -------------
# ``to_html`` writes the page as one file that loads nothing from elsewhere. It has the
# verdict and the findings, all figures with captions, and every number with its errors.
# It also has what produced the numbers: seed, options and versions. ``to_json`` adds
# all records per datum, and ``to_csv`` has one number per row.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "exam.html"
    page.to_html(path)
    text = path.read_text(encoding="utf-8")
sections = "; ".join(re.findall("<h2>(.*?)</h2>", text))
print(f"{len(text) // 1000} kB; sections: {sections}")

# %%
# An autoguide
# ------------
# ``AutoNormal`` needs no change, as long as the model has the datum plate. It has a
# separate location and scale for every student, and no encoder. So it *is* the best
# member of the independent family, found in another way. ``poutine.block`` hides the
# parameters of the model from the training, so that they keep their values.

students = test_set.tensors
frozen = poutine.block(model, hide_types=["param"])
auto = AutoNormal(frozen)
num_steps = 20 if SMOKE_TEST else 500
several = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
svi = trainer(frozen, auto, num_steps, 0.1, several)
for _ in range(num_steps):
    svi.step(*students)
gaps = pv.InferenceGaps(model, auto, num_particles=NUM_PARTICLES, seed=0)(*students)
print(gaps)
if not SMOKE_TEST:
    through_independent = kept["answers and mask"][0].test.approximation.mean()
    assert gaps.amortization.mean() < 0.01
    assert gaps.approximation.mean() > through_independent + 0.03

# %%
# Without an encoder there is no amortization gap. But compare the approximation gap
# with the one in the table. The model here was trained through the chain. On it,
# independent Gaussians lose half as much again as on the model that was trained through
# independent Gaussians. That model had moved to where its guide is nearly right. So a
# part of the damage is in the model, and no longer in the gap. Turner and Sahani (2011,
# `Two problems with variational expectation maximisation for time-series models
# <https://doi.org/10.1017/CBO9780511984679.006>`__) describe this effect.
#
# A small gap says that the bound is tight *for this model*. To learn whether a family
# has biased the model, train with a richer family and compare log p(x).
#
# What is refused
# ---------------
# If the importance weight of a datum is not well defined, the library raises an error.
# Suppose a site in the guide is misspelt. The model then draws ``reading`` from its
# prior, and the log-density of ``raeding`` is subtracted all the same. Pyro warns and
# goes on. So here is what importance weights would give without the check, with one
# draw or many, on 20 students.

misspelt = guide_of(encoder, answers_and_mask, chain=True, second="raeding")
num_copies = 100 if SMOKE_TEST else 1000  # many draws at once
copies = [part[:20].repeat(num_copies, 1) for part in students]


def log_weights(guide, second):
    """log p(x, z) - log q(z) by Pyro alone: (copies, 20)."""
    drawn = poutine.trace(guide).get_trace(*copies)
    scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*copies)

    def log_density(trace, *sites):
        trace.compute_log_prob()
        return sum(trace.nodes[site]["log_prob"].sum(-1) for site in sites)

    log_joint = log_density(scored, "maths", "reading", "answer")
    return (log_joint - log_density(drawn, "maths", second)).reshape(-1, 20)


with torch.no_grad():
    passes = range(1 if SMOKE_TEST else 100)
    right_one = torch.cat([log_weights(guide, "reading") for _ in passes])
    wrong_one = torch.cat([log_weights(misspelt, "raeding") for _ in passes])
first_20 = (part[:20] for part in students)
exact = log_joint_on_grid(*first_20, *fitted()).logsumexp(-1).mean()
print(f"exact log p(x): {exact:.3f}\n     K  as it should be   misspelt")
for k in (1, 10, 100) if SMOKE_TEST else (1, 10, 100, 1_000, 10_000, 100_000):
    groups = [log_w.unflatten(0, (-1, k)) for log_w in (right_one, wrong_one)]
    bounds = [pv.ops.log_mean_exp(group, 1).mean() for group in groups]
    print(f"{k:6d} {bounds[0]:16.3f} {bounds[1]:10.3f}")

# %%
# With one draw, the misspelt estimate is nats too low. With many draws it rises above
# log p(x). It has no upper limit, because the weights then contain a factor :math:`1/q`
# whose mean is infinite.
#
# A second case: somebody makes the easiness of the questions a latent as well. All
# students depend on it, so no student has an importance weight of their own. The
# library's errors for the two cases:

normal = dist.Normal(torch.zeros(len(needs)), 1.0).to_event(1)
bayesian = poutine.lift(model, prior={"ease": normal})


def bayesian_guide(answers, asked):
    guide(answers, asked)
    pyro.sample("ease", dist.Normal(fitted()[1], 0.1).to_event(1))


for programs in ((model, misspelt), (bayesian, bayesian_guide)):
    try:
        pv.diagnose(*programs, train=train, test=test, **options)
    except pv.errors.StructureError as error:
        print(f"{type(error).__name__}: {error}")

# %%
# The first message names the site to rename. The second message lists several remedies.
# One is to keep the easiness as a parameter, as above. Another is ``datum_plate=None``,
# which takes the whole call as *one* datum: a class of twenty students, with one
# log p(x) for all their answers.

one_class = {"datum_plate": None, "seed": 0}
whole_class = pv.AdaptiveImportanceSampling(bayesian, bayesian_guide, **one_class)
print(whole_class(*(part[:20] for part in students)))

# %%
# What to try
# -----------
# The answers are of one run each.
#
# - Ask each student 20 % of the questions, with the mask and independent skills. Which
#   gap grows, and which shrinks? (Both shrink: the encoder's part to 0.010 nats and the
#   family's part to 0.045. With few answers the posterior is near the prior, whose
#   skills are independent. But the error of the loadings grows to 0.70.)
# - Train the independent guide with the mask ten times as long. (The family's part
#   stays at 0.13 nats. The error of the loadings falls to 0.30, still above the 0.21 of
#   the chain.)
# - Make the two skills one site with ``pv.nn.MultivariateNormal``, so that :math:`q^*`
#   has its own correlation for each student. (The family's part is 0.015 nats. This is
#   what a Gaussian loses because the posterior is not Gaussian.)
# - Use sensors instead of questions: ``dist.Normal`` instead of ``dist.Bernoulli``, and
#   readings with gaps. (Then ``pv.exact.LinearGaussian`` gives log p(x) in closed form,
#   with one model for each set of sensors that reported.)
#
# Practice problems
# -----------------
#
# 1. A question that was not asked is masked: its factor :math:`p(x_j \mid z)` is left
#    out. Show that the result is the exact log p of the answers that were given. When
#    would it be the wrong likelihood?
# 2. Show that the posterior correlation of the two skills is negative near its mode,
#    for any answers.
# 3. The posterior is a Gaussian with correlation :math:`\rho`. Show that the best
#    independent Gaussians have the gap :math:`-\tfrac12 \log(1 - \rho^2)`. Which
#    :math:`\rho` gives the 0.195 nats of the autoguide?
# 4. Show that the misspelt guide's importance weights have an infinite mean.
#
# Answers
# -------
#
# 1. Given the skills, the answers are independent. The probability of the given answers
#    is the sum of the full probability over both values of every missing answer, and
#    :math:`p(x_j = 0 \mid z) + p(x_j = 1 \mid z) = 1`. It would be wrong if the choice
#    of questions depended on what is missing, for example if students skipped what they
#    could not answer.
# 2. With :math:`p_j` for the probability of a right answer, minus the second derivative
#    of the log posterior is :math:`\Lambda = I + \sum_j p_j (1 - p_j) \, a_j a_j^\top`.
#    Its off-diagonal entry is positive, because loadings are not negative. The
#    covariance is :math:`\Lambda^{-1}`, whose off-diagonal entry has the opposite sign.
# 3. For independent :math:`q` and a Gaussian of precision :math:`\Lambda`,
#    :math:`\mathrm{KL}(q \,\|\, p)` is smallest with the same mean and the variances
#    :math:`1 / \Lambda_{ii}`. There it is
#    :math:`\tfrac12 (\log \Lambda_{11} \Lambda_{22} - \log |\Lambda|)`. With the
#    correlation :math:`\rho` this equals :math:`-\tfrac12 \log(1 - \rho^2)`. For 0.195
#    nats, :math:`|\rho| = \sqrt{1 - e^{-0.39}} = 0.57`.
# 4. The weight is :math:`p(x, z_\mathrm{maths}, z_\mathrm{reading})` divided by
#    :math:`q(z_\mathrm{maths}) \, q(\tilde z)`, where :math:`z_\mathrm{reading}` comes
#    from the prior and :math:`\tilde z`, the site ``raeding``, from the guide. Given
#    the other draws, the mean of :math:`1 / q(\tilde z)` is
#    :math:`\int q(\tilde z) / q(\tilde z) \, d\tilde z`, the length of the real line.
#
# Next: a paper's table, measured again: :doc:`11_reproducing_a_table`.
