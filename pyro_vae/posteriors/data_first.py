"""The numbers of observed sites, with the data axis first, for any plates of the model."""

from __future__ import annotations

from torch import Tensor

from ..errors import StructureError
from ..kernel import Layout, SiteRecord


class DataFirst:
    """The layout of the numbers of an observed site: from canonical tensors (K, *plates, *event) to (K, B, *rest)."""

    def __init__(self, site: SiteRecord, layout: Layout) -> None:
        self.width = layout.num_plates + site.event_dim
        value = last_dims(site.value, self.width)
        if value.numel() < site.value.numel():
            raise StructureError(
                f"the values that '{site.name}' observes differ between draws of the latents, so they are not data: "
                "observe values that do not depend on latents"
            )
        self.shape = [1] * (self.width - value.ndim) + list(value.shape)
        for frame in site.frames:  # one value may be common to a whole plate
            if frame.dim is not None:
                size = layout.batch_size if frame.name == layout.datum_plate else frame.size
                self.shape[layout.num_plates + frame.dim] = max(size, self.shape[layout.num_plates + frame.dim])
        own = {frame.dim for frame in site.frames if frame.dim is not None}
        plates = range(-layout.num_plates, 0)
        self.has_data_axis = layout.datum_dim in own
        data = [layout.datum_dim] if self.has_data_axis else []
        order = [*(d for d in plates if d not in own), *data, *(d for d in plates if d in own and d != layout.datum_dim)]
        self.num_dropped = layout.num_plates - len(own)  # plates of other sites
        events = range(layout.num_plates, self.width)
        self.order = [1 + d for d in [*(layout.num_plates + d for d in order if d is not None), *events]]

    def __call__(self, tensor: Tensor, num_particles: int) -> Tensor:
        """(K, B, *rest) of a tensor that broadcasts to (K, *plates, *event)."""
        tensor = tensor.reshape(len(tensor), *[1] * (self.width + 1 - tensor.ndim), *tensor.shape[1:])
        tensor = tensor.expand(num_particles, *self.shape).permute(0, *self.order).flatten(0, self.num_dropped)
        return tensor if self.has_data_axis else tensor.unsqueeze(1)


def last_dims(tensor: Tensor, width: int) -> Tensor:
    """The first entry along all dimensions but the last ones."""
    return tensor[(0,) * (tensor.ndim - width)] if tensor.ndim > width else tensor
