"""Base class of request objects, the treatment of unknown fields, and vLLM's extensions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from veneer_server.openai.http.body import Many
from veneer_server.serving.checks import MAX_TOP_LOGPROBS
from veneer_server.serving.generation import Generation
from veneer_server.serving.samples import Delta
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.text.turns import Effort
from veneer_server.wire.messages import PackedTops, unpack_tops

Unknown = Literal["refuse", "ignore", "warn"]
"""How to treat unknown fields: the values of ``--unknown-fields``."""

MAX_NAMED: Final = 16
"""Most names in the header ``veneer-ignored``."""
_LONGEST: Final = 64
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_.\[\]-]")


class Ignored:
    """Collects the fields and tools of one request that have no effect on its answer.

    Attributes:
        unknown: how to treat unknown fields and unsupported tools.
        counts: how many, by label of the metric: a known field's name, ``unknown`` or
            ``tools``.
    """

    def __init__(self, unknown: Unknown = "refuse") -> None:
        self.unknown = unknown
        self.counts: Counter[str] = Counter()
        self._named: dict[str, None] = {}
        self._asked = 0
        self._more = 0

    @property
    def strict(self) -> bool:
        """Whether unknown fields and unsupported tools are refused."""
        return self.unknown == "refuse"

    @property
    def crowded(self) -> bool:
        """Whether there are so many unknown fields that no similar names are suggested."""
        return self._asked >= MAX_NAMED

    def known(self, field: str) -> None:
        """Record a known field that has no effect."""
        self.counts[field] += 1

    def field(self, name: str) -> None:
        """Record an unknown field. Its name includes those of the objects that contain it."""
        self._asked += 1
        self._add("unknown", name)

    def tool(self, kind: str) -> None:
        """Record a tool of an unsupported type."""
        self._add("tools", f"tools.{kind}")

    def _add(self, label: str, name: str) -> None:
        # The caller chose this name, and it goes into a header.
        name = _NO_NAME.sub("?", name[:_LONGEST])
        if name in self._named:
            return
        self.counts[label] += 1
        if len(self._named) >= MAX_NAMED:
            self._more += 1
        else:
            self._named[name] = None

    @property
    def header(self) -> str:
        """Value of the header ``veneer-ignored``; empty if there is nothing to report."""
        if self.unknown != "warn":
            return ""
        more = [f"and {self._more} more"] if self._more else []
        return ", ".join([*self._named, *more])


def is_neutral(value: object) -> bool:
    """Whether an unknown member can be dropped because it is null or empty. SDKs send such
    members for fields that were never set."""
    return value is None or (isinstance(value, list | dict | str) and not value)


@cache
def _members_of(kind: type[BaseModel]) -> frozenset[str]:
    return frozenset(each.alias or name for name, each in kind.model_fields.items())


class Fields(BaseModel):
    """Base class of request objects. Drops null members and empty unknown ones. Other unknown
    members are refused, unless the validation's context is an `Ignored` that allows them.

    Attributes:
        where: the object's path in its request.
        refused: unknown members that are always refused, because they would change the
            answer; None: all unknown members.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    where: ClassVar[str] = ""
    refused: ClassVar[frozenset[str] | None] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _members(cls, given: object, info: ValidationInfo) -> object:
        if not isinstance(given, dict):
            return given
        known = _members_of(cls)
        ignored = info.context if isinstance(info.context, Ignored) else Ignored()
        kept = {
            name: value for name, value in given.items() if name in known and value is not None
        }
        for name, value in given.items():
            if name in known or is_neutral(value):
                continue
            if ignored.strict or cls.refused is None or name in cls.refused:
                # Only one: pydantic makes an error for each, which is slow for many.
                return {**kept, name: value}
            ignored.field(f"{cls.where}.{name}")
        return kept


# -------------------- fields
# vLLM's extensions: fields of both chats and completions, and fields of chats only.

_INT32: Final = (1 << 31) - 1
_UINT32: Final = (1 << 32) - 1

Verbosity = Literal["low", "medium", "high"]


class SharedExtensions(Fields):
    """Fields of both chats and completions.

    Attributes:
        prompt_logprobs: number of top tokens reported with each prompt token's log-probability.
        return_token_ids: whether the answer includes the token ids of prompt and answer.
        return_tokens_as_token_ids: name tokens ``token_id:17`` in log-probabilities.
        truncate_prompt_tokens: see `GenerateCall.truncate_prompt`.
        cache_salt: only requests with the same salt share prefixes in the cache.
    """

    min_tokens: Annotated[int, Field(ge=0, le=_UINT32)] = 0
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    guided_grammar: str | None = None
    cache_salt: str = ""


class ChatExtensions(Fields):
    """Fields of chats only.

    Attributes:
        include_reasoning: whether the answer shows the model's reasoning.
        enable_thinking: sets the template's variable of that name.
        verbosity: likewise.
        add_generation_prompt: unset means yes, unless ``continue_final_message``.
    """

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    verbosity: Verbosity | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


# -------------------- answers
# vLLM's additions to answers: token ids, and the prompt's log-probabilities.

Json = dict[str, Any]


def labels(fields: SharedExtensions, tokenizer: TextTokenizer) -> Callable[[int], str]:
    """Return the function that names tokens in log-probabilities."""
    if fields.return_tokens_as_token_ids:
        return "token_id:{}".format
    return tokenizer.token_label


class Additions:
    """Builds the members that a request asked for beyond OpenAI's answer. Most requests ask for
    none; then every object is empty."""

    def __init__(
        self, fields: SharedExtensions, tokenizer: TextTokenizer, *, several: bool
    ) -> None:
        """Args: several: whether several choices repeat a prompt's members."""
        self.token_ids = fields.return_token_ids
        self._prompt_tops = fields.prompt_logprobs
        self._label = tokenizer.token_label
        self._several = several
        self._ids: dict[int, list[int]] = {}
        self._prompts: dict[int, Json] = {}

    def add(self, at: int, prompt: int, generation: Generation, delta: Delta) -> None:
        """Keep the token ids and prompt scores in a delta of choice ``at``."""
        if self.token_ids:
            self._ids.setdefault(at, []).extend(delta.tokens)
            self._of(prompt).setdefault("prompt_token_ids", _ids(generation.prompt.ids))
        if self._prompt_tops is not None and delta.prompt_logprobs is not None:
            assert delta.prompt_ranks is not None, "asked for with prompt_logprobs"
            each = (
                generation.prompt.ids[1:],
                delta.prompt_logprobs,
                delta.prompt_top_logprobs or [b""] * len(delta.prompt_logprobs),
                delta.prompt_ranks,
            )
            # As in vLLM, each of a completion's choices repeats them. Their JSON is made once.
            self._of(prompt)["prompt_logprobs"] = Many(
                len(generation.prompt.ids),
                lambda: chain((None,), map(self._scores, *each)),
                at_once=4,
                keep=self._several,
            )

    def of_prompt(self, prompt: int) -> Json:
        """A prompt's members in a complete answer."""
        return self._prompts.get(prompt, {})

    def of_choice(self, at: int) -> Json:
        """A choice's members in a complete answer."""
        return {"token_ids": _ids(self._ids.get(at, []))} if self.token_ids else {}

    def of_start(self, generation: Generation) -> Json:
        """A prompt's members in a choice's first chunk."""
        return {"prompt_token_ids": _ids(generation.prompt.ids)} if self.token_ids else {}

    def of_delta(self, delta: Delta) -> Json:
        """A choice's members in the chunk with the delta's tokens."""
        return {"token_ids": _ids(delta.tokens)} if self.token_ids else {}

    def _of(self, prompt: int) -> Json:
        return self._prompts.setdefault(prompt, {})

    def _scores(self, token: int, logprob: float, packed: PackedTops, rank: int) -> Json:
        """Scores by token id, the prompt's own token first. If that is among the top tokens,
        its rank is its position there, so that no two entries have the same rank."""
        tops = list(unpack_tops(packed))
        ranks = {token: rank} | {other: place for place, (other, _) in enumerate(tops, 1)}
        return {
            str(other): {
                "logprob": score,
                "rank": ranks[other],
                "decoded_token": self._label(other),
            }
            for other, score in ((token, logprob), *(top for top in tops if top[0] != token))
        }


def _ids(ids: Sequence[int]) -> Many:
    return Many(len(ids), lambda: ids)
