"""Constraints come from callers, so a server must outlive any of them.

Uses its own server, since a failure would leave a thread there that never ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import psutil
import pytest
import pytest_asyncio
from veneer_proto.v1 import inference_pb2 as pb
from veneer_proto.v1 import inference_pb2_grpc

from tests.attacks.hostile_constraints import GROWS, HOSTILE, PANICS, SLOW_MASK, Hostile
from tests.server_harness import Server, refusal, running_server

pytestmark = [pytest.mark.push, pytest.mark.real_base, pytest.mark.asyncio(loop_scope="module")]

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
ANSWER_S = 60
"""An answer later than this is none."""

MODULE = "veneer_server.constraints.process"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("hostile") / "data"
    async with running_server(folder, cache_dir) as server:
        yield server


def ask(server: Server, hostile: Hostile, tokens: int = 4) -> Any:
    constraint = pb.Constraint(**{hostile.kind: hostile.text})
    return server.generate(prompt="A:", constraint=constraint, stopping={"max_tokens": tokens})


async def outcome(call: Awaitable[Any]) -> tuple[str, dict[str, str]]:
    """The status, and the metadata of the error."""
    try:
        async with asyncio.timeout(ANSWER_S):
            await call
    except grpc.aio.AioRpcError as error:
        refused = refusal(error)
        return refused.code, refused.metadata
    return "OK", {}


async def person(server: Server, **more: Any) -> Any:
    """A well-meant request with a schema; its answer is checked."""
    async with asyncio.timeout(ANSWER_S):
        answer = await server.generate(
            prompt="A person:",
            constraint=pb.Constraint(json_schema=PERSON),
            stopping={"max_tokens": 60},
            **more,
        )
    found = json.loads(answer.text)
    assert set(found) == {"name", "age"}
    return answer


def processes(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def memory(server: Server) -> int:
    """Bytes that the server's processes have for themselves."""
    total = 0
    for process in [psutil.Process(server.process.pid), *processes(server)]:
        try:
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


def workers(server: Server, role: str) -> list[psutil.Process]:
    """Processes of constraints by what they do, as their names say."""
    found = []
    for process in processes(server):
        try:
            if role in process.name():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(ANSWER_S):
        while not (found := condition()):  # noqa: ASYNC110 - processes tell no event
            await asyncio.sleep(0.005)
    return found


async def test_a_schema_of_endless_states_is_refused_while_others_are_answered(
    alone: Server,
) -> None:
    await person(alone)
    before, most = memory(alone), 0
    bad = asyncio.ensure_future(outcome(ask(alone, GROWS)))
    for _ in range(3):
        await person(alone)
        most = max(most, memory(alone))
    code, metadata = await bad
    assert code == "INVALID_ARGUMENT"
    assert metadata["field"] == "constraint.json_schema"
    assert metadata["limit"] in ("memory", "compile_seconds")
    assert max(most, memory(alone)) - before <= 64 << 20
    # Known by now: refused without another try.
    assert (await outcome(ask(alone, GROWS)))[0] == "INVALID_ARGUMENT"


async def test_sixty_slow_masks_are_answered_and_a_stream_goes_on(alone: Server) -> None:
    stream = alone.stream(prompt="One, two,", stopping={"max_tokens": 40, "ignore_eos": True})
    await stream.first()
    many = asyncio.gather(*(outcome(ask(alone, SLOW_MASK)) for _ in range(60)))
    assert len(await stream.rest()) >= 1
    # Which of the two limits it meets first depends on the machine.
    for code, metadata in await many:
        assert code == "OK" or (
            code == "INVALID_ARGUMENT" and metadata["limit"] in ("mask_seconds", "memory")
        )


async def test_one_callers_constraints_do_not_keep_anothers_waiting(alone: Server) -> None:
    numbers = range(60_000_001, 60_000_009, 2)
    many = [
        asyncio.ensure_future(
            outcome(
                ask(alone, Hostile("json_schema", f'{{"type":"integer","multipleOf":{n}}}'))
            )
        )
        for n in numbers
    ]
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(alone.address, options=options) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        await until(lambda: workers(alone, "veneer-compile"))
        for text in ("first", "second", "third"):
            constraint = pb.Constraint(choice=pb.Choices(texts=[text]))
            answer = await stub.Generate(pb.GenerateRequest(prompt="A:", constraint=constraint))
            assert answer.text == text
        assert not all(call.done() for call in many)
    for code, metadata in await asyncio.gather(*many):
        assert (code, metadata["limit"]) in [
            ("INVALID_ARGUMENT", "memory"),
            ("INVALID_ARGUMENT", "compile_seconds"),
        ]


async def test_a_panic_in_the_library_is_the_callers_error(alone: Server) -> None:
    code, metadata = await outcome(ask(alone, PANICS))
    assert (code, metadata["field"]) == ("INVALID_ARGUMENT", "constraint.regex")
    # To tell of its panic the library may need more memory than it has.
    assert metadata["limit"] in ("library", "memory")
    body = {
        "model": "smollm2-135m",
        "prompt": "A",
        "max_tokens": 2,
        "structured_outputs": {"regex": PANICS.text},
    }
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_S)) as session,
        session.post(f"http://{alone.openai}/v1/completions", json=body) as answer,
    ):
        error = (await answer.json())["error"]
        assert (answer.status, error["type"]) == (400, "invalid_request_error")
    await person(alone)


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_constraint_harms_nobody(case: str, alone: Server) -> None:
    beside = alone.stream(prompt="One, two,", stopping={"max_tokens": 8, "ignore_eos": True})
    (code, metadata), _ = await asyncio.gather(
        outcome(ask(alone, HOSTILE[case])), beside.rest()
    )
    assert code in ("OK", "INVALID_ARGUMENT")
    if code != "OK":
        assert metadata["field"].startswith("constraint")
    await person(alone)
    assert await alone.serving()


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_caller_who_leaves_ends_the_compilation(alone: Server) -> None:
    slow = HOSTILE["multiples of primes"]._replace(
        text=json.dumps(
            {"type": "integer", "allOf": [{"multipleOf": p} for p in (101, 103, 107, 109)]}
        )
    )
    constraint = pb.Constraint(json_schema=slow.text)
    call = alone.inference.Generate(
        pb.GenerateRequest(prompt="A:", constraint=constraint), timeout=ANSWER_S
    )
    [worker] = await until(lambda: workers(alone, "veneer-compile"))
    worker.suspend()  # it would be done or killed before we look
    call.cancel()
    await until(lambda: ended(worker))
    await person(alone)


async def test_killing_the_compiler_delays_its_call_and_no_other(alone: Server) -> None:
    constraint = json.dumps({"enum": [f"text {i}" for i in range(2000)]})
    call = asyncio.ensure_future(outcome(ask(alone, Hostile("json_schema", constraint))))
    [worker, *_] = await until(lambda: workers(alone, "veneer-compile"))
    os.kill(worker.pid, signal.SIGKILL)
    await person(alone)
    assert (await call)[0] == "OK"


@pytest.mark.parametrize("role", ["veneer-matcher", "veneer-constrai"])
async def test_killing_what_follows_constraints_changes_no_answer(
    role: str, alone: Server
) -> None:
    wanted = await person(alone)
    stream = alone.stream(
        prompt="A person:",
        constraint=pb.Constraint(json_schema=PERSON),
        stopping={"max_tokens": 60},
    )
    first = await stream.first()
    for worker in workers(alone, role):
        os.kill(worker.pid, signal.SIGKILL)
    rest = await stream.rest()
    assert "".join(message.text for message in [first, *rest]) == wanted.text
    await person(alone)
