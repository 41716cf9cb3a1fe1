"""`diagnose`: all analyses of a model and guide in one call."""

import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..batches import ToArguments, arguments_of, check_loader, first_element, picked
from ..calibration import GuideCalibration
from ..errors import ArgumentError, LatentsError, NonFiniteError, OptionError, StructureError, SurgeryWarning
from ..evaluation import Folder, OnError, checkpoint_at, evaluate, rank_and_size, shared_seed
from ..evidence import AdaptiveImportanceSampling, Evidence, SelfCheck
from ..gaps import InferenceGaps
from ..kernel import INFER, Pair
from ..latent import ActiveUnits, ELBOSurgery
from ..noise import kept_random_state, seed_torch
from ..options import flag, seed_or_none, whole_number
from ..records import without_warnings
from ..samples import SampleCheck
from ..simulate import reconstruct, simulated_data
from .batches import Stages
from .diagnosis import Diagnosis

T = TypeVar("T")
NUM_SIMULATED = 100  # data of the self-check: enough to see a mode that holds a fifth of the mass
NUM_DRAWS = 1000  # data that the means of the surgery are taken over; q(z) is made of all
# Decoder evaluations per datum, as the records of a pair on images say; of the last four as many as take the same time.
COSTS = {
    "gaps on test data": 2700.0,
    "gaps on training data": 2700.0,
    "self-check": 23000.0,
    "calibration": 100.0,
    "latent units": 12.0,
    "surgery": 12.0,
    "samples": 12.0,
}
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
    r"""What is wrong with this VAE, and what to change first: one call, one page.

    ::

        log p(x) - ELBO = amortization gap (encoder) + approximation gap (family)       on test data and on training data
        mean KL         = mutual information + total correlation + dimension-wise KL    on all training data

    together with the units of the latents, trials of the estimate and of the guide on data simulated from the model
    (`SelfCheck`, `GuideCalibration`), and samples beside their nearest training data (`SampleCheck`). What cannot be known
    for a pair (the surgery of masked latents, say) is left out, and the page says why; the gaps are always there, or their
    error is raised.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param train: the training data, an iterable of batches that can be gone through more than once, such as a `DataLoader`.
    :param test: data that the pair was not trained on.
    :param args: maps a batch to the tuple of the model's arguments, or to a dict of keywords; by default its first element.
    :param data: maps simulated values by observed site to the model's arguments; by default they stand in the place of the
        arguments that the sites observed.
    :param evidence: maps (model, guide) to the estimator of log p(x) behind the gaps, which is also the one on trial; by
        default `AdaptiveImportanceSampling`.
    :param num_data: gaps are taken over whole batches, spread evenly over the loader, until they hold so many data. The
        rest is taken over all training data.
    :param num_particles: K, draws per datum behind each ELBO, and weights behind log p(x).
    :param image_shape: of an observation, for sharpness; found by itself for (H, W), (C, H, W) and flat squares.
    :param seed: fixes all noise, that of loaders which draw from torch included; the caller's random state stays as it is.
        `None` draws one from that state.
    :param datum_plate: the plate of the data; found by itself where only one is common to all sites; `None` makes every
        batch one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.
    :param progress: show one progress bar; its remaining time weighs the parts by their cost.
    :param checkpoint: a folder for what is finished, as in `evaluate`: the same call goes on from there. Gaps, trials and
        units are kept by batch. Surgery and samples are made again: they need draws of all data in memory at once, which
        are quickly drawn and large.
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
        versions={"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        seconds=time.perf_counter() - start,
    )


@dataclass
class Run:
    """The analyses behind one diagnosis, and why parts of it are missing."""

    gaps: InferenceGaps
    trial: SelfCheck
    calibration: GuideCalibration
    units: ActiveUnits
    surgery: ELBOSurgery
    looks: SampleCheck
    args: ToArguments
    seed: int
    folder: Path | None
    on_error: OnError
    left_out: dict[str, str] = field(default_factory=dict)

    def measure(self, train: Iterable[Any], test: Iterable[Any], num_data: int, progress: bool) -> dict[str, Any]:
        """The fields of `Measured`: gaps on parts of both data sets, units, surgery and samples on all training data."""
        plate = self.gaps.datum_plate
        held_out, _ = picked(test, num_data, self.args, plate)
        known, num_train = picked(train, num_data, self.args, plate)
        simulated, _ = picked(held_out, NUM_SIMULATED, self.args, plate)
        num_batches = {
            "gaps on test data": len(held_out),
            "gaps on training data": len(known),
            "self-check": len(simulated),
            "calibration": len(held_out),
            **dict.fromkeys(("latent units", "surgery", "samples"), num_train),
        }
        with Stages(COSTS, num_batches, progress and rank_and_size()[0] == 0) as stage:
            of_test = self.evaluated(self.gaps, "gaps on test data", held_out, stage)
            of_train = self.evaluated(self.gaps, "gaps on training data", known, stage)
            trial = partial(self.evaluated, self.trial, "self-check", simulated, stage)
            calibration = partial(self.evaluated, self.calibration, "calibration", held_out, stage)
            options: Any = {"args": self.args, "progress": False, "on_error": self.on_error}
            units = partial(self.units, stage("latent units", train), checkpoint=self.kept("latent units"), **options)
            surgery = partial(self.surgery, stage("surgery", train), **options)
            looks = partial(self.looks, held_out, train=stage("samples", train), evidence=of_test.evidence, **options)
            return {
                "test": of_test,
                "train": of_train,
                "self_check": self.unless_refused("self-check", trial),
                "calibration": self.unless_refused("calibration", calibration),
                "units": self.unless_refused("units", units),
                "surgery": self.unless_refused("surgery", surgery),
                "samples": self.unless_refused("samples", looks),
                **self.pictures(held_out),
            }

    def evaluated(self, estimator: Callable[..., Any], name: str, batches: Iterable[Any], stage: Stages) -> Any:
        kept: Any = {"seed": self.seed, "checkpoint": self.kept(name), "on_error": self.on_error}
        return evaluate(estimator, stage(name, batches), args=self.args, progress=False, **kept)

    def kept(self, name: str) -> Path | None:
        """The folder of a part of the checkpoint."""
        return None if self.folder is None else self.folder / name

    def pictures(self, batches: Iterable[Any]) -> dict[str, Any]:
        """Those of the first batch; where batches may be skipped, of the first that can be used."""
        for batch in batches:
            try:
                return self.pictures_of(batch)
            except Exception:
                if self.on_error == "raise":
                    raise
        return {"simulation": None, "reconstruction": None}

    @torch.no_grad()
    def pictures_of(self, batch: Any) -> dict[str, Any]:
        """A draw from the model, and a batch as the model gives it back."""
        gaps = self.gaps
        positional, named = arguments_of(batch, self.args)
        drawn: dict[str, Any] = {"seed": self.seed, "datum_plate": gaps.datum_plate}
        shared: Any = {"prior_sites": gaps.prior_sites, "check_support": gaps.check_support}
        with Pair(gaps.model, gaps.guide, datum_plate=gaps.datum_plate, **shared).open(positional, named, self.seed) as call:
            fixed = call.fixed
        simulation = partial(simulated_data, gaps.model, positional, named, fixed=fixed, **drawn)
        # One dict, in which an argument of the model takes the place of an option of the same name.
        options = {**drawn, "prior_sites": gaps.prior_sites, **named}
        reconstruction = partial(reconstruct, gaps.model, gaps.guide, *positional, **options)
        return {
            "simulation": self.unless_refused("simulation", simulation),
            "reconstruction": self.unless_refused("reconstruction", reconstruction),
        }

    def unless_refused(self, part: str, run: Callable[[], T]) -> T | None:
        """The record of a part, or `None` with the reason in `left_out`."""
        try:
            return run()
        except (StructureError, ArgumentError, OptionError, LatentsError, NonFiniteError) as error:
            self.left_out[part] = str(error)
            return None


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
