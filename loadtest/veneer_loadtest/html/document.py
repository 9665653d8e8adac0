"""Render pages from the templates beside this module: one HTML file, no network, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from veneer_loadtest.html.cautions import Banner


def document(
    template: str, title: str, lede: Sequence[str], banners: Sequence[Banner], **parts: Any
) -> str:
    """Render the whole file. All text is escaped, except plots, which are already SVG.

    Args:
        template: ``load``, ``swap`` or ``compare``.
        lede: opening lines of the page.
        parts: the template's other variables.
    """
    page = _templates().get_template(f"{template}.html.j2")
    return page.render(title=title, lede=lede, banners=banners, **parts)


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a missing part is a bug of ours
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
