"""Writes a byte-level BPE tokenizer's vocabulary to GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from veneer_registry.errors import InvalidField


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write what llama.cpp needs to tokenise as ``tokenizer.json`` does.

    Raises:
        InvalidField: llama.cpp would split text differently.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / "tokenizer.json").read_bytes())
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _unsupported(f"tokenizer.json cannot be read ({error})") from error
    model = facts["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"it is a {model['type']} tokenizer")
    if facts.get("normalizer") is not None:
        raise _unsupported("it normalizes text")
    vocabulary: dict[str, int] = dict(model["vocab"])
    special: dict[str, bool] = {}
    for added in facts["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        special[added["content"]] = added["special"]
    by_id = {number: token for token, number in vocabulary.items()}
    tokens, kinds = [], []
    for number in range(vocab_size):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            kinds.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(token)
        if token not in special:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            kinds.append(
                gguf.TokenType.CONTROL if special[token] else gguf.TokenType.USER_DEFINED
            )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(facts.get("pre_tokenizer")))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        token = settings.get(key)
        content = token["content"] if isinstance(token, dict) else token
        if content in vocabulary:
            add(vocabulary[content])
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text("utf-8"))
    elif isinstance(settings.get("chat_template"), str):
        writer.add_chat_template(settings["chat_template"])


def _pre_tokenizer(facts: Any) -> str:
    """llama.cpp's name for the way text is split before BPE."""
    steps = facts.get("pretokenizers", [facts]) if facts else []
    kinds = [step["type"] for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["ByteLevel"] and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    raise _unsupported(f"it splits text by {' and '.join(kinds) or 'nothing'}")


def _unsupported(why: str) -> InvalidField:
    return InvalidField(
        f"the tokenizer cannot be exported here, {why}: use llama.cpp's own converter on the "
        "merged folder (veneer-train merge)",
        metadata={"field": "base"},
    )
