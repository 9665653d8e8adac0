"""Streaming text equals one-shot text, for any tokens and any split."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from veneer_server.text.detokenizer import Detokenizer, StopStrings
from veneer_server.text.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="session")
def real(base_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(base_folder)


@pytest.fixture(scope="session")
def reference(base_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(base_folder / "tokenizer.json"))


def streamed(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.feed([token]) for token in ids), detokenizer.flush()]


@settings(max_examples=300, print_blob=True)
@given(ids=st.lists(st.integers(0, 49151), max_size=40))
def test_random_tokens_equal_the_one_shot_decode(
    real: TextTokenizer, reference: Tokenizer, ids: list[int]
) -> None:
    pieces = streamed(real, ids)
    assert "".join(pieces) == reference.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, print_blob=True)
@given(data=st.binary(max_size=24))
def test_invalid_utf8_equals_the_one_shot_decode(
    real: TextTokenizer, reference: Tokenizer, data: bytes
) -> None:
    single = {real.token_bytes(i): i for i in range(17, 600) if len(real.token_bytes(i)) == 1}
    ids = [single[bytes([byte])] for byte in data if bytes([byte]) in single]
    assert "".join(streamed(real, ids)) == reference.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, print_blob=True)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_survives_and_no_half_character_is_emitted(
    real: TextTokenizer, reference: Tokenizer, text: str
) -> None:
    ids = real.encode(text, add_special_tokens=False)
    pieces = streamed(real, ids)
    # The vocabulary lacks a few control characters, so text itself may lose them.
    text = reference.decode(ids)
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


def test_an_emoji_arrives_whole(real: TextTokenizer) -> None:
    ids = real.encode("👩‍🚀", add_special_tokens=False)
    assert len(ids) > 3
    assert [p for p in streamed(real, ids) if p] == ["👩", "\u200d", "🚀"]


def test_an_incomplete_character_is_shown_at_the_end(real: TextTokenizer) -> None:
    ids = real.encode("🚀", add_special_tokens=False)[:-1]
    assert "".join(streamed(real, ids)) == REPLACEMENT


def test_special_and_unknown_tokens_have_no_text(real: TextTokenizer) -> None:
    assert real.decode([1, 2, 0, 10**7]) == ""


def sentencepiece() -> tuple[Tokenizer, TextTokenizer]:
    """A tiny tokenizer of the Llama 2 kind: word marks and byte fallback."""
    words = ["<unk>", "▁", "▁Hello", "▁world", "a", "▁▁"]
    vocab = {
        token: i for i, token in enumerate([*words, *(f"<0x{n:02X}>" for n in range(256))])
    }
    rust = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    import json

    return rust, TextTokenizer(rust, json.loads(rust.to_str()))


@settings(max_examples=200, print_blob=True)
@given(ids=st.lists(st.integers(1, 5), max_size=12))
def test_word_marks_equal_the_one_shot_decode(ids: list[int]) -> None:
    rust, tokenizer = sentencepiece()
    assert "".join(streamed(tokenizer, ids)) == rust.decode(ids)


@settings(max_examples=100, print_blob=True)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12))
def test_byte_fallback_gives_whole_characters(text: str) -> None:
    _, tokenizer = sentencepiece()
    ids = [6 + byte for byte in text.encode()]
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == (text[1:] if text.startswith(" ") else text)
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


def test_a_continuation_keeps_its_first_space() -> None:
    _, tokenizer = sentencepiece()
    assert Detokenizer(tokenizer, continues=True).feed([2, 3]) == " Hello world"
    assert Detokenizer(tokenizer).feed([2, 3]) == "Hello world"


# ------------------------------------------------------------------ stop strings


def cut(text: str, stops: list[str], splits: list[int]) -> tuple[str, bool, list[str]]:
    stopper = StopStrings(stops)
    edges = sorted({0, len(text), *(s % (len(text) + 1) for s in splits)})
    pieces = [stopper.feed(text[a:b]) for a, b in pairwise(edges)]
    return "".join([*pieces, stopper.flush()]), stopper.stopped, pieces


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character, without holding anything back: the definition."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=500, print_blob=True)
@given(
    text=st.text("ab\n", max_size=24),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    splits=st.lists(st.integers(0, 24), max_size=8),
)
def test_stop_strings_do_not_depend_on_the_split(
    text: str, stops: list[str], splits: list[int]
) -> None:
    result, stopped, pieces = cut(text, stops, splits)
    assert (result, stopped) == expected(text, stops)
    assert not any(stop in "".join(pieces) for stop in stops)


@pytest.mark.parametrize("size", range(1, 9))
def test_a_stop_string_is_never_leaked_at_any_border(size: int) -> None:
    text, stop = "one two<|end|>three", "<|end|>"
    for offset in range(size):
        stopper = StopStrings([stop])
        edges = [0, *range(offset or size, len(text), size), len(text)]
        seen = ""
        for a, b in pairwise(edges):
            seen += stopper.feed(text[a:b])
            assert "<" not in seen
        assert (seen, stopper.stopped, stopper.flush()) == ("one two", True, "")


def test_text_that_was_no_stop_string_after_all_comes_out() -> None:
    stopper = StopStrings(["<|end|>"])
    assert stopper.feed("a <|en") == "a "
    assert stopper.feed("ough") == "<|enough"
    assert stopper.feed(" <") == " "
    assert stopper.flush() == "<"


@settings(max_examples=300, deadline=None, print_blob=True)
@given(
    early=st.lists(st.sampled_from(["a", "b", "ab", "c", ""]), max_size=6),
    late=st.lists(st.sampled_from(["a", "b", "ab", "c", ""]), max_size=6),
)
def test_stop_strings_end_nothing_early_but_may_begin_there(
    early: list[str], late: list[str]
) -> None:
    stops = StopStrings(["abc", "bb"])
    shown = "".join([*map(stops.skip, early), *map(stops.feed, late)])
    if not stops.stopped:
        shown += stops.flush()
    text, begin = "".join(early + late), len("".join(early))
    ends = [
        (at + len(stop), at)
        for stop in ("abc", "bb")
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > begin
    ]
    assert stops.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)
