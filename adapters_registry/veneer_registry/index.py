"""The registry's in-memory index: names, leases and garbage. No I/O.

Everything here happens under one lock that is never held across a system call, so the event
loop may call it. Look-up and lease are one step: otherwise a delete between the two could
remove what was just found (as SGLang's registry notes).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeVar

from veneer_registry.adapter import AdapterRef
from veneer_registry.entry import (
    Entry,
    Found,
    by_alias,
    by_prefix,
    check_prefix,
    short_name,
    split_spec,
)
from veneer_registry.errors import AdapterCorrupt, AdapterNotFound, BaseModelMismatch
from veneer_registry.rows import damaged_row
from veneer_registry.suggest import NearNames

_Key = TypeVar("_Key")

LOST: Final = "its content is missing from the disk"
_NO_DAMAGE: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Garbage:
    """Result of `Index.take_garbage`.

    Attributes:
        noted: the refs that were noted as possible garbage.
        weights, revisions: weights digests and revisions that nothing needs.
    """

    noted: frozenset[AdapterRef]
    weights: set[str]
    revisions: set[str]


def not_found(name: str, near: str | None) -> AdapterNotFound:
    """The error for a name that does not exist; ``near`` is a similar name that does."""
    metadata = {"adapter": name}
    if near is None:
        hint = "push it first, or list the names with `ListAdapters`"
    else:
        metadata["did_you_mean"] = near
        hint = f"did you mean {near!r}?"
    return AdapterNotFound(f"there is no adapter {name!r}; {hint}", metadata=metadata)


class Index:
    """Resolves names, and counts references (by names) and leases (by requests) to content.
    Thread-safe."""

    def __init__(self, base_name: str) -> None:
        """``base_name`` is for messages."""
        self._base_name = base_name
        self._lock = threading.Lock()
        self._names: dict[str, Entry] = {}
        self._near = NearNames()
        self._shared: set[str] = set()
        """Names that other tenants of the server may use."""
        self._shared_in_order: tuple[str, ...] | None = None
        """`_shared`, sorted; None after a change."""
        # References to a revision, and to weights. Counted, because while a name's entry is
        # replaced, both the old and the new one refer to a revision. Plain numbers and dicts,
        # since there may be a hundred thousand of them.
        self._by_revision: dict[str, int] = {}
        self._by_weights: dict[str, dict[AdapterRef, int]] = {}
        # Keyed by both weights digest and revision: SHA-256 over differently tagged
        # documents, so they do not collide.
        self._leases: Counter[str] = Counter()
        self._garbage: set[AdapterRef] = set()
        self._quarantined: dict[str, str] = {}
        # Weights and revisions whose content was not on disk at start-up.
        self._lost: set[str] = set()
        # Name -> number of damaged rows in the catalog.
        self._damaged: dict[str, int] = {}
        self._changed: Callable[[str, Entry | None], None] = lambda name, entry: None

    def __len__(self) -> int:
        return len(self._names)

    # ------------------------------------------------------------------- look-up

    def find(self, spec: str) -> Found:
        """Look up ``name``, ``name@revision`` or ``name/alias``, whatever base the revision
        was checked against.

        Raises:
            InvalidField: malformed, or an alias with several targets.
            AdapterNotFound: with metadata ``did_you_mean`` if there is a similar name.
        """
        with self._lock:
            return self._find(spec, None)

    def resolve(self, spec: str, key: str = "") -> AdapterRef:
        """Like `find`, but refuse a revision that was checked against another base, is damaged
        or is missing from the disk. For an alias with several targets, ``key`` chooses one;
        without a key, the choice is random."""
        with self._lock:
            return self._servable(spec, key).ref

    def acquire(self, spec: str, key: str = "") -> Found:
        """Resolve a name and lease the revision's content, in one step."""
        with self._lock:
            found = self._servable(spec, key)
            self._lease(found.ref)
            return found

    def hold(self, ref: AdapterRef) -> None:
        """Lease content that need not have a name; `release` ends the lease."""
        with self._lock:
            self._lease(ref)

    def _lease(self, ref: AdapterRef) -> None:
        self._leases[ref.revision] += 1
        self._leases[ref.weights_digest] += 1

    def release(self, ref: AdapterRef) -> None:
        """End one lease; content that nothing needs any more becomes garbage."""
        with self._lock:
            for key in (ref.revision, ref.weights_digest):
                self._leases[key] -= 1
                if not self._leases[key]:
                    del self._leases[key]
            self._note(ref)

    def leases(self, digest: str) -> int:
        """Number of leases on a weights digest or a revision."""
        with self._lock:
            return self._leases[digest]

    def holding(self, weights_digest: str) -> tuple[AdapterRef, ...]:
        """All revisions of any name that have these weights, sorted by name and revision."""
        with self._lock:
            held = self._by_weights.get(weights_digest, ())
            return tuple(sorted(held, key=lambda ref: (ref.name, ref.revision)))

    def find_entry(self, name: str) -> Entry:
        """The entry of a plain name. Raises as `find`."""
        with self._lock:
            entry = self._names.get(name)
            if entry is None:
                short_name(name)
                raise self._not_found(name)
            return entry

    def entry(self, name: str) -> Entry | None:
        """The entry of a plain name, or None."""
        with self._lock:
            return self._names.get(name)

    def _servable(self, spec: str, key: str) -> Found:
        found = self._find(spec, key)
        why = self._quarantined.get(found.ref.weights_digest)
        if why is not None:
            raise AdapterCorrupt(
                f"adapter {found.ref.short} is in quarantine because its stored content is "
                f"damaged ({why}); push the same files again to repair it, or name another "
                "revision",
                metadata={"adapter": found.ref.short, "why": why[:200]},
            )
        if self._is_lost(found.ref):
            raise AdapterCorrupt(
                f"the content of adapter {found.ref.short} is missing from the server's disk; "
                "push the same files again, or restore the data folder's store/ and restart "
                "the server",
                metadata={"adapter": found.ref.short, "why": LOST},
            )
        if found.ref.revision in found.entry.foreign:
            raise BaseModelMismatch(
                f"adapter {found.ref.short} was registered for a base other than "
                f"{self._base_name}; push it again to check it against this base, or start "
                "the server with the adapter's base",
                metadata={"adapter": found.ref.short, "base": self._base_name},
            )
        return found

    def _find(self, spec: str, key: str | None) -> Found:
        name, mark, rest = split_spec(spec)
        entry = self._names.get(name)
        if entry is None:
            short_name(name)
        if mark == "@":
            check_prefix(rest)
        if entry is None:
            raise self._not_found(name)
        try:
            return self._choose(name, mark, rest, entry, key)
        except AdapterNotFound:
            if name in self._damaged:  # it may exist, in a damaged row
                raise damaged_row(spec[:80]) from None
            raise

    def _choose(self, name: str, mark: str, rest: str, entry: Entry, key: str | None) -> Found:
        if mark == "@":
            return Found(entry, by_prefix(name, entry, rest))
        if mark == "/":
            return Found(entry, by_alias(name, entry, rest, key))
        if entry.current is None:
            raise AdapterNotFound(
                f"the content of adapter {name!r} was lost; push it again",
                metadata={"adapter": name, "why": LOST},
            )
        return Found(entry, entry.current)

    def _not_found(self, name: str) -> AdapterNotFound:
        return not_found(name, self._near.nearest(name, self._names))

    # ------------------------------------------------------------------- changes

    def put(self, name: str, entry: Entry) -> None:
        """Set a name's entry; revisions that it no longer has may become garbage."""
        with self._lock:
            old = self._names.get(name)
            if old is None:
                self._near.add(name)
            self._names[name] = entry
            if entry.shared != (name in self._shared):
                (self._shared.add if entry.shared else self._shared.discard)(name)
                self._shared_in_order = None
            self._count(entry, 1)
            self._drop(old)
        self._changed(name, entry)

    def remove(self, name: str) -> None:
        """Forget a name."""
        with self._lock:
            old = self._names.pop(name)
            self._near.remove(name)
            if name in self._shared:
                self._shared.discard(name)
                self._shared_in_order = None
            self._drop(old)
        self._changed(name, None)

    def follow(self, changed: Callable[[str, Entry | None], None]) -> dict[str, Entry]:
        """Return all entries, and call ``changed`` for each later change, in order (None: the
        name is gone). It is called in the thread that makes the change, and may repeat a change
        that the returned entries already have."""
        with self._lock:
            self._changed = changed
            return dict(self._names)

    def load(self, entries: dict[str, Entry], damaged: Mapping[str, int] = _NO_DAMAGE) -> None:
        """Fill an empty index at once (one sort instead of an insertion per name).

        Args:
            damaged: name -> number of its rows that are damaged.
        """
        with self._lock:
            self._names = dict(entries)
            self._damaged = dict(damaged)
            self._near = NearNames(entries)
            self._shared = {name for name, entry in entries.items() if entry.shared}
            self._shared_in_order = None
            for entry in entries.values():
                self._count(entry, 1)

    def _count(self, entry: Entry, by: int) -> None:
        for ref in entry.revisions:
            _add(self._by_revision, ref.revision, by)
            held = self._by_weights.setdefault(ref.weights_digest, {})
            _add(held, ref, by)
            if not held:
                del self._by_weights[ref.weights_digest]

    def _drop(self, old: Entry | None) -> None:
        if old is not None:
            self._count(old, -1)
            for ref in old.revisions:
                self._note(ref)

    def set_quarantined(self, weights: Mapping[str, str]) -> None:
        """Set all weights in quarantine: weights digest -> why it is damaged."""
        with self._lock:
            self._quarantined = dict(weights)

    def quarantined(self, weights_digest: str) -> str | None:
        """Why these weights are in quarantine, or None."""
        return self._quarantined.get(weights_digest)

    def unusable(self, ref: AdapterRef) -> str | None:
        """Why the content of a revision cannot be served, or None."""
        why = self._quarantined.get(ref.weights_digest)
        return LOST if why is None and self._is_lost(ref) else why

    def is_shared(self, name: str) -> bool:
        """Whether other tenants of the server may use a plain name."""
        return name in self._shared

    def shared(self) -> tuple[str, ...]:
        """The names that other tenants may use, in order."""
        with self._lock:
            if self._shared_in_order is None:
                self._shared_in_order = tuple(sorted(self._shared))
            return self._shared_in_order

    def entries(self) -> dict[str, Entry]:
        """All entries, by name."""
        with self._lock:
            return dict(self._names)

    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        with self._lock:
            return tuple(sorted(self._names))

    def weights(self) -> set[str]:
        """Weights digests that names refer to."""
        with self._lock:
            return set(self._by_weights)

    def revisions(self) -> set[str]:
        """Revisions that names refer to."""
        with self._lock:
            return set(self._by_revision)

    def is_named(self, digest: str) -> bool:
        """Whether a name has this weights digest or revision."""
        with self._lock:
            return digest in self._by_weights or digest in self._by_revision

    def set_lost(self, digests: Set[str]) -> None:
        """Set the weights digests and revisions whose content is not on disk."""
        with self._lock:
            self._lost = set(digests)

    def found(self, ref: AdapterRef) -> bool:
        """Note that the content of a revision is on disk. True if it was not before."""
        with self._lock:
            before = self._is_lost(ref)
            self._lost -= {ref.weights_digest, ref.revision}
            return before

    def damaged(self, name: str) -> bool:
        """Whether the catalog has damaged rows about a name."""
        return name in self._damaged

    @property
    def any_damaged(self) -> bool:
        """Whether the catalog has damaged rows. These may refer to content that is in no
        entry here."""
        return bool(self._damaged)

    def set_damaged(self, name: str, rows: int) -> None:
        """Set how many rows about a name are damaged."""
        with self._lock:
            if rows:
                self._damaged[name] = rows
            else:
                self._damaged.pop(name, None)

    def lost_adapters(self) -> tuple[AdapterRef, ...]:
        """Revisions whose content is not on disk, ordered by name."""
        with self._lock:
            if not self._lost:
                return ()
            entries = (self._names[name] for name in sorted(self._names))
            return tuple(r for entry in entries for r in entry.revisions if self._is_lost(r))

    def _is_lost(self, ref: AdapterRef) -> bool:
        lost = self._lost
        return bool(lost) and (ref.weights_digest in lost or ref.revision in lost)

    # ------------------------------------------------------------------- garbage

    @property
    def has_garbage(self) -> bool:
        """Whether `take_garbage` would return something."""
        return bool(self._garbage)

    def take_garbage(self) -> Garbage:
        """Take the content that no name or lease needs.

        The caller must block publishes until it has removed the content, and `put_back` the
        garbage if it cannot be removed.
        """
        with self._lock:
            noted, self._garbage = self._garbage, set()
            digests = {
                ref.weights_digest for ref in noted if self._unneeded(ref.weights_digest)
            }
            revisions = {ref.revision for ref in noted if self._unneeded(ref.revision)}
            return Garbage(frozenset(noted), digests, revisions)

    def put_back(self, garbage: Garbage) -> None:
        """Return garbage that could not be removed, for the next `take_garbage`."""
        with self._lock:
            self._garbage |= garbage.noted

    def _note(self, ref: AdapterRef) -> None:
        if self._unneeded(ref.weights_digest) or self._unneeded(ref.revision):
            self._garbage.add(ref)

    def _unneeded(self, key: str) -> bool:
        named = key in self._by_weights or key in self._by_revision
        return not named and key not in self._leases


def _add(counts: dict[_Key, int], key: _Key, by: int) -> None:
    """Add ``by`` to a count; a count of zero is removed."""
    counts[key] = counts.get(key, 0) + by
    if not counts[key]:
        del counts[key]
