"""vLLM's endpoints for token ids: ``/tokenize``, ``/detokenize`` and its ``generate``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator
from veneer_registry.errors import ContextTooLong

from veneer_server.access.caller import Caller
from veneer_server.engine_client.client import EngineClient
from veneer_server.openai.chat import ChatAnswer
from veneer_server.openai.choices import Choice, ChoiceAnswer, Json, Piece, TokenScore
from veneer_server.openai.core import ServingCore
from veneer_server.openai.extensions import Ignored, is_neutral
from veneer_server.openai.fields import (
    CommonFields,
    MessageItem,
    RequestFields,
    StreamOptions,
    parse_fields,
    parse_ids,
    with_fractions,
)
from veneer_server.openai.generate import GenerateEndpoint, GenerateJob
from veneer_server.openai.http.asgi import Reply
from veneer_server.openai.json_endpoint import Answering, JsonEndpoint
from veneer_server.openai.requests import (
    CHAT_SCORES,
    PROMPT_SCORES,
    adapter_named,
    answer_form,
    check_best_of,
    common,
    continues,
)
from veneer_server.openai.tools import template_messages
from veneer_server.serving.checks import MAX_MESSAGES, MAX_TOP_LOGPROBS, invalid
from veneer_server.serving.limits import check_ids, room
from veneer_server.serving.records import ChatMessages, GenerateCall, PromptTokens
from veneer_server.serving.tenants import Tenants
from veneer_server.serving.visible import Visible
from veneer_server.text.prompts import Prompts, Room
from veneer_server.text.tokenizer import TextTokenizer, TooManyTokens
from veneer_server.text.turns import TemplateOptions


class Tokenizing:
    """Tokenizes texts and chats as `Generator.admit` would. Returns at most as many tokens as a
    sequence may have, which bounds the size of an answer."""

    def __init__(self, prompts: Prompts, engine: EngineClient, tenants: Tenants) -> None:
        self._prompts = prompts
        self._engine = engine
        self._tenants = tenants

    async def of_text(
        self, text: str, model: str, caller: Caller, *, add_special_tokens: bool
    ) -> list[int]:
        """The tokens of a text. Raises ContextTooLong, AdapterNotFound.

        Args:
            model: an adapter that the caller sees, or empty for the base. It does not change
                the tokens.
        """
        await self._template(model, caller)
        try:
            return await self._prompts.token_ids(
                text, self._room, caller.sender, add_special_tokens=add_special_tokens
            )
        except TooManyTokens as error:
            raise self._too_many(error.count) from None

    async def of_chat(self, chat: ChatMessages, model: str, caller: Caller) -> list[int]:
        """The tokens of a chat, by the adapter's template or the base's.

        Raises:
            ContextTooLong, AdapterNotFound: as `of_text`.
            TemplateFailed, QueueFull: as `Prompts.from_messages`.
        """
        try:
            return await self._ids_of(chat, model, caller)
        except TooManyTokens as error:
            raise self._too_many(error.count, "messages") from None

    async def count(self, chat: ChatMessages, model: str, caller: Caller) -> int:
        """Count a chat's tokens. The count may exceed what a sequence may have, unless counting
        would take long. Raises as `of_chat`."""
        try:
            return len(await self._ids_of(chat, model, caller))
        except TooManyTokens as error:
            if error.count is None:
                raise self._too_many(None, "messages") from None
            return error.count

    async def _ids_of(self, chat: ChatMessages, model: str, caller: Caller) -> list[int]:
        template = await self._template(model, caller)
        prompt = await self._prompts.from_messages(
            chat.messages,
            template,
            self._room,
            caller.sender,
            tools=[tool.for_template() for tool in chat.tools],
            options=chat.options,
        )
        return prompt.ids

    async def text(self, ids: Sequence[int], model: str, caller: Caller) -> str:
        """The text of tokens. Raises InvalidField, ContextTooLong, AdapterNotFound."""
        await self._template(model, caller)
        info = self._engine.info
        if len(ids) > info.longest_sequence:
            room(info, None, len(ids))
        check_ids(info, "tokens", ids)
        return await self._prompts.text_of(ids, caller.sender)

    async def _template(self, model: str, caller: Caller) -> str | None:
        """The adapter's chat template; None if it has none."""
        if not model:
            return None
        home = await self._tenants.current(caller)
        visible = Visible(self._tenants)
        _, lease = visible.acquire(home, model, "")
        with lease:
            return lease.record.manifest.chat_template

    @property
    def _room(self) -> Room:
        info = self._engine.info
        return Room(info.vocab_size, info.longest_sequence)

    def _too_many(self, count: int | None, field: str = "prompt") -> ContextTooLong:
        most = self._engine.info.longest_sequence
        shown = "far more" if count is None else str(count)
        return ContextTooLong(
            f"the prompt has {shown} tokens, but sequences have at most {most}, and no more "
            "are returned: shorten it",
            metadata={"field": field, "largest": str(most)},
        )


# -------------------- tokenize
# ``/tokenize`` and ``/detokenize``, as in vLLM.

_INT64 = (1 << 63) - 1


class TokenizeFields(RequestFields):
    """``POST /tokenize``: a text or a chat.

    Attributes:
        model: the adapter whose chat template is used; the base if it is left out.
        add_special_tokens: whether to add the special tokens of a completion's prompt to a
            text; None: yes. A chat has those of its template.
        return_token_strs: also return the tokens as the vocabulary spells them.
    """

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[MessageItem], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None
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
            return parse_ids(given, _INT64)
        except ValueError as error:
            right = (type(one) is int and 0 <= one <= _INT64 for one in given)
            at = next(at for at, fits in enumerate(right) if not fits)
            raise invalid(f"tokens[{at}]", f"is not a token id: give 0 to {_INT64}") from error


class TokenizeEndpoint(JsonEndpoint):
    """``POST /tokenize``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        fields = parse_fields(TokenizeFields, body)
        adapter = _adapter(self._core, fields.model)
        if fields.messages is None and fields.prompt is None:
            raise invalid("prompt", "is missing: send it, or messages")
        if fields.messages is None:
            return Answering(partial(self._of_text, fields, adapter, caller))
        if fields.prompt is not None:
            raise invalid("messages", "conflicts with prompt: send one of them")
        if fields.add_special_tokens:
            raise invalid(
                "add_special_tokens",
                "is not supported for messages: the chat template adds special tokens itself",
            )
        options = TemplateOptions.of({}, None, None, continues(fields.messages))
        chat = ChatMessages(template_messages(fields.messages), options)
        return Answering(partial(self._of_chat, fields, adapter, chat, caller))

    async def _of_text(
        self, fields: TokenizeFields, adapter: str, caller: Caller, reply: Reply
    ) -> None:
        assert fields.prompt is not None, "checked"
        special = fields.add_special_tokens is not False
        ids = await tokenizing(self._core).of_text(
            fields.prompt, adapter, caller, add_special_tokens=special
        )
        await self._send(fields, ids, reply)

    async def _of_chat(
        self,
        fields: TokenizeFields,
        adapter: str,
        chat: ChatMessages,
        caller: Caller,
        reply: Reply,
    ) -> None:
        ids = await tokenizing(self._core).of_chat(chat, adapter, caller)
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

    def _check(self, body: object, caller: Caller) -> Answering:
        fields = parse_fields(DetokenizeFields, body)
        adapter = _adapter(self._core, fields.model)
        return Answering(partial(self._send, fields, adapter, caller))

    async def _send(
        self, fields: DetokenizeFields, adapter: str, caller: Caller, reply: Reply
    ) -> None:
        text = await tokenizing(self._core).text(fields.tokens, adapter, caller)
        await reply.json(200, {"prompt": text}, {})


def tokenizing(core: ServingCore) -> Tokenizing:
    """Return a `Tokenizing` for requests."""
    return Tokenizing(core.generator.prompts, core.engine, core.tenants)


def _adapter(core: ServingCore, model: str | None) -> str:
    """The adapter that a request names; empty for the base."""
    return "" if model is None else adapter_named(model, core.base.name)


# -------------------- token generate
# ``POST /inference/v1/generate``: token ids in, token ids out, as in vLLM.

_NO_EFFECT: Final = frozenset(
    {
        "detokenize",
        "flat_logprobs",
        "output_kind",
        "skip_clone",
        "skip_special_tokens",
        "spaces_between_special_tokens",
    }
)
"""Sampling parameters about an answer's text. They have no effect, as answers have no text."""

_REFUSED: Final = {
    "features": "only token ids are served: leave it out",
    "kv_transfer_params": "this server computes the prompt itself: leave it out",
}

_NO_SAMPLING: Final = (
    "echo",
    "model",
    "priority",
    "prompt",
    "stream",
    "stream_options",
    "user",
)
"""Fields of a completion that are not sampling parameters."""


class TokensFields(RequestFields):
    """``POST /inference/v1/generate``.

    Attributes:
        token_ids: the prompt.
        model: an adapter; the base if it is left out.
        cache_salt: if given, the request does not use the prefix cache.
    """

    token_ids: list[Any]
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    cache_salt: str = ""
    priority: int = 0
    request_id: Annotated[str, Field(max_length=256)] = ""

    @field_validator("token_ids", mode="before")
    @classmethod
    def _ids(cls, given: object) -> object:
        if not isinstance(given, list):
            return given
        if not given:
            raise ValueError("is empty: send at least one")
        return parse_ids(given)


@with_fractions
class TokenSampling(CommonFields):
    """``sampling_params``, together with the request's fields beside them.

    Attributes:
        logprobs: number of top tokens per position; 0 gives only the chosen token's.
    """

    add_special_tokens: Literal[True] = True
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None


def sampling_fields(fields: TokensFields, base: str, ignored: Ignored) -> TokenSampling:
    """The sampling parameters, checked. Raises InvalidField."""
    options = {
        name: value for name, value in fields.sampling_params.items() if name not in _NO_EFFECT
    }
    if wrong := next((name for name in _NO_SAMPLING if name in options), None):
        raise invalid(f"sampling_params.{wrong}", "is not a sampling parameter: leave it out")
    salted = {"use_prefix_cache": False} if fields.cache_salt else {}
    beside = {
        "model": fields.model or base,
        "stream": fields.stream,
        "stream_options": fields.stream_options.model_dump(),
        "priority": fields.priority,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    return parse_fields(TokenSampling, {**options, **salted, **beside}, ignored)


def tokens_call(fields: TokensFields, sampling: TokenSampling, base: str) -> GenerateCall:
    """The call for a request. Raises InvalidField."""
    check_best_of(sampling.best_of, sampling.n)
    scored = [PROMPT_SCORES] if sampling.prompt_logprobs is not None else []
    form = answer_form(sampling, CHAT_SCORES, scored, prompt_copies=sampling.n)
    return GenerateCall(
        input=PromptTokens(fields.token_ids),
        form=replace(form, prompt_ids=0),
        max_tokens=sampling.max_tokens,
        open_ended=True,
        logprobs=sampling.logprobs is not None,
        top_logprobs=sampling.logprobs or 0,
        **common(sampling, base),
    )


class TokensAnswer(ChatAnswer):
    """Builds an answer without text, whole or as chunks. Its scores have a chat's form."""

    def __init__(
        self, sampling: TokenSampling, tokenizer: TextTokenizer, *, request_id: str
    ) -> None:
        ChoiceAnswer.__init__(
            self,
            sampling,
            tokenizer,
            prompts=1,
            logprobs=sampling.logprobs is not None,
            echo=False,
            request_id=request_id,
            fingerprint="",  # unused: these answers do not name the model
        )
        self._request_id = request_id

    def whole(self) -> Json:
        """See `Answer.whole`."""
        made = super().whole()
        return {
            "request_id": self._request_id,
            "choices": made["choices"],
            "prompt_logprobs": made.get("prompt_logprobs"),
            "kv_transfer_params": None,
            "usage": made["usage"],
        }

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Answer.chunks`. Chunks have no members about the prompt."""
        return ChoiceAnswer.chunks(self, piece)

    def _whole_choice(self, at: int, text: str, choice: Choice) -> Json:
        return {
            "index": at,
            "logprobs": self._logprob_object(choice.tokens),
            "finish_reason": choice.finish,
            **self._additions.of_choice(at),
        }

    def _choice_chunks(
        self, at: int, text: str, tokens: list[TokenScore], piece: Piece, choice: Choice
    ) -> Iterator[Json]:
        delta = piece.delta
        if delta.tokens or delta.finish is not None:
            yield {
                "index": at,
                "logprobs": self._logprob_object(tokens),
                "finish_reason": delta.finish,
                **self._additions.of_delta(delta),
            }

    def _chunk(self, choices: list[Json]) -> Json:
        made = super()._chunk(choices)
        usage = {"usage": made["usage"]} if "usage" in made else {}
        return {"request_id": self._request_id, "choices": choices, **usage}


class TokensEndpoint(GenerateEndpoint):
    """``POST /inference/v1/generate``."""

    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        core, ignored = self._core, self._ignored()
        for name, instead in _REFUSED.items():
            if isinstance(body, dict) and not is_neutral(body.get(name)):
                raise invalid(name, f"is not supported: {instead}")
        fields = parse_fields(TokensFields, body, ignored)
        sampling = sampling_fields(fields, core.base.name, ignored)
        call = tokens_call(fields, sampling, core.base.name)
        answer = TokensAnswer(
            sampling,
            core.generator.prompts.tokenizer,
            request_id=fields.request_id or caller.request_id,
        )
        return GenerateJob([call], answer, fields.stream, ignored)
