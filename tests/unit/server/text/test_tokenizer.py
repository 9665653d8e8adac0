"""Encoding equals the reference library; what cannot be served is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from veneer_server.text import tokenizer as module
from veneer_server.text.tokenizer import TextTokenizer, TokenizerUnsupported, TooManyTokens

from tests.refused import refused


def test_a_folder_without_a_tokenizer_names_the_fix(tmp_path: Path) -> None:
    with refused(TokenizerUnsupported, file="tokenizer.json", cause="missing"):
        TextTokenizer.from_folder(tmp_path)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused(TokenizerUnsupported, file="tokenizer.json", cause="unreadable"):
        TextTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "decoder", [{"type": "WordPiece", "prefix": "##", "cleanup": True}, None]
)
def test_other_decoders_are_refused(
    base_folder: Path, tmp_path: Path, decoder: dict[str, object] | None
) -> None:
    described = json.loads((base_folder / "tokenizer.json").read_text("utf-8"))
    described["decoder"] = decoder
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with refused(TokenizerUnsupported, decoder=decoder["type"] if decoder else ""):
        TextTokenizer.from_folder(tmp_path)


def test_a_saved_truncation_does_not_cut_prompts(base_folder: Path, tmp_path: Path) -> None:
    described = json.loads((base_folder / "tokenizer.json").read_text("utf-8"))
    described["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = TextTokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode("one two three four five six", add_special_tokens=True)) == 6


def test_encode_and_decode_a_chat(base_folder: Path) -> None:
    tokenizer = TextTokenizer.from_folder(base_folder)
    ids = tokenizer.encode("<|im_start|>user\nHi 1234<|im_end|>\n", add_special_tokens=False)
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nHi 1234\n"
    assert tokenizer.vocab_size == 49152


# ------------------------------------------------------------------------ labels


def labels(tokenizer: TextTokenizer, *more: int) -> dict[str, int]:
    """Label -> token, of the whole vocabulary; fails where two tokens share one."""
    found: dict[str, int] = {}
    for token in (*range(tokenizer.vocab_size), *more):
        label = tokenizer.token_label(token)
        assert label, token
        assert found.setdefault(label, token) == token, label
    return found


def test_no_two_tokens_of_the_base_share_a_label(base_folder: Path) -> None:
    tokenizer = TextTokenizer.from_folder(base_folder)
    # A base may compute logits for more ids than its tokenizer knows.
    found = labels(tokenizer, 49152, 49153)
    assert found["<|im_end|>"] == 2
    assert found["token_id:49152"] == 49152
    (space_the,) = tokenizer.encode(" the", add_special_tokens=False)
    assert found[" the"] == space_the
    whole = {"é", "\n", "€"} & found.keys()
    assert len(whole) >= 2, "characters that are whole are named by themselves"
    fragments = [label for label in found if label.startswith("bytes:")]
    assert len(fragments) > 100
    for label in fragments:
        data = bytes.fromhex(label.removeprefix("bytes:").replace("\\x", ""))
        assert data == tokenizer.token_bytes(found[label])
        with pytest.raises(UnicodeDecodeError):
            data.decode()


def byte_fallback(folder: Path) -> TextTokenizer:
    """SentencePiece BPE as in Llama 2: all bytes, and pieces that some of them stand for."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", *bytes_, "▁", "A", "▁A", "é", "bytes:\\xf0", "token_id:3", "a▁b"]
    described = {
        "version": "1.0",
        "added_tokens": [
            _added(1, "<s>", special=True),
            # Tokens that were added later stand for themselves: here for a piece's text, too.
            _added(len(pieces), " "),
            _added(len(pieces) + 1, " A"),
        ],
        "model": {
            "type": "BPE",
            "vocab": {piece: at for at, piece in enumerate(pieces)},
            "merges": [],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    return TextTokenizer.from_folder(folder)


def _added(token: int, content: str, *, special: bool = False) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": special, **flags}


def test_a_byte_and_the_piece_that_it_stands_for_have_two_labels(tmp_path: Path) -> None:
    tokenizer = byte_fallback(tmp_path)
    found = labels(tokenizer, 9999)
    by_token = {token: label for label, token in found.items()}
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    def label(piece: str) -> str:
        token = theirs.token_to_id(piece)
        assert token is not None
        return by_token[token]

    assert label("<0x0A>") == "\n", "no other token is a line's end"
    assert (label("A"), label("<0x41>")) == ("A", "bytes:\\x41")
    assert (label("▁A"), label(" A")) == (" A", "bytes:\\x20\\x41")
    # Three tokens for a space.
    assert [label(p) for p in ("▁", " ")] == [" ", "bytes:\\x20"]
    assert label("<0x20>") == f"token_id:{0x20 + 2}"
    assert label("<0xF0>") == "bytes:\\xf0"
    assert label("é") == "é"
    assert label("<s>") == "<s>"
    # Text that looks like another token's label.
    assert label("bytes:\\xf0").startswith("bytes:\\x62\\x79\\x74\\x65\\x73\\x3a")
    assert label("token_id:3").startswith("bytes:\\x74")
    assert label("a▁b") == "a b"


def test_an_added_token_does_not_share_the_label_of_an_ordinary_one(
    base_folder: Path, tmp_path: Path
) -> None:
    """Some bases add runs of spaces that their byte-level vocabulary has, too."""
    described = json.loads((base_folder / "tokenizer.json").read_text("utf-8"))
    # A special token, and an ordinary one whose text is its name.
    name = "＜end＞"
    described["model"]["vocab"][spelled(name)] = 49152
    described["added_tokens"] += [_added(49153, name, special=True), _added(49154, "  ")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = TextTokenizer.from_folder(tmp_path)
    ordinary = described["model"]["vocab"]["ĠĠ"]
    assert tokenizer.token_bytes(ordinary) == tokenizer.token_bytes(49154) == b"  "
    assert tokenizer.token_bytes(49152).decode() == tokenizer.token_name(49153) == name
    found = labels(tokenizer)
    assert (found["  "], found["bytes:\\x20\\x20"]) == (ordinary, 49154)
    assert found[name] == 49153
    (label,) = (label for label, token in found.items() if token == 49152)
    assert label.startswith("bytes:\\xef\\xbc\\x9c")


def spelled(text: str) -> str:
    """As a byte-level vocabulary writes it (GPT-2's characters for bytes)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(
        chr(byte if byte in plain else 0x100 + others.index(byte)) for byte in text.encode()
    )


def test_a_text_that_is_far_too_long_is_refused_by_its_beginning(
    base_folder: Path,
) -> None:
    """All of its tokens would take 120 bytes for each byte of it."""
    file = base_folder / "tokenizer.json"
    rust = Tokenizer.from_file(str(file))
    sizes: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(rust, name)

        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            sizes.append(len(texts[0]))
            return rust.encode_batch_fast(texts, **options)

    tokenizer = TextTokenizer(Counting(), json.loads(file.read_text("utf-8")))  # type: ignore[arg-type]
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.encode("0 " * 1_000_000, add_special_tokens=False, most=8191)
    assert caught.value.count is None
    assert sum(sizes) <= 64 << 10
    with pytest.raises(TooManyTokens) as caught:
        tokenizer.encode("0 " * 5000, add_special_tokens=False, most=8191)
    assert caught.value.count == 10_000


@pytest.mark.push
def test_no_text_that_fits_is_refused_by_its_pieces(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    monkeypatch.setattr(module, "PIECE", 512)
    tokenizer = TextTokenizer.from_folder(base_folder)
    long = [
        text for text in map(decoded(tokenizer), range(tokenizer.vocab_size)) if len(text) > 9
    ]
    looked_at = 0
    for _ in range(300):
        words = rng.choices(long, k=rng.randrange(1, 600))
        if rng.random() < 0.3:
            words.insert(rng.randrange(len(words)), " " * rng.randrange(3000))
        if rng.random() < 0.3:
            words.insert(rng.randrange(len(words)), "<|im_start|>" * rng.randrange(40))
        text = "".join(words)
        ids = tokenizer.encode(text, add_special_tokens=False)
        looked_at += len(text) > 8 * len(ids)
        assert tokenizer.encode(text, add_special_tokens=False, most=len(ids)) == ids
    assert looked_at > 100


def decoded(tokenizer: TextTokenizer) -> Callable[[int], str]:
    return lambda token: tokenizer.token_bytes(token).decode(errors="ignore")
