"""The analyses behind one diagnosis, one after the other, with one progress bar."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..batches import ToArguments, arguments_of, picked
from ..calibration import GuideCalibration
from ..errors import ArgumentError, LatentsError, NonFiniteError, OptionError, StructureError
from ..evaluation import OnError, evaluate, rank_and_size
from ..evidence import SelfCheck
from ..gaps import InferenceGaps
from ..kernel import Pair
from ..latent import ActiveUnits, ELBOSurgery
from ..samples import SampleCheck
from ..simulate import reconstruct, simulated_data
from .batches import Stages

T = TypeVar("T")
NUM_SIMULATED = 100  # data of the self-check: enough to see a mode that holds a fifth of the mass
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
