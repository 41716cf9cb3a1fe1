"""The picture holds the distribution functions and their band, and says which latents leave it."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from calibration_helpers import calibrated
from pair_helpers import one_line

import pyro_vae as pv


@pytest.fixture
def ax():
    yield plt.subplots()[1]
    plt.close("all")


def test_lines_are_shares_below_minus_the_diagonal(ax):
    record, _ = calibrated(500, 0, factor=0.7)
    assert record.plot(ax) is ax
    labels = ax.get_legend_handles_labels()[1]
    assert labels[0] == "band" and set(labels[1:]) == {"z[0]", "z[1]", "log q(z | x)"}
    line = next(line for line in ax.lines if line.get_label() == "z[0]")
    z, height = line.get_data()
    assert np.allclose(z, np.arange(101) / 100) and height[0] == height[-1] == 0
    assert height[30] == pytest.approx(float((record.ranks[:, 0] < 0.3).double().mean()) - 0.3)
    assert height[5] > 0 > height[95]  # too narrow: too many ranks at both ends
    assert "3 of 3 outside" in ax.get_title()


def test_rows_inside_are_grey_and_many_outside_are_counted(ax):
    right, _ = calibrated(200, 0, latent_dim=10)
    pv.plots.plot_calibration(right, ax)
    assert "11 inside the band" in ax.get_legend_handles_labels()[1] and "0 of 11" in ax.get_title()
    wrong, _ = calibrated(500, 0, latent_dim=10, factor=0.5)
    labels = wrong.plot().get_legend_handles_labels()[1]
    assert "5 more outside" in labels


def test_nothing_to_draw_is_said():
    record, _ = calibrated(5, 0)
    empty = pv.Calibration(
        ("z",), torch.full((5, 1), math.nan), record.shift[:, :1], record.stretch[:, :1], None, record.elbo, 9, 1
    )
    with pytest.raises(ValueError, match="nothing to draw"):
        empty.plot()
    assert empty.passed and "No fault" in one_line(empty)
