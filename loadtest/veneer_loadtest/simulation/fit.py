"""Fit costs to a real server: least squares on times of single requests and small batches."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
from veneer_client import Tokens

from veneer_loadtest import workload
from veneer_loadtest.errors import TargetFailed
from veneer_loadtest.quantiles import median, percentiles
from veneer_loadtest.report import conditions
from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.servers import Served
from veneer_loadtest.simulation.traffic import prompts

_PROMPTS: Final = (8, 16, 24, 48)
_STREAMS: Final = (1, 2, 4)
_TOKENS: Final = 16
_SHARES: Final = tuple((place + 0.5) / 20 for place in range(20))
"""Percentiles of the measured noise that are kept."""
_STARTED_S: Final = 0.2
"""Seconds until a new sequence decodes, so that loads can be timed beside it."""


@dataclass(slots=True)
class Measurements:
    """Samples, in seconds.

    Attributes:
        first: time to first token by prompt length, one warm request at a time.
        apart: time between tokens by (streams, adapters).
        load: how long a request waits for its adapter, as the server reports it.
        load_beside: the same while another sequence decodes.
    """

    first: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    apart: defaultdict[tuple[int, int], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    load: list[float] = field(default_factory=list)
    load_beside: list[float] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Describe the medians, one line each."""
        kinds = {f"first token, prompt {n}": each for n, each in self.first.items()}
        kinds |= {f"between tokens, streams, adapters {n}": e for n, e in self.apart.items()}
        kinds |= {"load": self.load, "load during a step": self.load_beside}
        for kind, samples in kinds.items():
            yield f"{kind}: {median(samples) * 1e3:.1f} ms ({len(samples)})"


class _Bench:
    """Sends single requests to one server."""

    def __init__(self, server: Served, seed: int) -> None:
        self._server = server
        self._prompts = prompts(seed, 4096)
        self._at = 0

    def _prompt(self, length: int) -> Tokens:
        self._at = (self._at + 7919) % 60_000  # no two prompts begin alike
        return Tokens(tuple(self._prompts[self._at : self._at + length]))

    async def times(self, adapter: int, prompt: int, tokens: int) -> list[float]:
        """Send a request; return when each token came, in seconds after the request."""
        found: list[float] = []
        began = time.monotonic()
        async with self._server.client.generate_stream(
            self._prompt(prompt),
            adapter=workload.adapter_name(adapter),
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
        ) as stream:
            async for chunk in stream:
                found += [time.monotonic() - began] * max(0, len(chunk.token_ids))
        return found

    async def load(self, adapter: int) -> float:
        """Return how long a request waits for an adapter that is on disk."""
        name = workload.adapter_name(adapter)
        await self._server.client.evict(name)
        answer = await self._server.client.generate(
            self._prompt(8), adapter=name, max_tokens=1, temperature=0.0
        )
        return answer.provenance.timings.adapter_load_s


async def measure(server: Served, rounds: int, seed: int, measured: Measurements) -> None:
    """Add samples to ``measured``. Each of the ``rounds`` has all kinds of samples, so that a
    disturbance affects all kinds alike. The server needs ``max(_STREAMS)`` adapters."""
    bench = _Bench(server, seed)
    for adapter in range(max(_STREAMS)):
        await bench.times(adapter, 16, 2)
    for _ in range(rounds):
        for length in _PROMPTS:
            measured.first[length] += [(await bench.times(0, length, 1))[0]]
        for streams in _STREAMS:
            for adapters in {1, streams}:
                answers = await asyncio.gather(
                    *(bench.times(n % adapters, 8, _TOKENS) for n in range(streams))
                )
                measured.apart[streams, adapters] += _gaps(answers)
        measured.load += [await bench.load(1)]
        other = asyncio.create_task(bench.times(0, 8, 4 * _TOKENS))
        await asyncio.sleep(_STARTED_S)
        while not other.done():
            measured.load_beside += [await bench.load(1)]
        await other


def _gaps(answers: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean time between tokens of each answer, while all answers are under way."""
    begin = max(answer[0] for answer in answers)
    end = min(answer[-1] for answer in answers)
    found = []
    for answer in answers:
        inside = [at for at in answer if begin <= at <= end]
        if len(inside) > 1:
            found.append((inside[-1] - inside[0]) / (len(inside) - 1))
    return found


def fit(measured: Measurements, adapter_bytes: int, how: str, before: Costs) -> Costs:
    """Fit costs to the measurements.

    Args:
        before: costs to keep where nothing is measured: fetches, followers and detection.

    Raises:
        TargetFailed: streams that were sent together never ran together.
    """
    # On a slow machine, some streams may have ended before the others began.
    apart = {key: samples for key, samples in measured.apart.items() if samples}
    if len(apart) < 2:
        raise TargetFailed(
            "streams that were sent together did not run together: try more rounds of "
            "--fit-rounds, or a machine that does less"
        )
    # Time between tokens: step_s + streams * row_s + adapters * adapter_s.
    rows = [[1.0, streams, adapters, 0.0, 0.0] for streams, adapters in apart]
    times = [median(samples) for samples in apart.values()]
    # A first token: step_s + adapter_s + length * prompt_token_s + time outside the step.
    rows += [[1.0, 0.0, 1.0, length, 1.0] for length in measured.first]
    times += [median(samples) for samples in measured.first.values()]
    step_s, row_s, adapter_s, prompt_token_s, around = _least(rows, times)
    whole = step_s + adapter_s + around
    noise = [
        max(1e-3, sample / (whole + length * prompt_token_s))
        for length, samples in measured.first.items()
        for sample in samples
    ]
    load = max(1e-4, median(measured.load))
    # There are no samples if the other stream ended before the first load began.
    beside = median(measured.load_beside) if measured.load_beside else load
    known: dict[str, Any] = msgspec.structs.asdict(before)
    return Costs(
        **known
        | {
            "cpu": str(conditions()["cpu"]),
            "how": how,
            "front_s": 0.75 * around,
            "back_s": 0.25 * around,
            "step_s": max(1e-4, step_s),
            "row_s": row_s,
            "adapter_s": adapter_s,
            "prompt_token_s": prompt_token_s,
            "attention_s": 0.0,
            "noise": tuple(percentiles(noise, _SHARES)),
            "load_s": 0.3 * load,
            "load_byte_s": 0.7 * load / adapter_bytes,
            "busy_rate": min(1.0, max(0.02, load / max(load, beside))),
        }
    )


def _least(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Solve by least squares of relative errors; a cost that would be negative is 0."""
    kept = list(range(len(rows[0])))
    scale = 1 / np.array(seconds)
    while True:
        matrix = np.array(rows)[:, kept] * scale[:, None]
        found = np.linalg.lstsq(matrix, np.ones(len(seconds)), rcond=None)[0]
        worst = int(found.argmin())
        if found[worst] >= 0 or len(kept) == 1:
            break
        del kept[worst]
    costs = [0.0] * len(rows[0])
    for place, cost in zip(kept, found.tolist(), strict=True):
        costs[place] = max(0.0, cost)
    return costs
