"""The axes to draw on, and what a user passes to be drawn on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, OptionError, described

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """The given axes, or those of a new figure of `size` inches that makes room for all labels."""
    if ax is not None:
        from matplotlib.axes import Axes

        if not isinstance(ax, Axes):
            raise ArgumentError(f"ax must be axes of matplotlib, or None, got {described(ax)}: pass one of them, axes[0]")
        return ax
    import matplotlib.pyplot as plt  # here, so that importing the package starts no graphics

    return plt.subplots(figsize=size, layout="constrained")[1]


def check_record(record: Any, *kinds: type, made_by: str) -> None:
    """Refuse what is no record of one of these kinds; `made_by` says in words where it comes from."""
    if not isinstance(record, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(f"expected a record, {expected}, got {described(record)}: pass {made_by}")


def check_has(record: Any, *names: str, made_by: str) -> None:
    """The same for records whose classes are not known here, by what is drawn of them."""
    missing = [name for name in names if not hasattr(record, name)]
    if missing:
        raise ArgumentError(f"expected a record with {', '.join(names)}, got {described(record)}: pass {made_by}")


def color_of(color: Any) -> str | None:
    """A colour of the user as a string, which unlike an array of numbers is true or false."""
    from matplotlib.colors import is_color_like, to_hex

    if color is None:
        return None
    allowed = isinstance(color, (str, tuple, list)) and is_color_like(color)
    if not allowed:
        raise OptionError(
            f'color must be one colour of matplotlib, such as "C0" or "black", or None, got {described(color)}'
        )
    return str(to_hex(color, keep_alpha=True))


def check_cmap(cmap: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Colormap

    if not isinstance(cmap, Colormap) and not (isinstance(cmap, str) and cmap in colormaps):
        raise OptionError(f'cmap must be a colour map of matplotlib, such as "viridis", got {described(cmap)}')


def prefixed(label: object, text: str) -> str:
    """An entry of the legend, with the name of the run in front where there is one."""
    return text if label is None else literal(f"{label}: {text}")


def literal(name: object) -> str:
    """A name of the user as a label that shows it letter by letter.

    To matplotlib a dollar sign begins a formula, and a label that begins with an underscore is left out of the legend.
    """
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
