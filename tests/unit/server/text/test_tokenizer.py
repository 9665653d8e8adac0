"""Encoding equals the reference library; what cannot be served is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from veneer_server.text.tokenizer import TextTokenizer, TokenizerUnsupported


def test_a_folder_without_a_tokenizer_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(TokenizerUnsupported, match="save_pretrained"):
        TextTokenizer.from_folder(tmp_path)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerUnsupported, match="cannot be read"):
        TextTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "decoder", [{"type": "WordPiece", "prefix": "##", "cleanup": True}, None]
)
def test_other_decoders_are_refused(
    base_folder: Path, tmp_path: Path, decoder: dict[str, object] | None
) -> None:
    described = json.loads((base_folder / "tokenizer.json").read_text())
    described["decoder"] = decoder
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(TokenizerUnsupported, match="decoder"):
        TextTokenizer.from_folder(tmp_path)


def test_a_saved_truncation_does_not_cut_prompts(base_folder: Path, tmp_path: Path) -> None:
    described = json.loads((base_folder / "tokenizer.json").read_text())
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
