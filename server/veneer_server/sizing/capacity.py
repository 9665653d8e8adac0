"""Computes how many adapters and sequences fit into the budgets, for `PlanCapacity`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Limit(Enum):
    """A setting that limits the capacity; the value is its flag."""

    DEVICE_ADAPTERS = "--device-adapter-bytes"
    HOST_ADAPTERS = "--host-cache-bytes"
    KV_CACHE = "--kv-cache-bytes"
    MAX_RUNNING = "--max-running"


@dataclass(frozen=True, slots=True)
class Budgets:
    """A server's budgets; bytes unless named otherwise.

    Attributes:
        itemsize: bytes of one element of a resident adapter.
        kv_bytes: size of the KV cache, including the padding block.
        kv_tokens: tokens of all sequences together that fit into it.
        kv_token_bytes: bytes of K and V of one token.
        block_tokens: tokens of a KV block; a sequence takes whole blocks.
        max_running: maximum number of running sequences.
        window_blocks: maximum blocks of a sequence, however long it is; None if there is no
            such maximum.
    """

    host_adapters: int
    device_adapters: int
    itemsize: int
    kv_bytes: int
    kv_tokens: int
    kv_token_bytes: int
    block_tokens: int
    max_running: int
    window_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A requested amount that does not fit: the flag's current value and the smallest
    sufficient one."""

    limit: Limit
    needed: int
    available: int
    message: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """See the fields of the same names in ``server.proto``."""

    adapter_bytes: int
    on_device: int
    on_host: int
    sequence_bytes: int
    running: int
    limited_by: Limit
    shortfalls: tuple[Shortfall, ...]


def plan_capacity(
    budgets: Budgets,
    *,
    adapter_parameters: int,
    adapters: int,
    context_length: int,
    concurrency: int,
) -> Capacity:
    """Compute what fits if nothing else uses the budgets.

    Args:
        adapter_parameters: elements of all A and B matrices of one adapter.
        adapters, concurrency: wanted number of adapters and of sequences; 0 for none.
        context_length: tokens of one sequence, prompt and completion.
    """
    size = max(1, adapter_parameters * budgets.itemsize)
    blocks = -(-context_length // budgets.block_tokens)
    if budgets.window_blocks is not None:
        blocks = min(blocks, budgets.window_blocks)
    by_cache = budgets.kv_tokens // budgets.block_tokens // blocks
    running = min(by_cache, budgets.max_running)
    sequence_bytes = blocks * budgets.block_tokens * budgets.kv_token_bytes
    on_device, on_host = budgets.device_adapters // size, budgets.host_adapters // size
    shortfalls = []
    for limit, fitting, available, where in (
        (Limit.HOST_ADAPTERS, on_host, budgets.host_adapters, "stay ready in host memory"),
        (Limit.DEVICE_ADAPTERS, on_device, budgets.device_adapters, "stay ready to run"),
    ):
        if adapters > fitting:
            needed = adapters * size
            shortfalls.append(
                Shortfall(
                    limit,
                    needed,
                    available,
                    f"{fitting} of {adapters} adapters {where}; the others are loaded on "
                    f"demand: {limit.value} {needed} would hold all",
                )
            )
    if concurrency > by_cache:
        # One block more than sequences can use: the engine keeps one for padding.
        needed = concurrency * sequence_bytes + budgets.block_tokens * budgets.kv_token_bytes
        shortfalls.append(
            Shortfall(
                Limit.KV_CACHE,
                needed,
                budgets.kv_bytes,
                f"the KV cache holds {by_cache} of {concurrency} sequences of "
                f"{context_length} tokens; the others queue: {Limit.KV_CACHE.value} "
                f"{needed} would hold all",
            )
        )
    if concurrency > budgets.max_running:
        shortfalls.append(
            Shortfall(
                Limit.MAX_RUNNING,
                concurrency,
                budgets.max_running,
                f"{budgets.max_running} of {concurrency} sequences run at once; the others "
                f"queue: {Limit.MAX_RUNNING.value} {concurrency} would run all",
            )
        )
    return Capacity(
        adapter_bytes=size,
        on_device=on_device,
        on_host=on_host,
        sequence_bytes=sequence_bytes,
        running=running,
        limited_by=Limit.KV_CACHE if by_cache < budgets.max_running else Limit.MAX_RUNNING,
        shortfalls=tuple(shortfalls),
    )
