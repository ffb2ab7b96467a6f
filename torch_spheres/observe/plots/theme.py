"""What all pictures share: colours, matplotlib's settings, axes, title and legend."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "LABELS", "describe", "picture", "points"]

# Okabe and Ito's colours, which colour-blind people can tell apart, and on which black text is
# legible. The greys are translucent, to suit light and dark backgrounds.
COLOURS = {
    "processing": "#009e73",
    "accumulating": "#e69f00",
    "waiting": "#cc79a7",
    "ready": "#56b4e9",
    "forward": "#3a8fd0",
    "backward": "#a6d8f5",
    "sum": "#e69f00",
    "load": "#f0e442",
    "steal": "#d55e00",
    "late": "#e69f00",
    "idle": "#80808080",
    "terminating": "#808080",
    "unused": "#80808030",
}
LABELS = {
    "processing": "running items",
    "accumulating": "summing gradients",
    "waiting": "at a barrier",
    "ready": "between jobs",
    "idle": "idle",
    "terminating": "not running",
    "unused": "never busy",
    "forward": "forward",
    "backward": "backward",
    "sum": "summing gradients",
    "load": "loading a batch",
    "steal": "stolen from another sphere",
}


@contextmanager
def picture(what: str, ax: object, theme: str, size: tuple[float, float]) -> Iterator[Axes]:
    """Context with a theme's settings, which gives the axes to draw on.

    If `ax` is None these are axes of a new figure of `size` inches. pyplot makes the figure if
    pyplot is in use, so that ``plt.show()`` and notebooks show it; otherwise no one has to close
    it. `what` is the caller's name, for errors, which are those of `plot_timeline`.
    """
    if theme not in ("light", "dark"):
        raise ValueError(f"theme must be one of 'light', 'dark', got {theme!r}")
    try:
        from matplotlib import rc_context, rcParamsDefault
        from matplotlib.axes import Axes
        from matplotlib.style import library
    except ImportError as error:
        raise ImportError(
            f"{what} draws with matplotlib, which cannot be imported ({error}): "
            'pip install ".[plots]" in a checkout of torch_spheres'
        ) from error
    if ax is not None and not (isinstance(ax, Axes) and ax.name == "rectilinear"):
        raise TypeError(
            f"{what}: ax must be None or matplotlib Axes with plain x and y, as "
            f"figure.add_subplot() makes, got {type(ax).__name__}"
        )
    sheet = library["dark_background"]
    settings = dict(sheet) if theme == "dark" else {key: rcParamsDefault[key] for key in sheet}
    settings["image.cmap"] = "YlGnBu_r" if theme == "dark" else "YlGnBu"
    settings["axes.grid"] = False
    with rc_context(settings):
        on: Any = _new_axes(size) if ax is None else ax
        # rc settings do not reach axes that exist, nor ticks that are made after this context.
        on.figure.set_facecolor(settings["figure.facecolor"])
        on.set_facecolor(settings["axes.facecolor"])
        on.tick_params(colors=settings["xtick.color"], labelsize="small")
        on.tick_params(axis="y", length=0)
        on.spines[["top", "right", "left"]].set_visible(False)
        on.spines["bottom"].set_color(settings["axes.edgecolor"])
        for label in (on.xaxis.label, on.yaxis.label, on.title):
            label.set(color=settings["text.color"], fontsize="medium")
        yield on


def _new_axes(size: tuple[float, float]) -> Axes:
    if "matplotlib.pyplot" in sys.modules or "ipykernel" in sys.modules:
        from matplotlib import pyplot

        return pyplot.figure(figsize=size, layout="constrained").add_subplot()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").add_subplot()


def points(ax: Axes) -> tuple[float, float]:
    """Width and height of axes in 1/72 inch; approximate before the layout is computed."""
    box, dpi = ax.get_window_extent(), ax.figure.dpi
    return box.width * 72 / dpi, box.height * 72 / dpi


def describe(ax: Axes, lines: Sequence[str], handles: Sequence[Any], below: float) -> None:
    """Sets the title's lines above the axes, and a legend `below` font sizes below them."""
    ax.set_title("\n".join(lines), fontsize="medium", linespacing=1.4)
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        columns = int(points(ax)[0] / (5.0 * longest + 25))
        ax.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=below,
            ncols=max(1, min(columns, len(handles))), frameon=False, fontsize="small",
        )  # fmt: skip
