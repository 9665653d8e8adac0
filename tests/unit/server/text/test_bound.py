"""A prompt that fits is never refused for its bytes, whatever the tokenizer does with it."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veneer_server.text.bound import UNICODE_SHRINK
from veneer_server.text.tokenizer import ALPHABET, TextTokenizer

Described = dict[str, Any]


def described(base_folder: Path) -> Described:
    """The bundled base's tokenizer.json."""
    found: Described = json.loads((base_folder / "tokenizer.json").read_text())
    return found


def opened(description: Described, folder: Path) -> TextTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return TextTokenizer.from_folder(folder)


def sentencepiece() -> Described:
    """As Llama 2 and Mistral have it: spaces become ▁, unknown characters bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [chr(code) for code in range(0x21, 0x7F)] + ["▁", "▁▁", "▁▁▁▁", "he", "▁he"]
    vocabulary = {"<unk>": 0, "<s>": 1} | {piece: 2 + at for at, piece in enumerate(pieces)}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 1, "content": "<s>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [["▁", "▁"], ["▁▁", "▁▁"], ["h", "e"], ["▁", "he"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }


def composing(base_folder: Path) -> Described:
    """As Qwen has it: composed, then byte-level; and an added token that is normalized."""
    found = described(base_folder) | {"normalizer": {"type": "NFC"}}
    for char in ALPHABET:
        found["model"]["vocab"].setdefault(char, len(found["model"]["vocab"]) + 100)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    own = {"id": 49152, "content": "e\u0301" * 60, "normalized": True, **plain}
    found["added_tokens"] = [*found["added_tokens"], own]
    return found


TOKENIZERS: dict[str, Callable[[Path], Described]] = {
    "the base": described,
    "SentencePiece": lambda base_folder: sentencepiece(),
    "composing": composing,
}

WORST = [
    " " * 400,
    "=" * 800,
    "\n" + " " * 80,
    "\u1fbe\u0308\u0301" * 50,
    "\u212a\u0327" * 50,
    "e\u0301" * 240,
    "\u1100\u1161\u11a8" * 30,
    "<|im_start|>" * 9,
    "<s>" * 9,
    "he he he",
    "\x00\x01\x7f",
    "\x04" * 500,
    "\U00050000" * 9,
    "é🦆\ufffd",
]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_no_text_has_more_bytes_than_its_tokens_may_have(
    name: str, base_folder: Path, tmp_path: Path
) -> None:
    tokenizer = opened(TOKENIZERS[name](base_folder), tmp_path)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    texts = [*WORST, "#" * 8000]
    for _ in range(300):
        texts.append("".join(rng.choices(WORST, k=rng.randrange(1, 6))))
        texts.append("".join(map(chr, rng.choices(range(1, 0xD800), k=50))))
        texts.append("".join(tokenizer.decode([rng.randrange(300, 5000)]) for _ in range(9)))
    bound = tokenizer.bound
    assert bound is not None
    for text in texts:
        tokens = len(tokenizer.encode(text, add_special_tokens=False))
        most = bound.most_bytes(tokens, ascii_only=text.isascii())
        assert not bound.exceeds(text.encode(), most), text[:80]


def test_the_bound_is_near_for_plain_text(base_folder: Path) -> None:
    """Of the base it is 81 bytes a token: a line break and 80 spaces."""
    bound = TextTokenizer.from_folder(base_folder).bound
    assert bound is not None
    assert bound.most_bytes(8191, ascii_only=True) == 8191 * 81
    assert bound.most_bytes(8191, ascii_only=False) == 8191 * 81, "nothing normalizes"
    some = "a\x04é".encode()
    assert bound.exceeds(some, 2)
    assert not bound.exceeds(some, 3), "it has no token for 0x04"


def test_normal_forms_shrink_text_by_no_more() -> None:
    """Of each character that a form may give, the longest text that becomes it. Characters
    without a decomposition only come of themselves and of what decomposes to them."""
    every = (chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF)
    changing = [char for char in every if unicodedata.decomposition(char)]
    changing += map(chr, range(0xAC00, 0xD7A4))
    for form, parts in (("NFC", "NFD"), ("NFD", "NFD"), ("NFKC", "NFKD"), ("NFKD", "NFKD")):
        longest: dict[str, int] = {}
        for char in changing:
            part = unicodedata.normalize(parts, char)  # type: ignore[arg-type]
            longest[part] = max(longest.get(part, 0), len(char.encode()))
        for char in {*changing, *(part for part in longest if len(part) == 1)}:
            if unicodedata.normalize(form, char) != char:  # type: ignore[arg-type]
                continue
            whole = unicodedata.normalize(parts, char)  # type: ignore[arg-type]
            size = sum(longest.get(part, len(part.encode())) for part in whole)
            assert size <= UNICODE_SHRINK * len(char.encode()), (form, hex(ord(char)))


def without_byte(found: Described) -> None:
    del found["model"]["vocab"]["<0x41>"]


def test_normalizing_before_bytes_are_dropped_leaves_no_bound(
    base_folder: Path, tmp_path: Path
) -> None:
    found = described(base_folder) | {"normalizer": {"type": "NFC"}}
    assert opened(found, tmp_path).bound is None


UNBOUNDED: dict[str, Callable[[Described], None]] = {
    "strips spaces": lambda d: d.update(
        normalizer={"type": "Strip", "strip_left": True, "strip_right": True}
    ),
    "shortens": lambda d: d.update(
        normalizer={"type": "Replace", "pattern": {"String": "  "}, "content": " "}
    ),
    "removes by pattern": lambda d: d.update(
        normalizer={"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}
    ),
    "drops spaces": lambda d: d.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    "removes what it splits at": lambda d: d.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": "a"},
            "behavior": "Removed",
            "invert": False,
        }
    ),
    "takes spaces along": lambda d: d["added_tokens"][0].update(lstrip=True),
    "joins what is unknown": lambda d: d["model"].update(byte_fallback=False),
    "has no token for a byte": without_byte,
}


@pytest.mark.parametrize("name", sorted(UNBOUNDED))
def test_a_tokenizer_that_may_drop_text_has_no_bound(name: str, tmp_path: Path) -> None:
    changed = sentencepiece()
    UNBOUNDED[name](changed)
    tokenizer = opened(changed, tmp_path)
    assert tokenizer.bound is None
