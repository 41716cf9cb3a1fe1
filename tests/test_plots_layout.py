"""Every plot, with long names, at its own size and at that of a paper's column: all that is drawn can be read."""

import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from plot_helpers import record

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, OptionError

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
