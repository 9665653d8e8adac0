"""Planted bugs that mix up adapters: context managers that patch the product.

`PLANTED` lists them. They are used in this process, or in a server's engine process by
``python -m tests.torture.planted_server``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest.mock import patch

import torch
from veneer_registry import index
from veneer_registry.registry import Registry
from veneer_server.adapters.loaders import HostCopy, Loaders
from veneer_server.adapters.memory import LoraMemory
from veneer_server.engine.execution import model_runner
from veneer_server.engine.execution.exact import ExactRunner
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling import block_manager, prefix_cache
from veneer_server.serving import generation
from veneer_server.serving.records import Provenance
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.inbox import Arrived
from veneer_server.step.plan import SequenceResult, StepPlan
from veneer_server.wire.messages import AdapterSource

from tests.planted import planted


def _name(source: AdapterSource) -> str:
    return source.name.partition("@")[0]


@contextmanager
def _tables_by_name() -> Iterator[None]:
    """Memory is keyed by name, so a name keeps its first weights."""
    with _at_admission(lambda tables, mine, new: tables[mine[0]] if mine else new):
        yield


@contextmanager
def _replace_under_running() -> Iterator[None]:
    """A replaced name's new table replaces the old one, even for running sequences."""

    def put(tables: dict[str, AdapterTable], mine: list[str], new: AdapterTable) -> Any:
        tables.update(dict.fromkeys(mine, new))
        return new

    with _at_admission(put):
        yield


@contextmanager
def _at_admission(
    choose: Callable[[dict[str, AdapterTable], list[str], AdapterTable], AdapterTable],
) -> Iterator[None]:
    """Let ``choose`` pick the table for a digest, given all tables, the resident digests of
    other revisions of the same name, and the new table."""
    names: dict[str, str] = {}
    load, admit = LoraMemory.load, LoraMemory.admit

    def loading(self: LoraMemory, source: AdapterSource) -> None:
        names[source.weights_digest] = _name(source)
        load(self, source)

    def admitting(self: LoraMemory, arrived: Arrived) -> None:
        admit(self, arrived)
        digest = arrived.weights_digest
        if arrived.tier == "device":
            mine = [d for d in self.tables if d != digest and names[d] == names[digest]]
            self.tables[digest] = choose(self.tables, mine, self.tables[digest])

    with (
        patch.object(LoraMemory, "load", loading),
        patch.object(LoraMemory, "admit", admitting),
    ):
        yield


@contextmanager
def _recycled_memory() -> Iterator[None]:
    """A table's numbers are overwritten once it leaves DEVICE, although HOST shares them."""
    spare: dict[int, torch.Tensor] = {}
    drop, read = LoraMemory.drop, Loaders.read

    def dropping(self: LoraMemory, digest: str, tier: str) -> None:
        if tier == "device":
            run = self.tables[digest].run
            spare[run.numel()] = run
        drop(self, digest, tier)

    def read_again(self: Loaders, source: AdapterSource) -> tuple[HostCopy, dict[str, float]]:
        copy, stages = read(self, source)
        run = spare.pop(copy.run.numel(), None)
        if run is None:
            return copy, stages
        run.copy_(copy.run)
        return HostCopy(copy.layout, run), stages

    with (
        patch.object(LoraMemory, "drop", dropping),
        patch.object(Loaders, "read", read_again),
    ):
        yield


def _segments_shifted() -> AbstractContextManager[None]:
    """In a step with several adapters, each gets the table of the next."""
    return planted(
        model_runner,
        "    return tuple(segments)\n",
        "    tables = [segment.table for segment in segments]\n"
        "    turned = zip(segments, tables[1:] + tables[:1], strict=True)\n"
        "    return tuple(Segment(s.begin, s.end, table) for s, table in turned)\n",
    )


def _prefixes_without_weights() -> AbstractContextManager[None]:
    """The prefix cache's keys do not contain the weights digest."""
    return planted(prefix_cache, "else _root(scope, digest)", "else _root(scope, None)")


@contextmanager
def _holds_ignored() -> Iterator[None]:
    """A hold is released at once, so that adapters of running sequences can be evicted."""
    hold, unhold = Residency.try_hold, Residency.unhold

    def holding(self: Residency, digest: str) -> bool:
        held = hold(self, digest)
        if held:
            unhold(self, digest)
        return held

    with (
        patch.object(Residency, "try_hold", holding),
        patch.object(Residency, "unhold", lambda self, digest: None),
    ):
        yield


@contextmanager
def _late_name() -> Iterator[None]:
    """An answer names the revision that is current when it ends."""
    acquire, right = Registry.acquire, generation.replace
    registries: list[Registry] = []

    def acquiring(self: Registry, *args: Any) -> Any:
        registries[:] = [self]
        return acquire(self, *args)

    def late(provenance: Provenance, **fields: Any) -> Provenance:
        if provenance.adapter:
            ref = registries[0].resolve(provenance.adapter)
            fields |= {"revision": ref.revision, "weights_digest": ref.weights_digest}
        return right(provenance, **fields)

    with (
        patch.object(Registry, "acquire", acquiring),
        patch.object(generation, "replace", late),
    ):
        yield


@contextmanager
def _alias_unread() -> Iterator[None]:
    """An alias resolves to its name's current revision."""
    with patch.object(index, "by_alias", lambda name, entry, alias, key: entry.current):
        yield


@contextmanager
def one_adapter_scaled(digest: str, factor: float) -> Iterator[None]:
    """The loader gives one adapter's modules a wrong scaling."""
    right = Loaders.read

    def read_scaled(self: Loaders, source: AdapterSource) -> tuple[HostCopy, dict[str, float]]:
        copy, stages = right(self, source)
        if source.weights_digest != digest:
            return copy, stages
        slots = tuple(
            replace(slot, module=replace(slot.module, scaling=slot.module.scaling * factor))
            for slot in copy.layout.slots
        )
        return HostCopy(replace(copy.layout, slots=slots), copy.run), stages

    with patch.object(Loaders, "read", read_scaled):
        yield


def two_exchanged(one: str, other: str) -> AbstractContextManager[None]:
    """The runner swaps the tables of two adapters."""
    turned = {one: other, other: one}
    digest = "sequence.digest"
    return planted(
        model_runner,
        f"tables[{digest}])",
        f"tables.get({turned!r}.get({digest}, {digest}), tables[{digest}]))",
    )


def prefixes_by_name() -> AbstractContextManager[None]:
    """The prefix cache's keys contain the adapter's name instead of its weights."""
    name = 'sequence.adapter.name.partition("@")[0] if sequence.adapter else None'
    return planted(block_manager, "digest=sequence.digest,", f"digest={name},")


def prefixes_without_scope() -> AbstractContextManager[None]:
    """The prefix cache's keys do not contain the isolation scope."""
    return planted(prefix_cache, "else _root(scope, digest)", 'else _root("", digest)')


@contextmanager
def not_exact() -> Iterator[None]:
    """Exact mode computes the sequences of a step together."""

    def execute(self: ExactRunner, plan: StepPlan) -> tuple[SequenceResult, ...]:
        return self._runner.execute(plan)

    with patch.object(ExactRunner, "execute", execute):
        yield


@dataclass(frozen=True, slots=True)
class Planted:
    """A planted bug.

    Attributes:
        engine: whether the bug is in the engine process, not in the front.
        tight: whether it shows only if memory is scarce; other bugs show if the old and new
            tables of a name are resident together.
    """

    bug: Callable[[], AbstractContextManager[None]]
    tight: bool = False
    engine: bool = True


PLANTED: Final[Mapping[str, Planted]] = {
    "tables keyed by name": Planted(_tables_by_name),
    "a replace swaps the table under a running sequence": Planted(_replace_under_running),
    "segments get their neighbour's table": Planted(_segments_shifted),
    "prefix cache keyed without the weights": Planted(_prefixes_without_weights),
    "memory recycled while another tier shares it": Planted(_recycled_memory, tight=True),
    "a drop of what a running sequence holds": Planted(_holds_ignored, tight=True),
    "the answer names the revision of its end": Planted(_late_name, engine=False),
    "an alias means what its name means": Planted(_alias_unread, engine=False),
}
