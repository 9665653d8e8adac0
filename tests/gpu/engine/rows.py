"""Torture rows 9 to 12 with an engine over the backend for CUDA, on a simulated card.

In exact mode a row's bits do not depend on what shares its step, on the chunks of its prompt
or on the prefix cache. So an engine that computes one request at a time is the reference, as it
is for the native kernels. The rows' own code judges; only engines in this process can have a
simulated card.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest.mock import patch

from veneer_server.backends.cuda import chosen, sampled
from veneer_server.backends.cuda.decoder import CudaDecoder
from veneer_server.backends.cuda.memory import adapters
from veneer_server.engine.execution import ahead
from veneer_server.wire.messages import EngineConfig

from tests import engine_harness
from tests.gpu.engine.simulated import SimulatedDevice
from tests.planted import planted
from tests.tiny_llama import make_tiny_llama
from tests.torture import churn, in_process
from tests.torture.alone_reference import AloneReference
from tests.torture.forms import Form
from tests.torture.isolation import failures_of, outcomes
from tests.torture.parity_matrix import tiny_matrix
from tests.torture.planted_isolation import PLANTED as ISOLATION
from tests.torture.row import Scale
from tests.torture.rows import row_09_isolation as row_9
from tests.torture.rows import row_10_prefix as row_10
from tests.torture.rows import row_11_non_finite as row_11
from tests.torture.rows import row_12_parity as row_12


class _Exact(Form):
    """Judged as the native forms are: bit for bit."""

    @property
    def native(self) -> bool:
        return True

    def cache(self, folder: Path) -> Path:
        return folder


FORM: Final = _Exact(
    "cuda", {"dtype": "bfloat16", "quantization": "nf4", "backend": "cuda", "exact": True}
)


LONGEST_S: Final = 1800.0
"""Before a call or an engine counts as hung. A simulated card is slow, and more so on a machine
that does other things."""


@contextmanager
def cards(instead: Any, seed: str) -> Iterator[None]:
    """Each engine that is built meanwhile has a simulated card of its own."""

    def opened(_device: Any) -> SimulatedDevice:
        return SimulatedDevice(Random(seed), instead)

    with ExitStack() as stack:
        stack.enter_context(patch.object(chosen, "open_device", opened))
        stack.enter_context(patch.object(engine_harness, "LONGEST_S", LONGEST_S))
        if instead is None:  # interpreted kernels are not compiled, and slow
            stack.enter_context(patch.object(CudaDecoder, "prepare", lambda _decoder: 0))
        yield


Bug = Callable[[], AbstractContextManager[None]]


def _row_9(scale: Scale, work: int, bug: Bug) -> tuple[str, tuple[str, ...]]:
    base = make_tiny_llama(scale.work / "base", seed=scale.seed)
    traffic = replace(row_9.SERVED, requests=work, most_tokens=8)
    folder = scale.folder("served")
    settings = row_9.HALF[row_9.SMALL].settings() | {"exact": "true"}

    async def run() -> Any:
        form = Form("cuda", {k: v for k, v in FORM.settings.items() if k != "exact"})
        async with in_process.in_process(base, folder, form, **settings) as server:
            random = scale.random("churn")
            record = await churn.churn(server, traffic, random, folder / "adapters")
            error = server.engine_error
            if error is None:
                await server.end()
            return record, error

    stopping = patch.object(in_process, "STOP_SECONDS", LONGEST_S)
    with bug(), stopping, patch.object(churn, "LONGEST_S", LONGEST_S):
        record, error = asyncio.run(run())
    ended = () if error is None else (f"the step loop ended: {error!r}",)
    alone = AloneReference(base, FORM, folder / "cache")
    failures = (*ended, *failures_of(record, alone))
    told = ", ".join(f"{count} {what}" for what, count in outcomes(record).most_common())
    return f"{work} requests ({told}), {alone.judged} equal to one at a time", failures


def _row_10(scale: Scale, work: int, bug: Bug) -> tuple[str, tuple[str, ...]]:
    base = make_tiny_llama(scale.work / "base", seed=scale.seed)
    form = _Exact("cuda", {**FORM.settings, "exact": "true"})
    folder = scale.folder("prefix")
    with bug():
        found = asyncio.run(
            row_10.run_replaces(scale, base, folder, work, exact=False, form=form)
        )
    reference = AloneReference(base, FORM, scale.work / "cache")
    wrong = [line for line in reference.differences(found.cases) if line]
    told = f"{found.answers} answers, {found.across} tokens found across, {found.hits} own"
    return f"{told}, {reference.judged} equal to one at a time", (*found.failures, *wrong)


def _row_11(scale: Scale, work: int, bug: Bug) -> tuple[str, tuple[str, ...]]:
    bad = dict(list(row_11.BAD.items())[:work])
    with row_11.quiet(), patch.object(row_11, "BAD", bad), bug():
        outcome = row_11.torture_batches(scale.folder("batches"), scale, FORM)
    return outcome.figure, outcome.failures


def _row_12(scale: Scale, work: int, bug: Bug) -> tuple[str, tuple[str, ...]]:
    matrix = tiny_matrix(scale, work)
    config = partial(EngineConfig, backend="cuda", device_adapter_bytes=8 << 20)
    with patch.object(row_12, "EngineConfig", config):
        figure, failures = row_12.judge_bfloat16(matrix, scale.folder("cache"), bug())
    return f"{matrix.size}: {figure}", tuple(failures)


ROWS: Final[dict[int, tuple[Callable[..., Any], int]]] = {
    9: (_row_9, 60),
    10: (_row_10, 4),
    11: (_row_11, 3),
    12: (_row_12, 6),
}
"""What runs each row, and how much of it."""

_PREFIXES: Final = "prefix cache keyed without the weights"
PLANTED: Final[dict[int, dict[str, Bug]]] = {
    9: {
        "a slot is given twice": partial(
            planted,
            adapters,
            "self._free.append(placed.slot)",
            "self._free += [placed.slot, placed.slot]",
        ),
        "rows take the token of the row before theirs": partial(
            planted,
            ahead,
            "= self._rows[planned.sequence]",
            "= max(0, self._rows[planned.sequence] - 1)",
        ),
    },
    10: {_PREFIXES: ISOLATION[_PREFIXES].bug},
    11: {
        "what was sampled from NaN is answered": partial(
            planted,
            sampled,
            '[None if token < 0 else token for token in here["tokens"].tolist()],\n'
            '            here["sums"].isfinite().tolist(),',
            '[max(token, 0) for token in here["tokens"].tolist()],\n'
            "            [True] * len(tops),",
        )
    },
    12: {
        "scaling off by 10 %": partial(
            planted,
            adapters,
            "at(s.b), s.module.scaling)",
            "at(s.b), 1.1 * s.module.scaling)",
        )
    },
}
"""By row: what it must notice."""
