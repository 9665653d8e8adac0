"""The clients, the command and the examples against the real server on the real base."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from veneer_client import (
    AdapterEventKind,
    AsyncClient,
    Chat,
    FinishReason,
    RetryPolicy,
    Text,
    Tier,
)
from veneer_registry.errors import AdapterCorrupt, AdapterNotFound, InvalidField

from tests.server_harness import Server, running_server

pytestmark = [
    pytest.mark.push,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
# The suite shares two cores: what the server says is right, only later than usual. It tells up
# to a minute when its steps are slow, and a client gives up that was told more than this.
PATIENT = RetryPolicy(attempts=90, longest_wait_s=60.0, growth=1.0)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def published(server: Server) -> AsyncIterator[Server]:
    """The shared server with the example adapters, for the time of this module."""
    async with AsyncClient(server.address) as client:
        for name in ("chat", "code"):
            await client.push(EXAMPLES / "adapters" / name, name)
        yield server
        for name in ("chat", "code"):
            await client.delete(name)


async def run(*command: str, server: Server, lines: str = "") -> tuple[str, str]:
    """Output and notes of a program that must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "VENEER_SERVER": server.address, "COLUMNS": "200"},
    )
    out, errors = await process.communicate(lines.encode())
    assert process.returncode == 0, errors.decode()
    return out.decode(), errors.decode()


async def veneer(*args: str, server: Server, lines: str = "") -> tuple[str, str]:
    command = str(Path(sys.executable).with_name("veneer"))
    return await run(command, *args, server=server, lines=lines)


# ------------------------------------------------------------------------ examples


async def example(name: str, server: Server) -> str:
    out, _ = await run(sys.executable, str(EXAMPLES / name), server.address, server=server)
    return out


async def test_example_stream(published: Server) -> None:
    out = await example("stream.py", published)
    assert "tokens by base, the first after" in out
    assert len(out.split("\n\n")[0]) > 20


async def test_example_chat(published: Server) -> None:
    out = await example("chat.py", published)
    assert out.startswith("talking to chat@")
    answer = out.split("> What is my name?")[1]
    assert answer.strip()


async def test_example_two_adapters(published: Server) -> None:
    out = await example("two_adapters.py", published)
    titles = [line for line in out.splitlines() if line.startswith("--- ")]
    assert [title.split("@")[0] for title in titles] == ["--- base", "--- chat", "--- code"]
    answers = {part.partition("\n")[2].strip() for part in out.split("--- ")[1:]}
    assert len(answers) == 3, "three sets of weights, three answers"


async def test_example_structured(published: Server) -> None:
    out = await example("structured.py", published)
    first, second = out.splitlines()
    assert first.endswith("inhabitants")
    assert second in ("in Europe: yes", "in Europe: no")


async def test_example_publish_and_use(published: Server) -> None:
    out = await example("publish_and_use.py", published)
    assert "in device, pinned\nanswered by example-code@" in out
    assert out.endswith("deleted\n")


async def test_every_example_is_listed_and_tested() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    listing = (EXAMPLES / "README.md").read_text()
    tested = {f"{name.removeprefix('test_example_')}.py" for name in globals()}
    for script in scripts:
        assert f"`{script}`" in listing, script
        assert script in tested | {"demo.py"}, script  # `make demo` runs that one


# ------------------------------------------------------------------------- clients


async def test_a_handle_keeps_its_revision_when_the_name_moves(published: Server) -> None:
    async with AsyncClient(published.address) as client:
        await client.push(EXAMPLES / "adapters" / "chat", "moving")
        async with client.adapter("moving", pin=True) as a:
            before = await a.generate(Text("Once"), temperature=0, max_tokens=6)
            code = EXAMPLES / "adapters" / "code"
            await client.push(code, "moving", allow_replace=True)
            after = await a.generate(Text("Once"), temperature=0, max_tokens=6)
            assert after.token_ids == before.token_ids
            assert after.provenance.revision == a.info.revision
            now = await client.generate(Text("Once"), adapter="moving", max_tokens=1)
            assert now.provenance.revision != a.info.revision
            assert (await a.details()).adapter.pinned
        old = (await client.get(a.ref)).adapter
        assert (old.pinned, old.tier) == (False, Tier.DEVICE), "let go, not thrown out"
        await client.delete("moving")
        with pytest.raises(AdapterNotFound) as caught:
            async with client.adapter("chta"):
                pass
        assert caught.value.metadata["did_you_mean"] == "chat"


async def test_request_options_reach_the_engine(published: Server) -> None:
    async with AsyncClient(published.address) as client:
        options: dict[str, Any] = {"adapter": "chat", "max_tokens": 5, "seed": 3}
        samples = await client.generate(
            Text("The"), n=3, top_logprobs=2, min_p=0.01, repetition_penalty=1.1, **options
        )
        assert len(samples.others) == 2
        assert all(len(score.top) == 2 for score in samples.logprobs)
        stream = client.generate_stream(Text("The"), n=2, ignore_eos=True, **options)
        chunks = [chunk async for chunk in stream]
        ends = {c.index: c.finish_reason for c in chunks if c.finish_reason is not None}
        assert ends == {0: FinishReason.LENGTH, 1: FinishReason.LENGTH}
        greedy = await client.generate(Text("The"), temperature=0, max_tokens=1)
        (likeliest,) = greedy.token_ids
        banned = await client.generate(
            Text("The"), temperature=0, max_tokens=1, logit_bias={likeliest: -100.0}
        )
        assert banned.token_ids != greedy.token_ids
        stopped = await client.generate(Text("The"), temperature=0, stop_token_ids=[likeliest])
        assert (stopped.text, stopped.finish_reason) == ("", FinishReason.STOP)
        with pytest.raises(InvalidField):
            await client.generate(Text("The"), regex="(")


async def test_a_prompt_seen_before_comes_from_the_cache(published: Server) -> None:
    prompt = Chat.user("Count to three. " * 12)
    async with AsyncClient(published.address) as client:
        options: dict[str, Any] = {"adapter": "chat", "temperature": 0, "max_tokens": 2}
        await client.generate(prompt, **options)
        again = await client.generate(prompt, **options)
        off = await client.generate(prompt, use_prefix_cache=False, **options)
    assert again.usage.cached_prompt_tokens > 0
    assert off.usage.cached_prompt_tokens == 0
    assert again.token_ids == off.token_ids


async def test_the_command_talks_and_plans(published: Server) -> None:
    lines = "Say hello.\n/adapter code\nAgain.\n"
    flags = ("--temperature", "0", "--max-tokens", "8")
    out, notes = await veneer("chat", "-a", "chat", *flags, server=published, lines=lines)
    assert len(out.strip()) > 5
    assert "talking to chat@" in notes
    assert "talking to code@" in notes
    chosen, _ = await veneer(
        "generate", "Is water wet?", "--choice", "yes", "--choice", "no", server=published
    )
    assert chosen.strip() in ("yes", "no")
    planned, _ = await veneer("plan", "--like", "chat", "--json", server=published)
    assert json.loads(planned)["adapters"]["on_device"] > 0


# -------------------------------------------------------- watching, over everything


async def test_watch_and_retries_over_damage_a_full_queue_a_dead_engine_and_a_restart(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """One server's hard day; the callers of the clients notice only that it takes longer."""
    data, endless = tmp_path / "data", {"max_tokens": 7000, "ignore_eos": True}
    flags = ("--max-running", "1", "--max-queue", "0")
    async with running_server(data, cache_dir, *flags) as server:
        address = server.address
        client = AsyncClient(address, retry=PATIENT)
        watch = client.watch(timeout_s=170)
        assert [e.kind async for e in _up_to(watch, AdapterEventKind.SYNCED)] == [
            AdapterEventKind.RESET,
            AdapterEventKind.SYNCED,
        ]
        await client.push(EXAMPLES / "adapters" / "chat", "chat", activate=True)
        seen = [e.kind async for e in _up_to(watch, AdapterEventKind.ACTIVATED)]
        assert seen == [AdapterEventKind.PUBLISHED, AdapterEventKind.ACTIVATED]

        # Damage at rest: told to those who watch, repaired by pushing again.
        chat = (await client.get("chat")).adapter
        await client.evict("chat")
        weights = data / "store" / "weights" / chat.weights_digest / "adapter_model.safetensors"
        weights.chmod(0o644)
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(AdapterCorrupt):
            await client.activate("chat")
        events = [e async for e in _up_to(watch, AdapterEventKind.FAILED)]
        assert [e.kind for e in events] == [AdapterEventKind.EVICTED, AdapterEventKind.FAILED]
        assert "push the adapter again" in events[-1].detail
        await client.push(EXAMPLES / "adapters" / "chat", "chat", activate=True)
        seen = [e.kind async for e in _up_to(watch, AdapterEventKind.ACTIVATED)]
        assert seen == [
            AdapterEventKind.QUARANTINED,
            AdapterEventKind.LOADED,
            AdapterEventKind.ACTIVATED,
        ]

        # A full queue: told to come back, it does.
        stream = server.stream(prompt="Go", stopping=endless)
        await stream.first()
        waiting = asyncio.create_task(client.generate(Text("Hi"), max_tokens=2))
        await _refused(server, "QUEUE_FULL")
        stream.call.cancel()
        assert (await waiting).usage.completion_tokens == 2

        # A dead engine: refused until it is back, with its adapters.
        engine = server.engine
        engine.kill()
        await server.wait_for_health(False, seconds=20)
        answer = await client.generate(Text("Hi"), adapter="chat", max_tokens=2)
        assert answer.provenance.adapter == "chat"
        assert (await client.info()).engine_starts == 2
        seen = [e.kind async for e in _up_to(watch, AdapterEventKind.ACTIVATED)]
        assert seen == [
            AdapterEventKind.EVICTED,
            AdapterEventKind.LOADED,
            AdapterEventKind.ACTIVATED,
        ]

        # A server that drains, goes, and comes back at the same address.
        stream = server.stream(prompt="Go", stopping=endless)
        await stream.first()
        server.process.send_signal(signal.SIGTERM)
        await server.wait_for_health(False, seconds=20)
        waiting = asyncio.create_task(client.generate(Text("Hi"), adapter="chat", max_tokens=2))
        await _refused(server, "DRAINING")
        stream.call.cancel()
        assert await asyncio.wait_for(server.process.wait(), 60) == 0
    before = watch.sequence
    async with running_server(data, cache_dir, *flags, "--listen", address):
        assert (await waiting).provenance.adapter == "chat"
        events = [e async for e in _up_to(watch, AdapterEventKind.SYNCED)]
        assert [e.kind for e in events[:2]] == [
            AdapterEventKind.RESET,
            AdapterEventKind.PRESENT,
        ]
        assert events[1].adapter is not None
        assert events[1].adapter.name == "chat"
        assert watch.sequence > before
        await client.close()


async def _up_to(watch: Any, kind: AdapterEventKind) -> AsyncIterator[Any]:
    while True:
        event = await anext(watch)
        yield event
        if event.kind is kind:
            return


async def _refused(server: Server, reason: str) -> None:
    """Wait until the server has refused a call for this reason."""
    while not (await server.metric("veneer_request_failures_total")).get(f'reason="{reason}"'):
        pass  # each look is a scrape over HTTP
