"""Messages from the engine process to the front."""

from __future__ import annotations

from typing import Final, Literal

from veneer_registry.errors import VeneerError

from veneer_server.progress import StartPart
from veneer_server.wire.base import MemoryTier, Message, PackedTops, TierName, Tops


class StartProgress(Message, frozen=True):
    """Progress of one part of the startup, sent before `EngineInfo`."""

    part: StartPart


class EngineInfo(Message, frozen=True):
    """First message once an engine has started; sizes in bytes unless named otherwise.

    Attributes:
        backend: backend that executes steps: ``native (avx512-bf16)``, ``native (avx2)``, with
            ``, int8 activations`` inside if inputs are rounded to 8 bits, and ``, prebuilt`` if
            the kernels came with the wheel, or ``torch``.
        why_not_native: reason in words; empty if the native backend is used.
        int8_gain: what ``--int8-activations`` would gain, in words; empty if little.
        threads, why_threads: threads of a step on a CPU, and the reason for the number in
            words.
        kv_cache_tokens: capacity of the KV cache.
        longest_sequence: maximum tokens of prompt and completion: the context length, or fewer
            if the KV cache can never hold that many of one sequence.
        window_blocks: maximum KV blocks of a sequence, however long it is; None if a layer has
            no window.
        adapter_itemsize: bytes of one element of a resident adapter.
        load_seconds: from start to ready.
        max_batch_tokens, max_prefill_tokens: as configured, or fewer if such a step would take
            too long on this machine.
        step_seconds: duration of a step of one token, measured before serving.
        token_seconds: additional duration for each further token.
        longest_step_seconds: estimated duration of the longest step that can be planned.
        speculation: whether tokens are drafted, see `EngineConfig.speculation`.
    """

    device: str
    backend: str
    architecture: str
    parameters: int
    weights_bytes: int
    context_length: int
    vocab_size: int
    kv_cache_tokens: int
    adapter_itemsize: int
    load_seconds: float
    longest_sequence: int
    window_blocks: int | None = None
    why_not_native: str = ""
    int8_gain: str = ""
    max_batch_tokens: int = 0
    max_prefill_tokens: int = 0
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    longest_step_seconds: float = 0.0
    threads: int = 0
    why_threads: str = ""
    speculation: bool = False


class WireError(Message, frozen=True):
    """A `VeneerError` by its stable reason (see ``error_for_reason``)."""

    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None = None


class SequenceOutput(Message, frozen=True):
    """Output of one step for one sequence.

    Attributes:
        tokens: new token ids (one, or none if the sequence was cancelled).
        logprobs: raw log-probabilities of `tokens`, if requested.
        prompt_logprobs: one for each prompt token after the first, if requested; first
            output only.
        tier: tier where the adapter was found at submission; first output only.
        load_seconds: time that the sequence waited for its adapter; first output only.
        queue_seconds: other waiting time before its first step; first output only.
        finish: set in the last output.
        top_logprobs: for each of `tokens` the most likely tokens with their
            log-probabilities, likeliest first, if requested.
        prompt_top_logprobs: the same for `prompt_logprobs`, packed.
        prompt_ranks: rank of each of these prompt tokens, if requested: the number of tokens
            that are at least as probable, so 1 for the likeliest.
        cached_tokens: prompt tokens found in the prefix cache; first output only.
        step: number of the step that produced it (see `StepDone`); first output only.
        mixed: if `prompt_logprobs` are requested, whether a step that computed a part of the
            prompt also had rows of another adapter or of the base; first output only.
        accepted: number of `tokens` that speculation had drafted.
        rejected: tokens that it had drafted in vain.
    """

    sequence: int
    tokens: list[int]
    logprobs: list[float] | None = None
    prompt_logprobs: list[float] | None = None
    tier: TierName | None = None
    load_seconds: float = 0.0
    queue_seconds: float = 0.0
    finish: Literal["stop", "length", "cancelled"] | None = None
    top_logprobs: list[Tops] | None = None
    prompt_top_logprobs: list[PackedTops] | None = None
    cached_tokens: int = 0
    step: int = 0
    prompt_ranks: list[int] | None = None
    mixed: bool = False
    accepted: int = 0
    rejected: int = 0


class Prefilled(Message, frozen=True):
    """A step computed a part of a sequence's prompt and gave no token for the sequence.

    Attributes:
        tokens: leading prompt tokens computed so far, including those from the prefix cache.
        cached_tokens: prompt tokens found in the prefix cache.
    """

    sequence: int
    tokens: int
    cached_tokens: int


class SequenceFailed(Message, frozen=True):
    """A sequence ended with an error; the last message about it."""

    sequence: int
    error: WireError


class StepDone(Message, frozen=True):
    """One executed step, after its outputs.

    Attributes:
        step: number of steps executed since the engine started.
        seconds: wall time of the step.
        prefill_tokens, decode_rows: what the step computed, without drafts.
        adapters: number of distinct adapters in the step.
        prefix_asked, prefix_found: prompt tokens of the sequences that started in the step,
            and how many of them were in the prefix cache.
        extra_prefill, extra_decode: extra cost due to the size of adapters, in tokens, in
            addition to `prefill_tokens` and `decode_rows`; see `token_work`.
        drafted, accepted: draft tokens that the step verified, and those of them that became
            sequences' tokens.
    """

    step: int
    seconds: float
    prefill_tokens: int
    decode_rows: int
    adapters: int
    prefix_asked: int = 0
    prefix_found: int = 0
    extra_prefill: float = 0.0
    extra_decode: float = 0.0
    drafted: int = 0
    accepted: int = 0


class Occupancy(Message, frozen=True):
    """The engine's load; sent whenever it has changed.

    Attributes:
        running, waiting: number of sequences.
        waiting_for_adapter: number of waiting sequences whose adapter is not resident.
        kv_blocks_used, kv_blocks: KV blocks in use, and in total.
        kv_blocks_cached: unused blocks that hold a prefix.
        running_adapters, waiting_adapters: weights digests, sorted; at most 256 waiting ones,
            those that have waited longest.
    """

    running: int
    waiting: int
    waiting_for_adapter: int
    kv_blocks_used: int
    kv_blocks: int
    kv_blocks_cached: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()


class ResidencyChanged(Message, frozen=True):
    """New state of one adapter; sent on every change.

    Attributes:
        tier: nearest memory tier that holds the adapter, or ``disk`` for none.
        host_bytes, device_bytes: bytes used by all adapters in each tier.
        host_count, device_count: adapters in each tier; one may be in both.
    """

    weights_digest: str
    tier: TierName
    pinned: bool
    bytes: int
    host_bytes: int
    device_bytes: int
    host_count: int
    device_count: int


LOST: Final = "lost"


class AdapterLoaded(Message, frozen=True):
    """A load (to HOST) or activation (to DEVICE) succeeded; for metrics.

    ``stages`` maps ``read``, ``verify``, ``convert`` or ``copy`` to seconds. It also has
    ``lost`` (`LOST`) if a loader process ended or was killed before another did the work.
    """

    weights_digest: str
    source: Literal["disk", "host"]
    stages: dict[str, float]


EvictionCause = Literal["capacity", "budget", "admin", "abort"]


class Evicted(Message, frozen=True):
    """An adapter left a tier; for metrics.

    ``cause``: ``capacity`` (room for another), ``budget`` (a budget was lowered), ``admin``,
    or ``abort``.
    """

    weights_digest: str
    tier: MemoryTier
    cause: EvictionCause


class AdapterFailed(Message, frozen=True):
    """An adapter could not be loaded; sequences and operations that waited for it get their
    own error."""

    weights_digest: str
    error: WireError


ConstraintOutcome = Literal[
    "ok", "invalid", "compile_seconds", "memory", "mask_seconds", "fuel", "library"
]
"""``ok``, ``invalid`` (wrong or not supported), or the cause of the failure: a limit, or
``library``, a fault in the library."""


class ConstraintDone(Message, frozen=True):
    """The first compilation of a constraint ended (``trial``), or one failed while being
    followed (``generation``); for metrics.

    ``seconds``: CPU time of compiling; 0 if that did not finish.
    """

    phase: Literal["trial", "generation"]
    outcome: ConstraintOutcome
    seconds: float


class MatcherEnded(Message, frozen=True):
    """A matcher process ended, and another one took over; for metrics.

    ``cause``: ``limit`` (CPU time), ``killed`` (from outside), or ``fault``.
    """

    cause: Literal["limit", "killed", "fault"]


class BudgetsState(Message, frozen=True):
    """The budgets of adapters and their current use, in bytes.

    Use may exceed a budget while running sequences use adapters that will be evicted.
    """

    host_budget: int
    device_budget: int
    host_bytes: int
    device_bytes: int


class OperationDone(Message, frozen=True):
    """Answer to `Activate`, `Evict`, `Unpin`, `UpdateBudgets`, `Pause`, `ResetPrefixCache` or
    `Reference`.

    ``done`` is False if a drain still waits for running sequences; ``budgets`` answers
    `UpdateBudgets`, ``logprobs`` answers `Reference`.
    """

    operation: int
    error: WireError | None = None
    done: bool = True
    freed_bytes: int = 0
    budgets: BudgetsState | None = None
    logprobs: list[float] | None = None


class Pong(Message, frozen=True):
    """Answer of the step loop to `Ping`, with the steps executed so far."""

    number: int
    step: int


FromEngine = (
    StartProgress
    | EngineInfo
    | SequenceOutput
    | Prefilled
    | SequenceFailed
    | StepDone
    | Occupancy
    | ResidencyChanged
    | AdapterLoaded
    | AdapterFailed
    | Evicted
    | ConstraintDone
    | MatcherEnded
    | OperationDone
    | Pong
)


def wire_error(error: VeneerError) -> WireError:
    return WireError(error.reason, error.message, error.metadata, error.retry_after_s)
