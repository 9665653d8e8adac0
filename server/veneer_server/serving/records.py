"""What a call asks for and what it is told, as frozen records without protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from veneer_registry.adapter import Tier

from veneer_server.wire.messages import Constraint

__all__ = [
    "ChatMessages",
    "FinishReason",
    "GenerateCall",
    "PromptText",
    "PromptTokens",
    "Provenance",
    "Sampling",
]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class PromptText:
    """Text to be tokenised as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatMessages:
    """Messages (role, content) for a chat template."""

    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids, not yet checked against the vocabulary; there may be millions."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling as given; None is unset. ``temperature`` 0 is greedy, ``top_k`` 0 off."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A checked `GenerateRequest`.

    Attributes:
        adapter: ``name``, ``name@revision`` or ``name/alias``; empty for the base model.
        session_key: which target of an alias answers: the same key, the same one.
        max_tokens: None means the server's default.
        n: samples for the same prompt.
        use_prefix_cache: None means the server's default.
    """

    adapter: str
    input: PromptText | ChatMessages | PromptTokens
    sampling: Sampling
    max_tokens: int | None
    stops: tuple[str, ...]
    ignore_eos: bool
    logprobs: bool
    echo: bool
    top_logprobs: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    use_prefix_cache: bool | None = None
    session_key: str = ""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which weights answered, and how long what took (seconds)."""

    base_model: str
    adapter: str = ""
    revision: str = ""
    weights_digest: str = ""
    tier: Tier | None = None
    queue_s: float = 0.0
    load_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
