"""Named errors and warnings. Every message says what was expected, what came, and what to do."""

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
    """A short description of a value in a message; for tensors dtype and shape."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = f"{value!r:.60}"
    return text if isinstance(value, (str, int, float, type(None))) else f"{text}, a {type(value).__name__}"


def listed(bad: Tensor) -> str:
    """The indices where `bad`, shape (B,), is true: the first ten, and the number of others."""
    indices = bad.nonzero().flatten().tolist()
    return f"{indices[:10]}{f' and {len(indices) - 10} more' if len(indices) > 10 else ''}"


class ArgumentError(ValueError):
    """An argument has another type or shape than expected, so model, guide or function cannot be called with it."""


class ProgramError(RuntimeError):
    """The model or the guide raises an error in a plain run with the given arguments."""


class OptionError(ValueError):
    """An option of an estimator, an objective or a part of a model is out of range or has the wrong type."""


class ComparisonError(ValueError):
    """Records cannot be compared: their data or the order of these differ, or their log p(x) are of different kinds."""


class InvalidDataError(ValueError):
    """The data contain NaN or infinite values."""


class SupportError(InvalidDataError):
    """Observed values are outside the support of their likelihood."""


class LatentsError(InvalidDataError):
    """Latents are not posterior draws: they do not fit the model, or did not produce the data."""


class EmptyBatchError(InvalidDataError):
    """A batch without data."""


class StructureError(ValueError):
    """The structure of model or guide defines no importance weight per datum, or none that can be checked."""


class DatumPlateError(StructureError):
    """No plate, or more than one, is common to all sites, so a datum is not defined."""


class GlobalLatentError(StructureError):
    """A latent site is outside the datum plate, so it is common to all data."""


class SiteMismatchError(StructureError):
    """The latent sites of model and guide do not match."""


class AuxiliarySiteError(StructureError):
    """A site that only the guide has would enter log q without a counterpart in the model."""


class ObservedInGuideError(StructureError):
    """The guide observes a value, which is not part of log q."""


class SubsamplingError(StructureError):
    """A subsampled plate makes the weight of a datum depend on the subsample, or differs between model and guide."""


class EnumerationError(StructureError):
    """An enumerated site that cannot be summed out per datum."""


class MaskError(StructureError):
    """A mask in model or guide only, which cannot be applied to the other."""


class BatchCouplingError(StructureError):
    """The density of one datum depends on other data of its batch."""


class LocalFitError(StructureError):
    """Fits per datum are not possible for this guide or model."""


class LazyGuideError(RuntimeError):
    """An autoguide that was never run has no parameters to evaluate."""


class HiddenRandomnessError(RuntimeError):
    """The densities of a program differ between two runs at the same values, as with active dropout."""


class CompileError(RuntimeError):
    """An objective with `compile=` cannot be compiled for these programs, or gives other numbers than uncompiled."""


class CheckpointError(RuntimeError):
    """A checkpoint was made by another call or from other data, is damaged, is in use, or cannot be written."""


class MissingPackageError(ImportError, RuntimeError):
    """An optional package is not installed."""


class ProcessesError(RuntimeError):
    """The processes of a `torch.distributed` group do not make the same call, or one of them has ended."""


class NonFiniteError(RuntimeError):
    """A log-density is NaN or plus infinity, or its gradient is not finite although the density is."""


class OutOfMemoryError(torch.OutOfMemoryError, MemoryError):
    """The machine, or its accelerator, does not have enough memory for a call."""


class RecordFileError(OSError, ValueError):
    """A file of records is damaged, of another type or version, or cannot be read or written."""


class UnreliableEvidenceWarning(UserWarning):
    """Some estimates of log p(x) are in doubt: they are likely wrong by more than their error."""


class PrecisionWarning(UserWarning):
    """Rounding in float32 changes log p(x) by more than a tenth of its stated error."""


class ConvergenceWarning(UserWarning):
    """Some per-datum fits, or chains, had not converged when their steps were used up."""


class ScheduleWarning(UserWarning):
    """A schedule has no effect as intended: it is not advanced, or training ends before it does."""


class ParameterStoreWarning(UserWarning):
    """Pyro's parameter store has other values under a program's names; the program keeps those of its module."""


class UntrainedParameterWarning(UserWarning):
    """A loss depends on parameters that are not trained, because the optimiser was created before them."""


class CollapseWarning(UserWarning):
    """Most latent units do not depend on the data: the posterior has collapsed to the prior."""


class SkippedBatchWarning(UserWarning):
    """Batches that raised were left out of a result because of `on_error="skip"`."""


class SurgeryWarning(UserWarning):
    """A part of a KL, or the information about a factor, is outside its possible range, or limited by the number of data."""
