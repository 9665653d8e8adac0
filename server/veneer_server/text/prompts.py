"""From what a caller sent to token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.errors import InvalidField, TemplateFailed

from veneer_server.text.template import ChatTemplate, read_base_template
from veneer_server.text.template_process import TemplateProcess
from veneer_server.text.tokenizer import TextTokenizer

__all__ = ["Prompt", "Prompts"]

INLINE_CHARACTERS: Final = 2000
"""Longer texts are tokenised in a thread; shorter ones take under a millisecond."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as token ids (at least one)."""

    text: str
    ids: list[int]


class Prompts:
    """Tokenises, and renders chats with an adapter's template or the base's.

    Close it to end its threads and its process.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: the base model's Hugging Face folder.

        Raises:
            TokenizerUnsupported, TemplateFailed: the folder cannot be served.
        """
        self.tokenizer = TextTokenizer.from_folder(folder)
        source, special = read_base_template(folder)
        self._base = ChatTemplate(source, special) if source is not None else None
        self._uploaded = TemplateProcess(special)
        # Two, so that one long prompt does not hold up the others.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="text")

    async def close(self) -> None:
        """End threads and process; no call may follow."""
        await self._uploaded.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def from_text(self, text: str, *, vocab_size: int) -> Prompt:
        """Tokenise text as it stands; only the tokenizer's own BOS is added.

        Args:
            vocab_size: the model's, which its tokenizer may exceed: where tokens were
                added, and the model has no rows for them.

        Raises:
            InvalidField: there are no tokens, or one is outside the vocabulary.
        """
        ids = await self._tokenise(text, add_special_tokens=True)
        return Prompt(text, self._checked(ids, "prompt", vocab_size))

    async def from_messages(
        self,
        messages: Sequence[Mapping[str, str]],
        adapter_template: str | None,
        *,
        vocab_size: int,
    ) -> Prompt:
        """Render a chat and tokenise it.

        Raises:
            TemplateFailed: no template, or it refuses these messages.
            InvalidField: as `from_text`.
        """
        if adapter_template is not None:
            text = await self._uploaded.render(adapter_template, messages)
        elif self._base is None:
            raise TemplateFailed(
                "neither the adapter nor the base model has a chat template: send `prompt` "
                "instead of `messages`"
            )
        else:
            text = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._base.render, messages
            )
        ids = await self._tokenise(text, add_special_tokens=False)
        return Prompt(text, self._checked(ids, "messages", vocab_size))

    def from_ids(self, ids: Sequence[int], *, vocab_size: int, with_text: bool) -> Prompt:
        """Check token ids against the model's vocabulary.

        Raises:
            InvalidField: an id is outside it.
        """
        checked = self._checked(list(ids), "token_ids", vocab_size)
        return Prompt(self.tokenizer.decode(ids) if with_text else "", checked)

    async def _tokenise(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens),
        )

    def _checked(self, ids: list[int], field: str, vocab_size: int) -> list[int]:
        """The ids, if there are any and the model has all of them."""
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
