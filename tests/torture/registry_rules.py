"""Random histories of a registry: publish and resume, aliases, retention, leases, quarantine
and restarts, checked against `ledger.Name` and a list of the content that must be on disk. For
row 7.

Contents are numbers, each for a bundle of files that is made once. There are few names and
contents, so that operations interact.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from veneer_registry.adapter import AdapterRef
from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import REQUIRED_FILES, TEMPLATE_FILE
from veneer_registry.errors import (
    Aborted,
    AdapterCorrupt,
    AdapterExists,
    AdapterInUse,
    AdapterNotFound,
    ChecksumMismatch,
    EtagMismatch,
    FailedPrecondition,
    InvalidField,
    VeneerError,
)
from veneer_registry.format import weights_digest
from veneer_registry.lease import RevisionLease
from veneer_registry.publishing import Staged
from veneer_registry.records import Published
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights
from veneer_registry.upload import Upload
from veneer_registry.weights import WEIGHTS_FILE

from tests.torture.ledger import Name
from tests.unit.registry.kit import BASE, announce, bundle_files, make_adapter, make_tensors

RETAIN: Final = 1
WEIGHTS: Final = 5
"""Number of contents with different weights; two more have the weights of the first two and a
template."""
CONTENTS = st.integers(0, WEIGHTS + 1)
NAMES = st.sampled_from(["a", "b"])
SOME_NAME = st.integers(0, 23)
"""Choice of a name; see `RegistryRules.some`."""
ALIASES = st.sampled_from(["prod", "canary"])
WHICH = st.integers(0, 63)
SOMETIMES = st.integers(0, 7).map(lambda number: number == 7)


@dataclass(frozen=True, slots=True)
class Content:
    """A bundle and its expected digests; `parameters` is its size in memory."""

    files: Mapping[str, bytes]
    sums: Mapping[str, str]
    weights: str
    revision: str
    parameters: int


@cache
def contents() -> tuple[Content, ...]:
    """Make all contents; their ranks, and so their sizes in memory, differ."""
    with tempfile.TemporaryDirectory(prefix="veneer-test-") as root:
        return tuple(_content(Path(root) / str(n), n) for n in range(WEIGHTS + 2))


def _content(folder: Path, number: int) -> Content:
    rank = 1 + number % WEIGHTS
    tensors = make_tensors(rank, seed=rank, layers=[0], projections=["q_proj"])
    config = {"r": rank, "lora_alpha": 2 + rank}
    files = bundle_files(make_adapter(folder, config, tensors))
    if number >= WEIGHTS:
        files[TEMPLATE_FILE] = f"{{{{ x }}}} {number}".encode()
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    extra = {name: sha for name, sha in sums.items() if name not in REQUIRED_FILES}
    weights = weights_digest(folder)
    return Content(files, sums, weights, Bundle(weights, extra).revision, 64 * rank)


@dataclass(eq=False)
class Sending:
    """An open upload.

    Attributes:
        own: whether it has a separate folder, since another connection sends the same upload.
        there: number of received bytes of each file.
    """

    upload: Upload
    name: str
    content: int
    own: bool
    there: dict[str, int]
    etag: str = ""
    allow: bool = True

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.content


class RegistryRules(RuleBasedStateMachine):
    """The histories; see the module docstring. Subclasses may override hooks such as `gone`."""

    pool: ClassVar[str] = "ab"
    """The names, of one letter each."""
    seen: ClassVar[Counter[str]] = Counter()
    """Counts of events in all histories, which show that the histories are not empty."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="veneer-test-"))
        self.store = self.root / "data" / "store"
        self.names: dict[str, Name] = {}
        self.etags: dict[str, str] = {}
        self.alias_etags: dict[str, str] = {}
        self.sending: list[Sending] = []
        self.parts: dict[tuple[str, int], dict[str, int]] = {}
        self.leases: list[RevisionLease] = []
        self.rotten: set[str] = set()
        """Weights with a flipped bit that has not been detected yet."""
        self.quarantined: set[str] = set()
        self._seen_whole: set[tuple[str, int, int]] = set()
        self.open()

    def open(self) -> None:
        self.registry = Registry.open(self.root / "data", BASE, retain_superseded=RETAIN)

    # -------------------------------------------------------------------- the model

    def name(self, name: str) -> Name:
        return self.names.get(name, Name(RETAIN))

    def some(self, which: int) -> str:
        """Return a name; if there are registered ones, rarely one that is not registered."""
        if which < 2 or not self.names:
            return self.pool[which % len(self.pool)]
        return sorted(self.names)[which % len(self.names)]

    def some_alias(self, which: int) -> tuple[str, str]:
        """Return a name and an alias; rarely an alias that does not exist."""
        aliases = sorted(self.alias_etags)
        name, _, alias = aliases[which % len(aliases)].partition("/")
        return name, alias if which < 60 else "none"

    def set_name(self, name: str, state: Name) -> None:
        """Set a name's state; call `gone` for contents that it no longer keeps."""
        before = self.name(name)
        if state.kept:
            self.names[name] = state
        else:
            self.names.pop(name, None)
            self.etags.pop(name, None)
            self.alias_etags = {
                alias: etag
                for alias, etag in self.alias_etags.items()
                if alias.partition("/")[0] != name
            }
        self.gone([number for number in before.kept if number not in state.kept])

    def gone(self, numbers: list[int]) -> None:
        """Hook: a name no longer keeps these contents."""

    def held(self, number: int) -> bool:
        """Return whether any name keeps these weights."""
        weights = contents()[number].weights
        return any(
            contents()[c].weights == weights for n in self.names.values() for c in n.kept
        )

    def stored(self, number: int, file: str) -> bool:
        """Return whether the registry has, and reports, this file of a content."""
        content = contents()[number]
        if content.weights in self.quarantined:
            # Its template may be there, but a new push sends everything.
            return file not in REQUIRED_FILES and self._on_disk(number, file)
        return self._on_disk(number, file)

    def _on_disk(self, number: int, file: str) -> bool:
        content = contents()[number]
        if file in REQUIRED_FILES:
            return (self.store / "weights" / content.weights / file).exists()
        return (self.store / "revisions" / content.revision / file).exists()

    def spec(self, name: str, number: int) -> str:
        return f"{name}@{contents()[number].revision[:20]}"

    def ref(self, name: str, number: int) -> AdapterRef:
        return AdapterRef(name, contents()[number].revision, contents()[number].weights)

    @contextmanager
    def changed(self, name: str, *, expected: bool = True) -> Iterator[None]:
        """Check that the block changes the name's etag if it changes the registration
        (``expected``), and only then."""
        yield
        if name in self.names:
            etag = self.registry.revisions(name)[0].etag
            assert (etag != self.etags.get(name)) == expected, f"the etag of {name} is wrong"
            self.etags[name] = etag

    # ---------------------------------------------------------------------- uploads

    def request(self, name: str, number: int, **options: Any) -> Any:
        return announce(name, contents()[number].files, **options)

    @rule(name=NAMES, number=CONTENTS)
    def committed(self, name: str, number: int) -> None:
        told = self.registry.committed(self.request(name, number))
        assert told == self._expected(name, number)

    def _expected(self, name: str, number: int) -> dict[str, int]:
        arrived = dict(self.parts.get((name, number), {}))
        for each in self.sending:
            if each.key == (name, number) and not each.own:
                arrived = each.there
        return {
            file: len(data) if self.stored(number, file) else arrived.get(file, 0)
            for file, data in contents()[number].files.items()
        }

    @rule(
        name=NAMES,
        number=CONTENTS,
        resume=st.booleans(),
        allow=st.booleans(),
        stale=SOMETIMES,
        fresh=SOMETIMES,
        label=st.sampled_from(["", "x", "y"]),
    )
    def begin(
        self,
        name: str,
        number: int,
        resume: bool,
        allow: bool,
        stale: bool,
        fresh: bool,
        label: str,
    ) -> None:
        etag = "stale" if stale else self.etags.get(name, "") if fresh else ""
        labels = {"label": label} if label else {}
        request = self.request(name, number, allow_replace=allow, etag=etag, labels=labels)
        active = next((s for s in self.sending if s.key == (name, number) and not s.own), None)
        expected = self._expected(name, number)
        own = active is not None and not resume
        if active is not None and resume:
            self.sending.remove(active)
        if not own:
            self.parts.pop((name, number), None)
        rotten = contents()[number].weights in self.rotten
        if resume and rotten and self.stored(number, WEIGHTS_FILE):
            with pytest.raises(ChecksumMismatch):
                self.registry.begin_upload(request, resume=True)
            return
        upload = self.registry.begin_upload(request, resume=resume)
        self.seen["resumed"] += resume and any(expected.values())
        if active is not None and resume:
            self.seen["taken over"] += 1
            with pytest.raises(Aborted):
                active.upload.write(WEIGHTS_FILE, 0, b"late")
            active.upload.abort()
        there = expected if resume else dict.fromkeys(expected, 0)
        assert upload.committed == there
        self.sending.append(Sending(upload, name, number, own, there, etag, allow))

    @precondition(lambda self: self.sending)
    @rule(which=WHICH, share=st.sampled_from([0.3, 0.7, 1.0, 1.0]))
    def write(self, which: int, share: float) -> None:
        """Send the missing part of each file, or the first ``share`` of each file."""
        self._write(self.sending[which % len(self.sending)], share)

    def _write(self, sending: Sending, share: float) -> None:
        for file, data in contents()[sending.content].files.items():
            at = sending.there[file]
            end = max(at, int(len(data) * share))
            if end > at:
                sending.upload.write(file, at, data[at:end])
                sending.there[file] = end
        assert sending.upload.committed == sending.there

    @precondition(lambda self: self.sending)
    @rule(which=WHICH, keep=st.booleans())
    def break_off(self, which: int, keep: bool) -> None:
        sending = self.sending.pop(which % len(self.sending))
        (sending.upload.suspend if keep else sending.upload.abort)()
        if keep and not sending.own and sum(sending.there.values()):
            self.parts[sending.key] = sending.there

    @precondition(lambda self: self.sending)
    @rule(which=WHICH, whole=st.booleans(), only_validate=SOMETIMES, unready=SOMETIMES)
    def publish(self, which: int, whole: bool, only_validate: bool, unready: bool) -> None:
        sending = self.sending.pop(which % len(self.sending))
        if whole:
            self._write(sending, 1.0)
        name, number, content = sending.name, sending.content, contents()[sending.content]
        before = self.name(name)
        sizes = {file: len(data) for file, data in content.files.items()}
        refused: type[VeneerError] | None = None
        if sending.there != sizes:
            refused = InvalidField
        elif sending.etag and sending.etag != self.etags.get(name, ""):
            refused = EtagMismatch
        elif before.kept and before.current != number and not sending.allow:
            refused = AdapterExists
        if refused is not None:
            self.seen[f"publish: {refused.__name__}"] += 1
            with pytest.raises(refused):
                self._publish(sending, only_validate)
            return
        same = before.current == number and bool(before.kept)
        if unready and not only_validate:
            self.seen["discarded"] += 1
            self._repaired_on_disk(content)
            self._stage(sending, before, same).discard()
            return
        with self.changed(name, expected=not only_validate and before.current != number):
            published = self._publish(sending, only_validate)
            ref = published.record.ref
            assert ref == self.ref(name, number)
            assert published.published == (not same and not only_validate)
            assert published.replaced == (bool(before.kept) and not same and not only_validate)
            if only_validate:
                return
            self._repaired_on_disk(content)
            self.seen["published"] += 1
            self.seen["repaired"] += content.weights in self.quarantined
            self.quarantined.discard(content.weights)
            wide = before.publish(number, dict(sending.upload.request.labels))
            after = wide if same else wide.trimmed()
            dropped = [c for c in wide.kept if c not in after.kept]
            self.seen["superseded"] += len(dropped)
            assert list(published.dropped) == [self.ref(name, c) for c in dropped]
            self.replaced(name, before, after)
            self.set_name(name, after)

    @rule(name=NAMES, number=CONTENTS, resume=st.booleans())
    def push_at_once(self, name: str, number: int, resume: bool) -> None:
        self.push(name, number, resume, False)

    @rule(name=NAMES, number=CONTENTS, resume=st.booleans(), unready=SOMETIMES)
    def push(self, name: str, number: int, resume: bool, unready: bool) -> None:
        """Do a whole upload in one step."""
        before = len(self.sending)
        self.begin(name, number, resume, True, False, False, "x" if resume else "")
        if len(self.sending) > before or (
            self.sending and self.sending[-1].key == (name, number)
        ):
            self.publish(len(self.sending) - 1, True, False, unready)

    def replaced(self, name: str, before: Name, after: Name) -> None:
        """Hook: a publish has replaced the name's revision."""

    def _publish(self, sending: Sending, only_validate: bool) -> Published:
        if only_validate:
            return self.registry.validate(sending.upload)
        return self.registry.publish(sending.upload)

    def _stage(self, sending: Sending, before: Name, same: bool) -> Staged:
        staged = self.registry.stage(sending.upload)
        assert staged.record.ref == self.ref(sending.name, sending.content)
        old = self.ref(sending.name, before.current) if before.kept and not same else None
        assert staged.current == old
        return staged

    def _repaired_on_disk(self, content: Content) -> None:
        self.rotten.discard(content.weights)

    @precondition(lambda self: self.parts)
    @rule(left=st.booleans())
    def sweep_uploads(self, left: bool) -> None:
        """Sweep uploads; either none is old enough, or all inactive ones are."""
        swept = self.registry.sweep_uploads(-60 if left else 3600)
        assert swept == (len(self.parts) if left else 0)
        if left:
            self.parts.clear()

    # ---------------------------------------------------------------------- aliases

    @rule(
        which_name=SOME_NAME, alias=ALIASES, one=WHICH, two=st.none() | WHICH, stale=SOMETIMES
    )
    def set_alias(
        self, which_name: int, alias: str, one: int, two: int | None, stale: bool
    ) -> None:
        name = self.some(which_name)
        state, spec = self.name(name), f"{name}/{alias}"
        if not state.kept:
            with pytest.raises(AdapterNotFound):
                self.registry.set_alias(spec, [("0" * 64, 1)])
            return
        first = state.kept[one % len(state.kept)]
        targets = [(first, 3)]
        if two is not None and (second := state.kept[two % len(state.kept)]) != first:
            targets.append((second, 1))
        asked = [(contents()[c].revision, weight) for c, weight in targets]
        self._check_stale_alias(spec, asked, stale)
        before = state.aliases.get(alias)
        change = self.registry.set_alias(spec, asked, etag=self.alias_etags.get(spec, ""))
        after = state.move_alias(alias, tuple(targets))
        self._moved(spec, change, before.targets if before else (), after)

    def _check_stale_alias(self, spec: str, asked: list[tuple[str, int]], stale: bool) -> None:
        if stale:
            with pytest.raises(EtagMismatch):
                self.registry.set_alias(spec, asked, etag="stale")

    def _moved(
        self, spec: str, change: Any, before: tuple[tuple[int, int], ...], after: Name
    ) -> None:
        name, _, alias = spec.partition("/")
        now = after.aliases[alias].targets
        assert change.alias.targets == self._pairs(now)
        assert change.before == self._pairs(before)
        moved = after is not self.name(name)
        etag = str(change.alias.generation)
        assert (etag != self.alias_etags.get(spec)) == moved
        self.alias_etags[spec] = etag
        self.set_name(name, after)

    def _pairs(self, targets: tuple[tuple[int, int], ...]) -> tuple[tuple[str, int], ...]:
        return tuple((contents()[c].revision, weight) for c, weight in targets)

    @precondition(lambda self: self.alias_etags)
    @rule(which=WHICH)
    def roll_back(self, which: int) -> None:
        name, alias = self.some_alias(which)
        state, spec = self.name(name), f"{name}/{alias}"
        if alias not in state.aliases:
            with pytest.raises(AdapterNotFound):
                self.registry.rollback_alias(spec)
            return
        old = state.aliases[alias]
        if not old.previous:
            with pytest.raises(FailedPrecondition):
                self.registry.rollback_alias(spec)
            return
        change = self.registry.rollback_alias(spec)
        self.seen["rolled back"] += 1
        self._moved(spec, change, old.targets, state.move_alias(alias, old.previous))

    @precondition(lambda self: self.alias_etags)
    @rule(which=WHICH)
    def remove_alias(self, which: int) -> None:
        name, alias = self.some_alias(which)
        state, spec = self.name(name), f"{name}/{alias}"
        if alias not in state.aliases:
            with pytest.raises(AdapterNotFound):
                self.registry.remove_alias(spec)
            return
        assert self.registry.remove_alias(spec).before == self._pairs(
            state.aliases[alias].targets
        )
        del self.alias_etags[spec]
        self.set_name(name, state.remove_alias(alias))

    # -------------------------------------------------- labels, retention, deletion

    @precondition(lambda self: self.names)
    @rule(
        name=WHICH,
        which=WHICH,
        label=st.none() | st.sampled_from(["x", "y"]),
        retain=st.none() | st.integers(0, 3),
        current=st.booleans(),
        stale=SOMETIMES,
    )
    def update(
        self,
        name: int,
        which: int,
        label: str | None,
        retain: int | None,
        current: bool,
        stale: bool,
    ) -> None:
        plain = sorted(self.names)[name % len(self.names)]
        state = self.names[plain]
        number = state.kept[which % len(state.kept)]
        spec = self.spec(plain, number)
        labels = {"label": label} if label else {}
        if stale:
            with pytest.raises(EtagMismatch):
                self.registry.update(spec, current=True, retain=0, etag="stale")
        wide = state.relabel(number, labels)
        wide = wide.made_current(number) if current else wide
        retained = retain is not None and retain != state.retain
        after = wide.retaining(retain) if retained else wide
        with self.changed(plain, expected=after != state):
            record, dropped = self.registry.update(
                spec, labels=labels, retain=retain, current=current, etag=self.etags[plain]
            )
            assert record.ref == self.ref(plain, number)
            assert set(dropped) == {
                self.ref(plain, c) for c in wide.kept if c not in after.kept
            }
            self.set_name(plain, after)

    @precondition(lambda self: self.names)
    @rule(which_name=SOME_NAME, unless_leased=st.booleans(), stale=SOMETIMES, now=SOMETIMES)
    def delete(self, which_name: int, unless_leased: bool, stale: bool, now: bool) -> None:
        name = self.some(which_name)
        state = self.name(name)
        if not state.kept:
            with pytest.raises(AdapterNotFound):
                self.registry.delete(name)
            return
        if not now:
            return  # rarely, since a deleted name has no further history
        if self._refused(name, name, state.kept, unless_leased, stale):
            return
        revisions = tuple(contents()[c].revision for c in state.kept)
        etag = self.etags[name]
        gone = self.registry.delete(name, etag, unless_leased=unless_leased)
        assert gone == revisions
        self.set_name(name, state.forgotten())

    def _refused(
        self, spec: str, name: str, kept: tuple[int, ...], unless_leased: bool, stale: bool
    ) -> bool:
        if stale:
            with pytest.raises(EtagMismatch):
                self.registry.delete(spec, "stale")
        leased = {lease.ref.revision for lease in self.leases}
        busy = unless_leased and any(contents()[c].revision in leased for c in kept)
        if busy:
            with pytest.raises(AdapterInUse):
                self.registry.delete(spec, unless_leased=True)
        return busy

    @precondition(lambda self: self.names)
    @rule(which_name=SOME_NAME, which=WHICH, unless_leased=st.booleans(), stale=SOMETIMES)
    def delete_revision(
        self, which_name: int, which: int, unless_leased: bool, stale: bool
    ) -> None:
        name = self.some(which_name)
        state = self.name(name)
        number = state.kept[which % len(state.kept)] if which % 8 and state.kept else 0
        spec = self.spec(name, number)
        if number not in state.kept:
            with pytest.raises(AdapterNotFound):
                self.registry.delete(spec)
            return
        if number not in state.deletable():
            with pytest.raises(FailedPrecondition):
                self.registry.delete(spec)
            return
        if self._refused(spec, name, (number,), unless_leased, stale):
            return
        with self.changed(name):
            gone = self.registry.delete(spec, unless_leased=unless_leased)
            assert gone == (contents()[number].revision,)
            self.seen["deleted"] += 1
            self.set_name(name, state.delete(number))

    def _meant_before(self) -> list[tuple[str, str, int]]:
        """Return (name, alias, content) for contents that the alias could roll back to and that
        may be deleted."""
        return [
            (name, alias, number)
            for name, state in self.names.items()
            for alias, meant in state.aliases.items()
            for number, _ in meant.previous
            if number in state.deletable()
        ]

    @precondition(lambda self: self._meant_before())
    @rule(which=WHICH)
    def delete_what_an_alias_meant(self, which: int) -> None:
        found = self._meant_before()
        name, alias, number = found[which % len(found)]
        with self.changed(name):
            self.registry.delete(self.spec(name, number))
            self.set_name(name, self.name(name).delete(number))
        if alias in self.name(name).aliases:
            with pytest.raises(FailedPrecondition):
                self.registry.rollback_alias(f"{name}/{alias}")

    # ------------------------------------------------------------- leases and sweeps

    @rule(which_name=SOME_NAME, alias=st.none() | ALIASES, key=st.sampled_from(["", "k", "m"]))
    def lease(self, which_name: int, alias: str | None, key: str) -> None:
        name = self.some(which_name)
        self.take_lease(name, alias, key)

    def take_lease(self, name: str, alias: str | None, key: str) -> RevisionLease | None:
        """Take a lease as a request does; return None if it had to be refused, and was."""
        state = self.name(name)
        spec = name if alias is None else f"{name}/{alias}"
        if not state.kept or (alias is not None and alias not in state.aliases):
            with pytest.raises(AdapterNotFound):
                self.registry.acquire(spec, key)
            return None
        targets = ((state.current, 1),) if alias is None else state.aliases[alias].targets
        weights = {contents()[c].weights for c, _ in targets}
        if bad := weights & self.quarantined:
            if len(targets) == 1:
                with pytest.raises(AdapterCorrupt):
                    self.registry.acquire(spec, key)
            assert bad
            return None
        lease = self.registry.acquire(spec, key)
        assert lease.ref in [self.ref(name, c) for c, _ in targets]
        if key:
            assert self.registry.resolve(spec, key) == lease.ref, "a session changes sides"
        self.leases.append(lease)
        return lease

    @precondition(lambda self: self.leases)
    @rule(which=WHICH)
    def release(self, which: int) -> None:
        self.end_lease(self.leases[which % len(self.leases)])

    def end_lease(self, lease: RevisionLease) -> None:
        lease.release()
        self.leases.remove(lease)

    @precondition(lambda self: self.registry.needs_sweep)
    @rule()
    def sweep(self) -> None:
        self.registry.sweep()
        assert not self.registry.needs_sweep

    # -------------------------------------------------------------------- quarantine

    @precondition(lambda self: self.names and not self.rotten)
    @rule(which=WHICH)
    def rot(self, which: int) -> None:
        """Flip a bit of stored weights."""
        there = sorted(os.listdir(self.store / "weights"))
        if not there:
            return
        weights = there[which % len(there)]
        path = self.store / "weights" / weights / WEIGHTS_FILE
        if weights in self.quarantined or not path.exists() or weights in self.rotten:
            return
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        # In a new file, so that an upload's hard link stays intact.
        flipped = path.with_name("flipped")
        flipped.write_bytes(bytes(data))
        flipped.rename(path)
        self.rotten.add(weights)

    @precondition(lambda self: self.rotten)
    @rule(which=WHICH)
    def find_rot(self, which: int) -> None:
        self.quarantine(sorted(self.rotten)[which % len(self.rotten)])

    def quarantine(self, weights: str) -> None:
        """Quarantine weights, as the server does if a load finds damage."""
        holding = {
            self.ref(name, c)
            for name, state in self.names.items()
            for c in state.kept
            if contents()[c].weights == weights
        }
        assert set(self.registry.quarantine(weights, "a bit flipped")) == holding
        assert self.registry.quarantine(weights, "again") == ()
        if holding:
            self.seen["quarantined"] += 1
            self.quarantined.add(weights)
            self.rotten.discard(weights)

    # ---------------------------------------------------------------------- restarts

    @rule(now=SOMETIMES)
    def restart(self, now: bool) -> None:
        if now:
            self.reopen()

    def reopen(self) -> None:
        self.seen["restarts"] += 1
        self.registry.close()
        for sending in self.sending:
            if not sending.own and sum(sending.there.values()):
                self.parts[sending.key] = sending.there
        self.sending.clear()
        self.leases.clear()
        self.open()
        self._forget_swept()

    # -------------------------------------------------------------------- invariants

    def _forget_swept(self) -> None:
        """Forget the damage of content that was removed."""
        there = set(os.listdir(self.store / "weights"))
        self.rotten &= there
        kept = {contents()[c].weights for n in self.names.values() for c in n.kept}
        self.quarantined &= kept | {lease.ref.weights_digest for lease in self.leases}

    @invariant()
    def names_mean_what_the_model_says(self) -> None:
        registry = self.registry
        assert [record.ref.name for record in registry.list()] == sorted(self.names)
        assert len(registry) == len(self.names)
        for name, state in self.names.items():
            records = registry.revisions(name)
            numbers = {c.revision: i for i, c in enumerate(contents())}
            kept = tuple(numbers[record.ref.revision] for record in records)
            (current,) = [numbers[r.ref.revision] for r in records if r.current]
            aliases = {
                row.alias: tuple((numbers[r], weight) for r, weight in row.targets)
                for row in registry.aliases(name)
            }
            labels = {numbers[r.ref.revision]: dict(r.labels) for r in records}
            view = {"kept": kept, "current": current, "labels": labels, "aliases": aliases}
            assert {**view, "retain": records[0].retain} == state.view
            for record in records:
                damaged = record.ref.weights_digest in self.quarantined
                assert (record.quarantined is not None) == damaged
            assert registry.get(name).ref.revision == contents()[state.current].revision

    @invariant()
    def needed_content_is_whole_and_nothing_else_stays(self) -> None:
        self._forget_swept()
        named = [contents()[c] for state in self.names.values() for c in state.kept]
        revisions = {c.revision for c in named} | {lease.ref.revision for lease in self.leases}
        weights = {c.weights for c in named} | {
            lease.ref.weights_digest for lease in self.leases
        }
        on_disk = set(os.listdir(self.store / "weights"))
        bundles = set(os.listdir(self.store / "revisions"))
        assert on_disk >= weights - self.quarantined
        assert bundles >= revisions
        for digest in weights - self.quarantined - self.rotten:
            self._whole(digest)
        for digest in weights:
            holders = sum(lease.ref.weights_digest == digest for lease in self.leases)
            assert self.registry.leases(digest) == holders
        if not self.registry.needs_sweep:
            assert on_disk <= weights
            assert bundles == revisions
        assert len(os.listdir(self.store / "staging")) == sum(s.own for s in self.sending)
        active = {s.key for s in self.sending if not s.own}
        assert len(os.listdir(self.store / "uploads")) == len(active | self.parts.keys())

    def _whole(self, digest: str) -> None:
        folder = self.store / "weights" / digest
        stat = (folder / WEIGHTS_FILE).stat()
        if (seen := (digest, stat.st_ino, stat.st_mtime_ns)) not in self._seen_whole:
            verify_weights(folder, digest)
            self._seen_whole.add(seen)

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.root, ignore_errors=True)
