"""Named errors and warnings. Every message says what was expected, what came, and what to do about it."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = [
    "ArgumentError",
    "AuxiliarySiteError",
    "BatchCouplingError",
    "CheckpointError",
    "CollapseWarning",
    "ComparisonError",
    "CompileError",
    "ConvergenceWarning",
    "DatumPlateError",
    "EmptyBatchError",
    "EnumerationError",
    "GlobalLatentError",
    "HiddenRandomnessError",
    "InvalidDataError",
    "LatentsError",
    "LazyGuideError",
    "LocalFitError",
    "MaskError",
    "MissingPackageError",
    "NonFiniteError",
    "ObservedInGuideError",
    "OptionError",
    "OutOfMemoryError",
    "ParameterStoreWarning",
    "PrecisionWarning",
    "ProcessesError",
    "ProgramError",
    "RecordFileError",
    "ScheduleWarning",
    "SiteMismatchError",
    "SkippedBatchWarning",
    "StructureError",
    "SubsamplingError",
    "SupportError",
    "SurgeryWarning",
    "UnreliableEvidenceWarning",
    "UntrainedParameterWarning",
]


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def described(value: object) -> str:
    """What came, in a few words: of tensors their kind, not their numbers."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = f"{value!r:.60}"
    return text if isinstance(value, (str, int, float, type(None))) else f"{text}, a {type(value).__name__}"


def listed(bad: Tensor) -> str:
    """The indices where `bad`, shape (B,), is true: the first ten of them and how many there are."""
    indices = bad.nonzero().flatten().tolist()
    return f"{indices[:10]}{f' and {len(indices) - 10} more' if len(indices) > 10 else ''}"


class ArgumentError(ValueError):
    """An argument is of another kind or shape than expected, so that model, guide or function cannot be called with it."""


class ProgramError(RuntimeError):
    """The model or the guide fails by itself, in a plain run on the arguments that came."""


class OptionError(ValueError):
    """An option of an estimator, an objective or a part of a model is out of range or of the wrong kind."""


class ComparisonError(ValueError):
    """Records that cannot be compared: of other data or another order, or of log p(x) of other kinds."""


class InvalidDataError(ValueError):
    """The data contain NaN or infinite values."""


class SupportError(InvalidDataError):
    """Observed values lie outside the support of their likelihood."""


class LatentsError(InvalidDataError):
    """Latents that are no posterior draws: they do not fit the model, or did not produce the data."""


class EmptyBatchError(InvalidDataError):
    """A batch without data."""


class StructureError(ValueError):
    """A model or guide whose structure has no per-datum weight that is known to be right."""


class DatumPlateError(StructureError):
    """No plate, or more than one, is common to all sites, so a datum is not defined."""


class GlobalLatentError(StructureError):
    """A latent site lies outside the datum plate: it is shared by all data."""


class SiteMismatchError(StructureError):
    """The latent sites of model and guide do not match."""


class AuxiliarySiteError(StructureError):
    """A site of the guide alone would enter log q without a counterpart in the model."""


class ObservedInGuideError(StructureError):
    """The guide observes a value, which is no part of log q."""


class SubsamplingError(StructureError):
    """A subsampled plate where the weight of a datum would depend on the subsample, or model and guide hold other data."""


class EnumerationError(StructureError):
    """An enumerated site that cannot be summed out per datum."""


class MaskError(StructureError):
    """A mask on one side only that cannot be carried over to the other side."""


class BatchCouplingError(StructureError):
    """The density of one datum depends on the others of its batch."""


class LocalFitError(StructureError):
    """A guide or model for which per-datum fits are not defined."""


class LazyGuideError(RuntimeError):
    """An autoguide that was never run has no parameters to evaluate."""


class HiddenRandomnessError(RuntimeError):
    """A program whose densities differ between two runs at the same values, as under active dropout."""


class CompileError(RuntimeError):
    """An objective with `compile=` cannot be traced or compiled for these programs, or gives other numbers than without."""


class CheckpointError(RuntimeError):
    """A checkpoint that was made by another call or from other data, is damaged, in use, or cannot be written."""


class MissingPackageError(ImportError, RuntimeError):
    """An optional package is not installed."""


class ProcessesError(RuntimeError):
    """The processes of a `torch.distributed` group differ in what they were to share, or one of them is gone."""


class NonFiniteError(RuntimeError):
    """A log-density came out as NaN or plus infinity, or its gradient where the density itself is finite."""


class OutOfMemoryError(torch.OutOfMemoryError, MemoryError):
    """The machine, or its accelerator, has not the memory that a call asks for."""


class RecordFileError(OSError, ValueError):
    """A file of records that is damaged, of another kind or version, or cannot be read or written."""


class UnreliableEvidenceWarning(UserWarning):
    """Some estimates of log p(x) are in doubt: they are likely off by more than their error."""


class PrecisionWarning(UserWarning):
    """Rounding in float32 moves log p(x) by more than its stated error allows."""


class ConvergenceWarning(UserWarning):
    """Some per-datum fits, or chains, had not converged when their steps were used up."""


class ScheduleWarning(UserWarning):
    """A schedule is not doing what it was made for: it stands still, or the training ends before it does."""


class ParameterStoreWarning(UserWarning):
    """Pyro's parameter store held other values under a program's names: the program keeps its own."""


class UntrainedParameterWarning(UserWarning):
    """A loss depends on parameters that the optimiser leaves as they are: it was made before they were."""


class CollapseWarning(UserWarning):
    """Most units of the latents carry nothing about the data: the posterior has collapsed onto the prior."""


class SkippedBatchWarning(UserWarning):
    """Batches that raised were left out of a result, as `on_error="skip"` asks for."""


class SurgeryWarning(UserWarning):
    """A part of a KL, or the information about a factor, is beyond what it can be, or what the number of data allows."""
