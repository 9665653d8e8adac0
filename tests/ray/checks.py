"""What must hold of a deployment. Each check prints a line with what it saw."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import psutil
from veneer_proto.v1 import adapters_pb2, inference_pb2, replication_pb2
from veneer_ray.ingress_server import is_free

from tests.places import REPOSITORY
from tests.ports import free_port
from tests.ray.deployed import Deployed, sequences_of
from tests.server_harness import Refusal, Server, read_files, refusal

ADAPTER = REPOSITORY / "examples/adapters/chat"
WEIGHTS = "adapter_model.safetensors"
LONG = {"max_tokens": 200, "ignore_eos": True}


@dataclass
class Seen:
    """What was acknowledged, by name: nothing of it may be lost."""

    published: dict[str, str] = field(default_factory=dict)


def variant(number: int) -> dict[str, bytes]:
    """The example adapter with other weights: another digest, the same words."""
    files = read_files(ADAPTER)
    weights = bytearray(files[WEIGHTS])
    # The last two bytes' low bits, and the two before them.
    weights[-4:] = struct.pack("<HH", number % 1000 + 1, 1)
    return {**files, WEIGHTS: bytes(weights)}


async def publish(server: Server, seen: Seen, name: str, number: int) -> None:
    """Counts once it is acknowledged."""
    answer = await server.push_files(variant(number), name, allow_replace=True)
    seen.published[name] = answer.adapter.weights_digest


async def replica_of(call: Any) -> str:
    return str(dict(await call.trailing_metadata())["veneer-replica"])


# ------------------------------------------------------------------ one thing after another


async def interfaces(deployed: Deployed, server: Server, seen: Seen) -> str:
    """Of each Ray version that is supported: it has what `veneer_ray.ray_api` needs of it."""
    from veneer_ray import ray_api

    import ray

    ray_api.check()
    assert ray.__version__.startswith(f"{ray_api.SUPPORTED}."), ray.__version__
    return f"Ray {ray.__version__} has all that is not stable"


async def health(deployed: Deployed, server: Server, seen: Seen) -> str:
    await server.wait_for_health(True, 60)
    for service in ("InferenceService", "AdapterService", "ServerService"):
        assert await server.serving(f"veneer.v1.{service}"), service
    assert await server.serving("")
    return "every service is ready, by Check and Watch"


async def uploads(deployed: Deployed, server: Server, seen: Seen) -> str:
    wait = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    files = read_files(ADAPTER)
    answer = await server.push_files(files, "chat", wait=wait, allow_replace=True)
    seen.published["chat"] = answer.adapter.weights_digest
    reached = answer.replicas
    assert (reached.applied, reached.enough) == (2, True), reached
    return f"published through the ingress, on {reached.applied} of {reached.live} engines"


async def loads(deployed: Deployed, server: Server, seen: Seen) -> str:
    files = variant(98)
    answer = await server.push_files(files, "warm", activate=True)
    assert not answer.warnings, answer.warnings
    seen.published["warm"] = answer.adapter.weights_digest
    assert answer.adapter.tier == inference_pb2.TIER_DEVICE, answer.adapter
    stream = server.stream(prompt="Hi", adapter="warm", stopping={"max_tokens": 1})
    found = (await stream.rest())[-1].final.provenance.tier
    assert found == inference_pb2.TIER_DEVICE, "its first request did not find it in memory"
    return "an upload with activate is in an engine's memory, where its first request goes"


async def streams(deployed: Deployed, server: Server, seen: Seen) -> str:
    stream = server.stream(prompt="Hello", adapter="chat", stopping={"max_tokens": 24})
    messages = await stream.rest()
    assert messages[-1].HasField("final"), "the last message is not the last"
    assert all(m.ByteSize() for m in messages), "an empty message has come through"
    digest = messages[-1].final.provenance.weights_digest
    assert digest == seen.published["chat"], "the answer is another adapter's"
    text = "".join(message.text for message in messages)
    whole = await server.generate(prompt="Hello", adapter="chat", stopping={"max_tokens": 24})
    assert whole.text == text, "a stream and an answer differ"
    return f"{len(messages)} messages from replica {await replica_of(stream.call)}"


async def http(deployed: Deployed, server: Server, seen: Seen) -> str:
    def ask(**more: Any) -> tuple[int, bytes]:
        body = {"prompt": "Hello", "model": "chat", "max_tokens": 8, **more}
        request = Request(
            f"http://{deployed.http}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    status, body = await asyncio.to_thread(ask)
    assert status == 200, body
    text = json.loads(body)["choices"][0]["text"]
    status, body = await asyncio.to_thread(lambda: ask(stream=True, temperature=0))
    assert body.endswith(b"data: [DONE]\n\n"), body
    status, body = await asyncio.to_thread(lambda: ask(model="nobody"))
    assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")
    return f"whole ({text!r}), streamed, and refused"


async def errors(deployed: Deployed, server: Server, seen: Seen) -> str:
    missing = await server.refused(server.generate(prompt="x", adapter="nobody"))
    assert (missing.code, missing.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert missing.metadata["adapter"] == "nobody"
    stream = server.stream(prompt="x", adapter="nobody")
    assert await server.refused(stream.rest()) == missing, "a stream's error differs"
    wrong = await server.refused(server.generate(prompt="x", sampling={"temperature": -1}))
    assert wrong.code == "INVALID_ARGUMENT"
    assert wrong.metadata["field"], wrong
    deletion = adapters_pb2.DeleteAdapterRequest(name="nobody")
    gone = await server.refused(server.adapters.DeleteAdapter(deletion))
    assert gone.reason == "ADAPTER_NOT_FOUND"
    return "code, reason and metadata of single calls, streams and the registry's"


async def cancels(deployed: Deployed, server: Server, seen: Seen) -> str:
    calls = [server.stream(prompt="Count", adapter="chat", stopping=LONG) for _ in range(4)]
    await asyncio.gather(*(call.first() for call in calls))
    before = deployed.sequences()
    assert before >= 1, "nothing runs in the engines"
    began = time.monotonic()
    for call in calls:
        call.call.cancel()
    while await asyncio.to_thread(deployed.sequences):
        assert time.monotonic() - began < 60, "cancelled streams go on"
        await asyncio.sleep(0.1)
    return f"{before:.0f} sequences ended {time.monotonic() - began:.1f} s after the cancels"


async def affinity(deployed: Deployed, server: Server, seen: Seen) -> str:
    await publish(server, seen, "own", 99)
    counts: Counter[str] = Counter()
    for _ in range(6):
        stream = server.stream(prompt="Hi", adapter="own", stopping={"max_tokens": 1})
        await stream.rest()
        counts[await replica_of(stream.call)] += 1
    # What was sent to it before may have made that replica's share too large for one more.
    assert max(counts.values()) >= 5, f"an adapter's requests are spread: {counts}"
    return f"6 requests for a new adapter, at {dict(counts)}"


async def publication(deployed: Deployed, server: Server, seen: Seen) -> str:
    """From the acknowledgement to the first token at an engine that did not have it."""
    times = []
    for number in range(10):
        name = f"fresh-{number}"
        await publish(server, seen, name, 100 + number)
        began = time.monotonic()
        stream = server.stream(prompt="Hi", adapter=name, stopping={"max_tokens": 2})
        await stream.first()
        times.append(1000 * (time.monotonic() - began))
        await stream.rest()
    p50, worst = statistics.median(times), max(times)
    return f"p50 {p50:.0f} ms, worst {worst:.0f} ms of 10 (the bar is 300 ms, undisturbed)"


async def fails(deployed: Deployed, server: Server, seen: Seen) -> str:
    """An `up` that fails says why, and leaves nothing; it touches nothing else."""
    engines, registry = _replicas(deployed), deployed.registry()
    other = deployed.other
    assert other is not None, "it needs another team's application"
    mine = int(deployed.grpc.rpartition(":")[2])
    with tempfile.TemporaryDirectory(prefix="veneer-ray-") as folder:

        async def tried(*arguments: str) -> str:
            done = await asyncio.to_thread(
                deployed.tried,
                *("up", "--data-dir", folder, "--registry", f"127.0.0.1:{free_port()}"),
                *arguments,
                *("--", *deployed.flags),
            )
            assert done.returncode, done.stdout
            assert "ready" not in done.stdout
            return done.stderr.strip().splitlines()[-1]

        said = [
            await tried(
                *("--name", "second", "--grpc-port", str(free_port())),
                *("--http-port", str(other.port)),
            )
        ]
        assert "--http-port" in said[0], said
        second = ("--name", "second", "--http-port", str(free_port()))
        said.append(await tried(*second, "--grpc-port", str(mine)))
        assert "--grpc-port" in said[1], said
        said.append(await tried("--name", "greets"))  # the other team's
        said.append(await tried())  # ours, with other data
        assert all("--name" in each for each in said[2:]), said
        assert not deployed.servers_below(Path(folder)), "a failed up has left servers"
    missing = deployed.tried("status", "--name", "second")
    assert (missing.returncode, missing.stdout) == (1, "not deployed\n"), missing
    other.check()
    assert (_replicas(deployed), deployed.registry()) == (engines, registry)
    return "; ".join(each.removeprefix("veneer-ray: ") for each in said)


async def cost(deployed: Deployed, server: Server, seen: Seen) -> str:
    """HTTP through the ingress for HTTP to its server, in turns; with one engine, since
    two would share the cores."""
    await asyncio.to_thread(deployed.run, "scale", "1")
    await deployed.engines_are(1)
    (engine,) = deployed.engines()
    direct = next(
        f"127.0.0.1:{each.laddr.port}"
        for each in engine.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and _base_of(each.laddr.port)
    )
    model = _base_of(int(direct.rpartition(":")[2]))
    places = {"direct": direct, "through": deployed.http}
    for place in places.values():
        await _speed(place, model, 4, 1.0)
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in places}
    for _ in range(3):
        for name, place in places.items():
            small = [await _stream(place, model, 1) for _ in range(20)]
            one = await _speed(place, model, 1, 4.0)
            four = await _speed(place, model, 4, 4.0)
            figures[name].append((1000 * statistics.median(small), one, four))
    await asyncio.to_thread(deployed.run, "scale", "2")
    await deployed.engines_are(2)
    table = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in figures.items()
    }
    (d_token, d_one, d_four), (t_token, t_one, t_four) = table["direct"], table["through"]
    return (
        f"one token {t_token:.1f} ms for {d_token:.1f} direct; tokens/s at one stream "
        f"{t_one:.0f} for {d_one:.0f} ({t_one / d_one:.2f}), at four {t_four:.0f} for "
        f"{d_four:.0f} ({t_four / d_four:.2f})"
    )


def _base_of(port: int) -> str:
    """The base's name, if the OpenAI API is at this port; otherwise ""."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
            models = json.load(answer)["data"]
    except (OSError, HTTPException, ValueError):
        return ""
    return str(next(each for each in models if each["parent"] is None)["id"])


async def _speed(place: str, model: str, streams: int, seconds: float) -> float:
    """Tokens/s of streams that are repeated for some seconds."""
    began, tokens = time.monotonic(), 200

    async def repeat() -> int:
        sent = 0
        while time.monotonic() - began < seconds:
            await _stream(place, model, tokens)
            sent += tokens
        return sent

    total = sum(await asyncio.gather(*(repeat() for _ in range(streams))))
    return total / (time.monotonic() - began)


async def _stream(place: str, model: str, tokens: int) -> float:
    """Seconds of a streamed answer, over a connection of its own."""
    body = {"model": model, "prompt": "Tell me", "max_tokens": tokens, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True}
    sent = json.dumps(body).encode()
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(*place.split(":"))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(sent)
    )
    writer.write(sent)
    last = b""
    while part := await reader.read(1 << 16):
        last = (last + part)[-40:]
    writer.close()
    assert b"[DONE]" in last, last
    return time.monotonic() - began


# ------------------------------------------------------------------ under load


@dataclass
class Outcome:
    """How the calls under load ended."""

    finished: int = 0
    ended: asyncio.Condition = field(default_factory=asyncio.Condition)
    refused: list[Refusal] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    async def more(self, count: int) -> None:
        """Returns once so many more streams have finished."""
        goal = self.finished + count
        async with self.ended:
            await self.ended.wait_for(lambda: self.finished >= goal)


async def _load(server: Server, outcome: Outcome, stop: asyncio.Event) -> None:
    while not stop.is_set():
        stream = server.stream(
            prompt="Tell me", adapter="chat", stopping={"max_tokens": 40, "ignore_eos": True}
        )
        try:
            messages = await asyncio.wait_for(stream.rest(), 300)
        except grpc.aio.AioRpcError as error:
            try:
                outcome.refused.append(refusal(error))
            except AssertionError as bare:
                outcome.broken.append(str(bare))
        except TimeoutError:
            outcome.broken.append("a stream did not end")
        else:
            if messages and messages[-1].HasField("final"):
                async with outcome.ended:
                    outcome.finished += 1
                    outcome.ended.notify_all()
            else:
                outcome.broken.append("a stream ended well without its last message")


async def _publishing(server: Server, seen: Seen, prefix: str, stop: asyncio.Event) -> None:
    number = 0
    while not stop.is_set():
        name = f"{prefix}-{number}"
        await publish(server, seen, name, 200 + number)
        number += 1
        await asyncio.sleep(1)


async def _under_load(
    server: Server, seen: Seen, prefix: str, event: Callable[[], Awaitable[None]]
) -> Outcome:
    """Six callers and a publisher, before, during and after an event."""
    outcome, stop = Outcome(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(_load(server, outcome, stop))
        group.create_task(_publishing(server, seen, prefix, stop))
        await outcome.more(6)
        await event()
        await outcome.more(6)
        stop.set()
    assert not outcome.broken, outcome.broken
    return outcome


async def _nothing_lost(server: Server, seen: Seen) -> None:
    for name, digest in seen.published.items():
        found = await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name))
        assert found.adapter.weights_digest == digest, f"{name} was acknowledged, and is lost"
        answer = await server.generate(prompt="x", adapter=name, stopping={"max_tokens": 1})
        assert answer.provenance.weights_digest == digest, f"{name} is served as another one"


async def killed(deployed: Deployed, server: Server, seen: Seen) -> str:
    back = 0.0

    async def kill() -> None:
        nonlocal back
        engine = deployed.engines()[0]
        replica = psutil.Process(engine.ppid())
        os.kill(replica.pid, signal.SIGKILL)
        psutil.wait_procs([engine], timeout=30)
        assert not engine.is_running(), "a killed replica's server goes on"
        back = await deployed.engines_are(2)

    outcome = await _under_load(server, seen, "killed", kill)
    codes = Counter(f"{r.code}/{r.metadata.get('cause', r.reason)}" for r in outcome.refused)
    # Only what ran there: at most six callers, each with one call.
    assert set(codes) <= {"UNAVAILABLE/replica_lost"}, codes
    assert codes.total() <= 6, f"calls were sent to a dead replica: {codes}"
    assert all(r.retry_after_s is not None for r in outcome.refused), "no RetryInfo"
    await _nothing_lost(server, seen)
    return (
        f"{outcome.finished} streams finished, {dict(codes)}; two engines again after "
        f"{back:.0f} s; {len(seen.published)} publications are there"
    )


async def drained(deployed: Deployed, server: Server, seen: Seen) -> str:
    """From two engines to one: only that one goes, after its streams."""
    engines, registry = _replicas(deployed), deployed.registry()
    there: Counter[str] = Counter()

    async def drain() -> None:
        streams = [
            server.stream(prompt="Tell me more", adapter="chat", stopping=LONG)
            for _ in range(10)
        ]
        await asyncio.gather(*(stream.first() for stream in streams))
        for engine in deployed.engines():
            assert sequences_of(engine), "one engine has nothing to finish"
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(deployed.run, "scale", "1"))
            ended = [group.create_task(stream.rest()) for stream in streams]
        for stream, task in zip(streams, ended, strict=True):
            last = task.result()[-1]
            assert last.HasField("final"), "a stream ended without its last message"
            tokens = last.final.usage.completion_tokens
            assert tokens == LONG["max_tokens"], f"a stream ended after {tokens} tokens"
            there[await replica_of(stream.call)] += 1
        await deployed.engines_are(1)

    outcome = await _under_load(server, seen, "drained", drain)
    assert not outcome.refused, f"a drain has refused calls: {outcome.refused}"
    left = _replicas(deployed)
    assert len(left) == 1, "the drained replica's server is still there"
    assert left < engines, f"the one that stays was replaced: {engines} -> {left}"
    assert deployed.registry() == registry, "the registry was replaced"
    stays = await _answering(server)
    assert stays in there, f"{stays} is new: {there}"
    gone = there.total() - there[stays]
    assert gone, "nothing ran at the replica that was drained"
    await _nothing_lost(server, seen)
    return (
        f"{outcome.finished} streams finished, none failed; {gone} long ones at the replica "
        f"that went, {there[stays]} at the one that stays, which is the same process"
    )


async def grown(deployed: Deployed, server: Server, seen: Seen) -> str:
    """From one engine to two: nothing else is touched."""
    engines, registry = _replicas(deployed), deployed.registry()
    stays = await _answering(server)

    async def grow() -> None:
        await asyncio.to_thread(deployed.run, "scale", "2")
        await deployed.engines_are(2)

    outcome = await _under_load(server, seen, "grown", grow)
    assert not outcome.refused, f"another engine has refused calls: {outcome.refused}"
    now = _replicas(deployed)
    assert len(now) == 2
    assert engines < now, f"the one that was there was replaced: {engines} -> {now}"
    assert deployed.registry() == registry, "the registry was replaced"
    found = {await replica_of(each.call) for each in await _at_once(server, 10)}
    assert len(found) == 2, f"only {found} answers"
    assert stays in found, f"{stays} is gone: {found}"
    await _nothing_lost(server, seen)
    if deployed.other is not None:
        deployed.other.check()
    return f"{outcome.finished} streams finished, none failed; the first is the same process"


def _replicas(deployed: Deployed) -> set[tuple[int, int]]:
    """(pid of its actor, pid of its server) of each engine."""
    return {(engine.ppid(), engine.pid) for engine in deployed.engines()}


async def _answering(server: Server) -> str:
    """The replica that answers a request."""
    (stream,) = await _at_once(server, 1)
    return await replica_of(stream.call)


async def _at_once(server: Server, count: int) -> list[Any]:
    """Streams, which have ended."""
    streams = [
        server.stream(prompt="Hi", adapter="chat", stopping={"max_tokens": 8})
        for _ in range(count)
    ]
    await asyncio.gather(*(stream.rest() for stream in streams))
    return streams


async def down(deployed: Deployed, server: Server, seen: Seen) -> str:
    """The last check: ours is gone, and nothing else."""
    assert await asyncio.to_thread(deployed.run, "down") == ""
    assert not deployed.servers_below(deployed.data_dir), "its servers are there"
    for place in (deployed.grpc, deployed.http):
        assert is_free("127.0.0.1", int(place.rpartition(":")[2])), f"{place} is kept"
    again = await asyncio.to_thread(deployed.tried, "down")
    assert (again.returncode, again.stdout) == (1, "not deployed\n"), again
    assert deployed.other is not None
    deployed.other.check()
    return "ours is gone; another team's application is the same process"


NEED_NEIGHBOUR = (fails, down)
"""Checks that are only for a deployment of our own, beside another team's application."""
Check = Callable[[Deployed, Server, Seen], Awaitable[str]]
CHECKS: tuple[Check, ...] = (
    interfaces,
    health,
    uploads,
    loads,
    streams,
    http,
    errors,
    cancels,
    affinity,
    publication,
    fails,
    cost,
    killed,
    drained,
    grown,
    down,
)
