"""The memory plan: the most that the server will use, computed before it loads anything.

Sizes follow from the base's ``config.json`` and the settings. Budgets are counted
in full although they fill up only with use: a server that has started must not be
OOM-killed later. Pure: no torch, no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from veneer_registry.errors import VeneerError

from veneer_server.config import ServerConfig
from veneer_server.models.config import DecoderConfig
from veneer_server.step.reach import most_blocks
from veneer_server.system.machine import Gpu, HostMemory

ITEMSIZE: Final = {"bfloat16": 2, "float16": 2, "float32": 4}

BLOCK_TOKENS: Final = 16
"""Tokens that a KV block holds."""

AUTO_KV_SHARE: Final = 4
"""``auto`` gives the KV cache the free memory divided by this."""
USUAL_KV_BYTES: Final = 1 << 30
"""``auto`` gives the KV cache at least this many bytes if they fit."""
_SMALLEST_KV_TOKENS: Final = 2048
_LEAST_KV_TOKENS: Final = 128
"""A configured cache must hold at least this many tokens (a question and a short answer), or
one whole context if that is shorter."""
_USUAL_RANK: Final = 16

_FRONT_BYTES: Final = 280 << 20
"""Front process with its template processes (measured: 30 MB each) and gRPC."""
_ENGINE_BYTES: Final = 490 << 20
"""Engine process after importing torch and transformers and loading a base, without the base
itself and the vocabulary of constraints."""
_LOADER_BYTES: Final = 72 << 20
"""The process that reads adapters (measured: 37 MB), with memory ready for the next one."""
_CONSTRAINT_BYTES: Final = 96 << 20
"""The processes that compile and follow constraints (measured: 80 MB, most of it the
vocabulary, which they share), with some constraints in use."""
_CUDA_BYTES: Final = 700 << 20
"""On the device: CUDA context and library workspaces."""

_EXPANDED_BYTES: Final = 24 << 20
"""4-bit weights expanded for a GEMM of many rows, a slice at a time (`packed.SLICE`)."""
_EXPANDED_CODES_BYTES: Final = 96 << 20
"""Weights stored as codes, expanded a slice at a time: 17 bytes a number (codes, indices into
the table, float32), and what the allocator keeps."""
_SCORED_BYTES: Final = 8
"""Bytes in addition to each logit while log-probabilities are computed."""
_DRAWN_BYTES: Final = 64
"""Bytes in addition to each logit while a token is sampled: copies, probabilities and, if the
whole vocabulary is sorted, its order and cumulative sums in float64 (measured: up to 62)."""


class MemoryTooSmall(VeneerError):
    """The configuration cannot fit this machine, container or GPU."""

    code = "FAILED_PRECONDITION"
    reason = "MEMORY_TOO_SMALL"


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """One part of a pool, in bytes. ``flag`` is the setting that an operator may lower."""

    name: Literal["base", "kv_cache", "host_adapters", "device_adapters", "adapters",
                  "scratch", "processes"]  # fmt: skip
    bytes: int
    flag: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """Memory of the host, or of a device that has its own.

    Attributes:
        limit: size of the memory in bytes.
    """

    name: Literal["host", "device"]
    uses: tuple[MemoryUse, ...]
    limit: int

    @property
    def total(self) -> int:
        return sum(use.bytes for use in self.uses)

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def __str__(self) -> str:
        parts = " + ".join(f"{use.name} {_mib(use.bytes)}" for use in self.uses)
        return f"{self.name}: {parts} = {_mib(self.total)} MiB of {_mib(self.limit)}"


@dataclass(frozen=True, slots=True)
class KvCachePlan:
    """The KV cache.

    Attributes:
        bytes: size of the cache, as configured or chosen by ``auto``.
        tokens: number of tokens that fit into the cache.
        context: longest sequence, in tokens.
        held: tokens that the longest sequence holds at a time: all, or fewer with windows.
        chosen: reason for the size that ``auto`` chose; "" if the size is configured.
        short: whether ``auto`` found too little memory for the default size.
    """

    bytes: int
    tokens: int
    context: int
    held: int
    chosen: str = ""
    short: bool = False

    def __str__(self) -> str:
        sequences = self.tokens / self.held
        auto = f"; auto: {self.chosen}" if self.chosen else ""
        return (
            f"KV cache of {_mib(self.bytes)} MiB for {self.tokens:,} tokens, {sequences:.1f} "
            f"sequences of {self.context:,}{auto}"
        )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The result of `plan_memory`.

    Attributes:
        kv_token_bytes: bytes of K and V of one token in all layers.
    """

    pools: tuple[MemoryPool, ...]
    kv_cache: KvCachePlan
    kv_token_bytes: int

    @property
    def kv_cache_bytes(self) -> int:
        return self.kv_cache.bytes

    def __str__(self) -> str:
        return "; ".join(map(str, (*self.pools, self.kv_cache)))

    @property
    def summary(self) -> str:
        """The totals only, for a line that has other content too."""
        return ", ".join(f"{p.name} {_mib(p.total)} of {_mib(p.limit)} MiB" for p in self.pools)


def plan_memory(
    model: DecoderConfig, config: ServerConfig, host: HostMemory, gpu: Gpu | None
) -> MemoryPlan:
    """Add up what the server may use, and choose the size of the KV cache if it is ``auto``.

    Args:
        gpu: None to serve on the CPU, where adapters in DEVICE share the memory of
            those in HOST and count once.

    Raises:
        MemoryTooSmall: the plan does not fit (the message has the numbers and the flags to
            lower), or a budget is too small for any adapter, or the KV cache for any request.
    """
    base = MemoryUse("base", base_bytes(model, config), "--base")
    scratch = MemoryUse("scratch", _scratch_bytes(model, config), "--max-batch-tokens")
    processes = MemoryUse(
        "processes", _FRONT_BYTES + _ENGINE_BYTES + _LOADER_BYTES + _CONSTRAINT_BYTES
    )
    hosted = MemoryUse("host_adapters", config.host_cache_bytes, "--host-cache-bytes")
    on_device = MemoryUse(
        "device_adapters", config.device_adapter_bytes, "--device-adapter-bytes"
    )
    itemsize = _adapter_itemsize(config, gpu)
    _check_holds_adapters(model, on_device, itemsize)
    if gpu is not None:  # otherwise HOST may use the larger of both budgets
        _check_holds_adapters(model, hosted, itemsize)
    host_pool: tuple[MemoryPool, ...] = ()
    if gpu is None:
        larger = max(hosted, on_device, key=lambda use: use.bytes)
        adapters = MemoryUse("adapters", larger.bytes, larger.flag)
        fixed = (adapters, scratch, processes)
    else:
        host_pool = (MemoryPool("host", (hosted, processes), host.limit),)
        fixed = (on_device, scratch, MemoryUse("processes", _CUDA_BYTES))
    limit = host.limit if gpu is None else gpu.total
    unused = host.available if gpu is None else gpu.free
    taken = base.bytes + sum(use.bytes for use in fixed)
    kv = _kv_cache(model, config, limit - taken, min(limit, unused) - taken)
    cache = MemoryUse("kv_cache", kv.bytes, "--kv-cache-bytes")
    pool = MemoryPool("host" if gpu is None else "device", (base, cache, *fixed), limit)
    plan = MemoryPlan((*host_pool, pool), kv, token_bytes(model, config.dtype))
    for planned in plan.pools:
        if not planned.fits:
            raise _too_small(planned)
    return plan


def plan_registry(host: HostMemory) -> MemoryPool:
    """Memory that a server without an engine may use: the front, and the upload checker."""
    return MemoryPool(
        "host", (MemoryUse("processes", _FRONT_BYTES + _LOADER_BYTES),), host.limit
    )


def _kv_cache(model: DecoderConfig, config: ServerConfig, left: int, free: int) -> KvCachePlan:
    """Plan the KV cache; choose its size if that is ``auto``.

    The share is taken of free memory, so that it leaves room for other programs, and for larger
    adapter budgets later. The usual size depends on the limit alone: otherwise a server that
    starts while other programs briefly hold memory would be left with almost no cache.

    Args:
        left: bytes of the limit that the rest of the plan leaves.
        free: bytes that the rest of the plan leaves of the memory that is free now.
    """
    each = token_bytes(model, config.dtype)
    block = each * BLOCK_TOKENS

    chunk = max(config.max_batch_tokens, config.max_running)

    def held(tokens: int) -> int:
        return most_blocks(tokens, model.window, chunk, BLOCK_TOKENS)

    def bytes_of(blocks: int) -> int:
        """Bytes of these blocks plus the one that the engine keeps for padding."""
        return (blocks + 1) * block

    def planned(size: int, chosen: str = "", *, short: bool = False) -> KvCachePlan:
        context = model.context_length
        tokens = max(0, size // block - 1) * BLOCK_TOKENS
        return KvCachePlan(size, tokens, context, held(context) * BLOCK_TOKENS, chosen, short)

    if config.kv_cache_bytes is not None:
        found = planned(config.kv_cache_bytes)
        least = min(model.context_length, _LEAST_KV_TOKENS)
        if found.tokens < least:
            raise MemoryTooSmall(
                f"--kv-cache-bytes {config.kv_cache_bytes} has room for {found.tokens} tokens: "
                f"give at least {_shown(bytes_of(-(-least // BLOCK_TOKENS)))}, which is "
                f"{least} tokens of this base, or leave it out",
                metadata={"key": "kv_cache_bytes", "tokens": str(found.tokens)},
            )
        return found
    whole = bytes_of(held(model.context_length))
    choices = [
        (free // AUTO_KV_SHARE, f"1/{AUTO_KV_SHARE} of {_mib(max(0, free))} MiB free"),
        (min(USUAL_KV_BYTES, left), "the default size"),
        (whole if whole <= free else 0, "one sequence of the full context"),
    ]
    size, chosen = max(choices)
    if size == left < USUAL_KV_BYTES:
        chosen = "all remaining memory"
    # Windows are ignored here: blocks that a sequence gives back stay in the prefix cache.
    most = bytes_of(config.max_running * -(-model.context_length // BLOCK_TOKENS))
    if size > most:
        size, chosen = most, f"{config.max_running} sequences of the full context"
    smallest = bytes_of(held(min(model.context_length, _SMALLEST_KV_TOKENS)))
    if size < smallest:
        size, chosen = smallest, "the minimum"
    return planned(size, chosen, short=size < min(most, max(USUAL_KV_BYTES, whole)))


def _adapter_itemsize(config: ServerConfig, gpu: Gpu | None) -> int:
    """Minimum bytes of one element of an adapter in memory, see `Chosen.lora_dtype`. With
    --backend auto on a CPU, either native or torch may serve."""
    if config.backend in ("native", "cuda"):
        return 2
    if gpu is not None:
        return ITEMSIZE[config.dtype]
    return 2 if config.backend == "auto" and config.dtype == "bfloat16" else 4


def _check_holds_adapters(model: DecoderConfig, budget: MemoryUse, itemsize: int) -> None:
    """Raise MemoryTooSmall for a budget that would refuse every adapter of this base."""
    sizes = [itemsize * model.num_layers * sum(shape) for shape in model.shapes.values()]
    if budget.bytes < min(sizes):
        raise MemoryTooSmall(
            f"{budget.flag} {budget.bytes} holds no adapter: the smallest for this base takes "
            f"{_shown(min(sizes))} (rank 1, one module), one of rank {_USUAL_RANK} with all "
            f"modules {_shown(_USUAL_RANK * sum(sizes))}",
            metadata={"key": budget.flag.strip("-").replace("-", "_")},
        )


def _shown(size: int) -> str:
    """A size as text, rounded up, so that it can be given as a budget."""
    return f"{-(-size // 1024)}KiB" if size < 1 << 20 else f"{_mib(size)}MiB"


def _too_small(pool: MemoryPool) -> MemoryTooSmall:
    most = sorted((u for u in pool.uses if u.flag), key=lambda u: u.bytes, reverse=True)
    over = pool.total - pool.limit
    lower = [use.flag for use in most if use.flag != "--base"]
    return MemoryTooSmall(
        f"this configuration needs {_mib(over)} MiB more {pool.name} memory than is available "
        f"({pool}): lower {', '.join(lower)}, or choose a smaller --base",
        metadata={"pool": pool.name, "missing_bytes": str(over), "lower": " ".join(lower)},
    )


def token_bytes(model: DecoderConfig, dtype: Literal["bfloat16", "float16", "float32"]) -> int:
    """Bytes of K and V of one token in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * ITEMSIZE[dtype]


def base_bytes(model: DecoderConfig, config: ServerConfig) -> int:
    """Bytes of the resident weights. In 4 bits: half a byte per weight, and a float32 scale for
    each block of 64 (bitsandbytes; nested scales are expanded when loaded). A folder stored in
    4 bits is served as it is, whatever the flag says."""
    if model.stored_bytes:  # codes take at most a tenth more in memory, see `models.quantized`
        return int(1.1 * model.stored_bytes)
    itemsize = ITEMSIZE[config.dtype]
    linears = model.num_layers * sum(rows * columns for rows, columns in model.shapes.values())
    quantization = model.quantization or config.quantization
    each = {"none": float(itemsize), "fp8": 1.0}.get(quantization, 0.5 + 4 / 64)
    embedding = model.vocab_size * model.hidden_size
    embeddings = embedding * (1 if model.tied_head else 2) * itemsize
    if config.backend != "torch" and config.dtype == "bfloat16" and config.device != "cuda":
        # The native backend keeps the head in 8 bits only, unless it is also the embedding.
        # With --backend auto, torch may have to serve.
        native = int(embedding * (itemsize + 1 + 4 / 64))
        embeddings = native if config.backend == "native" else max(native, embeddings)
    return int(linears * each) + embeddings


def _scratch_bytes(model: DecoderConfig, config: ServerConfig) -> int:
    """Scratch memory of the largest step: for every row, activations in float32, logits
    (prompt log-probabilities need all) and the mask of a chunk over the longest context;
    then the memory for log-probabilities of all rows or for sampling, whichever is larger."""
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    row = 4 * (4 * model.hidden_size + 2 * qkv + 3 * model.intermediate_size)
    logits = 4 * model.vocab_size
    mask = 5 * model.context_length
    # Each running sequence has a row, even if these exceed a step's tokens.
    rows = max(config.max_batch_tokens, config.max_running)
    scored = rows * _SCORED_BYTES * model.vocab_size
    drawn = config.max_running * _DRAWN_BYTES * model.vocab_size
    expanded = _EXPANDED_CODES_BYTES if model.stored_bytes else _EXPANDED_BYTES
    return rows * (row + logits + mask) + max(scored, drawn) + expanded


def _mib(size: int) -> int:
    return -(-size // (1 << 20))
