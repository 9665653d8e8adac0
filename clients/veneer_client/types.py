"""What the clients take and give: frozen records, no protobuf.

Times are seconds, sizes are bytes, digests are 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import TypedDict

from veneer_registry.adapter import SHORT_REVISION, BaseFingerprint, Tier

__all__ = [
    "AdapterDetails",
    "AdapterInfo",
    "BaseModel",
    "Budgets",
    "Chat",
    "ChatMessage",
    "Chunk",
    "EvictMode",
    "Eviction",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "GenerationEnd",
    "Prompt",
    "Provenance",
    "Pushed",
    "ServerInfo",
    "ServingStatus",
    "Text",
    "Timings",
    "TokenLogprob",
    "Tokens",
    "Usage",
]

# ------------------------------------------------------------------------- input


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn; ``role`` is for example ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that the server renders with a chat template (the adapter's, if it
    ships one)."""

    messages: tuple[ChatMessage, ...]

    @classmethod
    def user(cls, content: str, *, system: str | None = None) -> Chat:
        """A chat of one user turn, after an optional system turn."""
        before = () if system is None else (ChatMessage("system", system),)
        return cls((*before, ChatMessage("user", content)))


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt that is tokenised as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt of token ids."""

    ids: tuple[int, ...]


Prompt = Text | Chat | Tokens


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of every generate method. What is left out is unset:
    the model's generation config decides, then temperature 1."""

    adapter: str
    """``name``, ``name@revision``, or nothing for the base model."""
    request_id: str
    """Echoed in the answer and in the server's log."""
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    """Unset: up to the context's end."""
    stop: Sequence[str]
    """Generation ends before the first of these strings."""
    ignore_eos: bool
    logprobs: bool
    """Log-probabilities of the raw distribution, one for each new token."""
    echo: bool
    """The text starts with the prompt; with ``logprobs``, also its log-probabilities."""
    timeout_s: float
    """Deadline of the whole call, retries included; unset: none."""


# ------------------------------------------------------------------------ answers


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """End of sequence, or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the context's end."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call; ``cached_prompt_tokens`` came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, as the server measured it.

    Attributes:
        queue_s: from arrival to the first step, without ``adapter_load_s``.
        adapter_load_s: waiting for the adapter to become resident.
        time_to_first_token_s, total_s: from arrival.
    """

    queue_s: float
    adapter_load_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which weights answered.

    Attributes:
        adapter: name, or "" for the base model.
        revision: the one current when the call was admitted, or "".
        weights_digest: of the adapter's tensors, or "".
        tier: where the adapter was found; None for the base model.
    """

    base_model: str
    adapter: str
    revision: str
    weights_digest: str
    tier: Tier | None
    timings: Timings

    @property
    def short(self) -> str:
        """``name@`` and 12 digits of the revision, or ``base``."""
        return f"{self.adapter}@{self.revision[:SHORT_REVISION]}" if self.adapter else "base"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream.

    Attributes:
        text: new text, never taken back; may lag behind ``token_ids``.
        logprobs: one for each of ``token_ids``, if asked for.
        prompt_logprobs: in the first chunk only, if asked for: one for each prompt
            token after the first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """What the end of a stream says."""

    request_id: str
    finish_reason: FinishReason
    usage: Usage
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer; see `Chunk` and `GenerationEnd` for its parts."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage
    provenance: Provenance


# ----------------------------------------------------------------------- adapters


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What the server knows of one revision.

    Attributes:
        rank: largest of any module.
        size: bytes that one resident copy takes.
        tier: nearest tier that holds it now.
        leases: requests admitted and not finished.
        last_used: None until first used since the server started.
        training: facts from the training manifest.
        current: the plain name resolves to this revision.
        etag: `delete` takes it, so that nothing newer is deleted.
    """

    name: str
    revision: str
    weights_digest: str
    base_model: str
    rank: int
    targets: tuple[str, ...]
    parameters: int
    size: int
    tier: Tier
    pinned: bool
    leases: int
    created: datetime
    last_used: datetime | None
    labels: Mapping[str, str]
    training: Mapping[str, str]
    current: bool
    etag: str
    has_chat_template: bool

    @property
    def short(self) -> str:
        """``name@`` and 12 digits of the revision."""
        return f"{self.name}@{self.revision[:SHORT_REVISION]}"


@dataclass(frozen=True, slots=True)
class AdapterDetails:
    """One adapter and all stored revisions of its name, newest first."""

    adapter: AdapterInfo
    revisions: tuple[AdapterInfo, ...]


@dataclass(frozen=True, slots=True)
class Pushed:
    """Outcome of a push.

    Attributes:
        published: False when the name already held this content, and for a dry run.
        replaced: another revision of the name was current before.
        warnings: sentences from the local check and the server.
        skipped: files of the folder that were not sent.
        sent_bytes: bytes of the files that were.
    """

    adapter: AdapterInfo
    published: bool
    replaced: bool
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    sent_bytes: int


class EvictMode(Enum):
    """What becomes of the requests that use an evicted adapter."""

    DRAIN = "drain"
    """They finish; memory is freed when the last one has."""
    FAIL_IF_BUSY = "fail_if_busy"
    """The eviction is refused."""
    ABORT = "abort"
    """They end with `AdapterEvicted`."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Outcome of an eviction; ``evicted`` is False while a drain waits."""

    evicted: bool
    freed_bytes: int


# ------------------------------------------------------------------------- server


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The resident base model; ``size`` in bytes."""

    name: str
    architecture: str
    quantization: str
    dtype: str
    parameters: int
    size: int
    fingerprint: BaseFingerprint


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits that the server runs with; bytes and counts."""

    host_adapter_bytes: int
    device_adapter_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_batch_tokens: int
    max_running: int
    max_queue: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is.

    Attributes:
        backend: what executes a step, for example ``torch``.
        context_length: longest prompt plus completion, in tokens.
        engine_starts: 1 unless the engine process failed.
    """

    version: str
    base_model: BaseModel
    device: str
    backend: str
    budgets: Budgets
    context_length: int
    uptime_s: float
    adapters_registered: int
    adapters_on_device: int
    engine_starts: int


class ServingStatus(Enum):
    """Answer of the standard health service."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"
