r"""
A real run: a convolutional VAE
===============================

The other tutorials keep their loops short. This one has all the parts of a real run on
28x28 images: data loaders, convolutional networks, KL annealing, a monitor, early
stopping and checkpoints. The run is interrupted and resumed. Then the trained VAE is
evaluated on test data, diagnosed, and compared with a second model.

Prerequisites: :doc:`02_first_vae`, :doc:`03_three_gaps` and :doc:`07_collapse`; about
2 minutes to run.
"""

# %%
# The data
# --------
# The images are made here, so that the program needs no download. Each starts from an
# 8x8 digit of scikit-learn. It is enlarged, turned, sheared, scaled and shifted a
# little at random, rendered at 28x28 pixels and binarised. *MNIST drops in*: replace
# ``train``, ``held_out`` and ``test`` by binarised tensors of shape (N, 1, 28, 28), and
# nothing below changes.

import contextlib
import os
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_WARPS, MAX_EPOCHS, BATCH_SIZE = (1, 6, 10) if SMOKE_TEST else (2, 60, 100)
TEST_BATCH_SIZE, NUM_PARTICLES = (2, 20) if SMOKE_TEST else (20, 200)
CHANNELS = (4, 8) if SMOKE_TEST else (16, 32)
folder = Path(tempfile.mkdtemp())  # a real run keeps its checkpoints in a named folder
pyro.set_rng_seed(0)


def warped(digits):
    """8x8 digits, (N, 64), as warped and binarised images, (N, 1, 28, 28)."""
    num = len(digits)
    angle, shear = 0.15 * torch.randn(2, num)
    across, down = 0.08 * torch.randn(2, num)
    shrink = (0.08 * torch.randn(num)).exp()
    cos, sin = angle.cos() * shrink, angle.sin() * shrink
    maps = torch.stack([cos, shear - sin, across, sin, cos, down], 1).reshape(num, 2, 3)
    small = digits.reshape(num, 1, 8, 8) / 16
    large = nn.functional.interpolate(small, size=(20, 20), mode="bicubic")
    large = nn.functional.pad(large, (4, 4, 4, 4))
    grid = nn.functional.affine_grid(maps, list(large.shape), align_corners=False)
    grey = nn.functional.grid_sample(large, grid, align_corners=False)
    return (grey > 0.5).float()


# %%
# The split comes before the warping, so that no two sets share a digit. Three sets are
# needed. *Training* data move the parameters. *Held-out* data decide when to stop, and
# are used up by that. All reported numbers come from *test* data.

digits = torch.tensor(load_digits().data, dtype=torch.float)
rest, test = train_test_split(digits, test_size=200, random_state=0)
train, held_out = train_test_split(rest, test_size=297, random_state=0)
if SMOKE_TEST:
    train, held_out, test = train[:48], held_out[:20], test[:6]
train = warped(train.repeat(NUM_WARPS, 1))
held_out, test = warped(held_out), warped(test)
print(f"{len(train)} training, {len(held_out)} held-out and {len(test)} test images")

train_loader = DataLoader(TensorDataset(train), batch_size=BATCH_SIZE, shuffle=True)
held_out_loader = DataLoader(TensorDataset(held_out), batch_size=BATCH_SIZE)
test_loader = DataLoader(TensorDataset(test), batch_size=TEST_BATCH_SIZE)

# sphinx_gallery_start_ignore


def sheet(images):
    """Images, (rows, columns, 1, 28, 28), as one picture with light lines between."""
    framed = nn.functional.pad(images[:, :, 0], (1, 1, 1, 1), value=0.15)
    return framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


figure, ax = plt.subplots(figsize=(8, 2), layout="constrained")
ax.imshow(sheet(train[:48].reshape(3, -1, 1, 28, 28)), cmap="gray_r")
ax.set_title("training images")
ax.set_axis_off()
plt.show()
# sphinx_gallery_end_ignore

# %%
# The networks
# ------------
# ``ConvNet`` halves an image with each convolution and ends in a linear layer.
# ``DeconvNet`` is the same in reverse. A *head* turns the numbers of a network into a
# distribution: ``Normal`` into :math:`q(z \mid x)`, and ``Bernoulli`` into
# :math:`p(x \mid z)`, with three event dimensions (channel, height, width).

SHAPE = (1, 28, 28)


def new_vae(latent_dim):
    """The same start every time."""
    pyro.set_rng_seed(0)
    posterior, likelihood = pv.nn.Normal(), pv.nn.Bernoulli(event_dim=3)
    to_latents = pv.nn.ConvNet(
        SHAPE,
        posterior.num_outputs(latent_dim),
        channels=CHANNELS,
    )
    to_pixels = pv.nn.DeconvNet(
        latent_dim,
        (likelihood.num_outputs(1), 28, 28),
        channels=CHANNELS[::-1],
    )
    return pv.VAE(
        encoder=nn.Sequential(to_latents, posterior),
        decoder=nn.Sequential(to_pixels, likelihood),
        prior=pv.nn.StandardNormal(latent_dim),
    )


def num_parameters(vae):
    return sum(p.numel() for p in [*vae.model.parameters(), *vae.guide.parameters()])


# %%
# ``pv.conv_vae`` builds the same pair in one call:

bernoulli = pv.nn.Bernoulli(event_dim=3)
short = pv.conv_vae(SHAPE, 8, likelihood=bernoulli, channels=CHANNELS)
assert num_parameters(short) == num_parameters(new_vae(8))
print(f"{num_parameters(short)} parameters with 8 latents")

# %%
# The training loop
# -----------------
# The loop below is plain PyTorch. Four parts are added to it:
#
# - *KL annealing.* The weight of the KL in update :math:`t` is
#   :math:`\beta_t = \min(1, t / T)`. It keeps the decoder from ignoring the latents in
#   the first updates (:doc:`07_collapse`).
# - A *monitor*, which records the terms of the objective in every update, whatever
#   :math:`\beta_t` is.
# - *Early stopping*, which compares the ELBO of the held-out data from one look to the
#   next. It stops after ``patience`` looks without a rise above the sampling error.
#   Looks before :math:`\beta_t = 1` do not count.
# - A *checkpoint* after each epoch, which holds everything that the next epoch depends
#   on. This is the parameters, the state of the optimiser, the number of updates, the
#   monitor, the early stopping, and the state of the random numbers.

EVERY = 5 * len(train_loader)  # updates from one look to the next
warmup = pv.LinearAnnealing(EVERY)


def save(state, path):
    """Write beside the old file and rename, so that a crash leaves one whole file."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train_vae(vae, path, max_epochs):
    """Train up to so many epochs, or go on from the checkpoint `path` if it exists."""
    objective = pv.BetaTraceMeanField_ELBO(beta=warmup)
    loss = objective(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    monitor = pv.Monitor(objective, progress=False)
    stopping = pv.EarlyStopping(
        vae.model,
        vae.guide,
        held_out_loader,
        every=EVERY,
        patience=3,
        beta=warmup,
        num_particles=5,
    )
    epoch = 0
    if path.exists():
        saved = torch.load(path, weights_only=False)
        loss.load_state_dict(saved["loss"])
        optimizer.load_state_dict(saved["optimizer"])
        stopping.load_state_dict(saved["stopping"])
        monitor, epoch = saved["monitor"], saved["epoch"]
        monitor.objective = objective
        torch.set_rng_state(saved["random_state"])

    while epoch < max_epochs and stopping.stopped_at is None:
        for (x,) in monitor.watch(train_loader):
            optimizer.zero_grad()
            (loss(x) / len(x)).backward()
            optimizer.step()
            objective.num_updates += 1
        epoch += 1
        stopping(objective.num_updates)
        state = {
            "loss": loss.state_dict(),  # parameters, and the number of updates
            "optimizer": optimizer.state_dict(),
            "stopping": stopping.state_dict(),
            "monitor": monitor,
            "epoch": epoch,
            "random_state": torch.get_rng_state(),
        }
        save(state, path)
    return monitor.history(), stopping


# %%
# Interrupt and resume
# --------------------
# A checkpoint should be tested before it is needed. One run makes two epochs without a
# break. Another run stops after one epoch, as if the machine had been switched off. A
# fresh VAE then resumes it from the file. If the checkpoint is complete, both runs give
# the same losses and the same parameters, bit for bit.

whole, resumed = new_vae(8), new_vae(8)
expected, _ = train_vae(whole, folder / "whole.pt", 2)
train_vae(new_vae(8), folder / "8.pt", 1)
history, _ = train_vae(resumed, folder / "8.pt", 2)

assert torch.equal(history.loss, expected.loss)
for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
    assert torch.equal(ours, theirs)
print(f"{len(history)} updates, in one go and resumed: equal bit for bit")

# %%
# The long run goes on from the same file until early stopping ends it.
# ``restore_best`` then writes the parameters of the best look back into the VAE.

vaes = {"8 latents": new_vae(8)}
history, stopping = train_vae(vaes["8 latents"], folder / "8.pt", MAX_EPOCHS)
stopping.look(len(history))  # a run that reached its last epoch has not looked there
stopping.restore_best()
vaes["8 latents"].eval()
print(history)
print(stopping)

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
pv.plots.plot_training(history, ax=axes[0])
pv.plots.plot_held_out(stopping.history(), ax=axes[1])
plt.show()
# sphinx_gallery_end_ignore

# %%
# Evaluate on test data
# ---------------------
# ``pv.evaluate`` runs an estimator of :math:`\log p(x)` over a loader. With
# ``checkpoint=`` it keeps the finished batches in a folder. Here the loader breaks off
# as Ctrl-C would. The same call then goes on with the batches that are missing.


def broken_off(loader, num_batches):
    for number, batch in enumerate(loader):
        if number == num_batches:
            raise KeyboardInterrupt
        yield batch


def evaluated(vae, loader, checkpoint=None):
    estimator = pv.AdaptiveImportanceSampling(
        vae.model,
        vae.guide,
        num_particles=NUM_PARTICLES,
    )
    with warnings.catch_warnings():
        # The warnings are about single images, which the printed record counts.
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        return pv.evaluate(
            estimator,
            loader,
            seed=0,
            checkpoint=checkpoint,
            progress=False,
        )


vae = vaes["8 latents"]
with contextlib.suppress(KeyboardInterrupt):
    evaluated(vae, broken_off(test_loader, 1), checkpoint=folder / "test 8")
print("interrupted; kept:", *sorted(p.name for p in (folder / "test 8").glob("*.npz")))
found = {"8 latents": evaluated(vae, test_loader, checkpoint=folder / "test 8")}
print(found["8 latents"])

unbroken = evaluated(vae, list(test_loader)[:2])
first = found["8 latents"].log_evidence[: len(unbroken.log_evidence)]
assert torch.equal(first, unbroken.log_evidence)

# %%
# The last lines compare the first two batches with an evaluation that was not
# interrupted. One of these batches was computed before the interruption and the other
# one after it. The numbers are equal bit for bit, because the random numbers of a batch
# depend only on the seed and on the number of the batch.
#
# The diagnosis
# -------------
# ``pv.diagnose`` measures the gaps on test and training data, looks at the latents and
# at samples, and tests the estimate itself on data simulated from the model. The
# headline says what keeps the ELBO below :math:`\log p(x)`, and what to change first.
# ``page.to_html("diagnosis.html")`` writes everything as one page.
#
# The test on simulated data is the expensive part. To keep this tutorial short, it gets
# 20 images of each set. The default of ``num_data`` is 300, which makes the sampling
# errors about four times smaller.

once_each = TensorDataset(train[: len(train) // NUM_WARPS])  # one image per digit
once_each = DataLoader(once_each, batch_size=TEST_BATCH_SIZE)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the page has what they say
    page = pv.diagnose(
        vae.model,
        vae.guide,
        train=once_each,
        test=test_loader,
        num_data=TEST_BATCH_SIZE,
        num_particles=NUM_PARTICLES,
        progress=False,
    )
print(page)

# sphinx_gallery_start_ignore
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
pv.plots.plot_gaps(page.test, ax=axes[0])
pv.plots.plot_units(page.units, ax=axes[1])
plt.show()
# sphinx_gallery_end_ignore

# %%
# A second model
# --------------
# The diagnosis is about the inference in *this* model. It does not say whether another
# model would have a higher :math:`\log p(x)`. That needs a second model. This one has
# 16 latents instead of 8 and is otherwise the same. It is trained in the same way.

vaes["16 latents"] = new_vae(16)
history, stopping = train_vae(vaes["16 latents"], folder / "16.pt", MAX_EPOCHS)
stopping.look(len(history))
stopping.restore_best()
vaes["16 latents"].eval()
print(stopping)

# %%
# ``pv.compare`` takes the difference of :math:`\log p(x)` image by image, which cancels
# what makes an image hard for both models. It says whether the difference exceeds its
# sampling error, and whether the ELBO would have given the same answer.

found["16 latents"] = evaluated(vaes["16 latents"], test_loader)
comparison = pv.compare(found)
print(comparison)
gain = comparison.difference("16 latents", "8 latents").mean()
assert SMOKE_TEST or float(gain) > 0

# sphinx_gallery_thumbnail_number = 4
shown = test[:12]
rows = {"test images": shown}
for name, vae in vaes.items():
    rows[f"reconstructed, {name}"] = vae.reconstruct(shown)
for name, vae in vaes.items():
    rows[f"drawn, {name}"] = vae.decode(vae.prior().sample((len(shown),))).mean
# sphinx_gallery_start_ignore
figure, axes = plt.subplots(5, 1, figsize=(7.5, 4.6), layout="constrained")
for ax, (name, images) in zip(axes, rows.items(), strict=True):
    ax.imshow(sheet(images.detach()[None]), cmap="gray_r", vmin=0, vmax=1)
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
plt.show()
# sphinx_gallery_end_ignore

# %%
# What to try
# -----------
#
# - Run it on MNIST. ``torchvision.datasets.MNIST`` has the images; binarise them once,
#   by ``torch.bernoulli`` of the grey values, and keep the result.
# - Move the networks and the batches to a GPU by ``.to("cuda")``. Only the loop and the
#   arguments of the estimators change.
# - Give the encoder a head with correlations, ``pv.nn.MultivariateNormal()``. Does the
#   approximation gap shrink, and does :math:`\log p(x)` rise?
# - Interrupt the diagnosis with Ctrl-C. With ``checkpoint=`` it goes on where it
#   stopped.
# - Follow the advice of the diagnosis: :doc:`13_from_a_gap_to_a_better_model`.
#
# Practice problems
# -----------------
#
# 1. The encoder of the first model has two convolutions with a kernel of 4x4 and a
#    linear layer to 16 numbers. How many parameters does it have?
# 2. With 26 updates per epoch, in which epoch does :math:`\beta_t` reach 1?
# 3. What happens if the checkpoint lacks (a) the state of the optimiser, (b) the number
#    of updates, (c) the state of the random numbers?
# 4. Why should the ELBO of the held-out images at the best look not be reported as the
#    result?
# 5. The paired differences of two models have a standard deviation of 4 nats per image.
#    How many test images are needed to tell a mean difference of 0.5 nats from zero at
#    the 95% level?
#
# .. raw:: html
#
#    <details><summary>Answers</summary>
#
# 1. The images shrink from 28 to 14 to 7 pixels. The convolutions have
#    :math:`16 \cdot 1 \cdot 16 + 16 = 272` and :math:`32 \cdot 16 \cdot 16 + 32 = 8224`
#    parameters. The linear layer has :math:`32 \cdot 7 \cdot 7 \cdot 16 + 16 = 25104`.
#    The sum is 33,600.
# 2. Here :math:`T = 130`, so update number 130, counted from 0, is the first with
#    :math:`\beta_t = 1`. It is the first update of the sixth epoch.
# 3. (a) Adam starts again with empty averages, and its first steps are too large or in
#    a poor direction. (b) The annealing starts again at :math:`\beta_0 = 0`, so that
#    the rate rises first and has to fall again. (c) The batches come in another order,
#    with other noise. The run is as good as the unbroken one, but not equal to it.
# 4. It is the largest of several noisy numbers, so it tends to be too high. Test images
#    play no part in the choice.
# 5. The standard error of the mean is :math:`4 / \sqrt{N}`. It has to be below
#    :math:`0.5 / 1.96`, so :math:`N \ge (1.96 \cdot 4 / 0.5)^2 \approx 246`.
#
# .. raw:: html
#
#    </details>
#
# Larger data, several processes and interrupted runs: :doc:`/large_runs`. How the
# diagnosis comes to its verdict: :doc:`/diagnosis`.
