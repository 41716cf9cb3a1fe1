"""The numbers of a latent site as a matrix, one row per datum, and back."""

import torch
from torch import Tensor


class Rows:
    """Between values of a site, (*particles, *plates, *event), and rows, (*particles, R, n).

    R is B, the number of data, for a site in their plate, and 1 for a site outside it. n is the number of elements of the
    event and of all other plates of the site.

    :param batch_shape: of the site, which has its plates.
    :param num_plates: number of plates of the deepest site of the model; particles are left of as many dimensions.
    :param datum_dim: dimension of the plate of the data, negative; `None` for a site outside it.
    """

    def __init__(self, batch_shape: torch.Size, num_plates: int, datum_dim: int | None) -> None:
        self.num_plates, self.datum_dim, self.depth = num_plates, datum_dim, len(batch_shape)
        cells = [1] * (num_plates - len(batch_shape)) + list(batch_shape)  # the number of elements of the other plates
        if datum_dim is not None:
            del cells[datum_dim]
        self.cells = torch.Size(cells)

    def of(self, value: Tensor, event_dim: int) -> Tensor:
        """(*particles, *plates, *event) to (*particles, R, n)."""
        width = self.num_plates + event_dim
        value = value[(None,) * (width - value.ndim)] if value.ndim < width else value
        if self.datum_dim is None:
            return value.flatten(value.ndim - width).unsqueeze(-2) if width else value[..., None, None]
        value = value.movedim(self.datum_dim - event_dim, -width)
        return value.flatten(value.ndim - width + 1) if width > 1 else value.unsqueeze(-1)

    def cells_of(self, rows: Tensor, width: int) -> Tensor:
        """(*particles, R, n) to (*particles, *plates, width), the width of one cell of the other plates."""
        values = rows.unflatten(-1, (*self.cells, width))
        if self.datum_dim is None:
            values = values.squeeze(-len(self.cells) - 2)
        else:
            values = values.movedim(-len(self.cells) - 2, self.datum_dim - 1)
        surplus = self.num_plates - self.depth
        if surplus and values.ndim == self.num_plates + 1:  # no particles: only the plates of the site
            values = values.reshape(values.shape[surplus:])
        return values
