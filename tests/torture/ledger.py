"""The expected state of a registered name after each change: a model in plain Python, for rows
3 and 7.

It uses no code of the registry. A content is a number; `Name` tracks which contents a name
keeps and where its aliases point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

View = Mapping[str, Any]
"""A caller's view of a name: kept contents, newest first; the current content; labels by
content; targets by alias; retention."""


@dataclass(frozen=True, slots=True)
class Alias:
    """(content, weight) pairs now and before the last move."""

    targets: tuple[tuple[int, int], ...]
    previous: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Name:
    """A name's state; a name without `kept` is not registered.

    Attributes:
        kept: contents, newest first.
        default_retain: the server's setting for superseded revisions.
    """

    default_retain: int
    kept: tuple[int, ...] = ()
    current: int = -1
    retain: int | None = None
    labels: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)

    @property
    def view(self) -> View:
        if not self.kept:
            return {"kept": ()}
        return {
            "kept": self.kept,
            "current": self.current,
            "labels": {content: dict(self.labels[content]) for content in self.kept},
            "aliases": {name: alias.targets for name, alias in self.aliases.items()},
            "retain": self.default_retain if self.retain is None else self.retain,
        }

    def forgotten(self) -> Name:
        return Name(self.default_retain)

    def publish(self, content: int, labels: Mapping[str, str]) -> Name:
        """Return the state after a publish, before superseded revisions are dropped."""
        if self.kept and self.current == content:
            return self
        return replace(
            self,
            kept=(content, *(c for c in self.kept if c != content)),
            current=content,
            labels={**self.labels, content: dict(labels)},
        )

    def trimmed(self) -> Name:
        """Return the state without superseded contents beyond the retention, except targets of
        aliases, present or previous."""
        retain = self.default_retain if self.retain is None else self.retain
        safe = {c for a in self.aliases.values() for c, _ in (*a.targets, *a.previous)}
        superseded = [c for c in self.kept if c != self.current]
        dropped = {c for c in superseded[retain:] if c not in safe}
        return self._without(dropped)

    def retaining(self, retain: int) -> Name:
        """Return the state with another retention, without contents beyond it."""
        return replace(self, retain=retain).trimmed()

    def made_current(self, content: int) -> Name:
        return replace(self, current=content)

    def _without(self, dropped: set[int]) -> Name:
        return replace(
            self,
            kept=tuple(c for c in self.kept if c not in dropped),
            labels={c: labels for c, labels in self.labels.items() if c not in dropped},
        )

    def delete(self, content: int) -> Name:
        """Return the state without a content, which must be the last one, or neither current
        nor a target of an alias."""
        if self.kept == (content,):
            return self.forgotten()
        aliases = {
            name: replace(alias, previous=())
            if any(c == content for c, _ in alias.previous)
            else alias
            for name, alias in self.aliases.items()
        }
        return replace(self._without({content}), aliases=aliases)

    def deletable(self) -> list[int]:
        meant = {c for a in self.aliases.values() for c, _ in a.targets}
        if len(self.kept) == 1:
            return list(self.kept)
        return [c for c in self.kept if c != self.current and c not in meant]

    def move_alias(self, name: str, targets: tuple[tuple[int, int], ...]) -> Name:
        old = self.aliases.get(name)
        if old is not None and old.targets == targets:
            return self
        moved = Alias(targets, old.targets if old is not None else ())
        return replace(self, aliases={**self.aliases, name: moved})

    def remove_alias(self, name: str) -> Name:
        rest = {other: alias for other, alias in self.aliases.items() if other != name}
        return replace(self, aliases=rest)

    def relabel(self, content: int, labels: Mapping[str, str]) -> Name:
        wanted = {**self.labels[content], **labels}
        return replace(self, labels={**self.labels, content: wanted})
