"""The band holds uniform numbers with exactly the probability that it says."""

import itertools
import math

import pytest
import torch

from pyro_vae.calibration.uniformity import GRID, POINTS, band, is_outside, probability_inside


@pytest.mark.parametrize("num_data", [1, 2])
def test_the_probability_of_a_path_is_a_sum_over_cells(num_data):
    """Brute force: each number lies in one of a hundred cells of the same probability."""
    low = (num_data * GRID - 0.9).ceil().clamp(min=0).long()
    high = (num_data * GRID + 0.7).floor().clamp(max=num_data).long()
    cells = torch.tensor(list(itertools.product(range(POINTS), repeat=num_data)))
    counts = (cells.unsqueeze(-1) < torch.arange(1, POINTS)).sum(1)
    inside = ((counts >= low) & (counts <= high)).all(1).double().mean()
    assert 0.01 < float(inside) < 0.9
    assert probability_inside(num_data, low, high) == pytest.approx(float(inside), abs=1e-12)


def test_the_probability_of_one_limit_is_that_of_a_binomial():
    """Nothing is asked but that not all of a thousand numbers, and not fewer than 5, lie below 1/100."""
    low, high = torch.zeros(POINTS - 1, dtype=torch.long), torch.full((POINTS - 1,), 1000)
    low[0], low[1:] = 5, 5
    below = sum(math.comb(1000, k) * 0.01**k * 0.99 ** (1000 - k) for k in range(5))
    assert probability_inside(1000, low, high) == pytest.approx(1 - below, abs=1e-11)


@pytest.mark.parametrize("num_data", [20, 100, 1000])
@pytest.mark.parametrize("false_alarm", [0.05, 0.01])
def test_uniform_numbers_leave_the_band_as_often_as_it_says(num_data, false_alarm):
    """20,000 replicates; 4.5 binomial errors, 7e-6 each. At most the rate asked for, and hardly less from 20 numbers on."""
    low, high = band(num_data, false_alarm)
    exact = 1 - probability_inside(num_data, low, high)
    assert 0.97 * false_alarm < exact <= false_alarm
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(20_000, num_data, generator=generator, dtype=torch.float64).sort(1).values
    counts = torch.searchsorted(numbers, GRID.expand(20_000, -1).contiguous())
    share = float(((counts < low) | (counts > high)).any(1).double().mean())
    error = math.sqrt(exact * (1 - exact) / 20_000)
    assert error < 0.002 and abs(share - exact) < 4.5 * error


def test_the_band_is_symmetric_and_narrows_with_more_data():
    widths = []
    for num_data in (10, 1000, 100_000):
        low, high = band(num_data, 0.01)
        assert torch.equal(low, num_data - high.flip(0)) and bool((low <= high).all())
        widths.append(float((high - low).max()) / num_data)
    assert widths[0] > widths[1] > widths[2] and widths[2] < 0.012
    assert not is_outside(torch.tensor([0.999]), 0.01)  # one number says nothing
    assert is_outside(torch.full((50,), 0.5), 0.01)
