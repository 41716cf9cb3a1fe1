"""The look that all pictures share: colours, legends that cover no data, labels that have room."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .axes import literal

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

# The colours of Okabe and Ito, which colour-blind readers tell apart: https://jfly.uni-koeln.de/color/
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE = "#D55E00", "#CC79A7"

# Parts of a gap; a hatch tells them apart in grey.
ENCODER: dict[str, Any] = {"facecolor": ORANGE, "edgecolor": "black", "hatch": "//"}
FAMILY: dict[str, Any] = {"facecolor": SKY, "edgecolor": "black", "hatch": ".."}
BOTH: dict[str, Any] = {"facecolor": "white", "edgecolor": "black"}

LETTER = 0.58  # the width of a letter, of the size of its font
SMALL = 0.833  # the size of a "small" font
SHRINK = 0.8  # a layout leaves the axes about so much of their height once all labels have theirs
LEGEND: dict[str, Any] = {"fontsize": "small", "framealpha": 0.9, "edgecolor": "none", "columnspacing": 1.0}


def legend_over(ax: Axes, *, fit: bool = True, lines: int = 0) -> Legend:
    """A legend along the top, for which the vertical axis is made longer, so that it covers no data.

    :param fit: begin with limits that hold all data; otherwise with those that the axes have.
    :param lines: of text that stand above the highest data.
    """
    limits_given = ax.get_legend() is None and not ax.get_autoscaley_on()
    low, high = take_legend_off(ax, lines=lines)
    handles = unique_entries(ax)
    for ncols in range(min(len(handles), 3), 0, -1):
        legend = ax.legend(handles.values(), handles.keys(), loc="upper center", ncols=ncols, **LEGEND)
        if legend.get_window_extent().width <= ax.bbox.width:
            break
    if fit and limits_given:
        return legend  # limits of the user stay
    if fit:
        ax.autoscale(axis="y")
        low, high = ax.get_ylim()
    ax.set_ylim(low, low + (high - low) / (1 - share_of(legend, ax, lines)))
    return legend


def count_in_wholes(ax: Axes) -> None:
    """Whole numbers at the vertical axis."""
    from matplotlib.ticker import MaxNLocator

    ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True))


def take_legend_off(ax: Axes, *, lines: int = 0) -> tuple[float, float]:
    """Remove the legend of an earlier run; returns the limits of the vertical axis without its room."""
    low, high = ax.get_ylim()
    if (legend := ax.get_legend()) is not None:
        high = low + (high - low) * (1 - share_of(legend, ax, lines))
        legend.remove()
    return low, high


def share_of(legend: Legend, ax: Axes, lines: int) -> float:
    """The part of the height of the axes that a legend takes and lines of text below it, at most three quarters."""
    share = 1.05 * legend.get_window_extent().height / (SHRINK * ax.bbox.height)
    return min(share + height_of(ax, lines), 0.75)


def height_of(ax: Axes, lines: float) -> float:
    """The part of the height of the axes that so many lines of text take."""
    return 1.25 * lines * font_size(ax) * ax.figure.dpi / 72 / (SHRINK * ax.bbox.height)


def font_size(ax: Axes) -> float:
    """The size of the labels, in points."""
    return float(ax.xaxis.label.get_fontsize())


def letters_of(ax: Axes, share: float = 1.0) -> int:
    """How many letters of the size of a tick label fit into a part of the width of the axes."""
    return int(share * width_of(ax) / (LETTER * font_size(ax)))


def width_of(ax: Axes) -> float:
    """The width of the axes, in points."""
    return float(ax.bbox.width * 72 / ax.figure.dpi)


def size_for(letters: float, lines: float) -> tuple[float, float]:
    """The size of a figure, in inches: the usual one, or larger, so that it has room for so much text beside and above."""
    from matplotlib import rcParams

    wide, high = rcParams["figure.figsize"]
    font = rcParams["font.size"] / 72
    return max(wide, LETTER * font * letters), max(high, 1.25 * font * lines)


def legend_beside(ax: Axes) -> Legend:
    """A legend to the right of the axes where a layout makes room for it there, else at their top."""
    if ax.figure.get_layout_engine() is None:
        return legend_over(ax)
    handles = unique_entries(ax)
    style: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "handlelength": 1.5, **LEGEND}
    return ax.legend(handles.values(), handles.keys(), **style)


def unique_entries(ax: Axes) -> dict[str, Any]:
    """Handles of a legend by label, one of each."""
    entries: dict[str, Any] = {}
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        entries.setdefault(label, handle)
    return entries


def clip_above(ax: Axes, artists: Iterable[Artist], top: float) -> None:
    """Draw nothing of these above a value, where the legend will be."""
    from matplotlib.patches import Rectangle

    left, right = ax.get_xlim()
    low = ax.get_ylim()[0]
    below = Rectangle((left, low), right - left, top - low, transform=ax.transData)
    for artist in artists:
        artist.set_clip_path(below)


def filled(name: str, width: int) -> str:
    """A name on lines of at most so many letters, shown letter by letter."""
    return literal("\n".join(textwrap.fill(line, width) for line in name.split("\n")))


def name_ticks(ax: Axes, names: Sequence[str], *, share: float = 1.0) -> None:
    """Names at x = 0, 1, 2, ...: on several lines where they are long, aslant where a word is longer than its place.

    Where even slanted names would overlap, only every second, third, ... place has its name.

    :param share: the part of the axes' width that the places fill together.
    """
    split = [name.replace("[", "\n[") for name in names]
    for broken, smaller in ((names, 1.0), (split, 1.0), (names, SMALL), (split, SMALL)):
        letters = int(letters_of(ax, share / max(len(names), 1)) / smaller) - 1
        if all(len(word) <= letters for name in broken for word in name.replace("-", "- ").split()):
            size = "medium" if smaller == 1 else "small"
            ax.set_xticks(range(len(names)), [filled(name, letters) for name in broken], fontsize=size)
            return
    lines = [filled(name, 20) for name in names]
    wide = 1.6 * font_size(ax) * max(line.count("\n") + 1 for line in lines)  # of a slanted name, in points
    step = math.ceil(wide * len(names) / (share * width_of(ax)))
    places = range(0, len(names), step)
    ax.set_xticks(places, [lines[place] for place in places], rotation=40, ha="right", rotation_mode="anchor")


def wrap_labels(ax: Axes) -> Axes:
    """Break the title and the label below the axes where they would leave the figure; returns `ax`."""
    ax.title.set_wrap(True)
    ax.title.set_fontsize("medium")
    ax.xaxis.label.set_wrap(True)
    return ax
