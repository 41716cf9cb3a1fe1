"""Data, draws and means of the likelihood of the observed sites, one row per datum."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..densities import innermost
from ..errors import EnumerationError, MaskError, NonFiniteError, StructureError, listed, quoted
from ..kernel import Call, Layout, Record, SiteRecord, padded
from ..noise import Noise
from .images import laplacian_variance

LOOKS = ("data", "reconstruction_means", "sample_means", "sample_draws")
CLASSES = (torch.distributions.Categorical, torch.distributions.OneHotCategorical)
WITHOUT_MEAN = (torch.distributions.Cauchy, torch.distributions.HalfCauchy)


@dataclass(frozen=True)
class Looks:
    """B held-out data and as many samples, flat, (B, X)."""

    data: Tensor
    reconstruction_means: Tensor
    sample_means: Tensor
    sample_draws: Tensor
    shapes: list[torch.Size]  # of a datum, by observed site
    index: Tensor | None  # indices into a subsampled plate

    @classmethod
    def cat(cls, batches: Sequence["Looks"]) -> "Looks":
        shapes = batches[0].shapes
        for batch in batches:
            check_shapes(batch.shapes, shapes)
        index = [batch.index for batch in batches if batch.index is not None]
        return cls(
            **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in LOOKS},
            shapes=shapes,
            index=torch.cat(index) if index else None,
        )

    def sharpness(self, image_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The variance of the Laplacian of each kind of image, (B,) by name."""
        return {name: laplacian_variance(getattr(self, name), image_shape) for name in LOOKS}


def reconstruction(call: Call) -> Record:
    """All sites of the model at one draw of the guide."""
    if call.structure.model_enumerated:
        raise EnumerationError(
            f"the model sums out {quoted(call.structure.model_enumerated)}, which the guide lacks, so there is no draw "
            "from which to reconstruct data: add it to the guide"
        )
    call.set_noise(Noise.GUIDE, 0)
    return call.reconstruct()


def numbers_observed(record: Record) -> dict[str, SiteRecord]:
    """The observed sites; raises where distances between values have no meaning (classes)."""
    observed = {name: site for name, site in record.items() if site.is_observed}
    for name, site in observed.items():
        fn = innermost(site.fns[0])
        if type(fn).__name__ == "Unit":
            raise StructureError(
                f"the model has the factor '{name}', which cannot be simulated, so samples would not follow the model: "
                "write it as a distribution, or remove it for this check"
            )
        if isinstance(fn, CLASSES):
            raise StructureError(
                f"the observed site '{name}' is a class ({type(fn).__name__}), and a squared difference of classes has "
                "no meaning: pass a model whose observations are numbers (block the site, or give the class as an "
                "argument)"
            )
        if any(mask is not None and not bool(mask.all()) for mask in (site.mask, site.event_mask)):
            raise MaskError(
                f"the observed site '{name}' is masked, and there is no distance between data with parts missing: pass only "
                "data without missing parts, and no mask"
            )
    if not observed:
        raise StructureError("the model has no observed site, so there are no data to compare: pass the data with obs=")
    return observed


def values_in(record: Record, layout: Layout) -> list[Tensor]:
    """The values that each site observed or drew, (B, ...)."""
    values = {name: data_first(site.value, site, layout) for name, site in numbers_observed(record).items()}
    for name, value in values.items():
        check_finite(value, f"a draw of '{name}'")
    return list(values.values())


def means_in(record: Record, layout: Layout) -> list[Tensor]:
    """The mean of the likelihood of each observed site, (B, ...)."""
    means = []
    for name, site in numbers_observed(record).items():
        fn = site.fns[0]
        try:
            mean = None if isinstance(innermost(fn), WITHOUT_MEAN) else fn.mean
        except NotImplementedError:
            mean = None
        if mean is None:
            raise StructureError(
                f"the likelihood of the observed site '{name}' ({type(innermost(fn)).__name__}) has no mean to compare "
                "the data with: use a likelihood with a mean for this check"
            )
        means.append(data_first(mean, site, layout))
        check_finite(means[-1], f"the mean of the likelihood of '{name}'")
    return means


def data_first(tensor: Tensor, site: SiteRecord, layout: Layout) -> Tensor:
    """From (*plates, *event) to one row per datum, (B, ...)."""
    tensor = tensor.expand(torch.broadcast_shapes(site.value.shape, site.fns[0].shape()))
    if layout.datum_dim is None:
        return tensor.unsqueeze(0)
    dim = layout.datum_dim - site.event_dim
    tensor = padded(tensor, -dim).movedim(dim, 0)
    return tensor.expand(layout.batch_size, *tensor.shape[1:])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Flat and side by side, (B, X), floating point."""
    rows = torch.cat([part.flatten(1) if part.ndim > 1 else part.unsqueeze(1) for part in parts], 1)
    return rows if rows.is_floating_point() else rows.to(torch.get_default_dtype())


def shapes_of(values: Sequence[Tensor]) -> list[torch.Size]:
    return [value.shape[1:] for value in values]


def check_shapes(found: Sequence[torch.Size], expected: Sequence[torch.Size]) -> None:
    if found != expected:
        raise StructureError(
            f"the data differ in shape between batches, {[tuple(s) for s in expected]} before and "
            f"{[tuple(s) for s in found]} now: pass held-out and training data of one shape"
        )


def check_finite(values: Tensor, what: str) -> None:
    bad = ~values.isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.isfinite()
    if bool(bad.any()):
        raise NonFiniteError(
            f"{what} is NaN or infinite for data {listed(bad)}: look for NaN in the arguments or parameters, or choose "
            "a likelihood that has finite draws and a finite mean"
        )
