"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from pydantic import Field, field_validator

from veneer_server.openai.endpoints.core import Core
from veneer_server.openai.endpoints.json_endpoint import Answering, JsonEndpoint
from veneer_server.openai.endpoints.tokens import Tokenizing
from veneer_server.openai.fields import (
    ChatFields,
    Message,
    RequestFields,
    check_ids,
    parse_fields,
)
from veneer_server.openai.http.asgi import Reply
from veneer_server.openai.requests import chat_call
from veneer_server.serving.checks import MAX_MESSAGES, invalid
from veneer_server.serving.records import ChatMessages

__all__ = ["DetokenizeEndpoint", "TokenizeEndpoint"]

_INT64 = (1 << 63) - 1


class TokenizeFields(RequestFields):
    """``POST /tokenize``: a text or a chat.

    Attributes:
        model: whose chat template; the base if it is left out.
        add_special_tokens: as a completion's prompt has them; None means that a text has
            them.
        return_token_strs: also return the tokens as the vocabulary spells them.
    """

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None
    ) = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeFields(RequestFields):
    """``POST /detokenize``."""

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    tokens: list[Any]

    @field_validator("tokens", mode="before")
    @classmethod
    def _ids(cls, given: object) -> object:
        if not isinstance(given, list):
            return given
        try:
            return check_ids(given, _INT64)
        except ValueError as error:
            right = (type(one) is int and 0 <= one <= _INT64 for one in given)
            at = next(at for at, fits in enumerate(right) if not fits)
            raise invalid(f"tokens[{at}]", f"is not a token id: give 0 to {_INT64}") from error


class TokenizeEndpoint(JsonEndpoint):
    """``POST /tokenize``."""

    method = "POST /tokenize"

    def _check(self, body: object) -> Answering:
        fields = parse_fields(TokenizeFields, body)
        adapter = _adapter(self._core, fields.model)
        if fields.messages is None and fields.prompt is None:
            raise invalid("prompt", "is missing: send it, or messages")
        if fields.messages is None:
            return Answering(partial(self._of_text, fields, adapter))
        if fields.prompt is not None:
            raise invalid("messages", "conflicts with prompt: send one of them")
        if fields.add_special_tokens:
            raise invalid(
                "add_special_tokens",
                "is not supported for messages: the chat template adds special tokens itself",
            )
        chat = ChatFields.model_construct(model="chat", messages=fields.messages)
        messages = chat_call(chat, self._core.base.name).input
        assert isinstance(messages, ChatMessages), "made of messages"
        return Answering(partial(self._of_chat, fields, adapter, messages))

    async def _of_text(self, fields: TokenizeFields, adapter: str, reply: Reply) -> None:
        assert fields.prompt is not None, "checked"
        special = fields.add_special_tokens is not False
        ids = await _tokenizing(self._core).of_text(
            fields.prompt, adapter, add_special_tokens=special
        )
        await self._send(fields, ids, reply)

    async def _of_chat(
        self, fields: TokenizeFields, adapter: str, chat: ChatMessages, reply: Reply
    ) -> None:
        ids = await _tokenizing(self._core).of_messages(chat.messages, adapter)
        await self._send(fields, ids, reply)

    async def _send(self, fields: TokenizeFields, ids: list[int], reply: Reply) -> None:
        core, names = self._core, None
        if fields.return_token_strs:
            name = core.generator.prompts.tokenizer.token_name
            names = await asyncio.to_thread(lambda: [name(token) for token in ids])
        answer = {
            "count": len(ids),
            "max_model_len": core.engine.info.longest_sequence,
            "tokens": ids,
            "token_strs": names,
        }
        await reply.json(200, answer, {})


class DetokenizeEndpoint(JsonEndpoint):
    """``POST /detokenize``."""

    method = "POST /detokenize"

    def _check(self, body: object) -> Answering:
        fields = parse_fields(DetokenizeFields, body)
        return Answering(partial(self._send, fields, _adapter(self._core, fields.model)))

    async def _send(self, fields: DetokenizeFields, adapter: str, reply: Reply) -> None:
        text = await _tokenizing(self._core).text(fields.tokens, adapter)
        await reply.json(200, {"prompt": text}, {})


def _tokenizing(core: Core) -> Tokenizing:
    return Tokenizing(core.generator.prompts, core.engine, core.tenants)


def _adapter(core: Core, model: str | None) -> str:
    """The adapter that a request names; empty for the base."""
    return "" if model is None or model == core.base.name else model
