"""Pictures carry the numbers of their records and draw where they are told."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from pair_helpers import make_gaps

import pyro_vae as pv
from pyro_vae.errors import OptionError
from pyro_vae.evidence import KCurve
from pyro_vae.plots import plot_gaps, plot_k_curve, plot_reconstructions, plot_samples, plot_training
from pyro_vae.training import TrainingHistory


def gaps_record(num_data=5):
    zeros = torch.zeros(num_data)
    evidence = pv.Evidence(
        log_evidence=zeros - 10.0,
        std_error=zeros + 0.1,
        elbo=zeros - 14.0,
        elbo_std_error=zeros + 0.2,
        ess=zeros + 300,
        pareto_k=zeros,
        smoothed=zeros - 10.0,
        bound="lower",
        num_particles=500,
        cost=1000,
    )
    names = ("elbo", "optimal_elbo", "log_evidence", "amortization", "approximation", "inference", "contrast")
    return pv.Gaps(
        elbo=zeros - 14.0,
        optimal_elbo=zeros - 11.0,
        log_evidence=zeros - 10.0,
        std_errors=dict.fromkeys(names, zeros + 0.1),
        converged=zeros == 0,
        evidence=evidence,
        family="the guide's own",
        num_particles=500,
        cost=2000,
    )


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_waterfall_steps_from_the_elbo_to_log_p():
    ax = plot_gaps(gaps_record())
    bars = [(bar.get_y(), bar.get_height()) for bar in ax.patches]
    assert bars == [pytest.approx(b) for b in ((-14.0, 3.0), (-11.0, 1.0), (-14.0, 4.0))]
    assert "nats" in ax.get_ylabel()
    low, high = ax.get_ylim()
    assert low < -14.0 and high > -10.0


def test_an_error_in_doubt_has_no_bar():
    """Heavy tails concern the bars that end at log p(x), and not the amortization gap."""
    for k, bars in ((0.1, 3), (0.9, 1)):
        ax = plot_gaps(make_gaps(1.0, 0.5, pareto_k=torch.full((50,), k, dtype=torch.float64)))
        assert len(ax.containers) - 3 == bars
        assert sum("in doubt" in text.get_text() for text in ax.texts) == 3 - bars


def test_hatches_differ_so_that_black_and_white_will_do():
    ax = plot_gaps(gaps_record())
    assert len({bar.get_hatch() for bar in ax.patches}) == 3


@pytest.mark.parametrize("shape", [(7, 64), (7, 8, 8), (7, 1, 8, 8)])
def test_images_of_every_layout_are_shown_in_order(shape):
    data = torch.arange(7.0).reshape(7, *[1] * (len(shape) - 1)).expand(shape)
    ax = plot_reconstructions(pv.Reconstruction(observed={"x": data}, means={"x": data + 10}), num_images=5)
    sheet = ax.images[0].get_array()
    assert sheet.shape == (17, 44)
    assert [sheet[0, 9 * i] for i in range(5)] == list(range(5))
    assert [sheet[16, 9 * i] for i in range(5)] == [10 + i for i in range(5)]


def test_samples_and_a_given_ax():
    _, ax = plt.subplots()
    means = torch.rand(9, 16)
    assert plot_samples(pv.Simulation(observed={}, latents={}, means={"x": means}), ax=ax) is ax
    assert ax.images[0].get_array().shape == (9, 24)
    assert plot_gaps(gaps_record(), ax=plt.subplots()[1]).figure is not ax.figure


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"\(7, 63\)"):
        plot_samples(pv.Simulation(observed={}, latents={}, means={"x": torch.rand(7, 63)}))


def test_a_likelihood_without_a_mean_is_refused():
    with pytest.raises(ValueError, match="mean"):
        plot_samples(pv.Simulation(observed={}, latents={}, means={}))


# Training curves


def history_record(num_steps=200, sites=("z",), beta=None, **changes):
    """Distortion 100 to 80, rate 0 to 20 shared by the sites, ELBO -100 throughout."""
    step = torch.arange(num_steps)
    rate = torch.linspace(0, 20, num_steps, dtype=torch.float64)
    numbers = {
        "step": step,
        "loss": 100 - 0.5 * rate,
        "elbo": torch.full_like(rate, -100),
        "distortion": 100 - rate,
        "rate": rate,
        "kl": {site: rate / len(sites) for site in sites},
        "beta": torch.full_like(rate, 0.5) if beta is None else beta,
        "per_datum": True,
    }
    return TrainingHistory(**{**numbers, **changes})


def named_curves(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def panel_of(ax):
    (panel,) = [other for other in ax.figure.axes if other is not ax and other.get_shared_x_axes().joined(ax, other)]
    return panel


@pytest.mark.parametrize("window", [1, 4, 25])
def test_training_curves_carry_the_numbers(window):
    """The curves are straight, so a running mean of any width stays on them, but for half a window at the ends."""
    history = history_record()
    curves = named_curves(plot_training(history, window=window))
    expected = {"$-$ELBO": -history.elbo, "distortion": history.distortion, "rate": history.rate}
    assert set(curves) == set(expected)
    slope = 20 / 199
    for name, values in expected.items():
        x, y = (np.asarray(side) for side in curves[name].get_data())
        offsets = np.abs(y - values.numpy()[x])
        inner = (x >= window) & (x < 200 - window)
        assert inner.sum() > 5 and x[0] == 0 and x[-1] > 195
        assert offsets[inner].max() <= slope / 2 + 1e-9  # an even window has no middle
        assert offsets.max() <= slope * window / 4 + slope / 2


def test_running_mean_by_hand():
    """Window 3 of 0, 9, 0, nan, 6: (0+9)/2, 9/3, (9+0)/2, (0+6)/2, 6/1."""
    values = torch.tensor([0.0, 9.0, 0.0, math.nan, 6.0], dtype=torch.float64)
    history = history_record(5, distortion=values)
    line = named_curves(plot_training(history, window=3))["distortion"]
    assert np.asarray(line.get_ydata()).tolist() == [4.5, 3.0, 4.5, 3.0, 6.0]


def test_the_values_themselves_stand_faint_behind():
    history = history_record(rate=torch.rand(200, dtype=torch.float64))
    faint = [line for line in plot_training(history).lines if line.get_color() == "0.8"]
    assert any(np.array_equal(line.get_ydata(), history.rate.numpy()) for line in faint)
    assert not [line for line in plot_training(history, window=1).lines if line.get_color() == "0.8"]


def test_lines_differ_in_colour_and_in_style_so_that_black_and_white_will_do():
    ax = plot_training(history_record(sites=("z", "w", "y")))
    curves = named_curves(ax)
    assert list(curves) == ["$-$ELBO", "distortion", "rate", "rate of z", "rate of w", "rate of y"]
    assert len({line.get_color() for line in list(curves.values())[:4]}) == 4
    assert len({str(line._unscaled_dash_pattern) for line in curves.values()}) == 6
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(curves)


@pytest.mark.parametrize(("per_datum", "unit"), [(True, "nats per datum"), (False, "nats, totals")])
def test_training_axes_have_units(per_datum, unit):
    ax = plot_training(history_record(per_datum=per_datum))
    assert ax.get_ylabel() == unit
    assert panel_of(ax).get_xlabel() == "step" and panel_of(ax).get_ylabel() == "beta"


def test_beta_has_a_panel_of_its_own():
    beta = torch.linspace(0, 4, 200)
    panel = panel_of(plot_training(history_record(beta=beta)))
    assert np.array_equal(panel.lines[0].get_ydata(), beta.numpy())
    assert panel.get_ylim()[0] == 0 and 4 < panel.get_ylim()[1] < 5
    panel = panel_of(plot_training(history_record(sites=("z", "w"), beta={"z": beta, "w": 1 - beta / 4})))
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["of z", "of w"]
    assert len({line.get_linestyle() for line in panel.lines}) == 2


@pytest.mark.parametrize("beta", [torch.zeros(200), torch.full((200,), math.nan), {}])
def test_a_panel_for_any_beta(beta):
    assert panel_of(plot_training(history_record(beta=beta))).get_ylim()[0] == 0


def test_the_first_steps_do_not_flatten_the_rest():
    distortion = history_record().distortion
    distortion[:5] = 1e6
    low, high = plot_training(history_record(distortion=distortion)).get_ylim()
    assert low < 0 and 100 < high < 140


def test_steps_that_are_not_finite_are_marked():
    elbo = history_record().elbo
    elbo[[3, 70]] = torch.tensor([math.nan, -math.inf], dtype=elbo.dtype)
    ax = plot_training(history_record(elbo=elbo))
    marks = named_curves(ax)["not finite"]
    assert np.asarray(marks.get_xdata()).tolist() == [3, 70]
    assert np.isfinite(np.asarray(named_curves(ax)["$-$ELBO"].get_ydata())).all()
    assert "not finite" not in named_curves(plot_training(history_record()))


def test_a_history_without_a_finite_value_is_drawn():
    nothing = torch.full((10,), math.nan, dtype=torch.float64)
    plot_training(history_record(10, elbo=nothing, distortion=nothing, rate=nothing)).figure.canvas.draw()


@pytest.mark.parametrize("num_steps", [1, 2, 49, 51, 3000])
def test_short_and_long_histories_are_drawn(num_steps):
    ax = plot_training(history_record(num_steps))
    ax.figure.canvas.draw()
    assert len(named_curves(ax)["rate"].get_xdata()) >= min(num_steps, 500)


def test_training_curves_stay_in_the_place_of_their_ax():
    """In a grid with and without a layout engine, and on an ax outside any grid."""
    for layout in (None, "constrained", "tight"):
        figure, axes = plt.subplots(2, 2, layout=layout)
        before = axes[0, 0].get_subplotspec().get_position(figure)
        assert plot_training(history_record(), ax=axes[0, 0]) is axes[0, 0]
        figure.canvas.draw()
        boxes = [axes[0, 0].get_position(), panel_of(axes[0, 0]).get_position()]
        if layout is None:
            assert min(b.y0 for b in boxes) == pytest.approx(before.y0)
            assert max(b.y1 for b in boxes) == pytest.approx(before.y1)
        assert boxes[0].y0 > boxes[1].y1 > boxes[1].y0 > axes[1, 0].get_position().y1
    figure = plt.figure()
    ax = figure.add_axes((0.1, 0.2, 0.5, 0.6))
    plot_training(history_record(), ax=ax)
    assert ax.get_position().bounds == pytest.approx((0.1, 0.32, 0.5, 0.48))
    assert panel_of(ax).get_position().bounds == pytest.approx((0.1, 0.2, 0.5, 0.096))


def test_an_empty_history_and_a_window_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no step to draw"):
        plot_training(history_record(0))
    with pytest.raises(OptionError, match="at least 1, got 0"):
        plot_training(history_record(), window=0)


# K-curves


def numbers_below(ax):
    """The numbers at the horizontal axis that are drawn."""
    low, high = ax.get_xlim()
    return [text.get_text() for text in ax.get_xticklabels() if low <= text.get_position()[0] <= high]


def curve_record(values=(-3.0, -2.0, -1.5, -1.25), errors=(0.02, 0.04, 0.06, 0.08), num_data=4):
    sizes = tuple(2**j for j in range(len(values)))
    values, errors = (torch.tensor(side, dtype=torch.float64) for side in (values, errors))
    return KCurve(sizes, values.unsqueeze(1).expand(-1, num_data), errors.unsqueeze(1).expand(-1, num_data))


def test_k_curve_carries_the_means_and_two_errors():
    """The mean over four data halves their errors, so that bars of two errors end where a datum's own would."""
    ax = plot_k_curve(curve_record())
    (container,) = ax.containers
    line, _, (bars,) = container
    assert np.asarray(line.get_xdata()).tolist() == [1, 2, 4, 8]
    assert np.asarray(line.get_ydata()).tolist() == [-3.0, -2.0, -1.5, -1.25]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx(pair) for pair in ((-3.02, -2.98), (-2.04, -1.96), (-1.56, -1.44), (-1.33, -1.17))]
    assert ax.get_xscale() == "log" and numbers_below(ax) == ["1", "2", "5"]
    assert "nats per datum" in ax.get_ylabel() and "4 data" in ax.get_title()


def test_k_curve_states_the_last_difference_to_two_digits_of_its_error():
    """0.08^2 / sqrt 2 per datum, half of it in the mean over four."""
    (note,) = plot_k_curve(curve_record()).texts
    assert note.get_text() == "K from 4 to 8:\n+0.2500 \u00b1 0.0023 nats"
    (note,) = plot_k_curve(curve_record(errors=(0.0,) * 4)).texts
    assert "+0.250000 \u00b1 0.000000 nats" in note.get_text()


def test_k_curve_leaves_out_what_is_not_finite():
    _, given = plt.subplots()
    curve = curve_record((-math.inf, -math.inf, -2.0, -1.0), (math.nan, math.nan, 0.1, 0.1))
    ax = plot_k_curve(curve, ax=given)
    assert ax is given
    assert np.asarray(ax.containers[0][0].get_xdata()).tolist() == [4, 8]
    with pytest.raises(ValueError, match="no finite value"):
        plot_k_curve(curve_record((-math.inf, -math.inf), (math.nan, math.nan)))


@pytest.mark.parametrize("num_particles", [1, 2, 100, 5000, 100_000])
def test_k_curves_of_any_length_are_drawn(num_particles):
    ax = plot_k_curve(KCurve.from_log_weights(torch.randn(num_particles, 3)))
    ax.figure.canvas.draw()
    labels = numbers_below(ax)
    powers = [str(10**n) for n in range(6) if 10**n <= num_particles]
    assert [label for label in labels if label in powers] == powers
    assert 1 <= len(labels) <= 8
    assert len(ax.texts) == (num_particles > 1)


def test_units_are_drawn_largest_first_and_inactive_ones_hollow():
    torch.manual_seed(0)
    vae = pv.mlp_vae(6, latent_dim=3, likelihood=pv.nn.Bernoulli(), hidden=(8,))
    units = pv.ActiveUnits(vae.model, vae.guide, seed=0, threshold=1e-3)(
        [torch.bernoulli(torch.rand(20, 6))], args=lambda x: (x,)
    )
    ax = pv.plots.plot_units(units)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx(units.kl[units.order].tolist())
    filled = [bar.get_facecolor()[0] < 0.9 for bar in ax.patches]
    assert filled == units.active[units.order].tolist()
    assert "nats" in ax.get_ylabel() and len(pv.plots.plot_units(units, num_units=2).patches) == 2


def linear_pair():
    return pv.mlp_vae(6, latent_dim=2, likelihood=pv.nn.Bernoulli(), hidden=(8,)), torch.bernoulli(torch.rand(30, 6))


def test_the_parts_of_a_kl_are_stacked_up_to_it():
    torch.manual_seed(0)
    vae, x = linear_pair()
    surgery = pv.ELBOSurgery(vae.model, vae.guide, seed=0)([x])
    ax = pv.plots.plot_surgery(surgery)
    *parts, whole = ax.patches
    assert parts[-1].get_y() + parts[-1].get_height() == pytest.approx(float(surgery.kl.value), abs=1e-5)
    assert whole.get_height() == pytest.approx(float(surgery.kl.value)) and whole.get_y() == 0
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(math.log(30))


def test_curves_of_rate_and_distortion_lie_on_one_plane():
    torch.manual_seed(0)
    vae, x = linear_pair()
    curve = pv.RateDistortion(vae.model, vae.guide, num_steps=20, num_chains=4, seed=0)([x], progress=False)
    ax = pv.plots.plot_rate_distortion(curve)
    rate, distortion = (sorted(values.tolist()) for values in (curve.rate, curve.distortion))
    line = ax.lines[0]
    assert line.get_xdata().tolist() == pytest.approx(rate)
    assert sorted(line.get_ydata().tolist()) == pytest.approx(distortion)
    guide = (float(curve.guide_rate.value), float(curve.guide_distortion.value))
    assert any(list(zip(other.get_xdata(), other.get_ydata(), strict=True)) == [pytest.approx(guide)] for other in ax.lines)
    assert "nats" in ax.get_xlabel() and "nats" in ax.get_ylabel()
