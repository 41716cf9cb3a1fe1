"""Every plot, with long names, at its own size and at that of a paper's column: all that is drawn can be read."""

import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from pair_helpers import make_evidence
from plot_helpers import record

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, OptionError
from pyro_vae.latent import FactorInformation

SIZES = {"default": {}, "paper": {"figure.figsize": (3.3, 2.5), "font.size": 8}}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts_of(figure):
    """All texts that are drawn, but tick labels beyond the ends of their axis."""
    beyond = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not ax.axison or not low <= tick.get_loc() <= high:
                    beyond |= {tick.label1, tick.label2}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in beyond]


def faults_of(figure):
    """What leaves the figure, what overlaps, and what a legend covers."""
    figure.canvas.draw()
    boxes = {text: text.get_window_extent() for text in texts_of(figure)}
    found = []
    for text, box in boxes.items():
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            found.append(f"outside: {text.get_text()!r}")
    upright = [item for item in boxes.items() if item[0].get_rotation() % 90 == 0]
    for (one, a), (other, b) in itertools.combinations(upright, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > 1 and height > 0.25 * min(a.height, b.height):
            found.append(f"overlap: {one.get_text()!r} and {other.get_text()!r}")
    for ax in figure.axes:
        if ax.get_legend() is not None and covered(ax, ax.get_legend().get_window_extent()):
            found.append("the legend covers data")
    return found


def covered(ax, legend):
    """Whether points of a curve or bars lie under a legend."""
    for line in ax.lines:
        points = line.get_xydata()
        if len(points) > 2 and line.get_transform() == ax.transData:  # two are a line across the axes
            x, y = ax.transData.transform(points[np.isfinite(points).all(1)]).T
            top = min(legend.y1, line.get_clip_box().y1)
            if ((x > legend.x0) & (x < legend.x1) & (y > legend.y0) & (y < top)).any():
                return True
    bars = [patch.get_window_extent() for patch in ax.patches if isinstance(patch, Rectangle)]
    return any(legend.overlaps(bar) and bar.y1 > legend.y0 + 1 for bar in bars)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", pv.plots.__all__)
def test_nothing_is_clipped_or_covered(name, size):
    with plt.rc_context(SIZES[size]):
        ax = getattr(pv.plots, name)(record(name))
        assert faults_of(ax.figure) == []


LONG = "angle of the stroke at its upper end"


def renamed(name):
    """The record with latents of a long name."""
    found = record(name)
    return replace(found, names=tuple(f"{LONG}[{d}]" for d in range(len(found.names))))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["plot_aggregated_posterior", "plot_factors", "plot_latents", "plot_manifold", "plot_traversals", "plot_units"]
)
def test_long_names_of_latents_have_room(name, size):
    with plt.rc_context(SIZES[size]):
        ax = getattr(pv.plots, name)(renamed(name))
        assert faults_of(ax.figure) == []


def many_factors():
    terms = torch.rand(1, 12, 12, 40, dtype=torch.float64)
    names = tuple(f"z[{d}]" for d in range(40))
    options = {"num_values": (2,) * 12, "names": names, "aggregate": "full", "dtype": torch.float32, "cost": 1.0}
    return FactorInformation.from_terms(terms, terms, frequencies=torch.full((12, 12), 0.5), **options)


def many_models():
    generator = torch.Generator().manual_seed(0)
    values = [-100 + 0.5 * i + 0.3 * torch.randn(60, generator=generator) for i in range(6)]
    return pv.compare({f"model number {i}": make_evidence(value) for i, value in enumerate(values)})


def many_units():
    found = record("plot_aggregated_posterior")
    wide = {name: getattr(found, name).repeat(1, 5) for name in ("draws", "means", "prior")}
    return replace(found, **wide, names=tuple(f"latent[{d}]" for d in range(30)), analytic=found.analytic.repeat(5))


MANY = {
    "plot_factors": (many_factors, {}),
    "plot_comparison": (many_models, {}),
    "plot_aggregated_posterior": (many_units, {"num_units": 30}),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MANY)
def test_much_at_once_can_be_read(name, size):
    make, options = MANY[name]
    with plt.rc_context(SIZES[size]):
        assert faults_of(getattr(pv.plots, name)(make(), **options).figure) == []


# Two runs on one pair of axes

OVERLAID = [
    "plot_gaps_per_datum",
    "plot_held_out",
    "plot_k_curve",
    "plot_likelihood_and_looks",
    "plot_nearest_neighbours",
    "plot_pareto_k",
    "plot_rate_distortion",
    "plot_training",
    "plot_units",
]


def colors_of(ax):
    """The colours of all that is drawn, as hex strings."""
    found = [line.get_color() for line in ax.lines]
    found += [patch.get_facecolor() for patch in ax.patches] + [patch.get_edgecolor() for patch in ax.patches]
    found += [color for drawn in ax.collections for color in (*drawn.get_edgecolor(), *drawn.get_facecolor())]
    return {to_hex(color) for color in found}


@pytest.mark.parametrize("name", OVERLAID)
def test_two_runs_share_an_axis(name):
    draw = getattr(pv.plots, name)
    ax = draw(record(name), color="C0", label="first $run")
    assert draw(record(name), ax, color="C3", label="_second") is ax
    entries = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sum("first \\$run" in entry for entry in entries) == sum("_second" in entry for entry in entries) > 0
    assert len(entries) == len(set(entries))
    assert {to_hex("C0"), to_hex("C3")} <= colors_of(ax)
    assert [fault for fault in faults_of(ax.figure) if "overlap" not in fault] == []


@pytest.mark.parametrize("name", OVERLAID)
def test_further_keywords_go_to_matplotlib(name):
    with pytest.raises(AttributeError, match="no_such_property"):
        getattr(pv.plots, name)(record(name), no_such_property=1)
    getattr(pv.plots, name)(record(name), alpha=0.5)


@pytest.mark.parametrize("name", OVERLAID)
def test_a_color_that_is_none_is_refused_by_name(name):
    with pytest.raises(OptionError, match="color must be one colour of matplotlib"):
        getattr(pv.plots, name)(record(name), color="no colour")
    assert not plt.get_fignums()


def test_the_legend_shows_the_colours_of_the_runs():
    for name in ("plot_units", "plot_nearest_neighbours", "plot_k_curve"):
        ax = getattr(pv.plots, name)(record(name), color="C1", label="run")
        (handle,) = [h for h, label in zip(*ax.get_legend_handles_labels(), strict=True) if "run" in label]
        drawn = handle[0] if isinstance(handle, tuple) else handle
        assert to_hex(drawn.get_color() if name == "plot_k_curve" else drawn.get_edgecolor()) == to_hex("C1")


def test_a_second_training_run_has_its_beta_in_the_same_panel():
    ax = pv.plots.plot_training(record("plot_training"), label="a")
    assert pv.plots.plot_training(record("plot_training"), ax, label="b", color="C1") is ax
    _, panel = ax.figure.axes
    assert len(panel.lines) == 2 and panel.get_ylabel() == "beta"


def test_the_room_of_a_legend_does_not_grow_with_every_run():
    for name in ("plot_held_out", "plot_training", "plot_rate_distortion"):
        ax, ends = None, []
        for _ in range(3):
            ax = getattr(pv.plots, name)(record(name), ax)
            ends.append(ax.get_ylim())
        assert ends[1] == pytest.approx(ends[0]) and ends[2] == pytest.approx(ends[0])


def test_limits_of_the_user_stay():
    _, ax = plt.subplots()
    ax.set_ylim(-1000, 0)
    assert pv.plots.plot_held_out(record("plot_held_out"), ax).get_ylim() == (-1000, 0)


def test_parts_differ_in_grey_too():
    """By hatch, by line style and marker, or by lightness."""
    for name in ("plot_gaps", "plot_gaps_side_by_side", "plot_gaps_per_datum"):
        patches = [patch for patch in getattr(pv.plots, name)(record(name)).patches if patch.get_fill()]
        assert len({patch.get_hatch() for patch in patches}) == len({patch.get_facecolor() for patch in patches}) > 1
    lines = [line for line in pv.plots.plot_calibration(record("plot_calibration")).lines if line.get_linewidth() == 1.5]
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == len({line.get_color() for line in lines}) > 3


# Images

IMAGES = ("plot_copies", "plot_manifold", "plot_reconstructions", "plot_samples", "plot_traversals")


@pytest.mark.parametrize("name", IMAGES)
def test_the_figure_has_the_shape_of_its_images(name):
    ax = getattr(pv.plots, name)(record(name))
    ax.figure.canvas.draw()
    place, figure = ax.get_tightbbox(), ax.figure.bbox
    assert place.width > 0.95 * figure.width and place.height > 0.7 * figure.height


@pytest.mark.parametrize("name", IMAGES)
def test_images_take_a_map_of_colours_and_a_scale(name):
    (image,) = getattr(pv.plots, name)(record(name), cmap="viridis", vmin=-1, vmax=20).images
    assert image.get_cmap().name == "viridis" and image.get_clim() == (-1, 20)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_colour_images_are_drawn_in_colour(low, high):
    """Red, green and blue in the order of the data; on a scale where they are not in [0, 1]."""
    images = torch.full((3, 3, 4, 5), low)
    for i in range(3):
        images[i, i] = high
    sheet = (
        pv.plots.plot_reconstructions(pv.Reconstruction(observed={"x": images}, means={"x": images})).images[0].get_array()
    )
    assert sheet.shape == (9, 17, 3)
    for i in range(3):
        assert sheet[2, 6 * i + 2].tolist() == [float(i == c) for c in range(3)]
    assert sheet[4].min() == 1  # white between the rows
    half = pv.plots.plot_samples(pv.Simulation(observed={}, latents={}, means={"x": images}), vmin=low, vmax=2 * high - low)
    assert half.images[0].get_array()[2, 2].tolist() == [0.5, 0, 0]


@pytest.mark.parametrize("name", pv.plots.__all__)
def test_a_wrong_record_is_refused_by_name(name):
    for wrong in (None, 3, record("plot_traversals" if name == "plot_manifold" else "plot_manifold")):
        with pytest.raises(ArgumentError, match="expected a "):
            getattr(pv.plots, name)(wrong)
    assert not plt.get_fignums()
