"""The backend for CUDA without a card: ``python -m tests.gpu.engine``.

Eight parts: histories of chunks and fences; places of adapters in memory; captured graphs under
swaps, evictions and changes of the batch; steps enqueued ahead; the engine on a simulated card;
the formats of a base; two processes with half of one each, and an engine on both; torture rows
9 to 12. All but the engine on one card and the formats also with planted bugs, which must be
noticed.

With ``--kernels`` the card executes Triton's kernels by its interpreter, a second or more for a
step; without, the same launches in torch. ``--quick`` is the suite's form.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from veneer_server.engine.execution.backend_choice import BackendUnavailable, choose
from veneer_server.step.inbox import NoSlot
from veneer_server.wire.messages import EngineConfig

import tests.gpu.interpreter  # noqa: F401 (before anything that imports triton)
from tests.gpu.engine import (
    churn,
    formats,
    histories,
    lookahead,
    parallel,
    places,
    rows,
    scenario,
)
from tests.gpu.engine.kit import tiny_base
from tests.gpu.engine.plain import PLAIN
from tests.gpu.engine.rows import ROWS, cards
from tests.torture.row import Scale

LEAST: Final = 6  # requests of the engine whose distance from torch is judged


def _memory(given: Any, _instead: Any) -> Iterator[str]:
    for number in range(given.histories):
        histories.check(f"{given.seed}/{number}")
    print(f"memory: {given.histories} histories right", flush=True)
    for number, (name, *_) in enumerate(histories.BUGS[: given.bugs]):
        found = histories.caught(number, given.seed, max(400, given.histories))
        print(f"    {name}: {found[:120] or 'NOT NOTICED'}", flush=True)
        if not found:
            yield name


def _places(given: Any, _instead: Any) -> Iterator[str]:
    """Needs no kernel: memory alone."""
    try:
        for number in range(2):
            print(f"places: {places.check(f'{given.seed}/{number}', given.loads)}", flush=True)
    except NoSlot as error:
        yield str(error)
    for name, bug in places.PLANTED.items():
        found = ""
        try:
            with bug():
                for number in range(4):
                    places.check(f"{given.seed}/{number}", max(600, given.loads))
        except NoSlot as error:
            found = str(error)
        print(f"    {name}: {found[:120] or 'NOT NOTICED'}", flush=True)
        if not found:
            yield name


def _graphs(given: Any, instead: Any) -> Iterator[str]:
    with tiny_base() as base:
        for exact in (False, True):
            done = churn.churn(base, given.seed, instead, changes=given.changes, exact=exact)
            print(f"graphs{', exact' if exact else ''}: {done}", flush=True)
        for bug in churn.PLANTED.values():  # also those that are not run now
            with bug():
                pass
        for name, bug in list(churn.PLANTED.items())[: given.bugs]:
            found = ""
            try:
                with bug():
                    churn.churn(base, given.seed, PLAIN, changes=given.changes)
            except (AssertionError, IndexError) as error:
                found = str(error)
            print(f"    {name}: {found[:120] or 'NOT NOTICED'}", flush=True)
            if not found:
                yield name


def _lookahead(given: Any, instead: Any) -> Iterator[str]:
    def steady(instead: Any, *, exact: bool) -> str:
        with tempfile.TemporaryDirectory() as name, cards(instead, given.seed):
            folder = Path(name)
            config = scenario.config(base, folder, backend="cuda", exact=exact)
            return lookahead.steady(config, folder, tokens=given.steps)

    with tiny_base() as base:
        try:
            told = lookahead.check(base, given.seed, instead, steps=given.steps)
            print(f"lookahead: {told}", flush=True)
            for exact in (False, True):
                print(f"    {steady(instead, exact=exact)}", flush=True)
        except AssertionError as error:
            yield str(error)
        for name, bug in list(lookahead.PLANTED.items())[: given.bugs]:
            found = ""
            try:
                with bug():
                    steady(PLAIN, exact=False)
            except AssertionError as error:
                found = str(error)
            print(f"    {name}: {found[:120] or 'NOT NOTICED'}", flush=True)
            if not found:
                yield name


def _refused() -> bool:
    """Whether an engine without a card says that it cannot serve."""
    with tempfile.TemporaryDirectory() as folder, tiny_base() as base:
        config = EngineConfig(str(base), folder, "tiny", "", backend="cuda")
        try:
            choose(config, torch.device("cpu"), torch.bfloat16, 8)
        except BackendUnavailable as error:
            return "the device is cpu" in str(error)
    return False


def _engine(given: Any, instead: Any) -> Iterator[str]:
    if _refused():
        print("engine without a card: refused", flush=True)
    else:
        yield "an engine without a card starts"
    for exact in (False, True):
        with tempfile.TemporaryDirectory() as folder, cards(instead, given.seed):
            found = scenario.run(Path(folder), requests=given.requests, exact=exact)
        print(f"engine{', exact' if exact else ''}: {found.figure}", flush=True)
        yield from found.failures


def _bases(given: Any, instead: Any) -> Iterator[str]:
    with tiny_base() as base:
        try:
            print(f"bases: {formats.check(base)}", flush=True)
        except AssertionError as error:
            yield str(error)
    if given.quick:
        return
    for quantization in ("fp8", "none"):
        with tempfile.TemporaryDirectory() as folder, cards(instead, given.seed):
            found = scenario.run(
                Path(folder), requests=given.requests, exact=False, quantization=quantization
            )
        print(f"    {quantization}: {found.figure}", flush=True)
        yield from found.failures


def _parallel(given: Any, instead: Any) -> Iterator[str]:
    kernels = instead is None
    for quantization in parallel.FORMATS[: 1 if given.quick else None]:
        for exact in (False,) if given.quick else (False, True):
            try:
                told = parallel.check(quantization, exact=exact, kernels=kernels)
                how = f"{quantization}, exact" if exact else quantization
                print(f"parallel: {how}: {told}", flush=True)
            except AssertionError as error:
                yield str(error)
    for name in list(parallel.PLANTED)[: given.bugs]:
        found = ""
        try:
            parallel.check("nf4", exact=False, bug=name)
        except AssertionError as error:
            found = str(error)
        print(f"    {name}: {found[:120] or 'NOT NOTICED'}", flush=True)
        if not found:
            yield name
    for exact in (False, True):
        found_here = parallel.serve(requests=given.requests, exact=exact)
        how = "two cards, exact" if exact else "two cards"
        print(f"engine on {how}: {found_here.figure}", flush=True)
        yield from found_here.failures
        if given.quick:
            return
    for name in list(parallel.PLANTED_LEADING)[: given.bugs]:
        noticed = parallel.serve(requests=given.requests, exact=True, bug=name).failures
        print(f"    {name}: {(noticed or ('NOT NOTICED',))[0][:120]}", flush=True)
        if not noticed:
            yield name


def _rows(given: Any, instead: Any) -> Iterator[str]:
    for number, (run, work) in ROWS.items():
        if given.row not in (0, number):
            continue
        figure, failures = _row(run, max(1, work // given.share), nullcontext, given, instead)
        print("\n    ".join((f"row {number}: {figure}", *failures)), flush=True)
        yield from failures
        for name, bug in list(rows.PLANTED[number].items())[: given.bugs]:
            found = ""
            try:
                _, noticed = _row(run, work, bug, given, PLAIN)
                found = "; ".join(noticed)
            except (AssertionError, KeyError) as error:
                found = repr(error)
            print(f"    {name}: {found[:120] or 'NOT NOTICED'}", flush=True)
            if not found:
                yield f"row {number}: {name}"


def _row(
    run: Callable[..., Any], work: int, bug: Callable[..., Any], given: Any, instead: Any
) -> tuple[str, tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as folder, cards(instead, given.seed):
        scale = Scale(full=False, seed=1, work=Path(folder))
        told: tuple[str, tuple[str, ...]] = run(scale, work, bug)
        return told


PARTS: dict[str, Callable[[Any, Any], Iterator[str]]] = {
    "memory": _memory,
    "places": _places,
    "graphs": _graphs,
    "lookahead": _lookahead,
    "engine": _engine,
    "bases": _bases,
    "parallel": _parallel,
    "rows": _rows,
}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.gpu.engine", description=__doc__)
    parser.add_argument("--only", choices=[*PARTS], help="one part")
    parser.add_argument("--row", type=int, default=0, help="one torture row")
    parser.add_argument("--share", type=int, default=1, help="of rows: one in so many")
    parser.add_argument("--seed", default="veneer")
    parser.add_argument("--kernels", action="store_true", help="interpret Triton's kernels")
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--loads", type=int, default=2000, help="of adapters into memory")
    parser.add_argument("--changes", type=int, default=1000, help="of graphs' batches")
    parser.add_argument("--requests", type=int, default=24, help="of the engine")
    parser.add_argument("--steps", type=int, default=30, help="of those enqueued ahead")
    parser.add_argument("--bugs", type=int, default=99, help="planted, at most")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.requests < LEAST:
        parser.error(f"--requests: {LEAST} or more; fewer have too few numbers to compare")
    if given.quick:
        given.histories, given.changes, given.bugs = 40, 60, 2
        given.steps, given.requests, given.row = 8, 6, -1
        given.loads = 400
    torch.set_num_threads(1)
    failures = []
    for name, part in PARTS.items():
        if given.only in (None, name):
            began = time.process_time()
            failures += [f"{name}: {line}" for line in part(given, _instead(given))]
            print(f"    {time.process_time() - began:.0f} s of CPU", flush=True)
    for line in failures:
        print(f"FAILED {line}")
    return 1 if failures else 0


def _instead(given: Any) -> Any:
    return None if given.kernels else PLAIN


if __name__ == "__main__":
    raise SystemExit(main())
