"""Record the files, functions and classes that a warm call enters in a server's processes.

The server runs with `tests.structure.tracer`. Each call is made `BEFORE` times and then
recorded `TIMES` times, from before it is sent until `SETTLE_S` after its answer, because a
server releases, counts and logs after it has answered. Only code that is entered every time
counts, so work that timers start now and then, such as housekeeping, does not. The front's ping
to the engine each second does count: it is printed as ``idle``, and is part of every figure.
"""

from __future__ import annotations

import asyncio
import functools
import json
import operator
import os
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.places import cache_dir
from tests.server_harness import Server, read_files, running_server

TRACER: Final = Path(__file__).with_name("tracer.py")
ADAPTER: Final = Path(__file__).parents[2] / "examples/adapters/chat"
WEIGHTS: Final = "adapter_model.safetensors"
PACKAGES: Final = ("server", "adapters_registry", "proto")
PROMPT: Final = "Name a colour."
BEFORE: Final = 2
TIMES: Final = 4
SETTLE_S: Final = 1.0


@dataclass(frozen=True)
class Entered:
    """The code that one call enters.

    Attributes:
        functions: ``FILE:LINE NAME``; the path is relative to the repository.
        classes: ``MODULE.NAME``.
        processes: number of server processes that enter any code.
    """

    functions: frozenset[str]
    classes: frozenset[str]
    processes: int

    @property
    def files(self) -> set[str]:
        return {function.partition(":")[0] for function in self.functions}

    def __and__(self, other: Entered) -> Entered:
        return Entered(
            self.functions & other.functions,
            self.classes & other.classes,
            min(self.processes, other.processes),
        )


class Recorder:
    """Switches recording on and off in all processes of a server, and reads their records.

    Args:
        folder: folder with the tracer.
        repository: checkout whose server runs.
    """

    def __init__(self, folder: Path, repository: Path) -> None:
        self._folder = folder
        self._repository = repository
        self._phase = 0
        (folder / "phase").write_bytes(b"\0")

    @asynccontextmanager
    async def recording(self, to: list[Entered]) -> AsyncIterator[None]:
        """Record the block and `SETTLE_S` after it."""
        self._phase += 1
        self._set(self._phase)
        yield
        await asyncio.sleep(SETTLE_S)
        self._set(0)
        to.append(self._read(self._phase))

    def _set(self, phase: int) -> None:
        with (self._folder / "phase").open("r+b") as file:
            file.write(bytes([phase]))

    def _read(self, phase: int) -> Entered:
        records = [path.read_text("utf-8") for path in self._folder.glob(f"{phase}-*")]
        lines = {line for record in records for line in record.splitlines()}
        of = {kind: {line[2:] for line in lines if line[0] == kind} for kind in "fc"}
        functions = {name.removeprefix(f"{self._repository}/") for name in of["f"]}
        return Entered(frozenset(functions), frozenset(of["c"]), len(records))


async def warm_calls(repository: Path) -> dict[str, Entered]:
    """Return the code that each call enters in the server of the checkout at ``repository``."""
    with tempfile.TemporaryDirectory() as made:
        traces = Path(made) / "traces"
        traces.mkdir()
        shutil.copy(TRACER, traces / "sitecustomize.py")
        recorder = Recorder(traces, repository)
        # The harness gives the server this process's environment.
        paths = [traces, *(repository / package for package in PACKAGES)]
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        async with running_server(Path(made) / "data", cache_dir()) as server:
            return await _record(server, recorder)


async def _record(server: Server, recorder: Recorder) -> dict[str, Entered]:
    calls: dict[str, Callable[[int], Awaitable[object]]] = {
        "idle": lambda _: asyncio.sleep(0),
        "gRPC generate": lambda _: server.generate(prompt=PROMPT, adapter="chat"),
        "chat over HTTP": lambda _: asyncio.to_thread(_chat, server.openai),
        "gRPC upload": lambda turn: server.push_files(_files(turn + 1), f"new-{turn}"),
        "upload and load": lambda turn: server.push_files(
            _files(turn + 101), f"loaded-{turn}", activate=True
        ),
    }
    await server.push_files(_files(0), "chat")
    found = {}
    for name, call in calls.items():
        recorded: list[Entered] = []
        for turn in range(BEFORE):
            await call(turn)
        await asyncio.sleep(SETTLE_S)
        for turn in range(BEFORE, BEFORE + TIMES):
            async with recorder.recording(recorded):
                await call(turn)
        found[name] = functools.reduce(operator.and_, recorded)
        if not found[name].functions:
            raise RuntimeError(f"nothing was recorded of {name}: the tracer does not run")
    return found


def _chat(address: str) -> None:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def _files(turn: int) -> dict[str, bytes]:
    """Return an adapter's files, with different content each turn: the last weight differs."""
    files = read_files(ADAPTER)
    files[WEIGHTS] = files[WEIGHTS][:-4] + bytes([turn, 0, 0, 0])
    return files
