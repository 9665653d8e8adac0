"""Send traffic over constantly changing adapters, and record all answers.

`churn` sends requests to a server (over real sockets) while names are replaced, rolled back,
deleted and published again, aliases move, and adapters are evicted in every mode, pinned and
prefetched. Nothing is judged here: `tests.torture.isolation` does that at the end.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import grpc
from veneer_proto.v1 import adapters_pb2
from veneer_registry.format import read_adapter

from tests.server_harness import read_files, refusal, request, upload_messages
from tests.tiny_llama import VOCABULARY, make_lora
from tests.torture.churn_record import Attempt, Churn, Content, Traffic

ALIAS = "live"
CHANGERS = 3
"""Number of concurrent changes, each of another name."""
KINDS = {
    "replace": 50,
    "alias": 20,
    "rollback": 6,
    "evict": 20,
    "activate": 8,
    "pin": 6,
    "delete": 3,
}
"""Kinds of changes of adapters, with their relative frequency."""
LONGEST_S = 60.0
"""Seconds after which a call counts as hung: it fails with DEADLINE_EXCEEDED."""


class Stubs(Protocol):
    """Stubs of a server: `server_harness.Server`, or `in_process.InProcess`."""

    inference: Any
    adapters: Any


async def churn(
    server: Stubs, traffic: Traffic, generator: random.Random, folder: Path
) -> Churn:
    """Publish all names, then send the traffic while they change; return the record.

    Args:
        folder: a new folder for the adapters.
    """
    run = Churn()
    changer = _Changer(server, traffic, generator, folder, run)
    names = [f"adapter-{number}" for number in range(traffic.names)]
    for name in names:
        await changer.publish(name, changer.fresh())
    waiting = _requests(traffic, names, random.Random(generator.random()), run)
    # Bounded, so that requests wait if changes do not keep up: the ratio of both is fixed.
    due: asyncio.Queue[bool] = asyncio.Queue(traffic.each * CHANGERS)

    async def work() -> None:
        for attempt in waiting:
            await _send(server, attempt, traffic.logprobs)
            await due.put(True)

    async def change() -> None:
        while True:
            for _ in range(traffic.each):
                if not await due.get():
                    return
            await changer.change(generator.choice(names))

    async with asyncio.TaskGroup() as changing:
        for _ in range(CHANGERS):
            changing.create_task(change())
        async with asyncio.TaskGroup() as working:
            for _ in range(traffic.workers):
                working.create_task(work())
        for _ in range(CHANGERS):
            # Let a running change end: its effect must be in the ledger.
            await due.put(False)
    return run


def _requests(
    traffic: Traffic, names: list[str], generator: random.Random, run: Churn
) -> Iterator[Attempt]:
    """Yield requests in order. There are few prompt prefixes, so that adapters share them."""

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(count)]

    beginnings = [tokens(count) for count in (17, 33, 50)]
    for number in range(traffic.requests):
        name = generator.choice(names) if generator.random() < 0.95 else ""
        how = generator.random()
        if name and how < 0.1:
            name = f"{name}@{run.ledger.now(name)[:12]}".removesuffix("@")
        elif name and how < 0.3 and run.ledger.now(f"{name}/{ALIAS}"):
            name = f"{name}/{ALIAS}"
        most = generator.randint(1, traffic.most_tokens)
        attempt = Attempt(
            number,
            asked=name,
            prompt=generator.choice(beginnings) + tokens(generator.randint(1, 8)),
            most=most,
            temperature=1.0 if generator.random() < traffic.sampled else 0.0,
            cancel_at=generator.randrange(most) if generator.random() < traffic.cancelled
            else None,
        )  # fmt: skip
        run.attempts.append(attempt)
        yield attempt


async def _send(server: Stubs, attempt: Attempt, logprobs: bool) -> None:
    """Send one request and record its outcome."""
    asked = request(
        token_ids=attempt.prompt,
        adapter=attempt.asked,
        sampling={"temperature": attempt.temperature, "seed": attempt.number},
        stopping={"max_tokens": attempt.most, "ignore_eos": True},
        output={"logprobs": logprobs},
    )
    attempt.began = time.monotonic()
    call = server.inference.GenerateStream(asked, timeout=LONGEST_S)
    try:
        if attempt.cancel_at == 0:
            await asyncio.sleep(attempt.number % 8 / 1000)
            call.cancel()
        async for message in call:
            attempt.settled = attempt.settled or time.monotonic()
            _note(attempt, message)
            if attempt.cancel_at and len(attempt.tokens) >= attempt.cancel_at:
                call.cancel()
        if not attempt.outcome:
            attempt.outcome = "ended without `final`"
    except asyncio.CancelledError:
        if attempt.cancel_at is None:
            raise
        attempt.outcome = "cancelled"
    except grpc.aio.AioRpcError as error:
        attempt.outcome = error.code().name
        with suppress(AssertionError):  # gRPC's own statuses have no reason
            attempt.outcome = refusal(error).reason
        if attempt.outcome == "CANCELLED" and attempt.cancel_at is not None:
            attempt.outcome = "cancelled"
    attempt.settled = attempt.settled or time.monotonic()


def _note(attempt: Attempt, message: Any) -> None:
    attempt.tokens.extend(message.token_ids)
    attempt.logprobs.extend(entry.logprob for entry in message.logprobs)
    if message.HasField("final"):
        where = message.final.provenance
        attempt.outcome = "finished"
        attempt.adapter, attempt.revision = where.adapter, where.revision
        attempt.digest = where.weights_digest


class _Changer:
    """Changes adapters one after another; only one task at a time changes a name."""

    def __init__(
        self,
        server: Stubs,
        traffic: Traffic,
        generator: random.Random,
        folder: Path,
        run: Churn,
    ) -> None:
        self._server = server
        self._traffic = traffic
        self._random = generator
        self._folder = folder
        self._run = run
        self._made: list[Content] = []
        self._locks: dict[str, asyncio.Lock] = {}

    def fresh(self) -> Content:
        """Make new weights that no adapter has had."""
        seed = self._random.getrandbits(32)
        folder = make_lora(
            self._folder / f"content-{len(self._made)}",
            seed=seed,
            rank=self._random.choice(self._traffic.ranks),
            modules=self._traffic.modules,
        )
        self._made.append(Content(folder, read_adapter(folder, None).weights_digest))
        return self._made[-1]

    async def publish(self, name: str, content: Content) -> None:
        began = time.monotonic()
        files = read_files(content.folder)
        answer: Any = await self._server.adapters.UploadAdapter(
            upload_messages(files, name, allow_replace=True)
        )
        self._run.ledger.contents[answer.adapter.revision] = content
        self._run.ledger.change(name, (answer.adapter.revision,), began)

    async def change(self, name: str) -> None:
        """Make a random change to one adapter; allowed refusals are counted, not raised."""
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        async with self._locks.setdefault(name, asyncio.Lock()):
            try:
                await getattr(self, f"_{kind}")(name)
                self._run.changes[kind] += 1
            except grpc.aio.AioRpcError as error:
                self._run.changes[f"{kind}: {refusal(error).reason}"] += 1

    async def _replace(self, name: str) -> None:
        """Replace, usually with new weights, otherwise with weights that this or another name
        had."""
        old = self._random.random() < 0.3
        await self.publish(name, self._random.choice(self._made) if old else self.fresh())

    async def _rollback(self, name: str) -> None:
        """Roll back to the name's previous revision, if any."""
        began, revision = time.monotonic(), self._run.ledger.before(name)
        if revision:
            await self._server.adapters.UpdateAdapter(
                adapters_pb2.UpdateAdapterRequest(name=f"{name}@{revision}", current=True)
            )
            self._run.ledger.change(name, (revision,), began)

    async def _alias(self, name: str) -> None:
        """Point an alias at the current revision, the previous one, or both."""
        began, ledger = time.monotonic(), self._run.ledger
        kept = list(dict.fromkeys(filter(None, (ledger.now(name), ledger.before(name)))))
        targets = self._random.sample(kept, self._random.randint(1, len(kept)))
        await self._server.adapters.SetAlias(
            adapters_pb2.SetAliasRequest(
                alias=f"{name}/{ALIAS}",
                targets=[adapters_pb2.AliasTarget(revision=r, weight=1) for r in targets],
            )
        )
        ledger.change(f"{name}/{ALIAS}", tuple(targets), began)

    async def _evict(self, name: str) -> None:
        mode: Any = self._random.choice(adapters_pb2.EvictMode.values()[1:])
        digest = self._digest(name)
        began = time.monotonic()
        try:
            await self._server.adapters.EvictAdapter(
                adapters_pb2.EvictAdapterRequest(name=name, mode=mode)
            )
        finally:
            if mode == adapters_pb2.EVICT_MODE_ABORT:
                self._run.ledger.aborted.append((digest, began, time.monotonic()))

    async def _activate(self, name: str) -> None:
        await self._server.adapters.ActivateAdapter(
            adapters_pb2.ActivateAdapterRequest(name=name)
        )

    async def _pin(self, name: str) -> None:
        await self._server.adapters.ActivateAdapter(
            adapters_pb2.ActivateAdapterRequest(name=name, pin=True)
        )
        await self._server.adapters.EvictAdapter(
            adapters_pb2.EvictAdapterRequest(name=name, unpin=True)
        )

    async def _delete(self, name: str) -> None:
        began = time.monotonic()
        await self._server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name))
        for gone in (name, f"{name}/{ALIAS}"):
            self._run.ledger.change(gone, (), began)
        await self.publish(name, self.fresh())

    def _digest(self, name: str) -> str:
        return self._run.ledger.contents[self._run.ledger.now(name)].digest
