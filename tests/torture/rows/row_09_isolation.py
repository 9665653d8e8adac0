"""Row 9: adapters come, go and change under traffic, and no token is from a wrong adapter.

First this runs the whole server in this process with a FAKE decoder, whose tokens are a hash of
everything that it read (`tests.torture.hash_backend`), so that any mix-up is an exact mismatch.
Then it runs real server processes on a tiny Llama: torch in float32, with PEFT as the
reference; and the native kernels in each supported instruction set, with an engine that
computes one request at a time as the reference.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from veneer_server.engine.execution import backend_choice as backends

from tests.server_harness import Server, running_server
from tests.tiny_llama import make_tiny_llama
from tests.torture.alone_reference import AloneReference
from tests.torture.cancels import all_free
from tests.torture.churn import churn
from tests.torture.churn_record import Churn, Traffic
from tests.torture.forms import Form, forms
from tests.torture.hash_backend import HashBackend
from tests.torture.in_process import InProcess, in_process
from tests.torture.isolation import HashReference, failures_of, outcomes
from tests.torture.peft_reference import BOUND, PeftReference
from tests.torture.planted_isolation import PLANTED, Planted
from tests.torture.planted_server import planted_server
from tests.torture.row import Control, Outcome, Scale

ROW = 9
TITLE = "isolation under churn"
BAR = "0 tokens from a wrong digest"

FREE_SECONDS = 30
ROUNDS = 10
"""Number of runs to catch a bug that needs a coincidence."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A server's memory, so small that adapters and prefixes are constantly swapped."""

    device: str
    host: str
    kv: str = "0.5MiB"
    running: str = "12"

    def settings(self) -> dict[str, Any]:
        return {
            "device_adapter_bytes": self.device,
            "host_cache_bytes": self.host,
            "kv_cache_bytes": self.kv,
            "max_running": self.running,
        }


# Bytes per rank: 1,536 for an adapter of one module, 20,736 for one of all modules.
ONE_MODULE = ("self_attn.q_proj",)
HASHED = Memory(device="24KiB", host="48KiB")
TIGHT = Memory(device="6KiB", host="24KiB")
ROOMY = Memory(device="48KiB", host="96KiB")
SMALL = Memory(device="256KiB", host="512KiB")
LARGE = Memory(device="1MiB", host="2MiB")
# The native backend stores adapters and KV in bfloat16, so half the bytes hold as many.
HALF = {
    SMALL: Memory(device="128KiB", host="256KiB", kv="0.25MiB"),
    LARGE: Memory(device="0.5MiB", host="1MiB", kv="0.25MiB"),
}
SERVED = Traffic(requests=2_000, most_tokens=16, sampled=0.3, logprobs=True)


def run(scale: Scale) -> Outcome:
    """Run the hashing decoder, then real servers in all forms."""
    base = make_tiny_llama(scale.work / "base", seed=scale.seed)
    hashed = _hashed(scale, base)
    traffic = replace(SERVED, requests=scale.pick(150, 2_000))
    parts = [hashed]
    for form in forms():
        folder = scale.folder(f"served by {form.name}")
        parts.append(asyncio.run(_served(scale, base, traffic, SMALL, folder, form)))
    return Outcome(
        figure="; ".join(part.figure for part in parts),
        bar=BAR,
        failures=tuple(line for part in parts for line in part.failures),
        notes=tuple(line for part in parts for line in part.notes),
    )


def controls(scale: Scale) -> Iterator[Control]:
    """Plant each bug with the hashing decoder, and some in a real engine process too."""
    base = make_tiny_llama(scale.work / "base", seed=scale.seed)
    for name, planted in PLANTED.items():
        yield _control(scale, base, name, planted)
    traffic = replace(SERVED, requests=scale.pick(90, 300), names=4, each=3)
    plain = [name for name, bug in PLANTED.items() if bug.engine and not bug.tight]
    for name in plain[: scale.pick(1, len(plain))]:
        for form in forms()[:2]:
            yield _real_control(scale, base, name, traffic, form)


# -------------------------------------------------------------- the hashing decoder


def _hashed(scale: Scale, base: Path) -> Outcome:
    traffic = Traffic(requests=scale.pick(400, 20_000), modules=ONE_MODULE)
    with patch.object(backends, "Decoder", HashBackend):
        record, seen, leaks = asyncio.run(
            _in_process(scale, base, traffic, HASHED, scale.folder("hashed"))
        )
    failures = (*leaks, *failures_of(record, HashReference()))
    revisions = len({attempt.revision for attempt in record.attempts} - {""})
    return Outcome(
        figure=(
            f"{traffic.requests:,} requests over {traffic.names} adapters, "
            f"{len(failures)} wrong ({_listed(outcomes(record))}; {revisions} revisions "
            f"answered, {seen['AdapterLoaded']} loads and moves, {seen['Evicted']} drops, "
            f"{seen['prefix tokens']} prompt tokens from the prefix cache)"
        ),
        bar=BAR,
        failures=failures,
        notes=(f"changes: {_listed(record.changes)}",),
    )


async def _in_process(
    scale: Scale, base: Path, traffic: Traffic, memory: Memory, folder: Path
) -> tuple[Churn, Counter[str], list[str]]:
    """Run a server in this process; return its record, counts of the engine's messages, and
    leaks."""
    async with in_process(base, folder, **memory.settings()) as server:
        record = await churn(server, traffic, scale.random(folder.name), folder / "adapters")
        leaks = await _leaks(server)
        return record, server.seen, leaks


async def _leaks(server: InProcess) -> list[str]:
    """Return leaked blocks, holds and leases, and whether the loop ended."""
    if server.engine_error is not None:
        return [f"the step loop ended: {server.engine_error!r}"]
    try:
        await server.end()
    except (AssertionError, TimeoutError) as error:
        return [f"after all had ended: {error!r}"]
    return []


def _control(scale: Scale, base: Path, name: str, planted: Planted) -> Control:
    traffic = Traffic(
        requests=120,
        names=8 if planted.tight else 4,
        each=3,
        modules=ONE_MODULE,
        ranks=(2,),
        # Longer if memory is scarce, so that requests overlap even on a busy machine.
        most_tokens=60 if planted.tight else 24,
    )
    memory = TIGHT if planted.tight else ROOMY
    for attempt in range(ROUNDS):
        folder = scale.folder(f"{name} {attempt}")
        with patch.object(backends, "Decoder", HashBackend), planted.bug():
            record, _, leaks = asyncio.run(_in_process(scale, base, traffic, memory, folder))
        failures = (*leaks, *failures_of(record, HashReference()))
        if failures:
            return Control(name, failures[0])
    return Control(name, "")


# ------------------------------------------------------------- real server processes


def _real_control(scale: Scale, base: Path, name: str, traffic: Traffic, form: Form) -> Control:
    """Plant a bug in a real engine process. Repeat the run, since in some runs no request uses
    a replaced name while its old weights are in memory."""
    planted = f"{name}, in a real engine process, {form.name}"
    for attempt in range(ROUNDS):
        folder = scale.folder(f"{name} served by {form.name} {attempt}")
        with planted_server(name, folder):
            outcome = asyncio.run(_served(scale, base, traffic, LARGE, folder, form))
        if outcome.failures:
            return Control.of(planted, outcome)
    return Control(planted, "")


async def _served(
    scale: Scale, base: Path, traffic: Traffic, memory: Memory, folder: Path, form: Form
) -> Outcome:
    """Run a server process, with PEFT or an engine of the same form as the reference."""
    memory = HALF[memory] if form.native else memory
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in memory.settings().items()]
    flags += ["--base", str(base), *form.flags]
    cache = form.cache(folder / "cache")
    async with running_server(folder / "data", cache, *flags) as server:
        record = await churn(server, traffic, scale.random(folder.name), folder / "adapters")
        seen = await _counted(server)
        leaks = await _left(server)
        stopped = await server.stop()
    failures, judged = _judged(record, base, form, cache)
    failures = (*leaks, *failures)
    if stopped:
        failures += (f"the server ended with status {stopped}",)
    revisions = len({attempt.revision for attempt in record.attempts} - {""})
    return Outcome(
        figure=(
            f"real processes, {form.name}: {traffic.requests:,} requests over "
            f"{traffic.names} adapters, {len(failures)} wrong ({_listed(outcomes(record))}; "
            f"{revisions} revisions answered, {_listed(seen)}; {judged})"
        ),
        bar=BAR,
        failures=tuple(f"{form.name}: {line}" for line in failures),
        notes=(f"changes of the real server, {form.name}: {_listed(record.changes)}",),
    )


def _judged(record: Churn, base: Path, form: Form, cache: Path) -> tuple[tuple[str, ...], str]:
    """Return failures, and a description of the bound that was used."""
    if form.native:
        alone = AloneReference(base, form, cache)
        failures = failures_of(record, alone)
        return failures, f"{alone.judged} bitwise those of one request at a time"
    peft = PeftReference(base)
    failures = failures_of(record, peft)
    return failures, (
        f"log-probabilities within {peft.worst:.0e} of PEFT's, bound {BOUND:.0e}, "
        f"{peft.near_ties} near ties"
    )


async def _left(server: Server) -> list[str]:
    """Return leaked places, blocks and leases, and restarts of the engine."""
    try:
        async with asyncio.timeout(FREE_SECONDS):
            await all_free(server)
    except (AssertionError, TimeoutError) as error:
        return [f"after all had ended: {error!r}"]
    return []


async def _counted(server: Server) -> Counter[str]:
    """Count swaps, from the server's metrics."""
    names = {
        "evictions": "veneer_adapter_evictions_total",
        "activations": "veneer_adapter_activate_seconds_count",
        "prompt tokens from the prefix cache": "veneer_prefix_cache_hit_tokens_total",
    }
    found: list[dict[str, float]] = await server.scrape(*names.values())
    return Counter(
        {what: int(sum(samples.values())) for what, samples in zip(names, found, strict=True)}
    )


def _listed(counts: Counter[Any]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())
