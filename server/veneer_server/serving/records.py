"""What a call asks for and what it is told, as frozen records without protobuf.

A record that exists has been checked: its ranges are in `serving.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from veneer_registry.adapter import Tier

from veneer_server.serving import checks
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

_ABOVE_0: Final = math.ulp(0.0)

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class PromptText:
    """Text to be tokenised as it stands."""

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            checks.refuse("prompt", "is empty: send at least one character")


@dataclass(frozen=True, slots=True)
class ChatMessages:
    """Messages (role, content) for a chat template."""

    messages: tuple[Mapping[str, str], ...]

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

    def __post_init__(self) -> None:
        most = checks.MAX_TEMPERATURE
        self._check("temperature", 0, most, f"give 0 (greedy) to {most:g}, or leave it unset")
        self._check("top_p", _ABOVE_0, 1, "give more than 0 and at most 1")
        self._check("min_p", 0, 1, "give 0 (off) to 1")
        least, most = checks.MIN_REPETITION_PENALTY, checks.MAX_REPETITION_PENALTY
        self._check("repetition_penalty", least, most, f"give {least:g} to {most:g}; 1 is off")
        most = checks.MAX_PENALTY
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -most, most, f"give {-most:g} to {most:g}; 0 is off")
        checks.check_logit_bias(self.logit_bias)

    def _check(self, name: str, least: float, most: float, fix: str) -> None:
        checks.check_number(f"sampling.{name}", getattr(self, name), least, most, fix)


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One call for tokens, whichever door it came through.

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

    def __post_init__(self) -> None:
        if self.max_tokens == 0:
            checks.refuse(
                "stopping.max_tokens", "is 0: ask for at least 1 token, or leave it unset"
            )
        checks.check_stops(self.stops, self.stop_token_ids)
        checks.check_output(self.n, self.logprobs, self.top_logprobs)
        if self.constraint is not None:
            checks.check_constraint(self.constraint)
        if len(self.session_key) > checks.MAX_SESSION_KEY:
            checks.refuse(
                "session_key",
                f"has {len(self.session_key)} characters: give at most "
                f"{checks.MAX_SESSION_KEY}",
            )


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
