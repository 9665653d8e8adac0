"""Tokenizes text with a Hugging Face folder's ``tokenizer.json``, without transformers.

The `tokenizers` library does the encoding. Decoding uses each token's bytes (see
`veneer_server.text.detokenizer`), derived here for the two decoders that supported models
use: byte-level BPE, and SentencePiece BPE with byte fallback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as RustTokenizer
from veneer_registry.errors import VeneerError

from veneer_server.text.bound import TextBound, read_bound
from veneer_server.text.detokenizer import Detokenizer

# By default, the library runs batches in a thread pool that all callers share: two long texts
# would delay short ones, no matter which of our threads call it.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LABEL: Final = re.compile(r"bytes:(\\x[0-9a-f]{2})+|token_id:\d+")
"""Labels of tokens that have no text; see `TextTokenizer.token_label`."""


class TokenizerUnsupported(VeneerError):
    """The base's tokenizer is missing, or its kind cannot be streamed."""

    code = "FAILED_PRECONDITION"
    reason = "TOKENIZER_UNSUPPORTED"


_SPARSE: Final = 8
"""A text with more than this many characters per usable token is first checked in pieces:
most text has fewer characters per token, so it is probably too long."""

PIECE: Final = 32 << 10
"""Characters per piece. The library needs about 120 bytes per character while it works."""


class TooManyTokens(Exception):
    """A text has more tokens than the caller can use.

    Attributes:
        count: number of tokens; None if counting was stopped early.
    """

    def __init__(self, count: int | None) -> None:
        super().__init__(f"the text has {count or 'too many'} tokens")
        self.count = count


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level BPE alphabet (GPT-2's reversible map).

    Printable Latin-1 stands for itself; the other bytes map, in order, to U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(others)}


ALPHABET: Final = _byte_alphabet()
_CHARACTERS: Final = {byte: character for character, byte in ALPHABET.items()}


@dataclass(frozen=True, slots=True)
class TokenNames:
    """Sizes of the longest tokens in a vocabulary, longest first.

    Attributes:
        texts: sizes in bytes of labels as JSON strings, see `TextTokenizer.token_label`.
        data: numbers of bytes that tokens stand for.
    """

    texts: Sequence[int]
    data: Sequence[int]


class TextTokenizer:
    """One base model's tokenizer. Thread-safe: calls share only caches."""

    def __init__(self, rust: RustTokenizer, description: Mapping[str, Any]) -> None:
        """Args: description: the parsed ``tokenizer.json``.

        Raises:
            TokenizerUnsupported: its decoder is not one of the supported kinds.
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
        self._labels: dict[int, str] = {}
        normalizer = rust.normalizer
        self._bound = read_bound(
            description, ALPHABET, normalizer.normalize_str if normalizer else str
        )

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Read ``tokenizer.json``.

        Raises:
            TokenizerUnsupported: the file is missing, broken, or of an unsupported kind.
        """
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            rust = RustTokenizer.from_str(text)
        except FileNotFoundError as error:
            raise TokenizerUnsupported(
                f"{folder} has no tokenizer.json: save the tokenizer with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
                metadata={"file": path.name, "cause": "missing"},
            ) from error
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerUnsupported(
                f"{path} cannot be read: {error}",
                metadata={"file": path.name, "cause": "unreadable"},
            ) from error
        # Saved truncation or padding settings would silently change prompts.
        rust.no_truncation()
        rust.no_padding()
        return cls(rust, json.loads(text))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._rust.get_vocab_size(with_added_tokens=True)

    def encode(
        self, text: str, *, add_special_tokens: bool, most: int | None = None
    ) -> list[int]:
        """Return the token ids of a text. Releases the GIL, unlike the library's plain
        ``encode``, which also computes offsets.

        Args:
            add_special_tokens: let the tokenizer add its own (such as BOS); a
                rendered chat template already contains them.
            most: most tokens that the caller can use; a longer list is never built, since
                each token takes 36 bytes as a Python object.

        Raises:
            TooManyTokens: there are more than ``most``.
        """
        if most is not None and len(text) > max(PIECE, _SPARSE * most):
            self._check_pieces(text, most)
        [found] = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if most is not None and len(found) > most:
            raise TooManyTokens(len(found))
        return found.ids

    def _check_pieces(self, text: str, most: int) -> None:
        """Raise TooManyTokens if a text is far too long, without spending the time and memory
        to encode all of it.

        A cut changes the tokens next to it, so the sum over the pieces is not exactly the
        text's number of tokens, but it is far below twice that number.
        """
        count = 0
        for at in range(0, len(text), PIECE):
            piece = text[at : at + PIECE]
            [found] = self._rust.encode_batch_fast([piece], add_special_tokens=False)
            count += len(found)
            if count > 2 * (most + 1):
                raise TooManyTokens(None)

    @property
    def bound(self) -> TextBound | None:
        """Bound on the bytes of text per token; None if there is none."""
        return self._bound

    def decode(self, ids: Iterable[int]) -> str:
        """Return the whole text of a finished sequence, without special tokens."""
        stream = Detokenizer(self)
        return stream.feed(ids) + stream.flush()

    def decode_all(self, ids: Sequence[int]) -> str:
        """Return the whole text of a sequence, with the names of its special tokens."""
        return self._rust.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for; empty for special and unknown tokens."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._derive(token)
        return known

    def token_name(self, token: int) -> str:
        """The token as the vocabulary spells it, such as ``<|im_end|>``; empty if unknown."""
        return self._rust.id_to_token(token) or ""

    def special_ids(self, names: Iterable[str]) -> dict[int, bytes]:
        """Return which of these names are special tokens: token id -> name. An answer's text
        has no special tokens, but a parser may need to see them."""
        found = ((self._rust.token_to_id(name), name.encode()) for name in names)
        return {
            token: name for token, name in found if token is not None and token in self._special
        }

    def token_label(self, token: int) -> str:
        """A token's label in log-probabilities; no two tokens share a label.

        Normally its text, such as `` the``. A fragment of a character is
        ``bytes:\\xf0\\x9f``, as in OpenAI's API. Of tokens with the same text (SentencePiece
        has ``A`` and the byte ``<0x41>``), the ordinary one is labelled by its text, the
        next by its bytes. A special token has its name from the vocabulary. Any other token
        is ``token_id:151700``.
        """
        known = self._labels.get(token)
        if known is None:
            known = self._labels[token] = self._label(token)
        return known

    def longest_names(self, count: int = 32) -> TokenNames:
        """Return the sizes of the ``count`` longest labels as JSON, and of the ``count`` tokens
        with the most bytes."""
        texts: list[int] = []
        data: list[int] = []
        bounds = [(_most_bytes(name), token) for name, token in self._rust.get_vocab().items()]
        for most, token in sorted(bounds, reverse=True):
            if len(texts) >= count and most <= min(texts[count - 1], data[count - 1]):
                break
            texts.append(len(json.dumps(self._label(token), ensure_ascii=False).encode()))
            data.append(len(self._derive(token)))
            if len(texts) % count == 0:
                texts, data = (sorted(each)[-count:][::-1] for each in (texts, data))
        texts, data = (sorted(each)[-count:][::-1] for each in (texts, data))
        # A small vocabulary has fewer than ``count``: repeat the last.
        return TokenNames(
            texts + texts[-1:] * (count - len(texts)), data + data[-1:] * (count - len(data))
        )

    def _label(self, token: int) -> str:
        data, number = self.token_bytes(token), f"token_id:{token}"
        if not data:
            return self.token_name(token) or number
        text = data.decode(errors="backslashreplace")
        alike = self._tokens_of(data)
        names = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in data)]
        whole = text.encode() == data
        special = self._rust.token_to_id(text) in self._special
        if whole and not special and not _LABEL.fullmatch(text):
            names.insert(0, text)
        place = alike.index(token) if token in alike else len(names)
        return names[place] if place < len(names) else number

    def _tokens_of(self, data: bytes) -> list[int]:
        """Tokens that stand for these bytes, the ordinary one first. May miss a token that
        mixes spellings of a space."""
        spellings = []
        if self._byte_level:
            spellings.append("".join(_CHARACTERS[byte] for byte in data))
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode()
            spelled = text
            for old, new in reversed(self._replaced):
                spelled = spelled.replace(new, old) if new else spelled
            spellings += [spelled, text]
        if self._byte_fallback and len(data) == 1:
            spellings += [f"<0x{data[0]:02X}>", f"<0x{data[0]:02x}>"]
        found = (self._rust.token_to_id(spelling) for spelling in dict.fromkeys(spellings))
        return [t for t in found if t is not None and self.token_bytes(t) == data]

    def _derive(self, token: int) -> bytes:
        text = None if token in self._special else self._rust.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            try:
                return bytes([ALPHABET[char] for char in text])
            except KeyError:
                # An added token outside the alphabet stands for itself.
                return text.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(match[1])
        for old, new in self._replaced:
            text = text.replace(old, new)
        return text.encode()


def _most_bytes(name: str) -> int:
    """Upper bound on the bytes of a token's label as JSON, from its name in the vocabulary."""
    plain = name.replace("Ġ", " ").replace("▁", " ")
    if plain.isascii() and plain.isprintable() and '"' not in plain and "\\" not in plain:
        return max(len(plain) + 2, 17)  # ``token_id:`` and a number
    # A character may take four bytes, or stand for a byte that takes six characters of JSON.
    return 8 + 6 * len(name)


_KNOWN_STEPS: Final = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        raise TokenizerUnsupported(
            "tokenizer.json has no decoder: its tokens have no text", metadata={"decoder": ""}
        )
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    for step in steps:
        plain = step.get("type") != "Replace" or "String" in step.get("pattern", {})
        if step.get("type") not in _KNOWN_STEPS or not plain:
            raise TokenizerUnsupported(
                f"tokenizer decoder {step.get('type')!r} is not supported; supported are "
                "byte-level BPE and SentencePiece BPE with byte fallback",
                metadata={"decoder": str(step.get("type"))},
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
