"""Clients of a front process that is killed. Each owns a name, changes it, and records which
changes were acknowledged and which were in flight. See row 3."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import grpc
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc
from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import ALLOWED_FILES, REQUIRED_FILES
from veneer_registry.format import weights_digest
from veneer_registry.lora_config import CONFIG_FILE

from tests.torture.ledger import Name
from tests.unit.server.rpc.front_harness import make_adapter

CHUNK: Final = 6000
"""Bytes per message: an adapter takes several messages, so that kills can fall between them."""
TIMEOUT_S: Final = 20.0
ALIASES: Final = ("prod", "canary")
DEAD: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Killed(Exception):
    """The front process has died."""


@dataclass(frozen=True, slots=True)
class Content:
    """An adapter to push: its files and their expected digests."""

    files: dict[str, bytes]
    weights: str
    revision: str

    sums: dict[str, str]


def make_contents(folder: Path, seeds: list[int]) -> list[Content]:
    """Make one content per seed, and one with the weights of the first and a template."""
    made = []
    for number, seed in enumerate([*seeds, seeds[0]]):
        template = f"{{{{ messages }}}} {seed}" if number == len(seeds) else None
        path = make_adapter(folder / str(number), seed=seed, rank=8, template=template)
        config = json.loads((path / CONFIG_FILE).read_text())
        (path / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 1 + seed}))
        files = {p.name: p.read_bytes() for p in sorted(path.iterdir())}
        files = {name: data for name, data in files.items() if name in ALLOWED_FILES}
        weights = weights_digest(path)
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        extra = {name: sha for name, sha in sums.items() if name not in REQUIRED_FILES}
        made.append(Content(files, weights, Bundle(weights, extra).revision, sums))
    return made


@dataclass(slots=True)
class Part:
    """What is known about one upload: for each file, the minimum and maximum bytes received."""

    told: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class UnderWay:
    """A call in flight, with the name's state and the pins after it.

    Attributes:
        states: all states that may be found if the call was interrupted, besides the previous
            state.
        publishes: the content whose upload the call completes.
    """

    what: str
    states: tuple[Name, ...]
    pins: frozenset[str]
    publishes: int | None = None


class Client:
    """The client of one thread. `work` runs until the front dies; `judge` checks the next
    front.

    Attributes:
        state, pins: the acknowledged state and pins (weights digests).
        counts: acknowledged calls by kind, and kills during calls.
        pinning: whether it pins; if so, no other client has its contents.
    """

    whole: ClassVar[set[str]] = set()
    """SHA-256 of each file that a client has sent completely."""

    def __init__(
        self, name: str, contents: list[Content], rng: random.Random, *, pinning: bool
    ) -> None:
        self.name = name
        self.contents = contents
        self.pinning = pinning
        self.state = Name(1)
        self.pins: frozenset[str] = frozenset()
        self.parts = [Part() for _ in contents]
        self.under_way: UnderWay | None = None
        self.failures: list[str] = []
        self.counts: dict[str, int] = {}
        self.cut_short = -1
        """The content whose publish the last kill interrupted and undid."""
        self._rng = rng
        self._stub: Any = None
        self._dead: Callable[[], bool] = lambda: True

    def connect(self, channel: grpc.Channel, dead: Callable[[], bool]) -> None:
        self._stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        self._dead = dead

    # ---------------------------------------------------------------------- work

    def work(self) -> None:
        """Make changes until the front dies."""
        try:
            while True:
                self._change()
        except Killed:
            return
        except Exception as error:
            if not self._died():
                what = self.under_way.what if self.under_way else "between two calls"
                self._fail(f"{what}: {type(error).__name__}: {str(error)[:400]}")

    def _change(self) -> None:
        state, rng = self.state, self._rng
        if not state.kept or rng.random() < 0.45:
            self._upload(rng.randrange(len(self.contents)))
            return
        kept = rng.choice(state.kept)
        pick = rng.random()
        if pick < 0.2:
            self._pin(kept)
        elif pick < 0.4:
            self._alias(kept)
        elif pick < 0.5:
            self._update("make current", kept, (state.made_current(kept),), current=True)
        elif pick < 0.6:
            labels = {rng.choice("xy"): str(rng.randrange(9))}
            self._update("label", kept, (state.relabel(kept, labels),), labels=labels)
        elif pick < 0.7:
            retain = rng.randrange(4)
            wide = replace(state, retain=retain)
            after = wide if retain == state.retain else state.retaining(retain)
            self._update("retain", kept, (wide, after), retain=retain)
        elif pick < 0.9 and state.deletable():
            self._delete(rng.choice(state.deletable()))
        elif pick > 0.93:
            call = pb.DeleteAdapterRequest(name=self.name)
            self._do("delete name", (state.forgotten(),), self._stub.DeleteAdapter, call)

    def _delete(self, content: int) -> None:
        call = pb.DeleteAdapterRequest(name=self._spec(content))
        after = self.state.delete(content)
        self._do("delete revision", (after,), self._stub.DeleteAdapter, call)

    def _update(self, what: str, content: int, states: tuple[Name, ...], **fields: Any) -> None:
        call = pb.UpdateAdapterRequest(name=self._spec(content), **fields)
        self._do(what, states, self._stub.UpdateAdapter, call)

    def _alias(self, content: int) -> None:
        alias, state = self._rng.choice(ALIASES), self.state
        old, spec = state.aliases.get(alias), f"{self.name}/{alias}"
        pick = self._rng.random()
        if old is not None and pick < 0.2:
            call = pb.SetAliasRequest(alias=spec, remove=True)
            self._do("remove alias", (state.remove_alias(alias),), self._stub.SetAlias, call)
        elif old is not None and old.previous and pick < 0.5:
            call = pb.SetAliasRequest(alias=spec, rollback=True)
            after = state.move_alias(alias, old.previous)
            self._do("roll alias back", (after,), self._stub.SetAlias, call)
        else:
            targets: tuple[tuple[int, int], ...] = ((content, 1),)
            others = [c for c in state.kept if c != content]
            if others and pick > 0.75:
                targets = ((content, 9), (self._rng.choice(others), 1))
            call = pb.SetAliasRequest(alias=spec)
            for target, weight in targets:
                call.targets.add(revision=self.contents[target].revision, weight=weight)
            after = state.move_alias(alias, targets)
            self._do("move alias", (after,), self._stub.SetAlias, call)

    def _pin(self, content: int) -> None:
        if not self.pinning:
            return
        spec, weights = self._spec(content), {self.contents[content].weights}
        call: Any
        match self._rng.randrange(5):
            case 0 | 1:
                call = pb.ActivateAdapterRequest(name=spec, pin=True)
                rpc, pins = self._stub.ActivateAdapter, self.pins | weights
            case 2:
                call = pb.ActivateAdapterRequest(name=spec)
                rpc, pins = self._stub.ActivateAdapter, self.pins
            case 3:
                call = pb.UpdateAdapterRequest(name=spec, pinned=False)
                rpc, pins = self._stub.UpdateAdapter, self.pins - weights
            case _:
                call = pb.EvictAdapterRequest(name=spec, unpin=True)
                rpc, pins = self._stub.EvictAdapter, self.pins - weights
        what = {"Update": "unpin", "Evict": "evict"}.get(type(call).__name__[:-14], "activate")
        if pins != self.pins and what == "activate":
            what = "pin"
        self._do(what, (self.state,), rpc, call, pins=pins)

    # ------------------------------------------------------------------- uploads

    def _upload(self, content: int) -> None:
        rng, part = self._rng, self.parts[content]
        offsets: dict[str, int] = {}
        if resume := rng.random() < 0.5:
            offsets = self._committed(content)
        else:
            part.told.clear()
        messages = self._messages(content, offsets, resume)
        # Another client may publish the missing part of a resumed upload meanwhile.
        may_break_off = len(messages) > 2 and (self.pinning or not resume)
        if may_break_off and rng.random() < 0.35:
            self._break_off(messages[: rng.randrange(2, len(messages))], content)
            self._committed(content)
            return
        labels = dict(messages[0].spec.labels)
        wide = self.state.publish(content, labels)
        after = wide if wide is self.state else wide.trimmed()
        pins, old = self.pins, self.state.current
        if self.state.kept and old != content and (was := self.contents[old].weights) in pins:
            pins = pins - {was} | {self.contents[content].weights}
        if wide is self.state:
            # We cannot know whether that has happened: its parts may be gone.
            part.told.clear()
        self._do(
            "resume" if resume else "upload",
            (wide, after),
            self._stub.UploadAdapter,
            self._counted(messages, content),
            pins=pins,
            publishes=content,
        )

    def _messages(
        self, content: int, offsets: dict[str, int], resume: bool
    ) -> list[pb.UploadAdapterRequest]:
        spec = self._spec_of(content)
        spec.resume, spec.allow_replace = resume, True
        spec.labels["n"] = str(self._rng.randrange(100))
        messages = [pb.UploadAdapterRequest(spec=spec)]
        for file, data in self.contents[content].files.items():
            for at in range(offsets.get(file, 0), len(data), CHUNK):
                chunk = pb.UploadChunk(file=file, offset=at, data=data[at : at + CHUNK])
                messages.append(pb.UploadAdapterRequest(chunk=chunk))
        return messages

    def _counted(
        self, messages: list[pb.UploadAdapterRequest], content: int
    ) -> Iterator[pb.UploadAdapterRequest]:
        part, sums = self.parts[content], self.contents[content].sums
        for message in messages:
            if chunk := message.chunk.data:
                file, end = message.chunk.file, message.chunk.offset + len(chunk)
                part.sent[file] = max(part.sent.get(file, 0), end)
                if end == len(self.contents[content].files[file]):
                    self.whole.add(sums[file])
            yield message

    def _break_off(self, messages: list[pb.UploadAdapterRequest], content: int) -> None:
        """Send a part, then end the stream or cancel the call. (A new upload is not cancelled,
        since the server may begin it, and empty the folder, after its end.)"""
        self.under_way = UnderWay("broken upload", (), self.pins)
        left = threading.Event()
        cancel = messages[0].spec.resume and self._rng.random() < 0.5

        def some() -> Iterator[pb.UploadAdapterRequest]:
            yield from self._counted(messages, content)
            if cancel:
                left.wait(TIMEOUT_S)

        call = self._stub.UploadAdapter.future(some(), timeout=TIMEOUT_S)
        if cancel:
            time.sleep(self._rng.random() * 0.01)  # anything from nothing to all may arrive
            call.cancel()
            left.set()
        error = call.exception() if not call.cancelled() else None
        if error is None and not cancel:
            self._fail("half an upload was published")
        if error is not None and error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise self._killed_or(error)
        self._acknowledged("broken upload")

    def _spec_of(self, content: int) -> pb.UploadSpec:
        spec = pb.UploadSpec(name=self.name)
        for file, data in self.contents[content].files.items():
            spec.files.add(name=file, size=len(data), sha256=self.contents[content].sums[file])
        return spec

    def _committed(self, content: int) -> dict[str, int]:
        """Return GetUpload's answer, checked against earlier answers and the bytes sent."""
        part, made = self.parts[content], self.contents[content]
        call = pb.GetUploadRequest(spec=self._spec_of(content))
        told = dict(self._call(self._stub.GetUpload, call).committed)
        for file, data in made.files.items():
            at, sent = told.get(file, 0), part.sent.get(file, 0)
            if at < part.told.get(file, 0):
                cut = " (killed in its publish)" if content == self.cut_short else ""
                self._fail(f"GetUpload: {at} bytes of {file}, before: {part.told[file]}{cut}")
            if at > sent and not (at == len(data) and made.sums[file] in self.whole):
                self._fail(f"GetUpload: {at} bytes of {file}, sent: {sent}")
            # Stored content is reported as complete, and may be deleted.
            part.told[file] = 0 if self._stored(made.sums[file]) else at
        return told

    def _stored(self, sha256: str) -> bool:
        """Return whether the server may have this file from a published adapter."""
        if not self.pinning:
            return sha256 in self.whole
        return any(sha256 in self.contents[c].sums.values() for c in self.state.kept)

    # ------------------------------------------------------------------ each call

    def _spec(self, content: int) -> str:
        return f"{self.name}@{self.contents[content].revision}"

    def _do(
        self,
        what: str,
        states: tuple[Name, ...],
        rpc: Any,
        call: Any,
        *,
        pins: frozenset[str] | None = None,
        publishes: int | None = None,
    ) -> None:
        """Send a change and record it once it is acknowledged."""
        after = states[-1]
        wanted = self._held(after, self.pins if pins is None else pins)
        self.under_way = UnderWay(what, states, wanted, publishes)
        try:
            answer = self._call(rpc, call)
        except grpc.RpcError as error:
            # Another name has meanwhile deleted content that was stored when it was queried.
            lost = publishes is not None and not self.pinning
            if lost and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                self._acknowledged("incomplete by another's delete")
                return
            raise
        if publishes is not None:
            if answer.adapter.revision != self.contents[publishes].revision:
                self._fail(f"{what}: published {answer.adapter.revision[:12]}")
            self.parts[publishes].told.clear()
        self.state, self.pins = after, wanted
        self._acknowledged(what)

    def _held(self, state: Name, pins: frozenset[str]) -> frozenset[str]:
        return pins & {self.contents[content].weights for content in state.kept}

    def _acknowledged(self, what: str) -> None:
        self.under_way = None
        self.counts[what] = self.counts.get(what, 0) + 1

    def _call(self, rpc: Any, call: Any) -> Any:
        try:
            return rpc(call, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._killed_or(error) from error

    def _killed_or(self, error: Any) -> Exception:
        if error.code() in DEAD and self._died():
            return Killed()
        return error  # type: ignore[no-any-return]

    def _died(self) -> bool:
        for _ in range(200):
            if self._dead():
                return True
            time.sleep(0.01)
        return False

    def _fail(self, what: str) -> None:
        self.failures.append(f"{self.name}: {what}")

    # ---------------------------------------------------------------------- judge

    def judge(self) -> None:
        """Check that the new front has the acknowledged state, with or without the call in
        flight. `work` continues from there.

        Raises:
            Killed: this front has died already; judge the next one.
            LookupError: its state is different, so this name cannot be judged any more.
        """
        found, pins = self._found()
        under_way, self.under_way = self.under_way, None
        allowed = [self.state, *(under_way.states if under_way else ())]
        during = f" (killed in: {under_way.what})" if under_way else ""
        state = next((state for state in allowed if state.view == found), None)
        if state is None:
            self._fail(f"found {found}, acknowledged {self.state.view}{during}")
            raise LookupError(self.name)
        before = self._held(state, self.pins)
        after = self._held(state, under_way.pins) if under_way else before
        # A replace and the transfer of its pin are two steps, and either may be missing.
        if wrong := (before ^ pins) - (before ^ after):
            lost, left = (
                sorted(w[:12] for w in each) for each in (before & wrong, wrong & pins)
            )
            self._fail(f"pins lost: {lost}, still there: {left}{during}")
        self.cut_short = -1
        if under_way is not None and under_way.publishes is not None:
            if state is self.state:
                self.cut_short = under_way.publishes
            else:
                self.parts[under_way.publishes].told.clear()
        self.state, self.pins = state, pins
        for content, part in enumerate(self.parts):
            if part.told:
                self._committed(content)

    def _found(self) -> tuple[dict[str, Any], frozenset[str]]:
        numbers = {content.revision: i for i, content in enumerate(self.contents)}
        try:
            answer = self._call(self._stub.GetAdapter, pb.GetAdapterRequest(name=self.name))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return {"kept": ()}, frozenset()
            raise
        listed = self._call(self._stub.ListAliases, pb.ListAliasesRequest(name=self.name))
        kept = {numbers[each.revision]: each for each in answer.revisions}
        (current,) = {numbers[each.revision] for each in answer.revisions if each.current}
        return {
            "kept": tuple(kept),
            "current": current,
            "labels": {number: dict(each.labels) for number, each in kept.items()},
            "aliases": {
                alias.alias.partition("/")[2]: tuple(
                    (numbers[target.revision], target.weight) for target in alias.targets
                )
                for alias in listed.aliases
            },
            "retain": answer.adapter.retain,
        }, frozenset(each.weights_digest for each in kept.values() if each.pinned)
