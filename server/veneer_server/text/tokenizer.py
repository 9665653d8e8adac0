"""Text to tokens, from a Hugging Face folder's ``tokenizer.json``. No transformers here.

The `tokenizers` library does the encoding. Decoding goes by each token's bytes
(see `veneer_server.text.detokenizer`), derived here from the two decoders that
supported models use: byte-level BPE, and SentencePiece BPE with byte fallback.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as RustTokenizer
from veneer_registry.errors import VeneerError

from veneer_server.text.detokenizer import Detokenizer

__all__ = ["TextTokenizer", "TokenizerUnsupported"]

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerUnsupported(VeneerError):
    """The base's tokenizer is missing or of a kind that cannot be streamed."""

    code = "FAILED_PRECONDITION"
    reason = "TOKENIZER_UNSUPPORTED"


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level BPE alphabet (GPT-2's reversible map).

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET: Final = _byte_alphabet()


class TextTokenizer:
    """One base model's tokenizer. Thread-safe: calls share no state but a cache."""

    def __init__(self, rust: RustTokenizer, description: Mapping[str, Any]) -> None:
        """Args: description: the parsed ``tokenizer.json``.

        Raises:
            TokenizerUnsupported: for a decoder of another kind.
        """
        self._rust = rust
        steps = _decoder_steps(description.get("decoder"))
        kinds = [step.get("type") for step in steps]
        self._byte_level = "ByteLevel" in kinds
        self._replaced = _replaced(steps)
        self._byte_fallback = "ByteFallback" in kinds
        self.strip_first_space = any(_strips(step) for step in steps)
        self._special = frozenset(
            token["id"] for token in description.get("added_tokens", ()) if token.get("special")
        )
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Read ``tokenizer.json``.

        Raises:
            TokenizerUnsupported: it is missing, broken, or of another kind.
        """
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            rust = RustTokenizer.from_str(text)
        except FileNotFoundError as error:
            raise TokenizerUnsupported(
                f"{folder} has no tokenizer.json: save the tokenizer with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            ) from error
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerUnsupported(f"{path} cannot be read: {error}") from error
        # A saved truncation or padding would cut or fill prompts in silence.
        rust.no_truncation()
        rust.no_padding()
        return cls(rust, json.loads(text))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._rust.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Releases the interpreter lock while it works.

        Args:
            add_special_tokens: let the tokenizer add its own (such as BOS); a
                rendered chat template already holds them.
        """
        return self._rust.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The whole text of a finished sequence, special tokens left out."""
        stream = Detokenizer(self)
        return stream.feed(ids) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for; empty for special and unknown tokens."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._derive(token)
        return known

    def token_name(self, token: int) -> str:
        """How the vocabulary writes a token, such as ``<|im_end|>``; empty if unknown."""
        return self._rust.id_to_token(token) or ""

    def _derive(self, token: int) -> bytes:
        text = None if token in self._special else self._rust.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            try:
                return bytes([_ALPHABET[char] for char in text])
            except KeyError:
                # An added token outside the alphabet stands for itself.
                return text.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(match[1])
        for old, new in self._replaced:
            text = text.replace(old, new)
        return text.encode()


_KNOWN_STEPS: Final = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        raise TokenizerUnsupported("tokenizer.json has no decoder: its tokens have no text")
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    for step in steps:
        plain = step.get("type") != "Replace" or "String" in step.get("pattern", {})
        if step.get("type") not in _KNOWN_STEPS or not plain:
            raise TokenizerUnsupported(
                f"tokenizer decoder {step.get('type')!r} is not supported; supported are "
                "byte-level BPE and SentencePiece BPE with byte fallback"
            )
    return list(steps)


def _replaced(steps: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    pairs = []
    for step in steps:
        if step["type"] == "Replace":
            pairs.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            pairs.append((step.get("replacement", "▁"), " "))
    return pairs


def _strips(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Strip":
        return bool(step.get("content") == " " and step.get("start", 0) >= 1)
    return bool(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
