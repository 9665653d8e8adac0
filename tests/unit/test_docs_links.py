"""Links, anchors, make targets and modules that the pages name exist."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.docs.pages import REPOSITORY, pages
from tests.docs.terminal import COMMANDS, on_screen

HIDDEN = re.compile(r"(^|/)(\.|node_modules|build/|dist/)")
PATHS = re.compile(r"(?<![\w./<-])(?:tests|examples|deploy|server/veneer_server)/[\w./-]+")
DOCS = REPOSITORY / "docs"
PICTURE = DOCS / "terminal.svg"
SOURCES = (
    "adapters_registry",
    "clients",
    "deploy",
    "loadtest",
    "proto",
    "server",
    "tests",
    "training",
)
FILE = re.compile(r"[\w./-]+\.(?:py|h|cpp|proto|yml)")
PAGE = re.compile(r"\bdocs/[\w/-]+\.md\b")


def all_pages() -> list[Path]:
    found = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.md"))
    return sorted(path for path in found if not HIDDEN.search(path.as_posix()))


def tokens(page: Path) -> Iterator[Token]:
    markdown = MarkdownIt("commonmark").enable("table")
    for token in markdown.parse((REPOSITORY / page).read_text("utf-8")):
        yield token
        yield from token.children or ()


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        target = token.attrGet("href") or token.attrGet("src")
        if target:
            yield str(target)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: Counter[str] = Counter()
    names = set()
    heading = False
    for token in tokens(page):
        if token.type == "inline" and heading:
            name = re.sub(r"[^\w\- ]", "", token.content.lower()).replace(" ", "-")
            names.add(f"{name}-{found[name]}" if found[name] else name)
            found[name] += 1
        if token.type in ("heading_open", "heading_close"):
            heading = token.type == "heading_open"
    return names


def code(page: Path) -> Iterator[str]:
    for token in tokens(page):
        if token.type in ("code_inline", "fence"):
            yield token.content


@pytest.mark.parametrize("page", all_pages(), ids=str)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    wrong = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / page.parent / path).resolve() if path else REPOSITORY / page
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.relative_to(REPOSITORY)):
            wrong.append(f"{link}: no such heading")
    assert not wrong


def test_the_way_through_the_docs_leads_to_each_page() -> None:
    led = {(DOCS / link.partition("#")[0]).resolve() for link in links(Path("docs/README.md"))}
    there = {page for page in DOCS.glob("*.md") if page.name != "README.md"}
    assert there - led == set()


@pytest.mark.parametrize(
    "page",
    [*(page.relative_to(REPOSITORY) for page in pages()), Path("ARCHITECTURE.md")],
    ids=str,
)
def test_targets_modules_and_files_that_a_page_names_are_there(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    wrong = []
    for text in code(page):
        wrong += [
            f"make {target}"
            for target in re.findall(r"(?m)^(?:\w+=\S+ )*make ([a-z-]+)", text)
            if target not in targets
        ]
        wrong += [
            module
            for module in re.findall(r"python -m ((?:tests|veneer_\w+)[\w.]*)", text)
            if importlib.util.find_spec(module) is None
        ]
        wrong += [
            path
            for path in re.findall(PATHS, text)
            if not (REPOSITORY / path.rstrip(".")).exists()
        ]
    assert not wrong


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_source_files_that_a_page_for_contributors_names_are_there(page: str) -> None:
    there = [
        f"/{path.relative_to(REPOSITORY).as_posix()}"
        for folder in SOURCES
        for path in (REPOSITORY / folder).rglob("*.*")
    ]
    named = {text for text in code(Path(page)) if FILE.fullmatch(text)}
    assert len(named) > 20
    missing = [name for name in named if not any(at.endswith(f"/{name}") for at in there)]
    assert not missing


def test_pages_that_source_files_name_are_there() -> None:
    files = [
        path
        for folder in SOURCES
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".proto", ".yml", ".yaml"}
        and not HIDDEN.search(path.relative_to(REPOSITORY).as_posix())
    ]
    named = {
        (page, path.relative_to(REPOSITORY).as_posix())
        for path in files
        for page in re.findall(PAGE, path.read_text("utf-8"))
    }
    assert len(named) > 20
    assert {each for each in named if not (REPOSITORY / each[0]).exists()} == set()


def test_the_picture_is_of_the_commands_and_loads_nothing() -> None:
    text = PICTURE.read_text("utf-8")
    assert PICTURE.stat().st_size < 100_000
    assert not re.search(r"url\((?!#)|https?://(?!www\.w3\.org)", text)
    shown = re.sub(r"<[^>]*>|&#160;|\s", "", text)
    for command in COMMANDS:
        escaped = command.replace("&", "&amp;").replace(">", "&gt;").replace('"', "&quot;")
        assert re.sub(r"\s", "", escaped) in shown, "make terminal-svg"
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert "docs/terminal.svg" in readme.partition("\n## ")[0], "README's first screen"


def test_what_is_left_on_the_screen_of_a_progress_bar() -> None:
    bar = "\x1b[?25l\r\x1b[2Ksending 1\r\x1b[2Ksending 2\r\n\x1b[1A\x1b[2Kdone\r\n\x1b[?25h"
    assert on_screen(f"before\r\n{bar}after\r\n") == "before\ndone\nafter"
