"""Shared by all plots: colours, axes, and SVG that can share a page with other SVG."""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree  # nosec B405 # of matplotlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

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
"""Okabe and Ito's palette, which colour-blind readers can tell apart, and a brown."""
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
"""Colours that the page's style sheet may replace, by the names of its variables."""

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
    # A label may contain a dollar sign.
    "text.parse_math": False,
}
_SVG: Final = "{http://www.w3.org/2000/svg}"
_XLINK: Final = "{http://www.w3.org/1999/xlink}"
ElementTree.register_namespace("", _SVG[1:-1])
ElementTree.register_namespace("xlink", _XLINK[1:-1])
_NOT_XML: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that a label may contain but XML may not."""

_WIDTH: Final = 10.4
"""Inches of 96 CSS pixels: as wide as the page."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot on the page; without ``svg`` it was left out, and ``caption`` says why.

    A caption may have several lines.
    """

    title: str
    caption: str
    svg: str = ""


@contextmanager
def canvas(
    rows: int, columns: int, height: float, **kwargs: Any
) -> Iterator[tuple[Any, list[list[Any]]]]:
    """Yield a figure and its axes, in our style whatever the user's matplotlib settings."""
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context():
        # For example, the font that measures widths lacks a character of a label.
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
    svg = ElementTree.fromstring(_NOT_XML.sub("\ufffd", out.getvalue()))  # nosec B314 # of matplotlib
    for part in svg.findall(f".//{_SVG}defs/{_SVG}style/.."):
        part.clear()  # the same in all plots; the page has its own
    for part in svg.findall(f"{_SVG}metadata"):
        svg.remove(part)
    for part in svg.iter():
        for name, value in part.attrib.items():
            part.set(name, _own(name, value, key))
    width = float(svg.attrib["viewBox"].split()[2]) * 96 / 72
    for name in ("width", "height", "version"):
        svg.attrib.pop(name, None)
    told = {"class": "plot", "role": "img", "aria-label": title}
    svg.attrib.update(told, style=f"max-width:{width:.0f}px")
    return ElementTree.tostring(svg, "unicode")


def _own(name: str, value: str, key: str) -> str:
    """Return an attribute's value with ids unique to this plot, and with colours that a dark
    page can replace."""
    if name == "id":
        return f"{key}-{value}"
    if name == f"{_XLINK}href":
        return value.replace("#", f"#{key}-", 1)
    if name == "style":
        for colour, variable in THEMED.items():
            value = value.replace(colour, f"var(--{variable},{colour})")
    return value.replace("url(#", f"url(#{key}-")


def legend(figure: Any, handles: Sequence[Any], most: int = 4) -> None:
    """Draw a legend above the plots, in at most ``most`` columns."""
    columns = min(most, len(handles)) or 1
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def result_lines(names: Sequence[str], *, dashed: bool = True, **more: Any) -> list[Any]:
    """Return a legend entry for each result, with its colour, marker and dash."""
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=COLOURS[number],
            linestyle=DASHES[number] if dashed else "-",
            marker=MARKERS[number],
            label=name,
            **more,
        )
        for number, name in enumerate(names[: len(COLOURS)])
    ]


def named_legend(figure: Any, names: Sequence[str], *, dashed: bool = False) -> None:
    """Draw a legend of the results' colours, unless there is a single result."""
    if len(names) > 1:
        legend(figure, result_lines(names, dashed=dashed))


def log_axis(axis: Any, low: float, high: float) -> None:
    """Make the axis logarithmic, from ``low`` to ``high``, with a few round numbers on it."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = low / 1.12, high * 1.12
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    axis.set_major_locator(FixedLocator(_round_numbers(low, high)))
    _plain(axis)
    axis.set_minor_locator(NullLocator())


def from_zero(axis: Any, unit: str, room: float = 1.06) -> None:
    """Make the vertical axis linear, from 0 to above everything drawn on it and on the axes
    that share it. Call it last: it fixes the limits."""
    axis.set_ylabel(unit)
    highest = max(other.dataLim.y1 for other in axis.get_shared_y_axes().get_siblings(axis))
    axis.set_ylim(0, highest * room if highest > 0 and math.isfinite(highest) else 1.0)
    _plain(axis.yaxis)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def whole_numbers(axis: Any) -> None:
    """Show only whole numbers on the vertical axis."""
    from matplotlib.ticker import MaxNLocator

    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def seconds_axis(axis: Any, begin: float, end: float) -> None:
    """Label the time axis in whole seconds, except at its end, where the next plot's 0 is."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(begin, max(end, begin + 0.1))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=end > 4, prune="upper"))
    axis.set_xlabel("seconds since the load began")


def _round_numbers(low: float, high: float) -> list[float]:
    """Return three to seven round numbers in this range, if possible."""
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
    """Sort tiers, the fastest first; other names, such as ``none``, last."""
    known = [tier for tier in TIERS if tier in names]
    return known + sorted(name for name in names if name not in TIERS)
