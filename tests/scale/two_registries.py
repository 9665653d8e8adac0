"""Readers, writers and faults on two registries, PostgreSQL, S3 and four engines.

    python -m tests.scale.two_registries                     20,000 reads, about ten minutes
    python -m tests.scale.two_registries --reads 2000        about one minute
    python -m tests.scale.two_registries --reads 2000 --plan the faults of a seed, run nothing
    python -m tests.scale.two_registries --bugs              planted bugs must be noticed
    python -m tests.scale.two_registries --keep run.json     keep the recorded history, and
    python -m tests.scale.two_registries --judge run.json    judge it again

Writers push, replace, label, move aliases, roll back, delete and create again, at either
registry or through an engine, and most wait for all followers. Readers ask each engine, a third
of them for a view of a maximum age. What was asked and answered is judged by `promises`. The
same seed plans the same faults; what meets them differs from run to run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import replication_pb2

from tests import seeds
from tests.places import cache_dir
from tests.scale import nemesis, promises
from tests.scale.cluster import ENGINES, REGISTRIES, Cluster, Node, cluster
from tests.scale.nemesis import Nemesis, Step, clock
from tests.scale.planted_servers import BUGS, program
from tests.scale.promises import (
    Fault,
    History,
    Line,
    Read,
    Verdict,
    Violation,
    Weights,
    Write,
)
from tests.server_harness import read_files, request, upload_messages
from tests.tiny_llama import make_lora

CONTENTS: Final = 6
WRITERS: Final = 3
NAMES_EACH: Final = 3
READERS: Final = 3
"""For each engine."""
READS_A_SECOND: Final = 20.0
"""At each engine."""
_LAGS: Final = (1.0, 2.0, 4.0)
_WRITE_S: Final = 25.0
_READ_S: Final = 4.0
_AGREE_S: Final = 30.0
_SHOWN: Final = 5
"""Violations of each rule that are printed."""
PROMPT: Final = "One day a fox"

_ALL: Final = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
_NO_CHANGE: Final = ("NOT_FOUND", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "ALREADY_EXISTS")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call failed: gRPC's code, the reason, its metadata; ``ours`` if Veneer gave it."""

    code: str
    reason: str
    metadata: dict[str, str]
    ours: bool

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Failure:
        info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(error)
        for detail in () if status is None else status.details:
            detail.Unpack(info)
        # Without a reason of ours, gRPC's words are all there is.
        reason = info.reason or (error.details() or "")[:120]
        return cls(error.code().name, reason, dict(info.metadata), bool(info.reason))

    def __str__(self) -> str:
        cause = self.metadata.get("cause", "")
        return " ".join(filter(None, (self.code, self.reason, cause)))


class Load:
    """Writers and readers, and what they recorded."""

    def __init__(self, servers: Cluster, seed: int, now: Callable[[], float]) -> None:
        self.servers, self.now = servers, now
        self.rng = random.Random(f"{seed} load")
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.weights: list[Weights] = []
        self.ended = False
        self._contents: list[dict[str, bytes]] = []
        self._numbers = 0
        self._told: dict[str, asyncio.Event] = {name: asyncio.Event() for name in REGISTRIES}

    @property
    def names(self) -> list[str]:
        """All names that are read: the writers', and those of `probe`."""
        return [f"name-{n}" for n in range(WRITERS * NAMES_EACH)] + list(
            map(_probe, REGISTRIES)
        )

    async def prepare(self) -> None:
        """Publish each content once, and note its digest and answer."""
        for number in range(CONTENTS):
            folder = self.servers.work / f"content-{number}"
            self._contents.append(read_files(make_lora(folder, seed=number, rank=32)))
            registry, engine = self.servers.nodes["a"].server, self.servers.nodes["1"].server
            assert registry is not None
            assert engine is not None
            name = f"right-{number}"
            pushed = await registry.push_files(self._contents[-1], name, wait=_ALL)
            said = await engine.generate(
                prompt=PROMPT, adapter=name, stopping={"max_tokens": 4, "ignore_eos": True}
            )
            self.weights.append(Weights(pushed.adapter.weights_digest, said.text))
        right = {(each.digest, each.answer) for each in self.weights}
        assert len(right) == len({each.answer for each in self.weights}) == CONTENTS

    # --------------------------------------------------------------------- writing

    async def writer(self, number: int) -> None:
        """Change this writer's names one after the other, until the end."""
        names = self.names[number * NAMES_EACH :][:NAMES_EACH]
        known: dict[str, list[str]] = {name: [] for name in names}
        while not self.ended:
            name = self.rng.choice(names)
            at = self.rng.choice(
                (REGISTRIES[number % 2], *REGISTRIES, self.rng.choice(ENGINES))
            )
            known[name] = await self._change(name, known[name], at)
            await asyncio.sleep(self.rng.choice((0, 0.05, 0.3)))

    async def _change(self, name: str, known: list[str], at: str) -> list[str]:
        """Make a change. ``known``: the revisions that the name probably has, newest first;
        returns them as they probably are afterwards."""
        draw, wait = self.rng.random(), _ALL if self.rng.random() < 0.85 else None
        older = known[1:3]
        if not known or draw < 0.4:
            write, answer = await self._push(name, at, wait)
            if write.outcome == "ok":
                known = [answer.adapter.revision, *known[:2]]
        elif draw < 0.6:
            write, _ = await self.write(
                "labels",
                name,
                at,
                wait,
                lambda id_: (
                    "UpdateAdapter",
                    pb.UpdateAdapterRequest(name=name, labels={"w": id_}, wait=wait),
                ),
            )
        elif draw < 0.75:
            revision = self.rng.choice(known)
            write, _ = await self.write(
                "alias",
                name,
                at,
                wait,
                lambda _: (
                    "SetAlias",
                    pb.SetAliasRequest(
                        alias=f"{name}/{promises.ALIAS}", revision=revision, wait=wait
                    ),
                ),
            )
        elif draw < 0.82 and older:
            back = self.rng.choice(older)
            write, _ = await self.write(
                "rollback",
                name,
                at,
                wait,
                lambda _: (
                    "UpdateAdapter",
                    pb.UpdateAdapterRequest(name=f"{name}@{back}", current=True, wait=wait),
                ),
            )
        else:
            write, _ = await self.write(
                "delete",
                name,
                at,
                wait,
                lambda _: ("DeleteAdapter", pb.DeleteAdapterRequest(name=name, wait=wait)),
            )
            if write.outcome == "ok":
                known = []
        # A refusal for another reason than a fault means that it is not as believed.
        return known if write.outcome == "ok" or write.why.startswith("UNAVAILABLE") else []

    async def _push(self, name: str, at: str, wait: Any) -> tuple[Write, Any]:
        number = self.rng.randrange(CONTENTS)

        def call(id_: str) -> tuple[str, Any]:
            spec = {"allow_replace": True, "labels": {"w": id_}, "wait": wait}
            return "UploadAdapter", upload_messages(self._files(number, id_), name, **spec)

        return await self.write("push", name, at, wait, call, weights=number)

    def _files(self, number: int, id_: str) -> dict[str, bytes]:
        """A content that nothing else has: another README makes another revision."""
        return {**self._contents[number], "README.md": id_.encode()}

    async def slow_push(self, at: str, half: asyncio.Event, go_on: asyncio.Event) -> None:
        """Push to a registry; tell ``half`` in the middle, and wait for ``go_on``."""
        number = self.rng.randrange(CONTENTS)

        def call(id_: str) -> tuple[str, Any]:
            spec = {"allow_replace": True, "labels": {"w": id_}, "wait": _ALL}
            messages = upload_messages(self._files(number, id_), "slow", **spec)

            async def sent() -> AsyncIterator[Any]:
                for at, message in enumerate(messages):
                    if at == len(messages) // 2:
                        half.set()
                        await go_on.wait()
                    yield message

            return "UploadAdapter", sent()

        try:
            await self.write("push", "slow", at, _ALL, call, weights=number)
        finally:
            half.set()

    async def probe(self, registry: str) -> None:
        """Change a label at one registry all the time, waiting for no follower: so it shows how
        long a change is held up."""
        name, made = _probe(registry), False
        while not self.ended:
            if made:
                write, _ = await self.write(
                    "labels",
                    name,
                    registry,
                    None,
                    lambda id_: (
                        "UpdateAdapter",
                        pb.UpdateAdapterRequest(name=name, labels={"w": id_}),
                    ),
                )
            else:
                write, _ = await self._push(name, registry, None)
                made = write.outcome == "ok"
            await asyncio.sleep(0.3)

    async def write(
        self,
        kind: str,
        name: str,
        at: str,
        wait: Any,
        call: Callable[[str], tuple[str, Any]],
        *,
        weights: int | None = None,
    ) -> tuple[Write, Any]:
        """Make a change and record it.

        Args:
            call: from the change's id, the method and its request.
        """
        self._numbers += 1
        id_, server = f"w{self._numbers}", self.servers.nodes[at].server
        registry = at if at in REGISTRIES else self.servers.follows[at]
        began, answer = self.now(), None
        fields: dict[str, Any] = {"outcome": "unknown"}
        if server is None:
            await asyncio.sleep(0.2)
            fields = {"outcome": "failed", "why": "not running", "unchanged": True}
        else:
            method, message = call(id_)
            try:
                answer = await getattr(server.adapters, method)(
                    message, timeout=_WRITE_S, metadata=(("veneer-actor", id_),)
                )
            except grpc.aio.AioRpcError as error:
                failure = Failure.of(error)
                unchanged = failure.metadata.get("outcome") == "unchanged"
                made = "failed" if unchanged or failure.code in _NO_CHANGE else "unknown"
                fields = {"outcome": made, "why": str(failure), "unchanged": unchanged}
            except (asyncio.CancelledError, grpc.aio.UsageError):  # the channel was closed
                if self.servers.nodes[at].server is server:
                    raise
                fields = {"outcome": "unknown", "why": "killed"}
            else:
                fields = {"outcome": "ok"}
                if answer.HasField("replicas"):
                    fields |= {"all": answer.replicas.enough, "live": answer.replicas.live}
        write = Write(
            id_,
            name,
            kind,
            at,
            registry,
            began,
            self.now(),
            waits=wait is not None,
            weights=weights,
            **fields,
        )
        self.writes.append(write)
        if write.all and write.outcome == "ok":
            self._told[registry].set()
        return write, answer

    async def acknowledged(self, registry: str) -> None:
        """Return after the next change that all followers have; after 20 s in any case."""
        self._told[registry].clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._told[registry].wait(), 20)

    # --------------------------------------------------------------------- reading

    async def reader(self, engine: str) -> None:
        """Read all names from one engine, until the end."""
        node = self.servers.nodes[engine]
        while not self.ended:
            draw = self.rng.random()
            what = "name" if draw < 0.6 else "alias" if draw < 0.75 else "generate"
            lag = self.rng.choice(_LAGS) if self.rng.random() < 0.35 else None
            await self.read(node, self.rng.choice(self.names), what, lag)
            await asyncio.sleep(self.rng.uniform(0, 2 * READERS / READS_A_SECOND))

    async def read(
        self, node: Node, name: str, what: Any, most_lag: float | None
    ) -> Read | None:
        """Read a name once and record it; None if the engine does not run."""
        server = node.server
        if server is None:
            await asyncio.sleep(0.05)
            return None
        metadata = () if most_lag is None else (("veneer-max-registry-lag", f"{most_lag:g}"),)
        began = self.now()
        fields: dict[str, Any]
        try:
            if what == "generate":
                said = await server.inference.Generate(
                    request(
                        prompt=PROMPT,
                        adapter=name,
                        stopping={"max_tokens": 4, "ignore_eos": True},
                    ),
                    timeout=_READ_S,
                    metadata=metadata,
                )
                fields = {"found": "seen", "revision": said.provenance.revision}
                fields["answer"] = said.text
            else:
                spec = f"{name}/{promises.ALIAS}" if what == "alias" else name
                got = await server.adapters.GetAdapter(
                    pb.GetAdapterRequest(name=spec), timeout=_READ_S, metadata=metadata
                )
                fields = {"found": "seen", "revision": got.adapter.revision}
                fields["digest"] = got.adapter.weights_digest
                fields["label"] = got.adapter.labels["w"] if what == "name" else ""
        except grpc.aio.AioRpcError as error:
            failure = Failure.of(error)
            found = {"NOT_FOUND": "absent", "DEADLINE_EXCEEDED": "unanswered"}
            found["UNAVAILABLE"] = "refused" if failure.ours else "unanswered"
            fields = {"found": found.get(failure.code, "error"), "why": str(failure)}
        except (asyncio.CancelledError, grpc.aio.UsageError):  # the channel was closed
            if node.server is server:
                raise
            return None
        read = Read(node.name, name, what, began, self.now(), most_lag=most_lag, **fields)
        self.reads.append(read)
        return read

    async def agree(self) -> list[str]:
        """After all faults: read every name from every engine with a fresh view. Returns what
        engines do not tell for `_AGREE_S`; what they tell is judged with the other reads."""
        silent = [
            f"{name} has ended by itself"
            for name, node in self.servers.nodes.items()
            if node.server is None or node.server.process.returncode is not None
        ]
        for engine in ENGINES:
            for name in self.names:
                end = self.now() + _AGREE_S
                while True:
                    read = await self.read(self.servers.nodes[engine], name, "name", 2.0)
                    if read is not None and read.found in ("seen", "absent"):
                        break
                    if self.now() > end:
                        silent.append(f"engine {engine} does not tell {name}: {read}")
                        break
                    await asyncio.sleep(0.1)
        return silent


def _probe(registry: str) -> str:
    return f"probe-{registry}"


async def record(
    servers: Cluster,
    seed: int,
    steps: Iterator[list[Step]],
    enough: Callable[[History], bool],
    *,
    aside: bool = True,
) -> tuple[History, list[str]]:
    """Run load and faults, round by round, until it is enough; return what happened, and what
    engines do not tell afterwards.

    Args:
        steps: rounds of faults.
        aside: whether the store and the clocks fail, too.
    """
    now = clock()
    load = Load(servers, seed, now)
    await load.prepare()
    spoiling = Nemesis(servers, now, load.slow_push, load.acknowledged)

    async def history() -> History:
        # The lines last: what was acknowledged by then is in them.
        parts = tuple(load.writes), tuple(load.reads), tuple(spoiling.faults)
        lines = await asyncio.to_thread(_lines, servers)
        return History(ENGINES, tuple(load.weights), *parts, lines)

    loads = [load.writer(number) for number in range(WRITERS)]
    loads += [load.probe(registry) for registry in REGISTRIES]
    loads += [load.reader(engine) for engine in ENGINES for _ in range(READERS)]
    tasks = [asyncio.ensure_future(each) for each in loads]
    beside = []
    if aside:
        skewed = [name for name, node in servers.nodes.items() if node.clock is not None]
        for work in (
            spoiling.run_store(nemesis.store_plan(seed)),
            spoiling.run_clocks(nemesis.clock_plan(seed, skewed)),
        ):
            beside.append(asyncio.ensure_future(work))
    try:
        for some in steps:
            working = asyncio.ensure_future(spoiling.run(some))
            await asyncio.wait({working, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, *tasks, *beside):
                if task.done():
                    task.result()
            if enough(await history()):
                break
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await asyncio.to_thread(servers.s3.fail)
        load.ended = True
        await asyncio.gather(*tasks)
        silent = await load.agree() if aside else []
        return await history(), silent
    finally:
        for task in (*tasks, *beside):
            task.cancel()
        await asyncio.gather(*tasks, *beside, return_exceptions=True)


def _lines(servers: Cluster) -> tuple[Line, ...]:
    """The catalog's history, as PostgreSQL has it."""
    with servers.postgres.connect() as connection:
        rows = connection.execute(
            "SELECT sequence, name, event, revision, actor FROM veneer.history"
        ).fetchall()
    return tuple(Line(*row) for row in rows)


def report(history: History, verdict: Verdict) -> Iterator[str]:
    """Counts of what happened, and the broken promises."""
    reads, writes = history.reads, history.writes
    found = Counter(read.found for read in reads)
    strict = [read for read in reads if read.most_lag is not None]
    answered = Counter(read.found in ("seen", "absent") for read in strict)
    yield (
        f"{_answered(history)} reads ({answered[True]} strict, "
        f"{sum(read.what == 'generate' for read in reads)} generated), "
        f"{found['refused']} refused ({answered[False]} strict), "
        f"{found['unanswered']} unanswered, {found['error']} errors"
    )
    outcomes = Counter(write.outcome for write in writes)
    yield (
        f"{len(writes)} changes: {outcomes['ok']} acknowledged "
        f"({sum(write.all for write in writes)} by all followers), "
        f"{outcomes['failed']} refused, {outcomes['unknown']} unknown"
    )
    whys = Counter(read.why for read in reads if read.found == "error")
    whys += Counter(write.why for write in writes if write.outcome != "ok")
    yield f"why: {', '.join(f'{n} {why}' for why, n in whys.most_common(12))}"
    faults = Counter(fault.kind for fault in history.faults)
    yield f"{len(history.faults)} faults: {', '.join(f'{n} {k}' for k, n in faults.items())}"
    blocked = "" if verdict.blocked_s is None else f"{verdict.blocked_s:.1f} s"
    yield f"the longest that a paused registry held others up: {blocked or 'none was paused'}"
    by_rule = ", ".join(f"{n} {rule}" for rule, n in sorted(verdict.by_rule.items()))
    yield f"broken promises: {by_rule or 'none'}"
    told: Counter[str] = Counter()
    for each in verdict.violations:
        told[each.rule] += 1
        if told[each.rule] <= _SHOWN:
            yield f"    {each.rule}: {each.text}"


def to_json(history: History) -> str:
    """A history as one JSON object."""
    return json.dumps(asdict(history), default=sorted)


def from_json(text: str) -> History:
    """The opposite of `to_json`."""
    data = json.loads(text)
    faults = (
        Fault(**{**each, "cuts": frozenset(each["cuts"]), "stops": frozenset(each["stops"])})
        for each in data["faults"]
    )
    return History(
        tuple(data["engines"]),
        tuple(Weights(**each) for each in data["weights"]),
        tuple(Write(**each) for each in data["writes"]),
        tuple(Read(**each) for each in data["reads"]),
        tuple(faults),
        tuple(Line(**each) for each in data["lines"]),
    )


def rounds(seed: int) -> Iterator[list[Step]]:
    """The plan of a seed, round by round, without end."""
    number = 1
    while True:
        yield nemesis.plan(seed, number)[-len(nemesis.KINDS) :]
        number += 1


def _answered(history: History) -> int:
    return sum(read.found in ("seen", "absent") for read in history.reads)


async def run(seed: int, reads: int, keep: Path | None) -> bool:
    """One run; return whether every promise was kept."""
    with tempfile.TemporaryDirectory(prefix="veneer-scale-") as work:
        async with cluster(Path(work), cache_dir()) as servers:
            if servers.library is None:
                print("no libfaketime (make tools): clocks are not set wrong")
            await servers.start()
            history, silent = await record(
                servers, seed, rounds(seed), lambda so_far: _answered(so_far) >= reads
            )
    if keep is not None:
        await asyncio.to_thread(keep.write_text, to_json(history))
    return _tell(history, silent)


async def run_bug(name: str, seed: int) -> bool:
    """Run servers with a planted bug; return whether it was noticed by the right rule."""
    bug = BUGS[name]
    with tempfile.TemporaryDirectory(prefix="veneer-scale-") as work:
        async with cluster(Path(work), cache_dir()) as servers:
            await servers.start(program(name, Path(work)))
            again = (list(bug.steps) for _ in range(3))
            noticed: list[Violation] = []

            def enough(history: History) -> bool:
                noticed[:] = [
                    each for each in promises.judge(history).violations if bug.rule in each.rule
                ]
                return bool(noticed)

            await record(servers, seed, again, enough, aside=False)
    print(f"{name}: {f'noticed: {noticed[0].text}' if noticed else 'NOT NOTICED'}", flush=True)
    return bool(noticed)


def _tell(history: History, silent: list[str]) -> bool:
    verdict = promises.judge(history)
    print(*report(history, verdict), *silent, sep="\n", flush=True)
    return not verdict.violations and not silent


def main(arguments: list[str] | None = None) -> int:
    """Run; return 1 if a promise was broken, or a planted bug was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=seeds.seed())
    parser.add_argument("--plan", action="store_true", help="print the faults, run nothing")
    parser.add_argument(
        "--bugs", nargs="*", choices=BUGS, metavar="BUG", help="servers with planted bugs"
    )
    parser.add_argument("--keep", type=Path, help="write the history to this file")
    parser.add_argument("--judge", type=Path, help="judge the history in this file")
    given = parser.parse_args(arguments)
    if given.judge:
        return 0 if _tell(from_json(given.judge.read_text()), []) else 1
    print(f"seed {given.seed}", flush=True)
    if given.bugs is not None:
        chosen = given.bugs or [name for name, bug in BUGS.items() if bug.steps]
        missed = [name for name in chosen if not asyncio.run(run_bug(name, given.seed))]
        print(f"{len(chosen) - len(missed)} of {len(chosen)} planted bugs noticed")
        return 1 if missed else 0
    if given.plan:
        for step in next(rounds(given.seed)):
            print(step)
        return 0
    return 0 if asyncio.run(run(given.seed, given.reads, given.keep)) else 1


if __name__ == "__main__":
    sys.exit(main())
