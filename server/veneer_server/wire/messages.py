"""The wire between front and engine process: frozen messages, MessagePack, one socket.

Two closed unions, `ToEngine` and `FromEngine`. A frame is a 4-byte big-endian
length and one MessagePack array of messages, so that a whole step's output is
one frame. No torch and no grpc may be imported here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, Literal

import msgspec
from veneer_registry.errors import (
    VeneerError,
)

from veneer_server.progress import Part

__all__ = [
    "Activate",
    "AdapterFailed",
    "AdapterLoaded",
    "AdapterSource",
    "BudgetsState",
    "Cancel",
    "Constraint",
    "ConstraintDone",
    "ConstraintLimits",
    "ConstraintOutcome",
    "EngineConfig",
    "EngineInfo",
    "Evict",
    "EvictMode",
    "Evicted",
    "FromEngine",
    "Loading",
    "MatcherEnded",
    "MemoryTier",
    "Occupancy",
    "OperationDone",
    "Ping",
    "Pong",
    "Reference",
    "Residency",
    "SamplingParams",
    "SequenceFailed",
    "SequenceOutput",
    "SequenceRequest",
    "StepDone",
    "Stop",
    "Submit",
    "TierName",
    "ToEngine",
    "Tops",
    "Unpin",
    "UpdateBudgets",
    "WireError",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
    "wire_error",
]

TierName = Literal["disk", "host", "device"]

MemoryTier = Literal["host", "device"]

EvictMode = Literal["drain", "fail_if_busy", "abort", "forget"]

Tops = list[tuple[int, float]]
"""The most likely tokens at one place with their log-probabilities."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all wire types."""


# --------------------------------------------------------------- configuration


class ConstraintLimits(Message, frozen=True):
    """What one constraint may take, and all of them. Times are of CPU, sizes in bytes.

    Attributes:
        workers: constraints that are compiled at once.
        compile_seconds, memory: of compiling one; ``memory`` also of following it.
        mask_seconds: of finding the tokens that may follow, each time.
        fuel: the same in the library's own count (`step_lexer_fuel`).
        matcher_memory: of the process that follows sequences, for all of them together; the
            one for slow ones has half of it.
    """

    workers: int = 2
    compile_seconds: float = 0.5
    memory: int = 16 << 20
    mask_seconds: float = 0.1
    fuel: int = 50_000
    matcher_memory: int = 48 << 20


class EngineConfig(Message, frozen=True):
    """Everything the engine process needs, fixed at its start.

    Attributes:
        base_folder: local Hugging Face folder of the base model.
        cache_folder: where 4-bit checkpoints are kept.
        base_name: logical name, for messages.
        log_format: of the engine's lines on standard error, see `logs`.
        weights_fingerprint: `BaseFingerprint.weights`; keys the 4-bit cache.
        device: ``cpu`` or ``cuda``; ``auto`` is resolved by the engine.
        quantization: ``nf4`` and ``fp4`` are bitsandbytes with double quantization.
        dtype: of activations, KV cache and adapters.
        backend: ``native`` and ``torch`` insist on one, see `engine.execution.backend_choice`.
        native_instructions: of the native kernels; ``auto`` is the most that the CPU has.
        threads: of a step; 0 means the number of usable cores.
        max_batch_tokens: most tokens computed in one step.
        max_prefill_tokens: most prompt tokens in a step that also decodes.
        max_running: most sequences running at once.
        block_size: tokens a KV block holds.
        kv_cache_bytes, host_adapter_bytes, device_adapter_bytes: budgets.
        load_workers: threads that read and convert adapters.
        prefix_cache: keep the K and V of prefixes and share them.
        exact: results do not depend on what shares a step; no prefix cache then.
        constraints: bounds of constrained output.
    """

    base_folder: str
    cache_folder: str
    base_name: str
    weights_fingerprint: str
    log_format: Literal["console", "json"] = "console"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "native", "torch"] = "auto"
    native_instructions: Literal["auto", "avx512-bf16", "avx2"] = "auto"
    threads: int = 0
    max_batch_tokens: int = 512
    max_prefill_tokens: int = 128
    max_running: int = 64
    block_size: int = 16
    kv_cache_bytes: int = 1 << 30
    host_adapter_bytes: int = 2 << 30
    device_adapter_bytes: int = 1 << 30
    load_workers: int = 1
    prefix_cache: bool = True
    exact: bool = False
    constraints: ConstraintLimits = ConstraintLimits()


class Loading(Message, frozen=True):
    """Before `EngineInfo`: how far a part of the start is."""

    part: Part


class EngineInfo(Message, frozen=True):
    """First message from an engine that is started; sizes in bytes unless named otherwise.

    Attributes:
        backend: what executes a step: ``native (avx512-bf16)``, ``native (avx2)``, either with
            ``, prebuilt`` inside where the kernels came with the wheel, or ``torch``.
        why_not_native: in words; empty where the native one serves.
        kv_cache_tokens: tokens that the KV cache holds in all.
        adapter_itemsize: bytes of one number of a resident adapter.
        load_seconds: from start to ready.
        max_batch_tokens, max_prefill_tokens: as configured, or fewer where a step of so
            many would take too long on this machine.
        step_seconds: a step of one token, as measured before serving.
        token_seconds: each further token of it.
        longest_step_seconds: the longest step that may be planned, by these.
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
    why_not_native: str = ""
    max_batch_tokens: int = 0
    max_prefill_tokens: int = 0
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    longest_step_seconds: float = 0.0


# ------------------------------------------------------------ front to engine


class AdapterSource(Message, frozen=True):
    """Where the engine finds the weights of one revision.

    Attributes:
        weights_digest: key of the resident copy; verified when read.
        folder: local folder with ``adapter_config.json`` and
            ``adapter_model.safetensors`` (made by the registry's store).
        parameters: numbers in all A and B; a resident copy takes this many times
            `EngineInfo.adapter_itemsize` bytes.
        name: for messages only.
    """

    weights_digest: str
    folder: str
    parameters: int
    name: str


class SamplingParams(Message, frozen=True):
    """Resolved sampling: nothing is unset any more.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        seed: the random stream of this request; the same seed, request and
            logits give the same tokens.
        repetition_penalty: of prompt and output; 1 is off.
        presence_penalty, frequency_penalty: of the output; 0 is off.
        logit_bias: added to the logits of these token ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)

    @property
    def needs_token_counts(self) -> bool:
        """Choosing a token takes the tokens before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class Constraint(Message, frozen=True):
    """What the output must be; the front has checked that it compiles.

    Attributes:
        text: a JSON schema, a regular expression, or a JSON array of strings.
    """

    kind: Literal["json_schema", "regex", "choice"]
    text: str


class SequenceRequest(Message, frozen=True):
    """What a sequence is to be: made once, by `serving.generation`, and then only passed on.

    Lengths and ranges have been checked.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most new tokens, at least 1, within the context.
        prompt_logprobs: also report the prompt's log-probabilities.
        top_logprobs: most likely tokens to report beside each log-probability.
        stop_token_ids: end the sequence, beside the model's own.
        use_prefix_cache: K and V of other sequences with the same prefix may be used.
        cache_scope: prefixes are shared only within a scope.
        deadline: when the first token must have come, on the monotonic clock, which the
            processes of a machine share; a sequence that cannot meet it is refused.
        caller: who asks, as far as that is known; callers take turns where they wait for
            a constraint to be compiled.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    adapter: AdapterSource | None = None
    ignore_eos: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    constraint: Constraint | None = None
    use_prefix_cache: bool = True
    cache_scope: str = ""
    deadline: float | None = None
    caller: str = ""


class Submit(Message, frozen=True):
    """A new sequence.

    Attributes:
        sequence: id chosen by the engine client, never used twice.
    """

    sequence: int
    request: SequenceRequest


class Cancel(Message, frozen=True):
    """End a sequence now; answered by a `SequenceOutput` with ``cancelled``
    unless it has finished already."""

    sequence: int


class Activate(Message, frozen=True):
    """Bring an adapter to ``host`` or ``device``; answered by `OperationDone`."""

    operation: int
    adapter: AdapterSource
    tier: MemoryTier = "device"
    pin: bool = False


class Evict(Message, frozen=True):
    """Free an adapter's memory; answered by `OperationDone`.

    ``drain`` frees it when the sequences that run now have ended: others wait, and load it
    anew. ``fail_if_busy`` refuses while there is a sequence, ``abort`` ends them with
    ADAPTER_EVICTED. ``forget`` is for weights that no name has any more: it frees them when
    the last of their sequences, waiting ones included, has ended.
    """

    operation: int
    weights_digest: str
    mode: EvictMode = "drain"
    unpin: bool = False


class Unpin(Message, frozen=True):
    """Remove an adapter's pin, free nothing; answered by `OperationDone`."""

    operation: int
    weights_digest: str


class UpdateBudgets(Message, frozen=True):
    """Change the bytes that adapters may take; answered by `OperationDone`.

    None leaves a budget as it is. What is past a lower one and not in use goes at once, the
    rest when what uses it has ended. Refused where pinned adapters alone take more.
    """

    operation: int
    host_bytes: int | None = None
    device_bytes: int | None = None


class Reference(Message, frozen=True):
    """Compute a prompt's log-probabilities apart from the serving path; answered by
    `OperationDone`.

    Attributes:
        tokens: at least one; each after the first gets its log-probability.
        adapter: read from its files, whether it is resident or not. None: the base alone.
    """

    operation: int
    tokens: list[int]
    adapter: AdapterSource | None = None


class Ping(Message, frozen=True):
    """Answered by the step loop itself, so an answer proves that it advances."""

    number: int


class Stop(Message, frozen=True):
    """End the engine process; the front has drained it."""


ToEngine = Submit | Cancel | Activate | Evict | Unpin | UpdateBudgets | Reference | Ping | Stop


# ------------------------------------------------------------ engine to front


class WireError(Message, frozen=True):
    """A `VeneerError` by its stable reason (see ``error_for_reason``)."""

    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None = None


class SequenceOutput(Message, frozen=True):
    """What one step gave one sequence.

    Attributes:
        tokens: new token ids (one, or none where it was cancelled).
        logprobs: raw log-probabilities of `tokens`, if asked for.
        prompt_logprobs: one for each prompt token after the first; with the
            first token only, if asked for.
        tier: tier that its adapter was found in at submission; first output only.
        load_seconds: time it waited for its adapter; first output only.
        queue_seconds: other time before its first step; first output only.
        finish: set in the last output.
        top_logprobs: for each of `tokens` the most likely tokens with their
            log-probabilities, likeliest first, if asked for.
        prompt_top_logprobs: the same for `prompt_logprobs`.
        cached_tokens: prompt tokens found in the prefix cache; first output only.
        step: number of the step that gave it (see `StepDone`); first output only.
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
    prompt_top_logprobs: list[Tops] | None = None
    cached_tokens: int = 0
    step: int = 0


class SequenceFailed(Message, frozen=True):
    """A sequence ended by an error; the last message about it."""

    sequence: int
    error: WireError


class StepDone(Message, frozen=True):
    """One executed step, after its outputs.

    Attributes:
        step: number of steps executed since the engine started.
        seconds: wall time of the step.
        prefill_tokens, decode_rows: what the step computed.
        adapters: different adapters in the step.
        prefix_asked, prefix_found: prompt tokens of the sequences that started with
            it, and how many of them were in the prefix cache.
    """

    step: int
    seconds: float
    prefill_tokens: int
    decode_rows: int
    adapters: int
    prefix_asked: int = 0
    prefix_found: int = 0


class Occupancy(Message, frozen=True):
    """How full the engine is; sent whenever it differs from the last one sent.

    Attributes:
        running, waiting: sequences.
        waiting_for_adapter: of `waiting`, those whose adapter is not resident.
        kv_blocks_used, kv_blocks: the pool.
        kv_blocks_cached: of those not used, the ones that hold a prefix.
        running_adapters, waiting_adapters: weights digests, sorted.
    """

    running: int
    waiting: int
    waiting_for_adapter: int
    kv_blocks_used: int
    kv_blocks: int
    kv_blocks_cached: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()


class Residency(Message, frozen=True):
    """New state of one adapter; sent on every change.

    Attributes:
        tier: nearest memory tier that holds it, or ``disk`` for none.
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
    """A load (to HOST) or activation (to DEVICE) ended well; for metrics.

    ``stages`` maps ``read``, ``verify``, ``convert`` or ``copy`` to seconds; and ``lost``
    (`LOST`), where a loader process ended or was killed before another did the work.
    """

    weights_digest: str
    source: Literal["disk", "host"]
    stages: dict[str, float]


EvictionCause = Literal["capacity", "budget", "admin", "abort"]


class Evicted(Message, frozen=True):
    """An adapter left a tier; for metrics.

    ``cause``: ``capacity`` (room for another), ``budget`` (it was lowered), ``admin``,
    or ``abort``.
    """

    weights_digest: str
    tier: Literal["host", "device"]
    cause: EvictionCause


class AdapterFailed(Message, frozen=True):
    """An adapter could not be brought into memory; what waited for it has its own error."""

    weights_digest: str
    error: WireError


ConstraintOutcome = Literal[
    "ok", "invalid", "compile_seconds", "memory", "mask_seconds", "fuel", "library"
]
"""``ok``, ``invalid`` (wrong or not supported), or what stopped it: a limit, or a fault of
the library."""


class ConstraintDone(Message, frozen=True):
    """A constraint was compiled for the first time (``trial``), or stopped one that was
    being followed (``generation``); for metrics.

    ``seconds``: CPU time of compiling; 0 where that did not end.
    """

    phase: Literal["trial", "generation"]
    outcome: ConstraintOutcome
    seconds: float


class MatcherEnded(Message, frozen=True):
    """A process that follows constraints ended, and another took over; for metrics.

    ``cause``: ``limit`` (CPU time), ``killed`` (from outside), or ``fault``.
    """

    cause: Literal["limit", "killed", "fault"]


class BudgetsState(Message, frozen=True):
    """The budgets of adapters and what is taken of them now, in bytes.

    More may be taken than the budget while running sequences use what must go.
    """

    host_budget: int
    device_budget: int
    host_bytes: int
    device_bytes: int


class OperationDone(Message, frozen=True):
    """Answer to `Activate`, `Evict`, `Unpin`, `UpdateBudgets` or `Reference`.

    ``done`` is False where a drain still waits for running sequences; ``budgets`` is the
    answer to `UpdateBudgets`, ``logprobs`` that to `Reference`.
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
    Loading
    | EngineInfo
    | SequenceOutput
    | SequenceFailed
    | StepDone
    | Occupancy
    | Residency
    | AdapterLoaded
    | AdapterFailed
    | Evicted
    | ConstraintDone
    | MatcherEnded
    | OperationDone
    | Pong
)

LENGTH: Final = struct.Struct(">I")
"""Prefix of a frame: bytes that follow."""

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine = msgspec.msgpack.Decoder(list[FromEngine])


def encode(messages: Sequence[ToEngine] | Sequence[FromEngine]) -> bytes:
    """One frame that holds all messages, in order."""
    body = _encoder.encode(messages)
    return LENGTH.pack(len(body)) + body


def decode_to_engine(body: bytes) -> list[ToEngine]:
    """The messages of one frame, without its length prefix."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> list[FromEngine]:
    """The messages of one frame, without its length prefix."""
    return _from_engine.decode(body)


def wire_error(error: VeneerError) -> WireError:
    return WireError(error.reason, error.message, error.metadata, error.retry_after_s)
