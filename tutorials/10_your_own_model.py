r"""
Bring your own Pyro model
=========================

Nothing in this package asks for a network in the model, for pixels, or for a class of its own. Here an exam is analysed
with two plain functions, nested plates, a mask for questions that were not asked, and parameters shared by all students. At
the end you can put such a pair through ``pv.diagnose``, read every line of its page, act on it, and see the verdict change.
"""

# %%
# An exam
# -------
# A student has two skills, maths and reading. Some questions need one of them; word problems need both. Question :math:`j`
# is answered rightly with probability
#
# .. math:: p(x_j = 1 \mid z) = \mathrm{sigmoid}(a_{j1} z_\mathrm{maths} + a_{j2} z_\mathrm{reading} + b_j) ,
#           \qquad z_\mathrm{maths}, z_\mathrm{reading} \sim N(0, 1) ,
#
# with *loadings* :math:`a_j \ge 0` (skill does no harm) and *easiness* :math:`b_j`. This is item response theory, in which
# tests have been made and marked for decades (`Reckase 2009 <https://doi.org/10.1007/978-0-387-89976-3>`__). The loadings
# are what the examiner wants to know: what does a question measure? A student is asked about three quarters of them.
#
# The exam is simulated, so the true loadings are known. Words: a *datum* is a student, its *latents* are the two skills.

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

lengths, angles = torch.tensor([1.4, 1.8, 2.2, 2.6]), torch.linspace(0.5, math.pi / 2 - 0.5, 8)
pure = torch.cat([lengths.outer(axis) for axis in torch.eye(2)])  # four questions of maths, four of reading
words = torch.cat([length * torch.stack([angles.cos(), angles.sin()], -1) for length in (1.8, 3.0)])  # sixteen of both
true_loading = torch.cat([pure, words])
needs = (true_loading > 0).float()  # which skills a question needs is known; how much of each is not
true_ease = torch.randn(len(needs))

skills = torch.randn(NUM_TRAIN + NUM_TEST, 2)
right = torch.bernoulli((skills @ true_loading.T + true_ease).sigmoid())
asked = torch.rand(right.shape) < 0.75
answers = right * asked  # 1: right; 0: wrong, or not asked
train_set, test_set = (TensorDataset(answers[part], asked[part]) for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None)))
train, test = DataLoader(train_set, 200, shuffle=True), DataLoader(test_set, 100)

# %%
# The model, in plain Pyro
# ------------------------
# Students are one plate, questions another one inside it, and the mask takes the log-probability of questions that were not
# asked out. The plate of the *data* is the one that all latents and observations share, ``"students"``. It is found by
# itself, and every number to come is per student; the inner plate and the mask are summed over.


def model(answers, asked):
    loading = needs * pyro.param("loading", torch.ones(len(needs), 2), constraint=constraints.positive)
    ease = pyro.param("ease", torch.zeros(len(needs)))
    with pyro.plate("students", len(answers), dim=-2):
        maths = pyro.sample("maths", dist.Normal(torch.zeros(()), 1.0))
        reading = pyro.sample("reading", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("questions", len(needs), dim=-1), poutine.mask(mask=asked):
            logits = maths * loading[:, 0] + reading * loading[:, 1] + ease
            pyro.sample("answer", dist.Bernoulli(logits=logits), obs=answers)


# %%
# A guide written by hand: a network reads the answers of a student and returns a Gaussian for each skill, independent of
# one another. Training is ``SVI`` with ``Trace_ELBO``, as ever.


def network(num_inputs, width=64):
    return nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))


def guide_of(encoder, inputs, chain=False, second="reading"):
    """`inputs` says what the encoder is shown. (`chain` and `second` are for later.)"""

    def guide(answers, asked):
        pyro.module("encoder", encoder)
        loc_m, log_scale_m, loc_r, log_scale_r, slope = encoder(inputs(answers, asked)).unsqueeze(-2).unbind(-1)  # (B, 1)
        with pyro.plate("students", len(answers), dim=-2):
            maths = pyro.sample("maths", dist.Normal(loc_m, log_scale_m.exp()))
            shift = slope * (maths - loc_m) if chain else 0.0
            pyro.sample(second, dist.Normal(loc_r + shift, log_scale_r.exp()))

    return guide


def trainer(model, guide, num_steps, lr, elbo):
    """Pyro's own; the learning rate falls to 1% at the end."""
    return SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / num_steps)}), elbo)


def fit(guide):
    """Model and guide from scratch: `pyro.param` and `pyro.module` go by name, and old values would stay."""
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
# ``diagnose`` wants the two programs and the two loaders. A batch of the loaders is a list ``[answers, asked]``;
# ``args=tuple`` says that these are the arguments of model and guide, in this order. For later on we keep the page, the
# parameters of the model, and draws of the guide for one student.

options = {"args": tuple, "num_data": NUM_TEST, "num_particles": NUM_PARTICLES, "progress": False}
kept = {}


def fitted():
    return needs * pyro.param("loading").detach(), pyro.param("ease").detach()


def fit_and_diagnose(name, guide):
    fit(guide)
    page = pv.diagnose(model, guide, train=train, test=test, **options)
    sites = poutine.trace(guide).get_trace(*(part[:1].expand(250, -1) for part in test_set.tensors)).nodes
    kept[name] = page, fitted(), [sites[skill]["value"].detach().squeeze(-1) for skill in ("maths", "reading")]
    return page


page = fit_and_diagnose("answers", guide_of(network(len(needs)), answers_alone))
print(page)

# %%
# From the top:
#
# - *Diagnosis*: what to change first, and how much of the inference gap (log p(x) less the ELBO) it is to blame for.
# - *First*: standing advice for that culprit. It does not know your program; more of that below.
# - *The latents are used*: the skills hold more than a nat of information on the student. Had it been nothing, the verdict
#   would be collapse, and no gap would matter.
# - *The estimates can be trusted*: the weights behind log p(x) behave (no *tails*), the fits per student have converged, and
#   on students simulated from the model, whose log p(x) two bounds enclose, no bias was seen.
# - *The larger part of the gap*, with Monte Carlo errors: what other draws would change for these students.
# - *Test minus training data*: what model and encoder lose on students they were not trained on, with sampling errors:
#   what other students would change. The encoder loses a little; it has learned some of its students by heart.
# - The table: ELBO, the best ELBO of the same family with each student fitted alone, log p(x), and the differences.
# - *Left out*: there is no distance between answer sheets with holes in them, so nearest neighbours are not sought.
#
# With two skills log p(x) is a sum over a grid, in plain PyTorch. It agrees with the page.

axis = torch.linspace(-5.5, 5.5, 111)
grid = torch.cartesian_prod(axis, axis)
log_prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1) + 2 * (axis[1] - axis[0]).log()  # times the area of a cell


def log_joint_on_grid(answers, asked, loading, ease):
    """log p(x, z) for all students and all points of the grid: (B, 111 * 111)."""
    logits = grid @ loading.T + ease
    return log_prior + answers @ logits.T - asked.float() @ softplus(logits).T  # answers are 0 where nothing was asked


by_grid = log_joint_on_grid(*test_set.tensors, *fitted()).logsumexp(-1).mean()
estimate = page.test.summary()["log_evidence"]
print(f"mean log p(x): {estimate.value:.4f} +- {estimate.std_error:.4f} on the page, {by_grid:.4f} on the grid, nats")
assert abs(estimate.value - by_grid) < 4.5 * estimate.std_error  # the grid itself is good to 1e-5

# %%
# The same as pictures. The second one goes through the students one by one: the family's part is much the same for all,
# the encoder's grows to more than a nat for some.

page.plot()
plt.show()

# %%
# Following the advice
# --------------------
# Train the encoder further, show it more, or make it bigger, says the page. This one has been trained for long; size is the
# next thing to come to mind: here is one four times as wide.

page = fit_and_diagnose("answers, wide net", guide_of(network(len(needs), width=256), answers_alone))
print(page.headline, page.advice, sep="\n")

# %%
# That made it worse: the bigger network learns more of its students by heart, and the page says so. The advice to show it
# more was the right one: what is wrong lies before the network. "The encoder" is the whole way from a datum to its guide,
# and what it is *shown* belongs to it. Ours is shown a 0 for a wrong answer and a 0 for a question that was never asked;
# no size tells them apart. Show it the mask:


def answers_and_mask(answers, asked):
    return torch.cat([(2 * answers - 1) * asked, asked], -1)  # right 1, wrong -1, not asked 0; and the mask


page = fit_and_diagnose("answers and mask", guide_of(network(2 * len(needs)), answers_and_mask))
print(page.headline, page.advice, sep="\n")

# %%
# The small network does it, and the verdict has moved on to the *family*. Whoever solves a word problem is good at maths
# or at reading, so the posterior of the two skills is tilted, and two independent Gaussians are not. The advice is a richer
# family. With two scalar sites that is one line, reading given maths, and any joint Gaussian can be written so.

encoder = network(2 * len(needs))
guide = guide_of(encoder, answers_and_mask, chain=True)
page = fit_and_diagnose("mask and chain", guide)
print(page.headline, page.advice, page.test.family, sep="\n")

# %%
# (The last line says what was freed per student to find the best of the family: locations and scales. The slope of the
# chain was not, so an error of the encoder in the slope counts as the family's.)
#
# What it was worth
# -----------------
# The gaps were a few per cent of the ELBO. But look at the last two columns. The *model* was trained through these guides,
# and each gap that was closed raised its log p(x), and brought its loadings nearer to the truth.

truth = log_joint_on_grid(*test_set.tensors, true_loading, true_ease).logsumexp(-1).mean()
print(f"{'':<18}{'culprit':<19}{'ELBO':>8}{'encoder':>9}{'family':>8}{'log p(x)':>10}{'error of loadings':>19}")
for name, (diagnosis, (loading, _), _) in kept.items():
    means = {key: float(value.value) for key, value in diagnosis.test.summary().items()}
    print(f"{name:<18}{diagnosis.culprit:<19}{means['elbo']:>8.3f}{means['amortization']:>9.3f}", end="")
    error = (loading - true_loading)[needs > 0].square().mean().sqrt()
    print(f"{means['approximation']:>8.3f}{means['log_evidence']:>10.3f}{error:>19.2f}")
print(f"{'the true model':<62}{truth:>10.3f}{0:>19.2f}")
if not SMOKE_TEST:
    assert [diagnosis.culprit for diagnosis, _, _ in kept.values()] == ["encoder", "overfitted encoder", "family", "none"]

# %%
# Above, a student: the posterior in grey, draws of the guide as dots. Below, the questions: hollow where they truly are,
# full where training put them. An independent guide is cheap where posteriors are not tilted, so training made a model
# with less tilted ones: it moved each word problem towards the skill that it needs more, and took from the other. An
# examiner would have believed it.

# sphinx_gallery_thumbnail_number = 2
shown = ["answers", "answers and mask", "mask and chain"]
figure, axes = plt.subplots(2, 3, figsize=(10, 7), sharex="row", sharey="row", layout="constrained")
for name, above, below in zip(shown, *axes, strict=True):
    diagnosis, (loading, ease), draws = kept[name]
    posterior = log_joint_on_grid(*(part[:1] for part in test_set.tensors), loading, ease).softmax(-1).reshape(111, 111).T
    levels, greys = [0.05, 0.2, 0.5, 0.8, 1], ["0.9", "0.8", "0.7", "0.6"]
    above.contourf(axis, axis, posterior / posterior.max(), levels=levels, colors=greys)
    above.plot(*draws, ".", color="black", markersize=2.5)
    above.set(xlabel="maths", title=f"{name}\nculprit: {diagnosis.culprit}", xlim=(-2.2, 1.6), ylim=(-1.9, 1.9))
    below.plot(*torch.stack([true_loading, loading]).permute(2, 0, 1), color="0.6", linewidth=1)
    below.plot(*true_loading.T, "o", color="black", markerfacecolor="white", label="true")
    below.plot(*loading.T, "o", color="black", markersize=4, label="found")
    below.set(xlabel="loading on maths", aspect="equal")
axes[0, 0].set_ylabel("reading")
axes[1, 0].set_ylabel("loading on reading")
axes[1, 0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0.05, 0.1))
plt.show()

# %%
# For the shelf
# -------------
# ``to_html`` writes the page as one file that loads nothing: verdict and findings, all pictures with a caption, every
# number with its errors, and what made them (seed, options, versions). ``to_json`` adds all records per datum, ``to_csv``
# has a number per row.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "exam.html"
    page.to_html(path)
    text = path.read_text(encoding="utf-8")
print(f"{len(text) // 1000} kB; sections: " + "; ".join(re.findall("<h2>(.*?)</h2>", text)))

# %%
# An autoguide
# ------------
# ``AutoNormal`` works as it is, as long as the plate of the data is there. It has a location and a scale of its own for
# every student and no encoder, so it *is* the best of the independent family, found in another way. The parameters of the
# model are hidden from it: they stay what they are.

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
    assert gaps.amortization.mean() < 0.01
    assert gaps.approximation.mean() > kept["answers and mask"][0].test.approximation.mean() + 0.03

# %%
# No encoder, no amortization gap. But compare the approximation gap with the one in the table. On this model, which was
# trained well, independent Gaussians cost half as much again as on the model that was trained through them. That one had
# moved to where its guide is right, and a part of the harm had gone from the gap into the model (`Turner and Sahani 2011
# <https://doi.org/10.1017/CBO9780511984679.006>`__). A small gap says that the bound is tight *now*. To learn whether a
# family has bent the model, train with a richer one and compare log p(x).
#
# Refused
# -------
# A program whose weights per datum are not known to be right raises. Misspell a site in the guide: the model then draws
# ``reading`` from its prior, and the log q of ``raeding`` is subtracted all the same. Pyro warns and goes on. So here is
# what importance weights say in silence, of one draw or many, on 20 students.

misspelt = guide_of(encoder, answers_and_mask, chain=True, second="raeding")
copies = [part[:20].repeat(100 if SMOKE_TEST else 1000, 1) for part in students]  # many draws at once


def log_weights(guide, second):
    """log p(x, z) - log q(z) by Pyro alone, from whatever sites are there: (copies, 20)."""
    drawn = poutine.trace(guide).get_trace(*copies)
    scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*copies)
    for trace in (drawn, scored):
        trace.compute_log_prob()
    log_joint = sum(scored.nodes[site]["log_prob"].sum(-1) for site in ("maths", "reading", "answer"))
    return (log_joint - sum(drawn.nodes[site]["log_prob"].sum(-1) for site in ("maths", second))).reshape(-1, 20)


with torch.no_grad():
    passes = range(1 if SMOKE_TEST else 100)
    right_one = torch.cat([log_weights(guide, "reading") for _ in passes])
    wrong_one = torch.cat([log_weights(misspelt, "raeding") for _ in passes])
exact = log_joint_on_grid(*(part[:20] for part in students), *fitted()).logsumexp(-1).mean()
print(f"exact log p(x): {exact:.3f}\n     K  as it should be   misspelt")
for k in (1, 10, 100) if SMOKE_TEST else (1, 10, 100, 1_000, 10_000, 100_000):
    means = [pv.ops.log_mean_exp(log_w.unflatten(0, (-1, k)), 1).mean() for log_w in (right_one, wrong_one)]
    print(f"{k:6d} {means[0]:16.3f} {means[1]:10.3f}")

# %%
# Nats too low with one draw, past log p(x) with many, and no limit above, for 1 / q has no finite mean. Second case:
# somebody makes the easiness of the questions a latent as well. All students depend on it, so no student has a weight of
# their own. The library says:

bayesian = poutine.lift(model, prior={"ease": dist.Normal(torch.zeros(len(needs)), 1.0).to_event(1)})


def bayesian_guide(answers, asked):
    guide(answers, asked)
    pyro.sample("ease", dist.Normal(fitted()[1], 0.1).to_event(1))


for programs in ((model, misspelt), (bayesian, bayesian_guide)):
    try:
        pv.diagnose(*programs, train=train, test=test, **options)
    except pv.errors.StructureError as error:
        print(f"{type(error).__name__}: {error}")

# %%
# The first message names the site to rename; what is left then is our pair of above. The second one has two ways out. The
# easiness may be a parameter, as it was. Or ``datum_plate=None`` takes the whole call as *one* datum: a class of twenty,
# with one log p(x) for all their answers.

print(pv.AdaptiveImportanceSampling(bayesian, bayesian_guide, datum_plate=None, seed=0)(*(part[:20] for part in students)))

# %%
# What to try
# -----------
#
# - Sensors instead of questions: ``dist.Normal`` for ``dist.Bernoulli``, readings with gaps. Then
#   ``pv.exact.LinearGaussian`` has log p(x) in closed form, sensor by sensor that reported.
# - Ask each student 20% of the questions. Which gap grows, which shrinks, and why?
# - Train the independent guide ten times as long. What becomes of its approximation gap, and of the loadings?
# - Free the slope: make the pair one site of two dimensions with ``dist.MultivariateNormal``. What is left of the family's
#   part?
#
# Next: a paper's table, measured again: :doc:`11_reproducing_a_table`.
