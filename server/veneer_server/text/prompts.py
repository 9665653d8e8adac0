"""Turns a caller's input into token ids, without blocking the event loop."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from veneer_registry.errors import ContextTooLong, InvalidField, TemplateFailed

from veneer_server.logs import get_logger
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.text.bound import Lanes
from veneer_server.text.replies import (
    TAGS,
    THINK,
    Tags,
    Thinking,
    tags_of,
    thinking_of,
)
from veneer_server.text.template import ChatTemplate, in_words, needs_words, read_base_template
from veneer_server.text.template_renderer import QUICK_LIMIT_S, RENDER_LIMIT_S, Renderer
from veneer_server.text.tokenizer import TextTokenizer, TooManyTokens
from veneer_server.text.tool_calls import CallFormat, family_of, knows_tools
from veneer_server.text.turns import TemplateOptions

INLINE_CHARACTERS: Final = 2000
"""Longer texts are tokenized in a thread; shorter ones take about a millisecond."""


MAX_CUT: Final = 1 << 16
"""Most tokens of a prompt that will be truncated, unless the context allows more."""

_log = get_logger(__name__)

Reasoning = Literal["auto", "think", "mistral", "none"]
"""Which answers to chats may begin with reasoning in tags: ``auto``, those whose template names
the tags; ``think`` and ``mistral``, all answers, in the tags of that name; ``none``, none."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as token ids (at least one).

    Attributes:
        thinking: which part of the answer may be reasoning.
        tags: the tags around the reasoning.
    """

    text: str
    ids: list[int]
    thinking: Thinking = Thinking.NONE
    tags: Tags = THINK


_PLAIN: Final = TemplateOptions()


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

    @property
    def to_cut(self) -> Room:
        """The limits for a prompt that will be truncated to its last tokens."""
        return replace(self, tokens=max(self.tokens, MAX_CUT))


ROLES: Final = ("system", "user", "assistant", "tool", "developer", "function")
"""Roles in common use in chat templates and in OpenAI's API."""


def check_roles(messages: Sequence[Mapping[str, Any]], template: str) -> None:
    """Raises InvalidField for a role that is neither in common use nor named by the template.

    Most templates print any role that they get, and the model somehow answers a role that it
    does not know: without this check, nobody would notice a misspelling.

    The template is searched only once, however many messages there are.
    """
    unknown = {message["role"] for message in messages}.difference(ROLES)
    if unknown:
        # A template names a role between quotes: look at all text between two of them.
        unknown = unknown.difference(template.split("'")[1:-1], template.split('"')[1:-1])
    for at, message in enumerate(messages):
        role = message["role"]
        if role not in unknown:
            continue
        field = f"messages[{at}].role"
        near = difflib.get_close_matches(role, ROLES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidField(
            # Not the role itself: it may be anything that a caller sent, even a secret.
            f"{field} is not a role: give {', '.join(ROLES[:4])} or {ROLES[4]}, or one that "
            f"the chat template names{hint}",
            metadata={"field": field} | ({"did_you_mean": near[0]} if near else {}),
        )


class Prompts:
    """Makes prompts: tokenizes text, and renders chats with an adapter's template or the
    base's.

    Close it to end its threads and processes.
    """

    def __init__(self, folder: Path, reasoning: Reasoning = "auto") -> None:
        """Args:
        folder: the base model's Hugging Face folder.

        Raises:
            TokenizerUnsupported, TemplateFailed: the folder cannot be served.
        """
        self.tokenizer = TextTokenizer.from_folder(folder)
        self.names = self.tokenizer.longest_names()
        source, special = read_base_template(folder)
        if source is not None:
            ChatTemplate(source, special)  # raises if it is not a valid template
        self._base_source = source
        self._folder = folder
        # The operator chose this template; callers cannot get others compiled in its process.
        self._base = Renderer(special, whose="the base's", compile_limit_s=RENDER_LIMIT_S)
        self._reasoning = reasoning
        self._uploaded = Renderer(special)
        self._lanes = Lanes()

    async def start(self) -> None:
        """Start the process that renders the base's template, and compile the template there,
        so that the first chat does not wait for it. Logs if it is slow. Optional."""
        if self._base_source is None:
            return
        with contextlib.suppress(TemplateFailed):  # it may reject these messages
            await self._base.render(self._base_source, [{"role": "user", "content": "Hello"}])
        if self._base.slow.process is not None:
            _log.warning(
                "the base's chat template is slow",
                limit_s=QUICK_LIMIT_S,
                hint="even one short message takes longer, so chats are rendered at low "
                "priority: simplify the template",
            )

    async def close(self) -> None:
        """End threads and processes; no call may follow."""
        await self._base.close()
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
            f"the prompt has {len(text)} bytes, but the {tokens} tokens that fit cover at "
            f"most {most}: shorten it",
            metadata={
                "field": field,
                "prompt_bytes": str(len(text)),
                "largest_bytes": str(most),
                "largest": str(tokens),
            },
        )

    async def from_text(self, text: str, room: Room, sender: Sender = NOBODY) -> Prompt:
        """Tokenize text unchanged, adding only the tokenizer's own special tokens such as BOS.

        Args:
            sender: the call's sender: senders take turns, here and in the other methods.

        Raises:
            ContextTooLong: the text has too many bytes to fit into ``room``.
            TooManyTokens: the text has too many tokens.
            InvalidField: there are no tokens, or one is outside the vocabulary.
        """
        ids = await self._tokenize(text, room, "prompt", sender, add_special_tokens=True)
        return Prompt(text, self._checked(ids, "prompt", room.vocab_size))

    async def from_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        adapter_template: str | None,
        room: Room,
        sender: Sender = NOBODY,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        options: TemplateOptions = _PLAIN,
    ) -> Prompt:
        """Render a chat and tokenize it.

        Args:
            tools: tools for the template; a template without support for tools gets them as
                text.
            options: options for the template.

        Raises:
            TemplateFailed: there is no template, or it rejects these messages, or it takes too
                long.
            QueueFull: too many of the sender's requests wait for the template.
            InvalidField: a message has an unknown role; see `check_roles`.
            ContextTooLong, TooManyTokens, InvalidField: as `from_text`.
        """
        check_roles(messages, self._source(adapter_template) or "")
        if needs_words(messages, tools) and not knows_tools(self._source(adapter_template)):
            messages, tools = in_words(messages, tools), ()
        source, renderer = adapter_template, self._uploaded
        if source is None:
            source, renderer = self._base_source, self._base
        if source is None:
            raise TemplateFailed(
                "neither the adapter nor the base model has a chat template: send `prompt` "
                "instead of `messages`",
                metadata={"cause": "no_template"},
            )
        text = await renderer.render(source, messages, sender, tools, options=options)
        ids = await self._tokenize(text, room, "messages", sender, add_special_tokens=False)
        checked = self._checked(ids, "messages", room.vocab_size)
        tags = TAGS.get(self._reasoning)
        if self._reasoning == "auto":
            tags = tags_of(self._source(adapter_template))
        if tags is None:
            return Prompt(text, checked)
        begun = messages[-1]["content"] if options.continue_final else ""
        return Prompt(text, checked, thinking_of(text, begun, tags), tags)

    def family(self, adapter_template: str | None, chosen: str = "auto") -> CallFormat | None:
        """The format of tool calls for an adapter's template, or else the base's; None if calls
        are not parsed.

        Args:
            chosen: the operator's choice for templates that support tools; ``auto``: detect it;
                ``none``: parse no calls.
        """
        template = self._source(adapter_template)
        if chosen == "auto" or (chosen != "none" and not knows_tools(template)):
            return family_of(template)
        return None if chosen == "none" else CallFormat(chosen)

    def thinks(self, adapter_template: str | None) -> bool:
        """Whether answers to chats may begin with reasoning, which is separated from the
        text."""
        if self._reasoning == "auto":
            return tags_of(self._source(adapter_template)) is not None
        return self._reasoning in TAGS

    def template(self, adapter_template: str | None) -> str:
        """The chat template of an adapter, or else the base's; empty if there is none."""
        return self._source(adapter_template) or ""

    def tokenizer_config(self) -> bytes:
        """The base's ``tokenizer_config.json``, with its chat template added, in whichever file
        of the folder that is. Reads a file."""
        told: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            read = json.loads((self._folder / "tokenizer_config.json").read_bytes())
            told = read if isinstance(read, dict) else {}
        told.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        return json.dumps({**told, "chat_template": self._base_source}).encode()

    def _source(self, adapter_template: str | None) -> str | None:
        return self._base_source if adapter_template is None else adapter_template

    async def from_ids(
        self, ids: Sequence[int], room: Room, sender: Sender = NOBODY, *, with_text: bool
    ) -> Prompt:
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
            text = await self._lanes.run(size, lambda: self.tokenizer.decode(checked), sender)
        return Prompt(text, checked)

    async def last(
        self, prompt: Prompt, count: int, sender: Sender = NOBODY, *, with_text: bool
    ) -> Prompt:
        """Return a prompt truncated to its last ``count`` tokens.

        Args:
            with_text: decode their text as well.
        """
        if len(prompt.ids) <= count:
            return prompt
        ids, text = prompt.ids[-count:], ""
        if with_text:
            text = await self._lanes.run(count, lambda: self.tokenizer.decode(ids), sender)
        return replace(prompt, text=text, ids=ids)

    async def token_ids(
        self, text: str, room: Room, sender: Sender = NOBODY, *, add_special_tokens: bool
    ) -> list[int]:
        """Tokenize any text, even an empty one. Raises ContextTooLong and TooManyTokens as
        `from_text`."""
        return await self._tokenize(
            text, room, "prompt", sender, add_special_tokens=add_special_tokens
        )

    async def expected(self, text: str, room: Room, sender: Sender = NOBODY) -> list[int]:
        """Tokenize the answer that a caller expects, up to a token that the model lacks.

        Raises:
            ContextTooLong: it has more tokens than ``room``.
        """
        try:
            ids = await self._tokenize(
                text, room, "prediction", sender, add_special_tokens=False
            )
        except TooManyTokens as error:
            raise ContextTooLong(
                f"the prediction has more tokens than the {room.tokens} that fit: shorten it",
                metadata={"field": "prediction", "largest": str(room.tokens)},
            ) from error
        known = (at for at, token in enumerate(ids) if token >= room.vocab_size)
        return ids[: next(known, len(ids))]

    async def text_of(self, ids: Sequence[int], sender: Sender = NOBODY) -> str:
        """Return the text of token ids, with the names of special tokens. The ids must have
        been checked."""
        return await self._lanes.run(len(ids), lambda: self.tokenizer.decode_all(ids), sender)

    async def _tokenize(
        self, text: str, room: Room, field: str, sender: Sender, *, add_special_tokens: bool
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
            sender,
        )

    def _checked(self, ids: list[int], field: str, vocab_size: int) -> list[int]:
        """Return the ids. Raises InvalidField if there are none, or one is not in the model's
        vocabulary."""
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
