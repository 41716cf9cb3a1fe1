"""`diagnose`: all analyses of a model and guide in one call."""

import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from ..batches import ToArguments, check_loader, first_element
from ..calibration import GuideCalibration
from ..errors import ArgumentError, SurgeryWarning
from ..evaluation import Folder, OnError, checkpoint_at, shared_seed
from ..evidence import AdaptiveImportanceSampling, Evidence, SelfCheck
from ..gaps import InferenceGaps
from ..kernel import INFER
from ..latent import ActiveUnits, ELBOSurgery
from ..noise import kept_random_state, seed_torch
from ..options import flag, seed_or_none, whole_number
from ..records import without_warnings
from ..samples import SampleCheck
from .diagnosis import Diagnosis
from .run import Run

NUM_DRAWS = 1000  # data that the means of the surgery are taken over; q(z) is made of all
PACKAGES = ("pyro_vae", "pyro-ppl", "torch", "numpy")


def diagnose(
    model: Callable,
    guide: Callable,
    *,
    train: Iterable[Any],
    test: Iterable[Any],
    args: ToArguments = first_element,
    data: Callable[[dict[str, torch.Tensor]], tuple[Any, ...]] | None = None,
    evidence: Callable[[Callable, Callable], Callable[..., Evidence]] | None = None,
    num_data: int = 300,
    num_particles: int = 500,
    image_shape: tuple[int, ...] | None = None,
    seed: int | None = 0,
    datum_plate: str | None = INFER,
    prior_sites: Collection[str] = (),
    check_support: bool = True,
    progress: bool = True,
    checkpoint: Folder | None = None,
    on_error: OnError = "raise",
) -> Diagnosis:
    r"""Find out what is wrong with a VAE and what to change first, in one call.

    ::

        log p(x) - ELBO = amortization gap (encoder) + approximation gap (family)       on test data and on training data
        mean KL         = mutual information + total correlation + dimension-wise KL    on all training data

    The page also has the units of the latents, and samples beside their nearest training data (`SampleCheck`). On data
    simulated from the model it tests the estimate of log p(x) (`SelfCheck`) and the guide (`GuideCalibration`). A part that
    is not defined for a pair, such as the surgery of masked latents, is left out, and the page says why. The gaps are never
    left out: their error is raised.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param train: the training data, an iterable of batches that can be gone through more than once, such as a `DataLoader`.
    :param test: data that the pair was not trained on.
    :param args: maps a batch to the tuple of the model's arguments, or to a dict of keywords; by default its first element.
    :param data: maps simulated values by observed site to the model's arguments; by default they stand in the place of the
        arguments that the sites observed.
    :param evidence: maps (model, guide) to the estimator of log p(x) behind the gaps, which is also the one on trial; by
        default `AdaptiveImportanceSampling`.
    :param num_data: how many data of each loader the gaps are taken over: whole batches, spread evenly over the loader. The
        rest is taken over all training data.
    :param num_particles: K, draws per datum behind each ELBO, and weights behind log p(x).
    :param image_shape: of an observation, for sharpness; found automatically for (H, W), (C, H, W) and flat squares.
    :param seed: fixes all noise, that of loaders which draw from torch included; the caller's random state stays as it is.
        `None` draws one from that state.
    :param datum_plate: the plate of the data; found automatically if only one is common to all sites. `None` makes every
        batch one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.
    :param progress: show one progress bar; its remaining time weighs the parts by their cost.
    :param checkpoint: a folder for what is finished, as in `evaluate`: the same call goes on from there. Gaps, self-check,
        calibration and units are kept by batch. Surgery and samples are computed again: they need draws of all data in
        memory at once, which are large but quickly drawn.
    :param on_error: what to do about a batch that raises: "raise", or "skip" to leave it out with a `SkippedBatchWarning`.

    :returns: a `Diagnosis`, N data each; nats per datum.
    :raises ArgumentError: if a loader is a tensor or can be gone through once only, or if `args` returns no tuple.
    :raises OptionError: for options out of range.
    :raises LocalFitError: for latents that cannot be fitted per datum, such as discrete ones.
    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty loader.
    :raises CheckpointError: for a checkpoint of another call, see `evaluate`.

    References: Cremer, Li and Duvenaud, 2018, https://arxiv.org/abs/1801.03558; Hoffman and Johnson, 2016,
    http://approximateinference.org/accepted/HoffmanJohnson2016.pdf; Grosse, Ancha and Roy, 2016,
    https://arxiv.org/abs/1606.02275; Meehan, Chaudhuri and Dasgupta, 2020, https://arxiv.org/abs/2004.05675.

    Example::

        page = pv.diagnose(vae.model, vae.guide, train=train_loader, test=test_loader)
        print(page)
        page.to_html("diagnosis.html")
    """
    start = time.perf_counter()
    check_loaders(train=train, test=test)
    flag("progress", progress)
    num_data, seed = whole_number("num_data", num_data), seed_or_none(seed)
    shared: dict[str, Any] = {"datum_plate": datum_plate, "prior_sites": prior_sites, "check_support": check_support}
    asked: dict[str, Any] = {"num_data": num_data, "num_particles": num_particles, "image_shape": image_shape, **shared}
    of = partial(diagnose, model, guide, evidence=evidence, data=data, **asked)
    with checkpoint_at(checkpoint, of, seed) as kept:
        seed = shared_seed(seed) if kept is None else kept.seed
        chosen = partial(AdaptiveImportanceSampling, num_particles=num_particles, **shared) if evidence is None else evidence
        run = Run(
            gaps=InferenceGaps(model, guide, num_particles=num_particles, evidence=evidence, **shared),
            trial=SelfCheck(model, guide, evidence=chosen, data=data, progress=False, **shared),
            calibration=GuideCalibration(model, guide, data=data, **shared),
            units=ActiveUnits(model, guide, seed=seed, **shared),
            surgery=ELBOSurgery(model, guide, num_draws=NUM_DRAWS, seed=seed, **shared),
            looks=SampleCheck(model, guide, image_shape=image_shape, seed=seed, **shared),
            args=args,
            seed=seed,
            folder=None if checkpoint is None else Path(checkpoint),
            on_error=on_error,
        )
        with without_warnings(SurgeryWarning), kept_random_state():  # the findings state the doubts
            seed_torch(seed)  # a loader that shuffles draws from it
            measured = run.measure(train, test, num_data, progress)
    return Diagnosis(
        **measured,
        left_out=run.left_out,
        settings={"seed": seed, "num_particles": num_particles, "num_data asked for": num_data},
        about={
            "model": name_of(model),
            "guide": name_of(guide),
            "training data": name_of_data(train),
            "test data": name_of_data(test),
            "date": date.today().isoformat(),
        },
        versions={"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        seconds=time.perf_counter() - start,
    )


def check_loaders(**loaders: Any) -> None:
    for name, loader in loaders.items():
        check_loader(loader)
        if isinstance(loader, Iterator):
            raise ArgumentError(f"{name} can be gone through only once: pass a DataLoader or a list of batches")


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"


def name_of(program: Callable) -> str:
    """A function's own name, without that of the function it was made in; otherwise the class."""
    while isinstance(program, partial):
        program = program.func
    return getattr(program, "__qualname__", type(program).__name__).rpartition("<locals>.")[2]


def name_of_data(loader: Any) -> str:
    """The class of the data set, through a `Subset`; of a list of batches "list"."""
    data = getattr(loader, "dataset", loader)
    while isinstance(data, Subset):
        data = data.dataset
    return type(data).__name__
