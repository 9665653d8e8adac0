"""What registries that share a catalog, and their engines, promise to callers.

A history has what callers asked and were answered, and when; the faults; and the catalog's own
lines at its end, which say in what order the changes were made. `judge` needs nothing else: it
reads no clock, file or socket. All times are seconds on the clock of whoever recorded them.

Each name is two registers: what the plain name means (a revision and its label, or nothing),
and where its alias `ALIAS` points. A catalog line with the id of a write is the write's place
in them. A read's place is the newest one, among changes that had begun when it was answered, at
which the register had what was read.

    rule          a read is wrong if, before its call began,
    older         a change was acknowledged as known to all, its engine among them, and it has
                  not seen that
    backwards     the same engine had answered by a newer change
    strict        a change was acknowledged, to anyone, longer ago than the age that it allows
    resurrected   as these three, and it found a name that was deleted in between
    digest        (at any time) weights or an answer are not those of the revision
    never         (at any time) the name never meant that
    failed        (at any time) it ended as if something was broken for good: DATA_LOSS,
                  INTERNAL or UNKNOWN, though nothing that was stored was damaged
    lost          (of a change) acknowledged, but not made; refused as not made, but made; or
                  made in another order than acknowledged
    blocked       (of a pause) others could change nothing for longer than `MOST_BLOCKED_S`
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

ALIAS: Final = "prod"

LEASE_S: Final = 5.0
"""A follower counts for this long after it was last heard (docs/scale.md)."""
_HEARD_S: Final = 1.5
"""A follower that is well is heard at least this often: twice a second, on a busy machine."""
BACK_S: Final = 5.0
"""After a fault an engine is back within this time: it connects again within two seconds."""

_BROKEN: Final = ("DATA_LOSS", "INTERNAL", "UNKNOWN")

MOST_BLOCKED_S: Final = 30.0
OWN_S: Final = 3.0
"""What a change itself may take after it has the lock."""

Outcome = Literal["ok", "failed", "unknown"]
Found = Literal["seen", "absent", "refused", "unanswered", "error"]


@dataclass(frozen=True, slots=True)
class Write:
    """A change that somebody asked for.

    Attributes:
        id: its actor in the catalog's history.
        kind: ``push``, ``labels``, ``alias``, ``rollback`` or ``delete``.
        registry: whose it was to make, and ``at`` the server that was asked.
        outcome: ``unknown`` also if there was no answer: it may still be made, at any time.
        unchanged: the refusal says that nothing was changed.
        waits: it waits until followers have it.
        all: the answer says that all live followers have it; ``live`` is how many.
        weights: number of the weights that a push has.
    """

    id: str
    name: str
    kind: str
    at: str
    registry: str
    began: float
    ended: float
    outcome: Outcome
    why: str = ""
    unchanged: bool = False
    waits: bool = False
    all: bool = False
    live: int = 0
    weights: int | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """A look-up by an engine.

    Attributes:
        what: ``name``, ``alias``, or ``generate``, which shows the plain name's revision.
        most_lag: the age of the view that it allows, in seconds; None for any.
        found: ``refused`` if the engine said that it cannot tell (UNAVAILABLE).
        answer: what the model generated.
    """

    engine: str
    name: str
    what: Literal["name", "alias", "generate"]
    began: float
    ended: float
    found: Found
    most_lag: float | None = None
    revision: str = ""
    label: str = ""
    digest: str = ""
    answer: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to the servers.

    Attributes:
        cuts: engines that the registries may not hear, or only late, while it lasts.
        stops: registries that may not be able to make a change while it lasts, except by
            waiting for a lock.
        paused: the registry that was paused; "" if none was.
    """

    kind: str
    on: str
    began: float
    ended: float
    cuts: frozenset[str] = frozenset()
    stops: frozenset[str] = frozenset()
    paused: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the catalog's history."""

    number: int
    name: str
    event: str
    revision: str
    actor: str


@dataclass(frozen=True, slots=True)
class Weights:
    """What is right for one of the contents: its digest, and the model's answer with it."""

    digest: str
    answer: str


@dataclass(frozen=True, slots=True)
class History:
    """Everything that `judge` needs."""

    engines: tuple[str, ...]
    weights: tuple[Weights, ...]
    writes: tuple[Write, ...]
    reads: tuple[Read, ...]
    faults: tuple[Fault, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: the rule's name, and what shows it."""

    rule: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Broken promises, and the longest time in seconds for which a paused registry stopped
    another from changing anything (None if none was paused)."""

    violations: tuple[Violation, ...]
    blocked_s: float | None

    @property
    def by_rule(self) -> Counter[str]:
        return Counter(each.rule for each in self.violations)


@dataclass(frozen=True, slots=True)
class _State:
    """A register's value from one change on; ``revision`` is "" where there is nothing."""

    revision: str
    label: str
    write: Write | None


@dataclass(slots=True)
class _Register:
    states: list[_State] = field(default_factory=lambda: [_State("", "", None)])
    places: dict[str, int] = field(default_factory=dict)
    """Id of a write -> the place where its change begins."""

    def add(self, revision: str, label: str, write: Write) -> None:
        self.places.setdefault(write.id, len(self.states))
        self.states.append(_State(revision, label, write))

    def last(self) -> _State:
        return self.states[-1]

    def matching(self, read: Read) -> list[int]:
        """The places, oldest first, at which the register had what was read, among changes that
        had begun when the answer came."""
        return [
            place
            for place, state in enumerate(self.states)
            if (state.write is None or state.write.began < read.ended)
            and (
                state.revision == ""
                if read.found == "absent"
                else state.revision == read.revision
                and (read.what != "name" or state.label == read.label)
            )
        ]


class _Floor:
    """The highest place that a read must have reached, by the time when its call began."""

    def __init__(self, known: Iterable[tuple[float, int, str]]) -> None:
        """``known``: from when on, place, and why."""
        self._times: list[float] = []
        self._best: list[tuple[int, str]] = []
        for time, place, why in sorted(known):
            if not self._best or place > self._best[-1][0]:
                self._times.append(time)
                self._best.append((place, why))

    def at(self, time: float) -> tuple[int, str]:
        before = bisect_left(self._times, time)
        return self._best[before - 1] if before else (0, "")


def judge(history: History) -> Verdict:
    """Return every broken promise of a history."""
    registers, revisions = _registers(history)
    broken = [
        *_lost(history, registers),
        *_reads(history, registers),
        *_contents(history, revisions),
        *(
            Violation("failed", f"{told_read(read)}: {read.why}")
            for read in history.reads
            if read.why.startswith(_BROKEN)
        ),
    ]
    waits = list(_waits(history))
    broken += [
        Violation(
            "blocked", f"{waited:.1f} s by {fault.kind} of {fault.on} at {fault.began:.1f} s"
        )
        for waited, fault in waits
        if waited > MOST_BLOCKED_S + OWN_S
    ]
    return Verdict(tuple(broken), max((waited for waited, _ in waits), default=None))


def _registers(
    history: History,
) -> tuple[Mapping[tuple[str, str], _Register], Mapping[str, int]]:
    """The registers by name and kind (``name`` or ``alias``), and each revision's weights."""
    writes = {write.id: write for write in history.writes}
    registers: dict[tuple[str, str], _Register] = defaultdict(_Register)
    labels: dict[tuple[str, str], str] = {}
    revisions: dict[str, int] = {}
    for line in sorted(history.lines, key=lambda line: line.number):
        write = writes.get(line.actor)
        if write is None or write.name != line.name:
            continue
        plain, alias = registers[line.name, "name"], registers[line.name, "alias"]
        if line.event in ("published", "replaced"):
            labels[line.name, line.revision] = write.id
            plain.add(line.revision, write.id, write)
            if write.weights is not None:
                revisions[line.revision] = write.weights
        elif line.event == "labels":
            labels[line.name, line.revision] = write.id
            if plain.last().revision == line.revision:
                plain.add(line.revision, write.id, write)
        elif line.event == "made_current":
            plain.add(line.revision, labels.get((line.name, line.revision), ""), write)
        elif line.event == "alias_set":
            alias.add(line.revision, "", write)
        elif line.event == "deleted" and plain.last().revision:
            plain.add("", "", write)
            if alias.last().revision:
                alias.add("", "", write)
    return registers, revisions


def _lost(
    history: History, registers: Mapping[tuple[str, str], _Register]
) -> Iterator[Violation]:
    made = {line.actor for line in history.lines}
    for write in history.writes:
        # An alias or a name that has the wanted target already is left as it is.
        if write.outcome == "ok" and write.kind in ("push", "labels", "delete"):
            if write.id not in made:
                yield Violation("lost", f"acknowledged, but not made: {told(write)}")
        elif write.unchanged and write.id in made:
            yield Violation("lost", f"refused as not made, but made: {told(write)}")
    for register in registers.values():
        newest: Write | None = None
        for state in register.states:
            write = state.write
            if write is None:
                continue
            if newest is not None and write.ended < newest.began and write.outcome == "ok":
                yield Violation(
                    "lost", f"acknowledged, then made after a later one: {told(write)}"
                )
            if newest is None or write.began > newest.began:
                newest = write


def _reads(
    history: History, registers: Mapping[tuple[str, str], _Register]
) -> Iterator[Violation]:
    reads: dict[tuple[str, str, str], list[Read]] = defaultdict(list)
    for read in history.reads:
        if read.found in ("seen", "absent"):
            kind = "alias" if read.what == "alias" else "name"
            reads[read.engine, read.name, kind].append(read)
    for (engine, name, kind), some in sorted(reads.items()):
        yield from _of_one(history, engine, registers.get((name, kind), _Register()), some)


def _of_one(
    history: History, engine: str, register: _Register, reads: Sequence[Read]
) -> Iterator[Violation]:
    acknowledged = [
        write
        for write in {
            state.write.id: state.write for state in register.states if state.write
        }.values()
        if write.outcome == "ok"
    ]

    def floor_of(some: Iterable[Write]) -> _Floor:
        return _Floor((write.ended, register.places[write.id], told(write)) for write in some)

    anyone = floor_of(acknowledged)
    everyone = floor_of(
        write for write in acknowledged if write.all and counted(history, engine, write)
    )
    shown: list[tuple[float, int, str]] = []
    floor = 0
    for read in sorted(reads, key=lambda read: read.ended):
        if not (matching := register.matching(read)):
            yield Violation("never", told_read(read))
            continue
        shown.append((read.ended, next((p for p in matching if p >= floor), matching[-1]), ""))
        floor = max(floor, shown[-1][1])
    seen = _Floor((at, place, "this engine's own earlier answer") for at, place, _ in shown)
    for read in reads:
        if not (matching := register.matching(read)):
            continue
        place = matching[-1]
        wanted = [("older", *everyone.at(read.began)), ("backwards", *seen.at(read.began))]
        if read.most_lag is not None:
            wanted.insert(0, ("strict", *anyone.at(read.began - read.most_lag)))
        for rule, least, why in wanted:
            if place < least:
                between = register.states[place + 1 : least + 1]
                if read.found == "seen" and any(not state.revision for state in between):
                    rule = f"resurrected ({rule})"
                yield Violation(rule, f"{told_read(read)}; it must know {why}")
                break


def counted(history: History, engine: str, write: Write) -> bool:
    """Whether an engine must have been among "all" when a write was answered: the registries
    heard it less than a lease before. One that was cut off for longer need not be."""
    heard_from, heard_to = write.ended - LEASE_S + 2, write.ended - _HEARD_S
    return not any(
        engine in fault.cuts and fault.began < heard_to and fault.ended + BACK_S > heard_from
        for fault in history.faults
    )


def _contents(history: History, revisions: Mapping[str, int]) -> Iterator[Violation]:
    for read in history.reads:
        number = revisions.get(read.revision)
        if read.found != "seen" or number is None:
            continue
        right = history.weights[number]
        if read.digest and read.digest != right.digest:
            yield Violation("digest", f"{told_read(read)}; right is {right.digest[:12]}")
        if read.what == "generate" and read.answer != right.answer:
            yield Violation("digest", f"{told_read(read)}; right is {right.answer!r}")


def _waits(history: History) -> Iterator[tuple[float, Fault]]:
    """For each pause of a registry, the longest time for which another one tried to change
    something and could not. Changes that wait for followers do not count."""
    for fault in history.faults:
        for registry in {write.registry for write in history.writes} - {fault.paused, ""}:
            hindered = any(
                other is not fault
                and registry in other.stops
                and other.began < fault.ended
                and other.ended > fault.began
                for other in history.faults
            )
            tried = sorted(
                (write.began, write.ended, write.outcome)
                for write in history.writes
                if write.registry == registry and not write.waits and write.ended > fault.began
            )
            if fault.paused and not hindered:
                yield max(_gaps(tried, fault), default=0.0), fault


def _gaps(tried: Iterable[tuple[float, float, Outcome]], fault: Fault) -> Iterator[float]:
    since = None
    for began, ended, outcome in tried:
        if began > fault.ended:
            return
        since = max(began, fault.began) if since is None else since
        yield min(ended, fault.ended) - since
        if outcome == "ok":
            since = None


def told(write: Write) -> str:
    """A write in words."""
    said = f"{write.id} ({write.kind} of {write.name} at {write.at}"
    acknowledged = f", all of {write.live}" if write.all else ""
    return f"{said}, {write.began:.2f} to {write.ended:.2f} s, {write.outcome}{acknowledged})"


def told_read(read: Read) -> str:
    """A read in words."""
    found = (
        "nothing" if read.found == "absent" else f"{read.revision[:12]} {read.label}".strip()
    )
    if read.digest:
        found += f" with {read.digest[:12]}"
    if read.answer:
        found += f" answering {read.answer!r}"
    limit = "" if read.most_lag is None else f" at most {read.most_lag:g} s old"
    return (
        f"{read.engine} at {read.began:.2f} to {read.ended:.2f} s: {read.what} of {read.name}"
        f"{limit} is {found}"
    )
