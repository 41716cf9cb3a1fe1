"""The picture of factors carries the numbers of its record, and can be read in black and white."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from pair_helpers import one_line

from pyro_vae.latent import FactorInformation
from pyro_vae.plots import plot_factors


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def record(num_dimensions=3, num_factors=2):
    """Dimension 0 says all about factor 0, dimension 1 half of what there is to say about factor 1."""
    frequencies = torch.tensor([[1 / (f + 2) for f in range(num_factors)]], dtype=torch.float64).expand(12, -1)
    terms = torch.zeros(2, 12, num_factors, num_dimensions, dtype=torch.float64)
    terms[:, :, 0, 0] = -frequencies[:, 0].log()
    terms[:, :, 1:, 1:].diagonal(dim1=2, dim2=3)[..., :1] = -frequencies[:, 1:2].log() / 2
    return FactorInformation.from_terms(
        terms,
        terms,
        frequencies=frequencies,
        num_values=tuple(range(2, num_factors + 2)),
        names=tuple(f"z[{d}]" for d in range(num_dimensions)),
        aggregate="full",
        dtype=torch.float32,
        cost=1.0,
    )


def test_cells_carry_the_shares_of_the_entropy():
    found = record()
    assert found.gap.tolist() == pytest.approx([1.0, 0.5]) and float(found.mig.value) == pytest.approx(0.75)
    assert float(found.mig.std_error) == 0 and "1 encoded by one dimension" in one_line(found)
    ax = plot_factors(found)
    shares = np.asarray(ax.images[0].get_array())
    assert shares.tolist() == [pytest.approx(row) for row in ([1.0, 0.0], [0.0, 0.5], [0.0, 0.0])]
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {
        ((f, d), f"{shares[d, f]:.2f}") for d in range(3) for f in range(2)
    }
    assert [t.get_text() for t in ax.get_yticklabels()] == ["z[0]", "z[1]", "z[2]"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0: 1.00", "1: 0.50"]
    assert "0.75" in ax.get_title() and ax.images[0].get_clim() == (0.0, 1.0)


def test_numbers_stand_out_from_their_cells():
    """Grey alone tells the cells apart, and a number has a contrast of at least 4.5 to 1 (WCAG 2.1) whatever its cell."""
    found = replace(record(11, 1), information=record(11, 1).entropy * torch.linspace(-0.1, 1.1, 11).unsqueeze(1))
    ax = plot_factors(found)
    image = ax.images[0]
    for text in ax.texts:
        f, d = text.get_position()
        red, green, blue, _ = image.cmap(image.norm(image.get_array()[d, f]))
        assert red == green == blue
        luminance = ((red + 0.055) / 1.055) ** 2.4 if red > 0.04045 else red / 12.92
        assert (1.05 / (luminance + 0.05) if text.get_color() == "white" else (luminance + 0.05) / 0.05) > 4.5


@pytest.mark.parametrize(("num_dimensions", "num_factors"), [(1, 1), (2, 2), (40, 12)])
def test_any_size_is_drawn_where_it_is_told(num_dimensions, num_factors):
    _, given = plt.subplots()
    ax = plot_factors(record(num_dimensions, num_factors), ax=given)
    assert ax is given and len(ax.texts) == num_dimensions * num_factors
    ax.figure.canvas.draw()
