"""Signal-to-noise of the gradients of the importance-weighted bound: closed forms at K = 1 and for large K, and slopes.

Runs the program of `tutorials/experiments/signal_to_noise.py` with 4 dimensions and fewer replicates. The guide's mean is
off by e, its variance is q = 2/3, that of the posterior p = 1/2. Mean squares over the elements of b are compared, so that
errors are those of one number: a difference of 4.5 of them has a false-alarm rate of 1 in 150,000.
"""

import importlib.util
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tutorials" / "experiments" / "signal_to_noise.py"
spec = importlib.util.spec_from_file_location("signal_to_noise", SCRIPT)
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

Q, P, DIM = toys.VARIANCE, 1 / 2, 4
TOY = toys.Toy(dim=DIM, offset=0.1)
ERROR = TOY.error.square()
LIMIT = 4.5

# E_q[(p/q)^2], and the mean gradient of the bound K times over, by the distance from the posterior: both from its bias,
# -chi2/(2K) + O(1/K^2).
SECOND_MOMENT = (Q / math.sqrt(P * (2 * Q - P))) ** DIM * math.exp(float(ERROR.sum()) / (2 * Q - P))
PULL = SECOND_MOMENT / (2 * Q - P)


def root_mean_square(ratios):
    return float(ratios.square().mean().sqrt())


def assert_near(measured, expected, largest_error, allowance=0.0):
    assert measured.std_error < largest_error * expected
    assert abs(measured.value - expected) < LIMIT * measured.std_error + allowance * expected, (measured, expected)


def snr(gradient, num_particles, num_replicates, part=0):
    return toys.signal_to_noise(TOY.gradients(gradient, num_particles, num_replicates)[part])


@pytest.mark.parametrize(
    ("gradient", "part", "expected"),
    [
        ("standard", 0, 2 * TOY.error / (2 * Q**0.5)),  # -2 (z - m_p)
        ("dreg", 0, 2 * TOY.error / (0.5 * Q**0.5)),  # -2 (z - m_p) + (z - m_q) / q
        ("stl", 0, 2 * TOY.error / (0.5 * Q**0.5)),
        ("standard", 1, (TOY.weight @ TOY.x + TOY.b - TOY.m) / Q**0.5),  # z - m
    ],
)
def test_one_particle(gradient, part, expected):
    assert_near(snr(gradient, 1, 20_000, part), root_mean_square(expected), 0.03)


def test_standard_with_many_particles():
    """Mean PULL e / K; variance 4 / K of z - m_p under p^2/q, which has variance 2/5 and mean 3 e/5 there."""
    variance = 4 * SECOND_MOMENT * (0.4 + 0.36 * ERROR) / 64
    assert_near(snr("standard", 64, 60_000), root_mean_square(PULL / 64 * TOY.error / variance.sqrt()), 0.1, allowance=0.02)


def test_the_signal_drowns_with_standard_and_stands_out_with_dreg():
    particles = (4, 16, 64)
    standard = toys.slope({k: snr("standard", k, 60_000) for k in particles})
    dreg = toys.slope({k: snr("dreg", k, 5_000) for k in particles})
    model = toys.slope({k: snr("standard", k, 5_000, part=1) for k in particles})
    assert standard.std_error < 0.02
    assert abs(standard.value + 0.5) < LIMIT * standard.std_error
    assert dreg.std_error < 0.01
    assert dreg.value > LIMIT * dreg.std_error
    assert_near(model, 0.5, 0.03, allowance=0.05)


@pytest.mark.parametrize(("gradient", "num_replicates"), [("standard", 60_000), ("dreg", 5_000)])
def test_the_mean_is_the_gradient_of_the_bound(gradient, num_replicates):
    mean = toys.relative_mean(TOY.gradients(gradient, 64, num_replicates)[0], TOY.error)
    assert_near(mean, PULL / 64, 0.1, allowance=0.02)


def test_the_mean_of_stl_is_not():
    """Its limit is the mean of the path gradient over the posterior, (m_p - m_q) / q: 1.5 where the bound's goes to zero."""
    mean = toys.relative_mean(TOY.gradients("stl", 64, 5_000)[0], TOY.error)
    assert_near(mean, 1 / Q, 0.01, allowance=0.03)
