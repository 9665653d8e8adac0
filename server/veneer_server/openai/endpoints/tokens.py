"""What a prompt's tokens are, without a place among the sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer_registry.errors import ContextTooLong

from veneer_server.engine_client.client import EngineClient
from veneer_server.serving.limits import check_ids, room
from veneer_server.serving.tenants.tenants import Tenants
from veneer_server.serving.tenants.visible import Visible
from veneer_server.serving.who import sender
from veneer_server.text.prompts import Prompts, Room
from veneer_server.text.tokenizer import TooManyTokens

__all__ = ["Tokenizing"]


class Tokenizing:
    """Tokens of texts and chats, as `Generator.admit` would compute them. As many as a
    sequence may have, which bounds what an answer holds."""

    def __init__(self, prompts: Prompts, engine: EngineClient, tenants: Tenants) -> None:
        self._prompts = prompts
        self._engine = engine
        self._tenants = tenants

    async def of_text(self, text: str, model: str, *, add_special_tokens: bool) -> list[int]:
        """Raises ContextTooLong, AdapterNotFound.

        Args:
            model: an adapter that the caller sees, or empty for the base; the tokens are the
                same.
        """
        await self._template(model)
        try:
            return await self._prompts.token_ids(
                text, self._room, sender(), add_special_tokens=add_special_tokens
            )
        except TooManyTokens as error:
            raise self._too_many(error.count) from None

    async def of_messages(self, messages: Sequence[Mapping[str, str]], model: str) -> list[int]:
        """The tokens of a chat, by the adapter's template or the base's.

        Raises:
            ContextTooLong, AdapterNotFound: as `of_text`.
            TemplateFailed, QueueFull: as `Prompts.from_messages`.
        """
        template = await self._template(model)
        try:
            prompt = await self._prompts.from_messages(messages, template, self._room, sender())
        except TooManyTokens as error:
            raise self._too_many(error.count) from None
        return prompt.ids

    async def text(self, ids: Sequence[int], model: str) -> str:
        """The text of tokens. Raises InvalidField, ContextTooLong, AdapterNotFound."""
        await self._template(model)
        info = self._engine.info
        if len(ids) > info.longest_sequence:
            room(info, None, len(ids))
        check_ids(info, "tokens", ids)
        return await self._prompts.text_of(ids, sender())

    async def _template(self, model: str) -> str | None:
        """The adapter's chat template; None if it has none."""
        if not model:
            return None
        home = await self._tenants.current()
        visible = Visible(self._tenants)
        _, lease = visible.acquire(home, model, "")
        with lease:
            return lease.record.manifest.chat_template

    @property
    def _room(self) -> Room:
        info = self._engine.info
        return Room(info.vocab_size, info.longest_sequence)

    def _too_many(self, count: int | None) -> ContextTooLong:
        most = self._engine.info.longest_sequence
        shown = "far more" if count is None else str(count)
        return ContextTooLong(
            f"the prompt has {shown} tokens, but sequences have at most {most}, and no more "
            "are returned: shorten it",
            metadata={"field": "prompt", "largest": str(most)},
        )
