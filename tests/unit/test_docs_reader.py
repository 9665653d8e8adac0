"""What `tests.docs` recognizes as a command, as its output, and as the same shape."""

from __future__ import annotations

import pytest

from tests.docs.pages import read_page
from tests.docs.shapes import difference


def fence(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n"


def test_blocks_that_are_run_and_what_they_print() -> None:
    page = read_page(fence("sh", "one\ntwo") + "\n" + fence("text", "1") + fence("python", "x"))
    assert page.mistakes == []
    first, second = page.blocks
    assert (first.line, first.text, first.output) == (2, "one\ntwo\n", "1\n")
    assert (second.language, second.output, second.when) == ("python", None, "always")


@pytest.mark.parametrize(
    ("mark", "when"), [("not run: it needs a GPU", "never"), ("slow: an hour", "slow")]
)
def test_a_mark_counts_for_the_block_right_after_it(mark: str, when: str) -> None:
    page = read_page(f"<!-- {mark} -->\n{fence('sh', 'a')}\n{fence('sh', 'b')}")
    assert [block.when for block in page.blocks] == [when, "always"]
    assert page.blocks[0].reason == mark.partition(": ")[2]
    page = read_page(f"<!-- {mark} -->\n\nText between.\n\n{fence('sh', 'a')}")
    assert [block.when for block in page.blocks] == ["always"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (fence("", "a"), "no language"),
        (fence("console", "$ a"), "console"),
        (fence("text", "no command before it"), "text"),
        (fence("sh", "a") + "\nText between.\n\n" + fence("text", "1"), "text"),
        ("<!-- not run: -->\n" + fence("sh", "a"), "no reason"),
        ("<!-- slow: toml cannot be run -->\n" + fence("toml", "a = 1"), "toml"),
        ("Text.\n\n    indented\n", "indented"),
        (fence("sh", "a") + "<!-- varies: 2 -->\n" + fence("text", "1"), "not there: 2"),
    ],
)
def test_a_block_of_which_nothing_is_known_is_a_mistake(text: str, mistake: str) -> None:
    (told,) = read_page(text).mistakes
    assert mistake in told


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("took 12 ms", "took 1,234.5 s\n"),
        ("chat@0e9940e11407 at 13:59:48", "chat@1b033338f305   at\n09:01:02"),
        ("1 KiB of 4.7 MiB", "1024 B of 1 GiB"),
        ("first\n...\nlast", "first\nand\nmore\nlast"),
        ("first\n...", "first"),
        ("{..., 'end'}", "{'a': 1, 'end'}"),
        ("-- 4 ──────", "-- 5 ───"),
    ],
)
def test_equal_shapes(expected: str, printed: str) -> None:
    assert difference(expected, printed) is None


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("serving", "not serving"),
        ("serving", "serving now"),
        ("serving", ""),
        ("first\n...\nlast", "first\nlast\nmore"),
        ("first ... last", "last ... first"),
        ("a ... b ... a", "a b"),
        ("published: chat", "replaced: chat"),
        ("took 12 ms", "took long"),
    ],
)
def test_other_words_are_another_shape(expected: str, printed: str) -> None:
    assert difference(expected, printed) is not None


def test_what_varies_is_whatever_it_is() -> None:
    assert difference("Ahoy! Fair winds", "Ahoy! Farewell", ["Fair winds"]) is None
    assert difference("Ahoy! Fair winds", "Oy! Farewell", ["Fair winds"]) is not None
