"""Stored responses and conversations, by tenant, in SQLite, with limits on size and age.

A response's row holds only its own items. Earlier items are in the rows of the responses that
it continues. Those rows stay as long as it does, even if their own responses are deleted. So a
chain takes no more disk than its items, and every stored response can be continued. A
conversation is a list of items that its caller may change.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
from veneer_registry.database import Reader, connect, database_errors, move_aside
from veneer_registry.disk import create_file, disk_errors, disk_failed, sync
from veneer_registry.errors import (
    CatalogDamaged,
    DiskFull,
    FailedPrecondition,
    QueueFull,
    VeneerError,
)

from veneer_server.logs import get_logger
from veneer_server.openai.errors import HttpError
from veneer_server.openai.http.asgi import MAX_BODY
from veneer_server.openai.http.body import LONG_BODY
from veneer_server.serving.checks import MAX_MESSAGES, invalid
from veneer_server.telemetry.metrics import Metrics

MAX_HISTORY: Final = MAX_BODY
"""Most bytes of stored items, as JSON, that a request may continue."""

MAX_REFERRED: Final = 2 * MAX_HISTORY
"""Most bytes of responses that are read to find the items that a request refers to."""

MAX_WAITING: Final = 32
"""Most requests of one tenant that may wait to write, and as many that may wait to read."""

MAX_READ: Final = 32 << 20
"""Most bytes of stored responses being sent at a time, not counting the first 64 KiB of each.
One tenant may use half of them."""

MAX_LISTED: Final = 100
"""Most items in one page of a list, as with OpenAI."""

WRITE_LIMIT_S: Final = 5.0
"""How long an answer waits to be stored. After that it is sent, and says that it is not stored.
"""

_UPKEEP_S: Final = 60.0
_REST: Final = 3
"""How long upkeep rests between two transactions, as a multiple of the time that one took."""
_AT_ONCE: Final = 256
"""Rows that upkeep removes in one transaction, so that it holds up no answer for long."""
_ROW: Final = 256
"""Rough overhead of a row, in bytes."""
FREE_PAGES: Final = 4096
"""Unused pages that are kept in the file. More are given back to the file system."""
_WAL_BYTES: Final = 16 << 20
_VERSION: Final = 1

_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE tenants (
    tenant TEXT PRIMARY KEY,
    count INTEGER NOT NULL,      -- responses and conversations
    bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE responses (
    number INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    id TEXT,                     -- NULL: deleted, but continued by others
    created REAL NOT NULL,
    conversation TEXT,
    previous INTEGER,            -- number of the response that it continues
    continued INTEGER NOT NULL,  -- how many continue it
    bytes INTEGER NOT NULL,
    head BLOB NOT NULL,          -- the response without output
    input BLOB NOT NULL,
    output BLOB NOT NULL
);
CREATE UNIQUE INDEX responses_by_id ON responses (tenant, id) WHERE id IS NOT NULL;
CREATE INDEX responses_by_age ON responses (tenant, created) WHERE id IS NOT NULL;
CREATE TABLE conversations (
    number INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    created INTEGER NOT NULL,
    used REAL NOT NULL,          -- when it was last changed
    bytes INTEGER NOT NULL,
    count INTEGER NOT NULL,      -- of its items
    metadata BLOB NOT NULL
);
CREATE UNIQUE INDEX conversations_by_id ON conversations (tenant, id);
CREATE INDEX conversations_by_age ON conversations (tenant, used);
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL,
    id TEXT NOT NULL,
    item BLOB NOT NULL
);
CREATE UNIQUE INDEX items_by_id ON items (conversation, id);
CREATE INDEX items_in_order ON items (conversation, number);
PRAGMA user_version = {_VERSION};
COMMIT;
"""

_log = get_logger(__name__)

T = TypeVar("T")


class StoredItem(NamedTuple):
    """An item with its id. Attributes: json: the whole item, including the id."""

    id: str
    json: bytes


@dataclass(frozen=True, slots=True)
class FinishedResponse:
    """A response that can be stored.

    Attributes:
        previous: id of the response that it continues.
        conversation: id of the conversation to which its items are added.
        head: the response without its output, as JSON.
    """

    id: str
    previous: str | None
    conversation: str | None
    head: bytes
    input: Sequence[StoredItem]
    output: Sequence[StoredItem]


@dataclass(frozen=True, slots=True)
class ItemPage:
    """The requested page of a list of items.

    Attributes:
        after: id of the item before the first one; empty for the beginning.
        newest: whether the list begins with the newest item.
    """

    after: str = ""
    limit: int = 20
    newest: bool = True


class _NoRoom(Exception):
    """A change would exceed the limit on bytes, or continues a response that is gone."""


class _Oldest(NamedTuple):
    at: float
    number: int
    bytes: int
    is_response: bool


def joined(items: Sequence[StoredItem]) -> bytes:
    """Items as a JSON list."""
    return b"[" + b",".join(item.json for item in items) + b"]"


def no_such(kind: str, name: str, *, param: str | None = None, hint: str = "") -> HttpError:
    """The error for an object that is not stored or is another tenant's, without saying which.

    Args:
        kind: ``response``, ``previous response``, ``conversation`` or ``item``.
    """
    why = hint or "it was deleted, or is too old, or was never stored"
    code = f"{kind.replace(' ', '_')}_not_found"
    return HttpError(404, code, f"there is no {kind} {name[:100]!r}: {why}", param=param)


class ResponseDatabase:
    """The SQLite database at ``path``. One thread at a time changes it, and another may read.

    Attributes:
        count: number of responses and conversations.
        bytes: bytes that they take on disk.
        renewed: how often a damaged database was replaced.
    """

    def __init__(
        self,
        path: Path,
        *,
        most_bytes: int,
        age_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the database. A damaged one is moved aside, and a new one created.

        Args:
            most_bytes: limit on disk. Beyond it, the oldest entries of the tenant that stores
                most are removed.
            age_s: older entries are removed.

        Raises:
            FailedPrecondition: it was written by a newer Veneer.
            DiskFull, DiskFailed: it cannot be opened.
        """
        self.count = self.bytes = self.renewed = 0
        self.path = path
        self._most = most_bytes
        self._age_s = age_s
        self._clock = clock
        try:
            self._open()
        except CatalogDamaged as error:
            self._start_anew(error)

    def close(self) -> None:
        self._reader.close()
        self._db.close()

    def renew(self, error: CatalogDamaged, renewed: int) -> None:
        """Replace this damaged database, unless that was done since the damage was found. Args:
        renewed: the value of `renewed` at that time."""
        if renewed != self.renewed:
            return
        self.renewed += 1
        with suppress(sqlite3.Error):
            self.close()
        self._start_anew(error)

    def _start_anew(self, error: CatalogDamaged) -> None:
        aside = move_aside(self.path)
        why = str(error.__cause__ or error)
        _log.error("stored responses damaged, starting anew", file=aside.name, why=why)
        self._open()

    def _open(self) -> None:
        self._db = _open(self.path)
        try:
            with database_errors(self.path):
                self._reader = Reader(self.path)
                self._look()
        except BaseException:
            self._db.close()
            raise

    # ------------------------------------------------------------------ changes

    def put(self, tenant: str, response: FinishedResponse) -> bool:
        """Store a response, and add its items to its conversation. Return False, and change
        nothing, if there is no room for it or the response that it continues is gone.

        Raises:
            HttpError: the conversation no longer exists.
        """
        items = joined(response.input), joined(response.output)
        size = _ROW + len(response.head) + sum(map(len, items))
        with suppress(_NoRoom), self._change():
            before, previous = self._used(), None
            if response.previous is not None:
                found = self._db.execute(
                    "UPDATE responses SET continued = continued + 1 "
                    "WHERE tenant = ? AND id = ? RETURNING number",
                    (tenant, response.previous),
                ).fetchall()
                if not found:
                    raise _NoRoom
                ((previous,),) = found
            keep = set[tuple[bool, int]]()
            if response.conversation is not None:
                own = [*response.input, *response.output]
                keep.add((False, self._add(tenant, response.conversation, own)))
            made = self._db.execute(
                "INSERT INTO responses (tenant, id, created, conversation, previous, "
                "continued, bytes, head, input, output) VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?)",
                (
                    tenant,
                    response.id,
                    self._clock(),
                    response.conversation,
                    previous,
                    size,
                    response.head,
                    *items,
                ),
            )
            assert made.lastrowid is not None, "inserted"
            self._count(tenant, 1, size)
            self._make_room(before, {*keep, (True, made.lastrowid)})
            return True
        return False

    def delete(self, tenant: str, response: str) -> bool:
        """Delete a response; return False if there is none. Its items stay for the responses
        that continue it."""
        with self._change():
            found = self._db.execute(
                "SELECT number FROM responses WHERE tenant = ? AND id = ? AND created >= ?",
                (tenant, response, self._oldest_allowed),
            ).fetchall()
            for (number,) in found:
                self._drop_response(tenant, number)
        return bool(found)

    def begin_conversation(
        self, tenant: str, conversation: str, metadata: bytes, items: Sequence[StoredItem]
    ) -> int:
        """Create a conversation, and return the time in Unix seconds. Raises DiskFull if there
        is no room for it."""
        now = self._clock()
        with self._room_or_full(), self._change():
            before, size = self._used(), _ROW + len(metadata)
            self._db.execute(
                "INSERT INTO conversations (tenant, id, created, used, bytes, count, metadata) "
                "VALUES (?, ?, ?, ?, ?, 0, ?)",
                (tenant, conversation, int(now), now, size, metadata),
            )
            self._count(tenant, 1, size)
            self._make_room(before, {(False, self._add(tenant, conversation, items))})
        return int(now)

    def describe_conversation(self, tenant: str, conversation: str, metadata: bytes) -> None:
        """Replace a conversation's metadata. Raises HttpError, DiskFull."""
        with self._room_or_full(), self._change():
            before, number = self._used(), self._found(tenant, conversation)
            ((had,),) = self._db.execute(
                "SELECT length(metadata) FROM conversations WHERE number = ?", (number,)
            )
            more = len(metadata) - had
            self._db.execute(
                "UPDATE conversations SET metadata = ?, bytes = bytes + ? WHERE number = ?",
                (metadata, more, number),
            )
            self._count(tenant, 0, more)
            self._make_room(before, {(False, number)})

    def add_items(
        self, tenant: str, conversation: str, items: Sequence[StoredItem], *, most: int | None
    ) -> None:
        """Add items to a conversation.

        Args:
            most: most bytes that it may then have; None sets no limit on bytes or items.

        Raises:
            HttpError: there is no such conversation.
            InvalidField: it would have too many items or bytes.
            DiskFull: there is no room for them.
        """
        with self._room_or_full(), self._change():
            before = self._used()
            number = self._add(tenant, conversation, items)
            ((size, count),) = self._db.execute(
                "SELECT bytes, count FROM conversations WHERE number = ?", (number,)
            )
            if most is not None and (size > most or count > MAX_MESSAGES):
                raise invalid(
                    "items",
                    f"would give the conversation {count} items and {size} bytes: it may have "
                    f"{MAX_MESSAGES} items and {most} bytes; begin another one",
                )
            self._make_room(before, {(False, number)})

    def delete_item(self, tenant: str, conversation: str, item: str) -> None:
        """Delete an item of a conversation. Raises HttpError if there is none."""
        with self._change():
            number = self._found(tenant, conversation)
            found = self._db.execute(
                "DELETE FROM items WHERE conversation = ? AND id = ? RETURNING length(item)",
                (number, item),
            ).fetchall()
            if not found:
                raise no_such("item", item)
            size = found[0][0] + _ROW
            self._db.execute(
                "UPDATE conversations SET bytes = bytes - ?, count = count - 1, used = ? "
                "WHERE number = ?",
                (size, self._clock(), number),
            )
            self._count(tenant, 0, -size)

    def delete_conversation(self, tenant: str, conversation: str) -> None:
        """Delete a conversation with its items. Raises HttpError if there is none."""
        with self._change():
            self._drop_conversation(tenant, self._found(tenant, conversation))

    def upkeep(self) -> bool:
        """Remove some entries that are too old or over the limit, and shrink a large file a
        bit. Return whether there may be more to do."""
        with self._change():
            self._db.execute("DELETE FROM tenants WHERE count = 0 AND bytes = 0")
            dropped, before = 0, self._oldest_allowed
            for tenant, _ in self._tenants():
                for each in self._oldest(tenant, set(), before, _AT_ONCE - dropped):
                    self._drop(tenant, each)
                    dropped += 1
                if dropped >= _AT_ONCE:
                    break
            if not dropped and self._used() > self._most:
                dropped = self._drop_some(self._used() - self._most, set())
        ((free,),) = self._db.execute("PRAGMA freelist_count")
        if free > FREE_PAGES:
            with database_errors(self.path):
                # With `execute`, Python's sqlite3 would stop after one page.
                self._db.executescript(f"PRAGMA incremental_vacuum({_AT_ONCE * 4})")
            return True
        return dropped > 0

    # ------------------------------------------------------------------ reading

    def response(self, tenant: str, response: str) -> bytes | None:
        """A response as JSON; None if there is none."""
        for head, output in self._reader.rows(
            "SELECT head, output FROM responses WHERE tenant = ? AND id = ? AND created >= ?",
            (tenant, response, self._oldest_allowed),
        ):
            return bytes(head[:-1] + b',"output":' + output + b"}")
        return None

    def history(self, tenant: str, response: str) -> bytes:
        """All items of a response and of those that it continues, oldest first, as a JSON list.

        Raises:
            HttpError: there is no such response.
            InvalidField: its items are in a conversation, or are too many.
        """
        field = "previous_response_id"
        chain = self._chain(tenant, response)
        if not chain:
            raise no_such("previous response", response, param=field)
        if (conversation := chain[-1][2]) is not None:
            raise invalid(field, f"belongs to a conversation: send conversation {conversation}")
        return _within(field, [part for row in chain for part in row[:2]])

    def referred(self, tenant: str, names: Sequence[str]) -> list[bytes]:
        """The items with these ids, in this order.

        Raises:
            HttpError: there is no such item.
            InvalidField: the items, or the responses that hold them, are too long.
        """
        wanted: dict[str, set[str]] = {}
        for name in names:
            if (match := _ITEM.fullmatch(name)) is None:
                raise no_such("item", name, param="input")
            wanted.setdefault(f"resp_{match[1]}", set()).add(name)
        items, size = dict[str, bytes](), 0
        for response, own in wanted.items():
            rows = self._reader.rows(
                "SELECT input, output FROM responses "
                "WHERE tenant = ? AND id = ? AND created >= ?",
                (tenant, response, self._oldest_allowed),
            )
            parts = [part for row in rows for part in row]
            if (size := size + sum(map(len, parts))) > MAX_REFERRED:
                raise invalid(
                    "input",
                    f"refers to items in more than {MAX_REFERRED} bytes of responses: send "
                    "the items themselves",
                )
            items.update(each for each in _named(parts) if each[0] in own)
            if missing := own.difference(items):
                raise no_such("item", min(missing), param="input")
        found, size = [], 0
        for name in names:
            found.append(items[name])
            if (size := size + len(found[-1])) > MAX_HISTORY:
                raise invalid("input", f"refers to more than {MAX_HISTORY} bytes of items")
        return found

    def input_items(self, tenant: str, response: str, page: ItemPage) -> bytes:
        """A page of the items that a response was made from: those that it continued, followed
        by its own input. Raises HttpError, InvalidField."""
        chain = self._chain(tenant, response)
        if not chain:
            raise no_such("response", response)
        found = _named([part for row in chain for part in row[:2]][:-1])
        if page.newest:
            found.reverse()
        begin = 0
        if page.after:
            places = [at for at, (name, _) in enumerate(found) if name == page.after]
            if not places:
                raise invalid("after", "is not the id of one of these items")
            begin = places[0] + 1
        wanted = found[begin : begin + page.limit]
        return listed(wanted, more=begin + page.limit < len(found))

    def conversation(self, tenant: str, conversation: str) -> tuple[int, bytes]:
        """A conversation's creation time and metadata. Raises HttpError if there is none."""
        for created, metadata in self._reader.rows(
            "SELECT created, metadata FROM conversations "
            "WHERE tenant = ? AND id = ? AND used >= ?",
            (tenant, conversation, self._oldest_allowed),
        ):
            return created, metadata
        raise no_such("conversation", conversation)

    def conversation_history(self, tenant: str, conversation: str) -> bytes:
        """All items of a conversation as a JSON list. Raises HttpError, InvalidField."""
        rows = self._reader.rows(
            "SELECT item FROM conversations LEFT JOIN items "
            "ON items.conversation = conversations.number "
            "WHERE tenant = ? AND conversations.id = ? AND used >= ? ORDER BY items.number",
            (tenant, conversation, self._oldest_allowed),
        )
        if not rows:
            raise no_such("conversation", conversation, param="conversation")
        return _within("conversation", [b"[" + (item or b"") + b"]" for (item,) in rows])

    def items(self, tenant: str, conversation: str, page: ItemPage) -> bytes:
        """A page of a conversation's items. Raises HttpError, InvalidField."""
        self.conversation(tenant, conversation)
        sign, order = ("<", "DESC") if page.newest else (">", "ASC")
        of = "(SELECT number FROM conversations WHERE tenant = ? AND id = ?)"
        where, values = f"conversation = {of}", [tenant, conversation]
        if page.after:
            found = self._reader.rows(
                f"SELECT number FROM items WHERE {where} AND id = ?",  # nosec B608 # of ours
                [*values, page.after],
            )
            if not found:
                raise invalid("after", "is not the id of one of these items")
            where, values = f"{where} AND number {sign} ?", [*values, found[0][0]]
        rows = self._reader.rows(
            f"SELECT id, item FROM items WHERE {where} "  # nosec B608 # of ours
            f"ORDER BY number {order} LIMIT ?",
            [*values, page.limit + 1],
        )
        return listed(rows[: page.limit], more=len(rows) > page.limit)

    def item(self, tenant: str, conversation: str, item: str) -> bytes:
        """An item of a conversation as JSON. Raises HttpError if there is none."""
        for (found,) in self._reader.rows(
            "SELECT item FROM conversations JOIN items "
            "ON items.conversation = conversations.number "
            "WHERE tenant = ? AND conversations.id = ? AND used >= ? AND items.id = ?",
            (tenant, conversation, self._oldest_allowed, item),
        ):
            return bytes(found)
        raise no_such("item", item)

    def _chain(self, tenant: str, response: str) -> list[tuple[bytes, bytes, str | None]]:
        """Input, output and conversation of each response in a chain, oldest first, this one
        last. One statement, so that no change can come in between."""
        return self._reader.rows(
            "WITH RECURSIVE chain (number, previous, depth) AS ("
            "SELECT number, previous, 0 FROM responses "
            "WHERE tenant = ? AND id = ? AND created >= ? "
            "UNION ALL SELECT before.number, before.previous, depth + 1 "
            "FROM chain JOIN responses AS before ON before.number = chain.previous) "
            "SELECT input, output, conversation FROM chain JOIN responses USING (number) "
            "ORDER BY depth DESC",
            (tenant, response, self._oldest_allowed),
        )

    # -------------------------------------------------------------------- parts

    @property
    def _oldest_allowed(self) -> float:
        return self._clock() - self._age_s

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Run the block as a transaction, which is on disk when the block has ended."""
        with database_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            self._look()

    @contextmanager
    def _room_or_full(self) -> Iterator[None]:
        try:
            yield
        except _NoRoom:
            raise DiskFull(
                f"this takes more than the {self._most} bytes that may be stored: send less",
                metadata={"limit": str(self._most)},
            ) from None

    def _look(self) -> None:
        ((count,),) = self._db.execute("SELECT coalesce(sum(count), 0) FROM tenants")
        self.count, self.bytes = count, self._used()

    def _used(self) -> int:
        """Bytes of the pages in use, as the open transaction sees them."""
        ((pages,),) = self._db.execute("PRAGMA page_count")
        ((free,),) = self._db.execute("PRAGMA freelist_count")
        ((size,),) = self._db.execute("PRAGMA page_size")
        return int((pages - free) * size)

    def _tenants(self) -> list[tuple[str, int]]:
        """Names and bytes of the tenants, the one that stores most first."""
        return self._db.execute(
            "SELECT tenant, bytes FROM tenants ORDER BY bytes DESC"
        ).fetchall()

    def _count(self, tenant: str, count: int, size: int) -> None:
        self._db.execute(
            "INSERT INTO tenants (tenant, count, bytes) VALUES (?, ?, ?) ON CONFLICT (tenant) "
            "DO UPDATE SET count = count + excluded.count, bytes = bytes + excluded.bytes",
            (tenant, count, size),
        )

    def _found(self, tenant: str, conversation: str) -> int:
        """A conversation's number. Raises HttpError."""
        for (number,) in self._db.execute(
            "SELECT number FROM conversations WHERE tenant = ? AND id = ? AND used >= ?",
            (tenant, conversation, self._oldest_allowed),
        ):
            return int(number)
        raise no_such("conversation", conversation)

    def _add(self, tenant: str, conversation: str, items: Sequence[StoredItem]) -> int:
        """Add items to a conversation, and return its number. Raises HttpError."""
        number = self._found(tenant, conversation)
        self._db.executemany(
            "INSERT INTO items (conversation, id, item) VALUES (?, ?, ?)",
            [(number, item.id, item.json) for item in items],
        )
        size = sum(_ROW + len(item.json) for item in items)
        self._db.execute(
            "UPDATE conversations SET bytes = bytes + ?, count = count + ?, used = ? "
            "WHERE number = ?",
            (size, len(items), self._clock(), number),
        )
        self._count(tenant, 0, size)
        return number

    def _make_room(self, before: int, keep: set[tuple[bool, int]]) -> None:
        """Remove the oldest entries until the limit is met or, if it was exceeded already,
        until no more is used than ``before``. Args: keep: entries that must stay. Raises
        _NoRoom."""
        most = max(self._most, before)
        while (over := self._used() - most) > 0:
            if not self._drop_some(over, keep):
                raise _NoRoom

    def _drop_some(self, over: int, keep: set[tuple[bool, int]]) -> int:
        """Remove some of the oldest entries of the tenant that stores most; return how many.
        About half of the excess at once: what it frees on disk is known only afterwards."""
        tenants = self._tenants()
        for at, (tenant, held) in enumerate(tenants):
            others = tenants[at + 1][1] if at + 1 < len(tenants) else 0
            dropped = freed = 0
            for each in self._oldest(tenant, keep):
                self._drop(tenant, each)
                dropped, freed = dropped + 1, freed + each.bytes
                if 2 * freed >= over or freed > held - others:
                    break
            if dropped:
                return dropped
        return 0

    def _oldest(
        self,
        tenant: str,
        keep: set[tuple[bool, int]],
        before: float = sys.float_info.max,
        most: int = _AT_ONCE,
    ) -> list[_Oldest]:
        found = [
            _Oldest(at, number, size, is_response)
            for is_response, sql in ((True, _OLDEST_RESPONSES), (False, _OLDEST_CONVERSATIONS))
            for at, number, size in self._db.execute(sql, (tenant, before, most))
            if (is_response, number) not in keep
        ]
        return sorted(found)[:most]

    def _drop(self, tenant: str, each: _Oldest) -> None:
        drop = self._drop_response if each.is_response else self._drop_conversation
        drop(tenant, each.number)

    def _drop_response(self, tenant: str, number: int) -> None:
        """Delete a response, and the rows of its chain that nothing continues any more."""
        self._count(tenant, -1, 0)
        self._db.execute("UPDATE responses SET id = NULL WHERE number = ?", (number,))
        at: int | None = number
        while at is not None:
            ((name, previous, continued, size, head),) = self._db.execute(
                "SELECT id, previous, continued, bytes, length(head) "
                "FROM responses WHERE number = ?",
                (at,),
            )
            if name is not None:
                return
            if continued:
                self._db.execute(
                    "UPDATE responses SET head = x'', bytes = bytes - ? WHERE number = ?",
                    (head, at),
                )
                self._count(tenant, 0, -head)
                return
            self._db.execute("DELETE FROM responses WHERE number = ?", (at,))
            self._count(tenant, 0, -size)
            if previous is not None:
                self._db.execute(
                    "UPDATE responses SET continued = continued - 1 WHERE number = ?",
                    (previous,),
                )
            at = previous

    def _drop_conversation(self, tenant: str, number: int) -> None:
        ((size,),) = self._db.execute(
            "SELECT bytes FROM conversations WHERE number = ?", (number,)
        )
        self._db.execute("DELETE FROM items WHERE conversation = ?", (number,))
        self._db.execute("DELETE FROM conversations WHERE number = ?", (number,))
        self._count(tenant, -1, -size)


_OLDEST_RESPONSES: Final = (
    "SELECT created, number, bytes FROM responses WHERE tenant = ? AND id IS NOT NULL "
    "AND created < ? ORDER BY created LIMIT ?"
)
_OLDEST_CONVERSATIONS: Final = (
    "SELECT used, number, bytes FROM conversations WHERE tenant = ? AND used < ? "
    "ORDER BY used LIMIT ?"
)


class _Identified(msgspec.Struct):
    id: str = ""


_ITEM: Final = re.compile(r"[a-z]+_([0-9a-f]+)_(?:in)?[0-9]+")
"""An item's id contains the unique part of its response's id."""


def _named(parts: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """The items of JSON lists, with their ids."""
    return [
        (msgspec.json.decode(raw, type=_Identified).id, bytes(raw))
        for part in parts
        for raw in msgspec.json.decode(part, type=list[msgspec.Raw])
    ]


def _within(field: str, parts: Sequence[bytes]) -> bytes:
    """Join JSON lists into one. Raises InvalidField if it is too long."""
    items = b"[" + b",".join(part[1:-1] for part in parts if part != b"[]") + b"]"
    if len(items) > MAX_HISTORY:
        raise invalid(
            field,
            f"has {len(items)} bytes of items: at most {MAX_HISTORY} can be continued; send "
            "those that still matter as input",
        )
    return items


def listed(found: Sequence[tuple[str, bytes]], *, more: bool) -> bytes:
    """A page of a list, as JSON."""
    ends = msgspec.json.encode(
        {
            "object": "list",
            "first_id": found[0][0] if found else None,
            "last_id": found[-1][0] if found else None,
            "has_more": more,
        }
    )
    return ends[:-1] + b',"data":[' + b",".join(item for _, item in found) + b"]}"


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        with disk_errors(path.parent):
            create_file(path)  # private, as SQLite's other files will be
            sync(path.parent)
    with database_errors(path):
        db = connect(path)
        try:
            ((version,),) = db.execute("PRAGMA user_version")
            if version > _VERSION:
                raise FailedPrecondition(
                    f"{path} was written by a newer Veneer: start that version, or move the "
                    "file away to start without stored responses",
                    metadata={"file": str(path)},
                )
            if version == 0:
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                db.execute("VACUUM")  # it has no tables; otherwise the mode would not change
                db.executescript(_SCHEMA)
            db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        except BaseException:
            db.close()
            raise
    return db


class StoredResponses:
    """The endpoints' access to stored responses. Belongs to one event loop; one thread writes,
    and another reads."""

    def __init__(
        self, database: ResponseDatabase, metrics: Metrics, *, limit_s: float = WRITE_LIMIT_S
    ) -> None:
        """Args: limit_s: how long an answer waits to be stored."""
        self._database = database
        self._limit_s = limit_s
        self._not_stored = metrics.not_stored
        metrics.stored_responses.set_function(lambda: database.count)
        metrics.stored_bytes.set_function(lambda: database.bytes)
        self._writing = ThreadPoolExecutor(1, "store-responses")
        self._reading = ThreadPoolExecutor(1, "read-responses")
        self._sending: Counter[str] = Counter()
        """Bytes being sent, by tenant."""
        self._changes: Counter[str] = Counter()
        """Requests that wait to write, by tenant."""
        self._reads: Counter[str] = Counter()
        """Requests that wait to read, by tenant."""
        self._changing = asyncio.Lock()
        """Passes one change at a time to the thread, so that answers overtake waiting changes.
        """
        self._keeping_up: asyncio.Task[None] | None = None
        self._late = False
        """Whether a write has taken too long, and the writes queued behind it are not done."""
        self._begun: float | None = None
        """When the running write began; None if none runs."""

    def start(self) -> None:
        """Start the task that removes old entries."""
        self._keeping_up = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        """Stop once everything is written. No call may follow."""
        if self._keeping_up is not None:
            self._keeping_up.cancel()
            await asyncio.wait({self._keeping_up})
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writing, lambda: None)
        self._writing.shutdown()
        await loop.run_in_executor(self._reading, self._database.close)
        self._reading.shutdown()

    async def keep(self, tenant: str, make: Callable[[], FinishedResponse]) -> bool:
        """Store a tenant's response, and return whether it is on disk now. It is not if there
        is no room for it, or the disk is full, fails or is slow.

        Args:
            make: builds the response, in the writing thread.
        """
        why = f"that would take longer than {self._limit_s:g} s"
        try:
            if not self._late:
                async with asyncio.timeout(self._limit_s):
                    if await self.write(lambda database: database.put(tenant, make())):
                        return True
                why = "no room, or the response before it is gone"
        except TimeoutError:
            begun = self._begun
            # Otherwise the disk is fine, and there are only many writes.
            if begun is not None and time.monotonic() - begun >= self._limit_s / 2:
                self._late = True  # answers do not wait for it any more
                self._writing.submit(self._in_time)
        except VeneerError as error:
            why = error.message
        self._not_stored.inc()
        _log.often("not stored", "response not stored", why=why)
        return False

    def _in_time(self) -> None:
        self._late = False

    async def change(self, tenant: str, work: Callable[[ResponseDatabase], T]) -> T:
        """Change the database. Raises what ``work`` does, DiskFull or DiskFailed, and
        QueueFull if too many of the tenant's requests wait."""
        with self._waiting(self._changes, tenant):
            async with self._changing:
                return await self.write(work)

    async def write(self, work: Callable[[ResponseDatabase], T]) -> T:
        """Like `change`, but without the limit on waiting requests: for an answer, which has
        been computed already."""

        def timed(database: ResponseDatabase) -> T:
            self._begun = time.monotonic()
            try:
                return work(database)
            finally:
                self._begun = None

        return await self._run(self._writing, timed)

    async def read(
        self, tenant: str, work: Callable[[ResponseDatabase], T], *, changed: bool = False
    ) -> T:
        """Read from the database. Raises what ``work`` does, DiskFailed, and QueueFull as
        `change` does.

        Args:
            changed: whether the same request has changed something, so that it is not refused.
        """
        with nullcontext() if changed else self._waiting(self._reads, tenant):
            return await self._run(self._reading, work)

    @contextmanager
    def _waiting(self, waiting: Counter[str], tenant: str) -> Iterator[None]:
        if waiting[tenant] >= MAX_WAITING:
            raise QueueFull(
                f"{MAX_WAITING} of your requests already wait for stored responses: retry "
                "later, or send fewer at once",
                metadata={"limit": str(MAX_WAITING)},
                retry_after_s=1.0,
            )
        waiting[tenant] += 1
        try:
            yield
        finally:
            waiting[tenant] -= 1
            if not waiting[tenant]:
                del waiting[tenant]

    @contextmanager
    def sending(self, tenant: str, size: int) -> Iterator[None]:
        """Reserve room for an answer to a tenant until it is sent. Raises QueueFull."""
        long = max(0, size - LONG_BODY)
        own = self._sending[tenant]
        if long and (own + long > MAX_READ // 2 or self._sending.total() + long > MAX_READ):
            raise QueueFull(
                f"{self._sending.total()} bytes of stored responses are being sent, {own} of "
                "them to you: read those first, then retry",
                retry_after_s=1.0,
            )
        self._sending[tenant] += long
        try:
            yield
        finally:
            self._sending[tenant] -= long
            if not self._sending[tenant]:
                del self._sending[tenant]

    async def _run(self, thread: ThreadPoolExecutor, work: Callable[..., T]) -> T:
        loop, database = asyncio.get_running_loop(), self._database
        renewed = database.renewed
        try:
            return await loop.run_in_executor(thread, work, database)
        except CatalogDamaged as error:
            await loop.run_in_executor(self._writing, database.renew, error, renewed)
            raise disk_failed(database.path.parent, error) from error
        except DiskFull as error:
            if error.metadata.get("limit"):
                raise
            raise DiskFull(
                "the server's disk is full, and nothing was stored: free space, or send "
                "store: false",
                detail=error.detail,
            ) from error
        except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
            raise disk_failed(database.path.parent, error) from error

    async def _keep_up(self) -> None:
        while True:
            begun, more = time.monotonic(), False
            try:
                more = await self.write(ResponseDatabase.upkeep)
            except VeneerError as error:
                _log.often("upkeep", "stored responses not cleaned up", why=error.message)
            worked_s = time.monotonic() - begun
            await asyncio.sleep(_REST * worked_s if more else _UPKEEP_S)
