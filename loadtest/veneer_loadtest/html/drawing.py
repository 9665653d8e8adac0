"""What all plots share: colours, axes, and SVG that can stand beside other SVG."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, Final

__all__ = [
    "BAD",
    "COLOURS",
    "DASHES",
    "GREY",
    "INK",
    "LABEL",
    "MARKERS",
    "PAPER",
    "THEMED",
    "TIERS",
    "TIER_COLOURS",
    "TIER_DASHES",
    "Plot",
    "canvas",
    "from_zero",
    "log_axis",
    "named_legend",
    "seconds_axis",
    "svg_of",
    "tiers_in_order",
    "whole_numbers",
]

COLOURS: Final = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#7F5F2A",
)
"""Okabe and Ito's, which colour-blind readers can tell apart, and a brown."""
DASHES: Final[tuple[Any, ...]] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.2)),
    (0, (6, 2, 1, 2)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 3)),
    (0, (8, 2, 2, 2, 2, 2)),
)
MARKERS: Final = ("o", "s", "^", "D", "v", "<", ">", "p")
GREY: Final = "#6b7280"
BAD: Final = "#b42318"

INK: Final = "#111827"
LABEL: Final = "#374151"
PAPER: Final = "#ffffff"

THEMED: Final = {
    **{colour.lower(): f"series-{number}" for number, colour in enumerate(COLOURS)},
    INK: "ink",
    LABEL: "label",
    GREY: "grey",
    BAD: "bad",
    PAPER: "paper",
    "#9ca3af": "axis",
    "#e5e7eb": "grid",
}
"""Colours that the page's style sheet may replace; by the names of its variables."""

TIERS: Final = ("device", "host", "disk")
TIER_COLOURS: Final = {"device": "#0072B2", "host": "#E69F00", "disk": "#D55E00"}
TIER_DASHES: Final[dict[str, Any]] = {"device": "-", "host": (0, (5, 2)), "disk": (0, (1, 1.2))}

_RC: Final = {
    "svg.fonttype": "none",
    "text.color": INK,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelsize": 8.5,
    "axes.labelcolor": LABEL,
    "axes.edgecolor": "#9ca3af",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "xtick.color": "#9ca3af",
    "ytick.color": "#9ca3af",
    "xtick.labelcolor": LABEL,
    "ytick.labelcolor": LABEL,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    # A label may hold a dollar sign.
    "text.parse_math": False,
}
_WIDTH: Final = 10.4
"""Inches; of 96 CSS pixels, as wide as the page."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot on the page; without ``svg`` it was left out, and ``caption`` says why.

    A caption may have lines.
    """

    title: str
    caption: str
    svg: str = ""


@contextmanager
def canvas(
    rows: int, columns: int, height: float, **kwargs: Any
) -> Iterator[tuple[Any, list[list[Any]]]]:
    """A figure and its axes, in our style whatever the user's own configuration says."""
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context():
        # Such as: a label's letter that is not in the font that widths are measured with.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
        yield figure, [list(row) for row in axes]


def svg_of(figure: Any, key: str, title: str) -> str:
    """The figure as an ``<svg>`` whose ids begin with ``key``. Call it inside `canvas`."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = key
    out = io.StringIO()
    figure.patch.set_alpha(0)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r'(<[^<>]*?\s)id="([^"]*)"', rf'\1id="{key}-\2"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r"<[^<>]*>", _themed, text)
    found = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text)
    assert found is not None
    width = float(found[1]) * 96 / 72
    head = (
        f'<svg class="plot" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{width:.0f}px" {found[0]} '
        'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">'
    )
    return head + text[text.index(">") + 1 :].strip()


def _themed(tag: re.Match[str]) -> str:
    """A tag whose colours are the page's, for a dark one; labels are between tags."""

    def variable(found: re.Match[str]) -> str:
        name = THEMED.get(found[0].lower())
        return found[0] if name is None else f"var(--{name},{found[0]})"

    return re.sub(
        r'(?<=\sstyle=")[^"]*',
        lambda style: re.sub(r"#[0-9a-fA-F]{6}\b", variable, style[0]),
        tag[0],
    )


def named_legend(figure: Any, names: Sequence[str]) -> None:
    """Which colour is which result; none for one."""
    from matplotlib.lines import Line2D

    if len(names) < 2:
        return
    handles = [
        Line2D([], [], color=COLOURS[n], marker=MARKERS[n], label=name)
        for n, name in enumerate(names[: len(COLOURS)])
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)))


def log_axis(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis from ``low`` to ``high`` with a few round numbers on it."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = low / 1.12, high * 1.12
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    axis.set_major_locator(FixedLocator(_round_numbers(low, high)))
    _plain(axis)
    axis.set_minor_locator(NullLocator())


def from_zero(axis: Any, unit: str, room: float = 1.06) -> None:
    """A linear upright axis from 0 to above all that was drawn on it and on those that
    share it. Call it last: limits that are set stay."""
    axis.set_ylabel(unit)
    highest = max(other.dataLim.y1 for other in axis.get_shared_y_axes().get_siblings(axis))
    axis.set_ylim(0, highest * room if highest > 0 and math.isfinite(highest) else 1.0)
    _plain(axis.yaxis)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def whole_numbers(axis: Any) -> None:
    """Upright: nothing between 1 and 2."""
    from matplotlib.ticker import MaxNLocator

    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def seconds_axis(axis: Any, begin: float, end: float) -> None:
    """Time, with whole seconds on it; none at the end, where the next plot's 0 stands."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(begin, max(end, begin + 0.1))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=end > 4, prune="upper"))
    axis.set_xlabel("seconds since the load began")


def _round_numbers(low: float, high: float) -> list[float]:
    """Three to seven between these, if there can be."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        wider = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(wider) > 7 and found:
            return found
        found = wider[:: math.ceil(len(wider) / 7)] if len(wider) > 7 else wider
    if len(found) >= 3:
        return found
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (step * k) <= 5)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def tiers_in_order(names: Sequence[str]) -> list[str]:
    """From the fastest on; others, such as ``none``, at the end."""
    known = [tier for tier in TIERS if tier in names]
    return known + sorted(name for name in names if name not in TIERS)
