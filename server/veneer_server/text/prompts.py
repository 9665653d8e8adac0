"""Turns a caller's input into token ids, without blocking the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.errors import ContextTooLong, InvalidField, TemplateFailed

from veneer_server.text.lanes import Lanes
from veneer_server.text.templates.template import ChatTemplate, read_base_template
from veneer_server.text.templates.uploaded import UploadedTemplates
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["Prompt", "Prompts", "Room"]

INLINE_CHARACTERS: Final = 2000
"""Longer texts are tokenized in a thread; shorter ones take about a millisecond."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as token ids (at least one)."""

    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Room:
    """A model's limits for a prompt.

    Attributes:
        vocab_size: token ids below it have rows in the model. The tokenizer may know more,
            if tokens were added.
        tokens: most tokens of a prompt.
    """

    vocab_size: int
    tokens: int


class Prompts:
    """Tokenises, and renders chats with an adapter's template or the base's.

    Close it to end its threads and processes.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: the base model's Hugging Face folder.

        Raises:
            TokenizerUnsupported, TemplateFailed: the folder cannot be served.
        """
        self.tokenizer = TextTokenizer.from_folder(folder)
        source, special = read_base_template(folder)
        self._base = ChatTemplate(source, special) if source is not None else None
        self._uploaded = UploadedTemplates(special)
        self._lanes = Lanes()

    async def close(self) -> None:
        """End threads and processes; no call may follow."""
        await self._uploaded.close()
        self._lanes.close()

    def check_bytes(self, text: bytes, tokens: int, field: str) -> None:
        """Raise ContextTooLong if a UTF-8 text cannot fit into ``tokens`` tokens."""
        bound = self.tokenizer.bound
        if bound is None:
            return
        most = bound.most_bytes(tokens, ascii_only=text.isascii())
        if not bound.exceeds(text, most):
            return
        raise ContextTooLong(
            f"the prompt has {len(text)} bytes, but the {tokens} tokens that fit hold at most "
            f"{most}: shorten it",
            metadata={
                "field": field,
                "prompt_bytes": str(len(text)),
                "largest_bytes": str(most),
                "largest": str(tokens),
            },
        )

    async def from_text(self, text: str, room: Room) -> Prompt:
        """Tokenize text as it is; only the tokenizer's own BOS is added.

        Raises:
            ContextTooLong: the text has too many bytes to fit into ``room``.
            TooManyTokens: the text has too many tokens.
            InvalidField: there are no tokens, or one is outside the vocabulary.
        """
        ids = await self._tokenize(text, room, "prompt", add_special_tokens=True)
        return Prompt(text, self._checked(ids, "prompt", room.vocab_size))

    async def from_messages(
        self,
        messages: Sequence[Mapping[str, str]],
        adapter_template: str | None,
        room: Room,
        caller: str = "",
    ) -> Prompt:
        """Render a chat and tokenize it.

        Args:
            caller: its connection; callers with slow templates take turns.

        Raises:
            TemplateFailed: there is no template, or it rejects these messages.
            QueueFull: too many requests wait for the adapter's template.
            ContextTooLong, TooManyTokens, InvalidField: as `from_text`.
        """
        if adapter_template is not None:
            text = await self._uploaded.render(adapter_template, messages, caller)
        elif (base := self._base) is None:
            raise TemplateFailed(
                "neither the adapter nor the base model has a chat template: send `prompt` "
                "instead of `messages`",
                metadata={"cause": "no_template"},
            )
        else:
            size = sum(len(message["content"]) for message in messages)
            text = await self._lanes.run(size, lambda: base.render(messages))
        ids = await self._tokenize(text, room, "messages", add_special_tokens=False)
        return Prompt(text, self._checked(ids, "messages", room.vocab_size))

    async def from_ids(self, ids: Sequence[int], room: Room, *, with_text: bool) -> Prompt:
        """Check token ids against the model's vocabulary. Their number must have been checked.

        Args:
            with_text: decode the text as well.

        Raises:
            InvalidField: an id is outside the vocabulary.
        """
        checked = self._checked(list(ids), "token_ids", room.vocab_size)
        text = ""
        if with_text:
            size = len(checked)
            text = await self._lanes.run(size, lambda: self.tokenizer.decode(checked))
        return Prompt(text, checked)

    async def token_ids(self, text: str, room: Room, *, add_special_tokens: bool) -> list[int]:
        """Tokenize any text, also one that is empty. Raises as `from_text`."""
        return await self._tokenize(text, room, "prompt", add_special_tokens=add_special_tokens)

    async def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, which must have been checked; with the names of special
        tokens."""
        return await self._lanes.run(len(ids), lambda: self.tokenizer.decode_all(ids))

    async def _tokenize(
        self, text: str, room: Room, field: str, *, add_special_tokens: bool
    ) -> list[int]:
        if len(text) <= INLINE_CHARACTERS:
            return self.tokenizer.encode(
                text, add_special_tokens=add_special_tokens, most=room.tokens
            )
        data = text.encode()
        self.check_bytes(data, room.tokens, field)
        size = len(data)
        del data
        return await self._lanes.run(
            size,
            lambda: self.tokenizer.encode(
                text, add_special_tokens=add_special_tokens, most=room.tokens
            ),
        )

    def _checked(self, ids: list[int], field: str, vocab_size: int) -> list[int]:
        """The ids. Raises InvalidField if there are none, or the model lacks one."""
        if not ids:
            raise InvalidField(
                "the prompt has no tokens in this base model's vocabulary: send other text",
                metadata={"field": field},
            )
        worst = max(ids)
        if worst >= vocab_size:
            name = self.tokenizer.token_name(worst)
            raise InvalidField(
                f"{field} holds token {worst}{name and f' ({name})'}, but the model's "
                f"vocabulary ends at {vocab_size - 1}: leave it out",
                metadata={"field": field},
            )
        return ids
