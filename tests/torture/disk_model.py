"""Model the possible contents of a disk after a power cut, from a record of system calls.

The model is as pessimistic as POSIX: a write, truncate or folder entry that was not followed by
an fsync of *that* file or folder may or may not be on disk, in any combination.

- File data: everything written before the last fsync or fdatasync of the file is kept. Each
  512-byte sector of a later write is independently kept or lost; if the file grew, it may
  have the new size with zeros.
- Folder entries (create, remove, rename) before the last fsync of their folder are kept.
  An fsync of a file does not make its name durable, as it would on ext4.
- A rename is atomic: there is the old name or the new one, never both or neither. An fsync of
  the target folder makes it durable. Journalling filesystems (ext4, XFS, btrfs) guarantee this.
- ``-shm`` files are ignored: SQLite rebuilds them from the log.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from tests.torture.syscalls import Call

SECTOR: Final = 512


@dataclass(slots=True)
class _Change:
    """A change that is durable only after an fsync of ``node``.

    Attributes:
        at: number of the event that made it.
        node: the file or folder whose fsync makes it durable.
    """

    at: int
    node: Node


@dataclass(slots=True)
class _Write(_Change):
    offset: int
    data: bytes


@dataclass(slots=True)
class _Truncate(_Change):
    size: int


@dataclass(slots=True)
class _Entry(_Change):
    """Folder entries that are set atomically: (folder, name, target or None)."""

    names: tuple[tuple[Node, str, Node | None], ...]


@dataclass(eq=False, slots=True)
class Node:
    """A file or folder.

    Attributes:
        syncs: numbers of the events that synced it.
        changes: changes of its data, in order.
        entries: current entries of a folder, by name.
    """

    folder: bool
    syncs: list[int] = field(default_factory=list)
    changes: list[_Write | _Truncate] = field(default_factory=list)
    entries: dict[str, Node] = field(default_factory=dict)
    size: int = 0


@dataclass(slots=True)
class _Open:
    node: Node
    position: int = 0
    append: bool = False


Keep = Callable[[_Change], bool]
"""Function that decides whether a change that is not durable is kept."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One possible disk after a power cut.

    Attributes:
        cut: events from this number on did not happen.
        keep: decides for each change that was not durable.
        torn: if given, kept writes randomly lose some of their sectors.
    """

    cut: int
    keep: Keep
    torn: random.Random | None = None


class Disk:
    """All changes below ``root``, which starts as an empty and durable folder.

    Attributes:
        events: number of calls that changed or synced something.
        said: (number of events before it, line) for each line on standard output.
    """

    def __init__(self, root: Path, calls: Iterable[Call]) -> None:
        self._root_path = PurePosixPath(root)
        self._root = Node(folder=True)
        self._open: dict[int, _Open] = {}
        self._names: list[_Entry] = []
        self.events = 0
        self.said: list[tuple[int, str]] = []
        for call in calls:
            self._replay(call)

    # ------------------------------------------------------------------ replaying

    def _replay(self, call: Call) -> None:
        if call.result < 0:
            return
        handler = getattr(self, f"_do_{call.name}", None)
        if handler is None:
            self._refuse_unknown(call)
        else:
            handler(call)

    def _refuse_unknown(self, call: Call) -> None:
        """Fail if a call that this model does not know concerns the disk."""
        paths = [a for a in call.arguments if isinstance(a, bytes)]
        inside = any(os.fsencode(self._root_path) in path for path in paths)
        if inside or any(self._file(a) for a in call.arguments if isinstance(a, str)):
            raise NotImplementedError(f"the disk model does not know {call.name}")

    def _file(self, descriptor: str | bytes) -> _Open | None:
        return self._open.get(int(descriptor)) if str(descriptor).isdigit() else None

    def _place(self, base: str | bytes, path: str | bytes) -> tuple[Node, str] | None:
        """Return (folder, name) for a path below the root, else None."""
        text = os.fsdecode(path)
        if text.startswith("/"):
            pure = PurePosixPath(text)
            if not pure.is_relative_to(self._root_path) or pure == self._root_path:
                return None
            node, parts = self._root, pure.relative_to(self._root_path).parts
        else:
            opened = self._file(base)
            if opened is None:
                return None
            node, parts = opened.node, PurePosixPath(text).parts
        for part in parts[:-1]:
            node = node.entries[part]
        return node, parts[-1]

    def _event(self) -> int:
        self.events += 1
        return self.events

    def _name(self, keeper: Node, *names: tuple[Node, str, Node | None]) -> None:
        self._names.append(_Entry(self._event(), keeper, names))
        for folder, name, node in names:
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node

    def _do_openat(self, call: Call) -> None:
        base, path, flags = call.arguments[:3]
        if os.fsdecode(path) == str(self._root_path):
            self._open[call.result] = _Open(self._root)
            return
        place = self._place(base, path)
        if place is None:
            self._open.pop(call.result, None)
            return
        folder, name = place
        node = folder.entries.get(name)
        if node is None:
            node = Node(folder=False)
            self._name(folder, (folder, name, node))
        elif "O_TRUNC" in flags and node.size:
            self._truncate(node, 0)
        self._open[call.result] = _Open(node, append="O_APPEND" in flags)

    def _do_close(self, call: Call) -> None:
        self._open.pop(int(call.arguments[0]), None)

    def _do_lseek(self, call: Call) -> None:
        opened = self._file(call.arguments[0])
        if opened is not None:
            opened.position = call.result

    def _do_read(self, call: Call) -> None:
        opened = self._file(call.arguments[0])
        if opened is not None:
            opened.position += call.result

    def _do_write(self, call: Call) -> None:
        data = call.arguments[1]
        assert isinstance(data, bytes)
        if call.arguments[0] == "1":
            self.said += [(self.events, line) for line in data.decode().splitlines()]
            return
        opened = self._file(call.arguments[0])
        if opened is not None:
            at = opened.node.size if opened.append else opened.position
            self._write(opened.node, at, data[: call.result])
            opened.position = at + call.result

    def _do_pwrite64(self, call: Call) -> None:
        opened = self._file(call.arguments[0])
        data = call.arguments[1]
        assert isinstance(data, bytes)
        if opened is not None:
            self._write(opened.node, int(call.arguments[3]), data[: call.result])

    def _write(self, node: Node, at: int, data: bytes) -> None:
        node.changes.append(_Write(self._event(), node, at, data))
        node.size = max(node.size, at + len(data))

    def _truncate(self, node: Node, size: int) -> None:
        node.changes.append(_Truncate(self._event(), node, size))
        node.size = size

    def _do_ftruncate(self, call: Call) -> None:
        opened = self._file(call.arguments[0])
        if opened is not None:
            self._truncate(opened.node, int(call.arguments[1], 0))

    def _do_fsync(self, call: Call) -> None:
        opened = self._file(call.arguments[0])
        if opened is not None:
            opened.node.syncs.append(self._event())

    _do_fdatasync = _do_fsync

    def _do_mkdir(self, call: Call) -> None:
        place = self._place("", call.arguments[0])
        if place is not None:
            self._name(place[0], (*place, Node(folder=True)))

    def _do_unlink(self, call: Call) -> None:
        place = self._place("", call.arguments[0])
        if place is not None:
            self._name(place[0], (*place, None))

    _do_rmdir = _do_unlink

    def _do_unlinkat(self, call: Call) -> None:
        place = self._place(*call.arguments[:2])
        if place is not None:
            self._name(place[0], (*place, None))

    def _do_linkat(self, call: Call) -> None:
        old, new = self._place(*call.arguments[:2]), self._place(*call.arguments[2:4])
        if old is not None and new is not None:
            self._name(new[0], (*new, old[0].entries[old[1]]))

    def _do_link(self, call: Call) -> None:
        old, new = self._place("", call.arguments[0]), self._place("", call.arguments[1])
        if old is not None and new is not None:
            self._name(new[0], (*new, old[0].entries[old[1]]))

    def _do_rename(self, call: Call) -> None:
        self._rename(self._place("", call.arguments[0]), self._place("", call.arguments[1]))

    def _do_renameat(self, call: Call) -> None:
        self._rename(self._place(*call.arguments[:2]), self._place(*call.arguments[2:4]))

    _do_renameat2 = _do_renameat

    def _rename(self, old: tuple[Node, str] | None, new: tuple[Node, str] | None) -> None:
        if old is None and new is None:
            return
        if old is None or new is None:
            raise NotImplementedError("a rename into or out of the recorded folder")
        node = old[0].entries[old[1]]
        self._name(new[0], (*old, None), (*new, node))

    # ------------------------------------------------------------- after the cut

    def pending(self, cut: int) -> list[_Change]:
        """Return the changes before ``cut`` that no fsync before ``cut`` made durable."""
        nodes = {id(self._root): self._root}
        found: list[_Change] = []
        for entry in self._names:
            for _, _, node in entry.names:
                if node is not None:
                    nodes[id(node)] = node
            if entry.at < cut and not _durable(entry, cut):
                found.append(entry)
        changes = (change for node in nodes.values() for change in node.changes)
        found += [c for c in changes if c.at < cut and not _durable(c, cut)]
        return sorted(found, key=lambda change: change.at)

    def build(self, choice: Choice, target: Path) -> None:
        """Write the contents of one possible disk into the empty folder ``target``."""
        entries: dict[int, dict[str, Node]] = {}
        for entry in self._names:
            if entry.at >= choice.cut:
                break
            if _durable(entry, choice.cut) or choice.keep(entry):
                for folder, name, node in entry.names:
                    names = entries.setdefault(id(folder), {})
                    if node is None:
                        names.pop(name, None)
                    else:
                        names[name] = node
        self._build(self._root, entries, choice, target)

    def _build(
        self, folder: Node, entries: dict[int, dict[str, Node]], choice: Choice, target: Path
    ) -> None:
        for name, node in entries.get(id(folder), {}).items():
            if node.folder:
                (target / name).mkdir()
                self._build(node, entries, choice, target / name)
            elif not name.endswith("-shm"):
                (target / name).write_bytes(_content(node, choice))


def _durable(change: _Change, cut: int) -> bool:
    return any(change.at < sync < cut for sync in change.node.syncs)


def _content(node: Node, choice: Choice) -> bytes:
    data = bytearray()
    for change in node.changes:
        if change.at >= choice.cut:
            break
        durable = _durable(change, choice.cut)
        if not durable and not choice.keep(change):
            continue
        if isinstance(change, _Truncate):
            data[change.size :] = bytes(max(0, change.size - len(data)))
            continue
        end = change.offset + len(change.data)
        data.extend(bytes(max(0, end - len(data))))
        for at in range(change.offset, end, SECTOR):
            lost = not durable and choice.torn is not None and choice.torn.random() < 0.5
            if not lost:
                stop = min(end, at + SECTOR)
                data[at:stop] = change.data[at - change.offset : stop - change.offset]
    return bytes(data)
