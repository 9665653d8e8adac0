"""A real browser draws the report page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from veneer_loadtest.html.page import write_page

from tests.browser_harness import Scheme, dump_dom, screenshot
from tests.unit.loadtest import results_kit as kit

pytestmark = pytest.mark.verify

LONG = "adapter_whose_name_has_no_end_" * 6
MEASURE = """
<script>
window.onload = () => {
  const plots = [...document.querySelectorAll("svg")].map((svg) => {
    const box = svg.getBoundingClientRect();
    const inside = svg.querySelector("g").getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
    return {
      width: box.width, height: box.height, drawn: inside.width * inside.height,
      texts: texts.length,
      cut: texts.filter((t) => t.left < box.left - 1 || t.right > box.right + 1 ||
                               t.top < box.top - 1 || t.bottom > box.bottom + 1).length,
    };
  });
  const wide = [...document.querySelectorAll("body *")].filter(
    (one) => !one.closest("svg") && !one.parentElement.closest(".scroll") &&
             one.getBoundingClientRect().right > innerWidth + 0.5);
  // A heading of one word that takes three lines has been broken into letters.
  const broken = [...document.querySelectorAll("th")].filter((one) => {
    const text = one.textContent.trim();
    return text.length < 12 && !/\\s/.test(text) && one.firstChild && (() => {
      const range = document.createRange();
      range.selectNodeContents(one);
      return range.getBoundingClientRect().height > 30;
    })();
  });
  const sizes = [...document.querySelectorAll("svg text")].map((text) => {
    const scale = text.ownerSVGElement.getBoundingClientRect().width /
      text.ownerSVGElement.viewBox.baseVal.width;
    return parseFloat(getComputedStyle(text).fontSize) * scale;
  });
  const bright = (one, name) => {
    const [r, g, b] = getComputedStyle(one)[name].match(/[0-9.]+/g).map(Number);
    return (r + g + b) / 765;
  };
  const told = document.createElement("pre");
  told.id = "measured";
  told.textContent = JSON.stringify({
    plots, inner: innerWidth, whole: document.documentElement.scrollWidth,
    wide: wide.map((one) => one.outerHTML.slice(0, 80)),
    attacked: window.attacked === true,
    broken: broken.map((one) => one.textContent), smallest: Math.min(...sizes),
    paper: bright(document.body, "backgroundColor"),
    ink: [...document.querySelectorAll("p, td, th, h1, h2, h3, figcaption, .banner")].map(
      (one) => bright(one, "color")),
    labels: [...document.querySelectorAll("svg text")].map((one) => bright(one, "fill")),
  });
  document.body.append(told);
};
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search and two levels of a run beside it, with every plot, and a hostile name."""
    attack = "<script>window.attacked = true</script>"
    levels = [
        kit.level(1),
        kit.level(
            8,
            by_adapter={attack: kit.split(5, 1.0, 2.0), LONG: kit.split(5, 1.0, 2.0)},
            errors={LONG: 4},
        ),
    ]
    run = kit.run(
        *levels, label="a run " + "of a long name " * 5, load=kit.load((attack, LONG))
    )
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_page(file, [run, kit.find_max((1, 1.0), (2, 0.5), label=attack)])
    return file


@pytest.mark.parametrize("width", [800, 1200])
@pytest.mark.parametrize("make", [kit.swap, kit.compare])
def test_pages_of_other_results_are_drawn(make: Any, width: int, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_page(file, [make(), make(label="another")])
    told = _measured(file, width, tmp_path)
    assert told["whole"] <= width
    assert told["wide"] == []
    assert len(told["plots"]) == (2 if make is kit.swap else 4)
    for plot in told["plots"]:
        assert plot["height"] > 100
        assert plot["texts"] > 10
        assert plot["cut"] == 0


def _measured(report: Path, width: int, work: Path, scheme: Scheme = "light") -> dict[str, Any]:
    """What the browser says of the page, asked by a script in a copy of it."""
    text = report.read_text("utf-8")
    # It forbids scripts, also this one; whether names are only text must hold without it.
    text, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert removed == 1
    copy = work / "measured.html"
    copy.write_text(text.replace("</body>", MEASURE + "</body>"), "utf-8")
    found = re.search(
        r'<pre id="measured">(.*?)</pre>', dump_dom(copy, width, work, scheme), re.S
    )
    assert found is not None
    told: dict[str, Any] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">"))
    return told


@pytest.mark.parametrize("width", [800, 1200])
def test_every_plot_is_drawn_and_nothing_is_wider_than_the_window(
    report: Path, width: int, tmp_path: Path
) -> None:
    told = _measured(report, width, tmp_path)
    assert told["inner"] == width
    assert told["whole"] <= width
    assert told["wide"] == []
    assert len(told["plots"]) == 6
    for plot in told["plots"]:
        assert plot["width"] > 0.8 * min(width, 1000)
        assert plot["height"] > 100
        assert plot["drawn"] > 0.5 * plot["width"] * plot["height"]
        assert plot["texts"] > 10
        assert plot["cut"] == 0
    assert not told["attacked"]


@pytest.mark.parametrize("make", [kit.run, kit.swap, kit.compare, kit.find_max])
def test_a_phone_can_read_it(make: Any, tmp_path: Path) -> None:
    """Plots as large as they are drawn and tables with whole words, in boxes that move
    sideways; the page itself does not."""
    file = tmp_path / "page.html"
    results = {
        kit.run: [kit.run(kit.level(1), kit.level(8), label="a")],
        kit.find_max: [kit.find_max((1, 1.0), (2, 0.5)), kit.run(kit.level(), label="b")],
    }
    write_page(file, results.get(make) or [make(label="one"), make(label="another")])
    told = _measured(file, 390, tmp_path)
    assert told["inner"] == 390
    assert told["whole"] <= 390
    assert told["wide"] == []
    assert told["broken"] == []
    assert told["smallest"] >= 9, "pixels"
    assert told["plots"]
    for plot in told["plots"]:
        assert plot["cut"] == 0


def test_a_long_name_on_a_phone(report: Path, tmp_path: Path) -> None:
    told = _measured(report, 390, tmp_path)
    assert told["whole"] <= 390
    assert told["wide"] == []


@pytest.mark.parametrize("make", [kit.run, kit.swap, kit.compare, kit.find_max])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(make: Any, scheme: Scheme, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    results = {
        kit.run: [kit.run(kit.level(1), kit.level(8), partial=True)],
        kit.find_max: [kit.find_max((1, 1.0), (2, 0.5))],
    }
    write_page(file, results.get(make) or [make()])
    told = _measured(file, 1280, tmp_path, scheme)
    dark = scheme == "dark"
    assert (told["paper"] < 0.2) is dark
    for brightness in [*told["ink"], *told["labels"]]:
        assert abs(brightness - told["paper"]) > 0.35


def test_lines_stand_out_on_a_dark_page(report: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.png"
    screenshot(report, file, (1280, 4000), tmp_path, "dark")
    pixels = (imread(file)[..., :3] * 255).round().astype(np.uint32)
    colours = set(
        np.unique((pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]).tolist()
    )
    assert {0x4BA3E3, 0xF2803A} <= colours
    assert not {0x0072B2, 0xD55E00} & colours
    assert (pixels.max(axis=2) < 60).mean() > 0.7, "the page is dark"


def test_no_script_runs_on_the_page(report: Path, tmp_path: Path) -> None:
    """Its policy holds in a browser, whatever would slip through the escaping."""
    copy = tmp_path / "copy.html"
    text = report.read_text("utf-8")
    copy.write_text(text.replace("</body>", MEASURE + "</body>"), "utf-8")
    assert '<pre id="measured">' not in dump_dom(copy, 800, tmp_path)


def test_the_picture_is_not_blank(report: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.png"
    screenshot(report, file, (1200, 4000), tmp_path)
    pixels = (imread(file)[..., :3] * 255).round().astype(np.uint32)
    assert pixels.shape[:2] == (4000, 1200)
    colours = np.unique((pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2])
    assert len(colours) > 100
    # The first two runs' lines, and the tiers'.
    assert {0x0072B2, 0xD55E00, 0xE69F00} <= set(colours.tolist())
    inked = (pixels.min(axis=2) < 250).any(axis=1)
    assert inked.mean() > 0.5
