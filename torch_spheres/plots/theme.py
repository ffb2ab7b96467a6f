"""What all pictures share: matplotlib, colours, the axes to draw on, sizes of text."""

from __future__ import annotations

import importlib
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "THEMES",
    "Canvas",
    "Theme",
    "canvas",
    "duration",
    "find_theme",
    "header",
    "ink_on",
    "need_matplotlib",
    "plain_axes",
]


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a picture.

    The categorical ones are Okabe and Ito's, which the colour-blind can tell apart; on dark ground
    somewhat brighter.
    """

    background: str
    ink: str
    """Text."""
    faint: str
    """Text that matters less."""
    line: str
    """Grid lines and borders."""
    unused: str
    """Spheres that did nothing."""
    scale: tuple[str, ...]
    """For shares of the time: from close to the background to far from it, in even steps of
    lightness (OKLab's), so that equal differences look equal, to the colour-blind too."""
    states: dict[str, str]
    """In the order of the legend."""
    phases: dict[str, str]
    steal: str
    gradient: str
    waited: str
    late: str

    def colormap(self) -> Colormap:
        """Of `scale`; masked values are `unused`."""
        from matplotlib.colors import LinearSegmentedColormap

        made = LinearSegmentedColormap.from_list("spheres", list(self.scale))
        return made.with_extremes(bad=self.unused)


# Okabe and Ito: orange, sky blue, green, yellow, blue, vermilion, purple.
_ORANGE, _SKY, _GREEN, _YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
_BLUE, _VERMILION, _PURPLE = "#0072b2", "#d55e00", "#cc79a7"

THEMES = {
    "light": Theme(
        background="#ffffff", ink="#1f2328", faint="#656d76", line="#d5d9de", unused="#eceef1",
        scale=(
            "#d8e6f3", "#accee8", "#7fb5dd", "#539cd0", "#3e80bb", "#2b64a6", "#1b4a8d", "#123467",
            "#0a1f44",
        ),
        states={
            "processing": _GREEN, "accumulating": _ORANGE, "waiting": _PURPLE, "ready": _SKY,
            "idle": "#c3c8ce", "terminating": "#50575f",
        },
        phases={"forward": _BLUE, "backward": _SKY, "sum": _ORANGE, "load": "#6b3a16"},
        steal=_VERMILION, gradient="#1f2328", waited=_VERMILION, late=_ORANGE,
    ),
    "dark": Theme(
        background="#0d1117", ink="#e6edf3", faint="#9198a1", line="#343b44", unused="#232a33",
        scale=(
            "#22395c", "#284f78", "#2c6695", "#2f7eb4", "#4199bd", "#55b4c5", "#7dcdc6", "#bbe0bd",
            "#f4f1b0",
        ),
        states={
            "processing": "#00a87b", "accumulating": "#f5cf4f", "waiting": _PURPLE,
            "ready": "#a6d8f5", "idle": "#4b535d", "terminating": "#aab1ba",
        },
        phases={"forward": "#3a9bdc", "backward": "#a6d8f5", "sum": "#f5cf4f", "load": "#784878"},
        steal="#f5713a", gradient="#e6edf3", waited="#f5713a", late="#f5cf4f",
    ),
}  # fmt: skip


def find_theme(name: object) -> Theme:
    """By its name.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(name, str) and name in THEMES:
        return THEMES[name]
    raise ValueError(f"theme must be one of {', '.join(map(repr, THEMES))}, got {name!r}")


def need_matplotlib(what: str) -> None:
    """Says what to install, if it is not.

    Raises:
        ImportError: matplotlib cannot be imported.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            f"{what} draws with matplotlib, which cannot be imported ({error}): "
            'pip install "torch_spheres[plots]"'
        ) from error


@dataclass(frozen=True, slots=True)
class Canvas:
    """Axes to draw on, and how large they are."""

    ax: Axes
    width: float
    """In points, of 1/72 inch."""
    height: float

    def text_size(self, of_width: float, smallest: float, largest: float) -> float:
        """Points: a share of the width, within limits."""
        return min(largest, max(smallest, of_width * self.width))


def canvas(what: str, ax: object, theme: Theme, size: tuple[float, float]) -> Canvas:
    """The axes that were given, or those of a new figure of `size` inches; coloured either way.

    A new figure is pyplot's only where pyplot is in use already, so that ``plt.show()`` and
    notebooks show it; elsewhere it is a figure of its own, which nobody has to close.

    Raises:
        ImportError: there is no matplotlib.
        TypeError: `ax` is something else than matplotlib axes with plain x and y.
    """
    need_matplotlib(what)
    from matplotlib.axes import Axes

    if ax is None:
        figure = _new_figure(size)
        ax = figure.add_subplot()
    elif not isinstance(ax, Axes):
        kind = type(ax).__name__
        hint = "; take one of them" if kind == "ndarray" else ""
        hint = "; give it figure.add_subplot()" if kind in ("Figure", "SubFigure") else hint
        raise TypeError(f"{what}: ax must be None or matplotlib Axes, got {kind}{hint}")
    elif ax.name != "rectilinear":
        raise TypeError(
            f"{what}: ax must be axes with plain x and y, got {ax.name!r} ones; make them without "
            "projection="
        )
    ax.figure.set_facecolor(theme.background)
    ax.set_facecolor(theme.background)
    whole = ax.get_figure(root=True)
    assert whole is not None  # axes of a figure, or they could not have been asked for theirs
    engine = whole.get_layout_engine()
    if engine is not None:
        engine.execute(whole)  # now rather than when it is drawn: what fits depends on it
    dpi = whole.dpi
    box = ax.get_window_extent()
    return Canvas(ax, box.width * 72 / dpi, box.height * 72 / dpi)


def _new_figure(size: tuple[float, float]) -> Figure:
    options: dict[str, Any] = {"figsize": size, "layout": "constrained"}
    if "matplotlib.pyplot" in sys.modules or "ipykernel" in sys.modules:
        from matplotlib import pyplot

        return pyplot.figure(**options)
    from matplotlib.figure import Figure

    return Figure(**options)


def ink_on(colour: Any) -> str:
    """Black or white, whichever is easier to read on it."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def header(
    on: Canvas, theme: Theme, text: float, title: str, notes: Sequence[str], handles: Sequence[Any]
) -> None:
    """Above the axes: what it is, what is worth knowing, and what the colours say.

    Layout engines make room for it. `text` is the size of the text in points.
    """
    from matplotlib.transforms import ScaledTranslation

    ax, line = on.ax, 1.45 * text
    above = 5.0  # points
    if handles:
        widest = max(len(handle.get_label()) for handle in handles)
        columns = max(1, min(len(handles), int(on.width / (text * (0.56 * widest + 2.6)))))
        whole = ax.get_figure(root=True)
        assert whole is not None
        up = ScaledTranslation(0, above / 72, whole.dpi_scale_trans)
        ax.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1),
            bbox_transform=ax.transAxes + up, ncols=columns, frameon=False, fontsize=text,
            labelcolor=theme.ink, borderaxespad=0, borderpad=0, handlelength=1.2, handleheight=0.8,
            columnspacing=1.2, handletextpad=0.5, labelspacing=0.3,
        )  # fmt: skip
        above += line * math.ceil(len(handles) / columns) + 3
    letters = max(20, int(on.width / (0.53 * text)))
    wrapped = textwrap.wrap("; ".join(notes), letters)
    _above(ax, "\n".join(wrapped), above, "notes", fontsize=text, color=theme.faint)
    above += line * len(wrapped) + (2 if wrapped else 0)
    size = min(1.2 * text, on.width / (0.6 * len(title)))
    _above(ax, title, above, "title", fontsize=size, color=theme.ink, weight="bold")


def _above(ax: Axes, words: str, points: float, gid: str, **style: Any) -> None:
    if words:
        ax.annotate(
            words, (0, 1), xytext=(0, points), xycoords="axes fraction", ha="left", va="bottom",
            textcoords="offset points", gid=gid, annotation_clip=False, linespacing=1.3, **style,
        )  # fmt: skip


def plain_axes(ax: Axes, theme: Theme, text: float) -> None:
    """Axes with little around them."""
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.faint)
    ax.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=text, length=0)
    ax.tick_params(axis="x", length=3)
    ax.xaxis.label.set_color(theme.ink)
    ax.yaxis.label.set_color(theme.ink)
    ax.xaxis.label.set_fontsize(text)
    ax.yaxis.label.set_fontsize(text)
