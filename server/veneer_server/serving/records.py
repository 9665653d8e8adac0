"""Calls and their provenance, as frozen records without protobuf.

Each record checks its fields when it is built; the ranges are in `serving.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from veneer_registry.adapter import AdapterRef, Tier

from veneer_server.serving import checks
from veneer_server.serving.answer_room import AnswerForm, ScoreForm
from veneer_server.serving.tool_use import Tool, ToolUse
from veneer_server.text.turns import TemplateOptions
from veneer_server.wire.messages import Constraint
from veneer_server.wire.sampling import RANGES

_PLAIN: Final = AnswerForm(ScoreForm(own=32, top=32))

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]


@dataclass(frozen=True, slots=True)
class PromptText:
    """Prompt text to tokenise unchanged."""

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            checks.refuse("prompt", "is empty: send at least one character")


@dataclass(frozen=True, slots=True)
class ChatMessages:
    """Messages (role, content, and the keys that `History` adds) for a chat template.

    Attributes:
        tools: the tools that the template shows to the model.
        drop_oldest: drop the oldest turns of a conversation that is too long, instead of
            refusing it; see `serving.generation`.
    """

    messages: tuple[Mapping[str, Any], ...]
    options: TemplateOptions = field(default_factory=TemplateOptions)
    tools: tuple[Tool, ...] = ()
    drop_oldest: bool = False

    def __post_init__(self) -> None:
        checks.check_messages(self.messages)


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids, not yet checked against the vocabulary; there may be millions."""

    ids: Sequence[int]

    def __post_init__(self) -> None:
        if not self.ids:
            checks.refuse("token_ids", "is empty: send at least one token")


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling options that a caller set, by their names in `SamplingParams`."""

    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            checks.check_number(
                f"sampling.{name}",
                self.given.get(name),
                allowed.least,
                allowed.most,
                allowed.fix,
            )
        checks.check_logit_bias(self.logit_bias)

    @property
    def logit_bias(self) -> Mapping[int, float]:
        """Token id to the bias added to its logit."""
        biases: Mapping[int, float] = self.given.get("logit_bias", {})
        return biases


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One generate call, over gRPC or HTTP.

    Attributes:
        adapter: ``name``, ``name@revision`` or ``name/alias``; empty for the base model.
        session_key: selects the target of an alias; the same key selects the same target.
        max_tokens: None means the server's default; 0, with echo, returns only the prompt.
        open_ended: without ``max_tokens``, the answer may use the rest of the context, unless
            the operator set a default.
        clamped: a ``max_tokens`` larger than the rest of the context is reduced to it, not
            refused.
        min_tokens: neither stop tokens nor stop strings end the output before it has this many
            tokens.
        prompt_logprobs: report the prompt's log-probabilities, each with this many most likely
            tokens; None: only if ``echo`` and ``logprobs`` ask for them.
        truncate_prompt: keep only this many tokens at the end of the prompt; -1: as many as
            leave room for ``max_tokens``; None: refuse a prompt that is too long.
        include_reasoning: whether the caller wants to see the model's reasoning.
        n: number of samples for the prompt.
        use_prefix_cache: None means the server's default.
        cache_salt: cached prefixes are shared only among calls with the same salt.
        prediction: the answer that the caller expects: a draft, which makes an answer like it
            faster and never changes one. Without speculation it has no effect.
        priority: order among requests of the same tenant; lower starts earlier.
        tools: whether and how the answer may call tools; None if it may not.
        constraint_field: the caller's name for the constraint, for errors; empty means the
            gRPC contract's name.
        form: how the caller's API writes log-probabilities and token ids.
    """

    adapter: str
    input: PromptText | ChatMessages | PromptTokens
    sampling: Sampling
    max_tokens: int | None
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    echo: bool = False
    top_logprobs: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    use_prefix_cache: bool | None = None
    session_key: str = ""
    priority: int = 0
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    truncate_prompt: int | None = None
    include_reasoning: bool = True
    tools: ToolUse | None = None
    open_ended: bool = False
    clamped: bool = False
    cache_salt: str = ""
    prediction: str = ""
    constraint_field: str = field(default="", compare=False)
    form: AnswerForm = field(default=_PLAIN, compare=False)

    def __post_init__(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            checks.refuse(
                "stopping.max_tokens",
                "is 0: ask for at least 1 token, or leave it unset; 0 needs output.echo",
            )
        checks.check_min_tokens(self.min_tokens, self.max_tokens)
        checks.check_stops(self.stops, self.stop_token_ids)
        checks.check_output(self.n, self.logprobs, self.top_logprobs)
        checks.check_prompt_logprobs(self.prompt_logprobs)
        checks.check_truncation(self.truncate_prompt)
        if self.constraint is not None:
            checks.check_constraint(self.constraint, self.constraint_field)
        checks.check_priority(self.priority)
        checks.check_cache_salt(self.cache_salt)
        if len(self.session_key) > checks.MAX_SESSION_KEY:
            checks.refuse(
                "session_key",
                f"has {len(self.session_key)} characters: give at most "
                f"{checks.MAX_SESSION_KEY}",
            )

    @property
    def scored(self) -> bool:
        """Whether the answer contains more than generated text."""
        more = self.echo or self.logprobs or self.form.ids > 0
        return more or self.prompt_logprobs is not None

    @property
    def prompt_tops(self) -> int | None:
        """Number of most likely tokens to report with each prompt log-probability; None means
        no prompt log-probabilities."""
        if self.prompt_logprobs is not None:
            return self.prompt_logprobs
        return self.top_logprobs if self.logprobs and self.echo else None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which weights answered, and how long each phase took (seconds)."""

    base_model: str
    adapter: str = ""
    revision: str = ""
    weights_digest: str = ""
    tier: Tier | None = None
    queue_s: float = 0.0
    load_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0

    @classmethod
    def of(cls, base_model: str, ref: AdapterRef | None, name: str = "") -> Provenance:
        """Return a provenance without timings. Args: name: the caller's name for the
        adapter."""
        if ref is None:
            return cls(base_model)
        return cls(base_model, name, ref.revision, ref.weights_digest)
