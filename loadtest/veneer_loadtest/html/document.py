"""What every page has: one HTML file that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from veneer_loadtest.html.cautions import Banner
from veneer_loadtest.html.drawing import Plot
from veneer_loadtest.html.style import STYLE

__all__ = ["banner_html", "document", "figure_html"]


def document(title: str, lede: Sequence[str], body: Sequence[str], footer: str) -> str:
    """The whole file. ``title``, ``lede`` (lines) and ``footer`` are text; ``body`` is HTML."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # Whatever a name may hold, nothing is loaded and no script runs.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="lede">{"<br>".join(map(escape, lede))}</p>',
            *body,
            f"<footer>{escape(footer)}</footer>",
            "</body></html>\n",
        ]
    )


def banner_html(banner: Banner) -> str:
    """A caution above all figures."""
    return (
        f'<div class="banner {banner.kind}"><strong>{escape(banner.head)}</strong> '
        f"{escape(banner.text)}</div>"
    )


def figure_html(plot: Plot) -> str:
    """A plot with its caption, or why it was left out."""
    title = escape(plot.title)
    caption = "<br>\n".join(escape(line) for line in plot.caption.splitlines())
    if not plot.svg:
        return f'<h3>{title}</h3>\n<p class="note">Left out. {caption}</p>'
    return (
        f'<figure><h3>{title}</h3>\n<div class="scroll">{plot.svg}</div>\n'
        '<p class="swipe">The plot is wider than this screen: move it sideways.</p>\n'
        f"<figcaption>{caption}</figcaption></figure>"
    )
