"""Random histories of registry and adapter memory together, connected as in the front process:
requests lease a revision and wait for its weights, loads read from the store, a delete frees
memory, and damage found by a load leads to quarantine. For row 7."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import AdapterCorrupt
from veneer_registry.lease import RevisionLease
from veneer_registry.stored_adapter import verify_weights
from veneer_server.wire.messages import AdapterSource

from tests.torture.ledger import Name
from tests.torture.memory_model import Memory, Request
from tests.torture.registry_rules import (
    ALIASES,
    CONTENTS,
    SOME_NAME,
    SOMETIMES,
    WHICH,
    RegistryRules,
    contents,
)

SIZE = 64
"""Bytes of the smallest adapter in memory; the largest takes five times as many."""
BUDGETS = st.sampled_from([5 * SIZE, 7 * SIZE, 12 * SIZE])
LOWERED = st.sampled_from([None, None, 4 * SIZE, 7 * SIZE, 12 * SIZE])


class StoreAndMemory(RegistryRules):
    """The histories; see the module docstring."""

    pool = "abcde"
    memory: Memory

    @initialize(host=BUDGETS, device=BUDGETS, shared=st.booleans())
    def begin_memory(self, host: int, device: int, shared: bool) -> None:
        self.memory = self._memory(host, device, shared)
        for number, name in enumerate(self.pool):
            self.push(name, number, False, False)

    def _memory(self, host: int, device: int, shared: bool) -> Memory:
        memory = Memory(host, device, shared=shared)
        self.operators: dict[str, RevisionLease] = {}
        """Leases that keep files during an activation, by digest."""
        return memory

    def source(self, ref: AdapterRef) -> AdapterSource:
        (size,) = {c.parameters for c in contents() if c.weights == ref.weights_digest}
        folder = str(self.registry.weights_folder(ref))
        return AdapterSource(ref.weights_digest, folder, size, ref.short)

    # --------------------------------------------------------------------- requests

    @rule(which_name=SOME_NAME, alias=st.none() | ALIASES, key=st.sampled_from(["", "k"]))
    def ask(self, which_name: int, alias: str | None, key: str) -> None:
        name = self.some(which_name)
        if alias is not None and alias not in self.name(name).aliases:
            alias = None
        lease = self.take_lease(name, alias, key)
        if lease is None:
            return
        found = self.memory.ask(self.source(lease.ref), lambda: self.end_lease(lease))
        if found is None:
            self.end_lease(lease)

    @rule(which_names=st.lists(SOME_NAME, min_size=1, max_size=3), loads=st.integers(0, 6))
    def turn(self, which_names: list[int], loads: int) -> None:
        """Requests arrive, loads end, ready requests start; the oldest running one ends."""
        for which in which_names:
            self.ask(which, None, "")
        self.plan(None)
        for _ in range(loads):
            if self.memory.coming:
                self._arrive(0)
            else:
                self.plan(2)
        self._operators_done()
        running = [request for request in self.memory.requests if request.running]
        for request in list(self.memory.requests):
            if not request.running:
                self.seen["started"] += self.memory.start(request)
        for request in running[:2]:
            self.memory.finish(request)

    @precondition(lambda self: self.memory.requests)
    @rule(which=WHICH)
    def start(self, which: int) -> None:
        waiting = [r for r in self.memory.requests if not r.running]
        if waiting:
            self.seen["started"] += self.memory.start(waiting[which % len(waiting)])

    @precondition(lambda self: self.memory.requests)
    @rule(which=WHICH)
    def end(self, which: int) -> None:
        self.memory.finish(self._request(which))

    def _request(self, which: int) -> Request:
        return self.memory.requests[which % len(self.memory.requests)]

    @rule(near=st.none() | st.integers(1, 3))
    def plan(self, near: int | None) -> None:
        self.memory.plan(near)
        self._operators_done()

    @precondition(lambda self: self.memory.coming)
    @rule(which=WHICH, all_of_them=st.booleans(), broken=SOMETIMES)
    def arrive(self, which: int, all_of_them: bool, broken: bool) -> None:
        while self.memory.coming:
            self._arrive(which % len(self.memory.coming), broken)
            if not all_of_them:
                break
        self._operators_done()

    def _arrive(self, index: int, broken: bool = False) -> None:
        """Handle a worker that has read an adapter from the store, or copied it to DEVICE."""
        digest, tier = self.memory.coming[index]
        if tier == "host" and self._is_there(digest):
            folder = self.registry.weights_folder(AdapterRef("", "", digest))
            try:
                verify_weights(folder, digest)
                assert digest not in self.rotten, "damage was loaded"
            except AdapterCorrupt:
                known = digest in self.rotten or digest in self.quarantined
                assert known, "a load finds its files gone or damaged"
                self.memory.fail(digest)
                if digest in self.rotten:
                    self.quarantine(digest)
                return
        if broken and tier == "device" and not self.memory.shared:
            self.memory.find_place(index)
        elif broken:
            self.memory.fail(digest)
        else:
            self.memory.arrive(index)
            self.seen["loaded"] += tier == "host"

    def _is_there(self, digest: str) -> bool:
        """Return whether the weights are still needed: a delete may leave a load running that
        nobody waits for."""
        return bool(self.memory.leases(digest)) or digest in self.operators

    # --------------------------------------------------------------------- operators

    @precondition(lambda self: self.names)
    @rule(
        which_name=SOME_NAME,
        which=WHICH,
        tier=st.sampled_from(["host", "device"]),
        pin=st.booleans(),
    )
    def activate(self, which_name: int, which: int, tier: Any, pin: bool) -> None:
        name = self.some(which_name)
        if not (kept := self.name(name).kept):
            return
        number = kept[which % len(kept)]
        if contents()[number].weights in self.quarantined:
            return
        lease = self.registry.acquire(self.spec(name, number))
        self.leases.append(lease)
        digest = lease.ref.weights_digest
        taken = self.memory.activate(self.source(lease.ref), tier, pin=pin)
        self.seen["pinned"] += pin and taken
        if taken and digest in self.memory.wanted and digest not in self.operators:
            self.operators[digest] = lease
        else:
            self.end_lease(lease)

    def _operators_done(self) -> None:
        for digest in [d for d in self.operators if d not in self.memory.wanted]:
            self.end_lease(self.operators.pop(digest))

    @precondition(lambda self: self.memory.sizes)
    @rule(
        which=WHICH,
        mode=st.sampled_from(["drain", "fail_if_busy", "abort"]),
        unpin=st.booleans(),
    )
    def evict(self, which: int, mode: str, unpin: bool) -> None:
        self.memory.evict(self._digest(which), mode, unpin=unpin)
        self._operators_done()

    @precondition(lambda self: self.memory.pins)
    @rule(which=WHICH)
    def unpin(self, which: int) -> None:
        pins = sorted(self.memory.pins)
        self.memory.unpin(pins[which % len(pins)])

    def _digest(self, which: int) -> str:
        digests = sorted(self.memory.sizes)
        return digests[which % len(digests)]

    @rule(host=LOWERED, device=LOWERED)
    def set_budgets(self, host: int | None, device: int | None) -> None:
        self.memory.set_budgets(host, device)

    # ------------------------------------------------------- what the registry tells

    def end_lease(self, lease: RevisionLease) -> None:
        """End a lease that no request holds; leases of requests end in `Memory.finish`."""
        if lease in self.leases:
            super().end_lease(lease)

    @rule(name=st.sampled_from(pool), number=CONTENTS, resume=st.booleans(), unready=SOMETIMES)
    def push(self, name: str, number: int, resume: bool, unready: bool) -> None:
        super().push(name, number, resume, unready)

    def push_at_once(self, *arguments: Any) -> None:
        super().push_at_once(*arguments)

    # These are not rules here: requests take and release leases, and `push` does whole uploads.

    def lease(self, *arguments: Any) -> None:
        super().lease(*arguments)

    def release(self, *arguments: Any) -> None:
        super().release(*arguments)

    def begin(self, *arguments: Any) -> None:
        super().begin(*arguments)

    def publish(self, *arguments: Any) -> None:
        super().publish(*arguments)

    def committed(self, *arguments: Any) -> None:
        super().committed(*arguments)

    def gone(self, numbers: list[int]) -> None:
        """Free the memory of contents that no name keeps, even if pinned, as
        `AdapterService._removed` does."""
        for number in numbers:
            digest = contents()[number].weights
            if not self.held(number) and digest in self.memory.sizes:
                assert not self.registry.holding(digest)
                self.memory.evict(digest, "forget", unpin=True)
        self._operators_done()

    def replaced(self, name: str, before: Name, after: Name) -> None:
        """Move a pin to the name's new revision, as `Replacing` does."""
        if not before.kept or before.current == after.current:
            return
        old, new = contents()[before.current].weights, contents()[after.current].weights
        tier = self.memory.pins.get(old)
        if tier is None or old == new:
            return
        self.memory.unpin(old)
        self.memory.activate(
            self.source(self.ref(name, after.current)),
            tier,  # type: ignore[arg-type]
            pin=True,
        )

    def reopen(self) -> None:
        """Restart: memory is empty, and pinned adapters are restored first."""
        memory = self.memory
        budgets, pins = dict(memory.budgets), dict(memory.pins)
        super().reopen()
        self.memory = self._memory(budgets["host"], budgets["device"], memory.shared)
        for digest, tier in pins.items():
            for ref in (r.ref for r in self.registry.holding(digest)[:1]):
                if digest not in self.quarantined:
                    self.memory.activate(self.source(ref), tier, pin=True)  # type: ignore[arg-type]

    # -------------------------------------------------------------------- invariants

    @invariant()
    def memory_is_as_told(self) -> None:
        if hasattr(self, "memory"):
            self.memory.check()
            self.seen.update(self.memory.seen)
            self.memory.seen.clear()

    def teardown(self) -> None:
        try:
            if not sys.exc_info()[0] and hasattr(self, "memory"):
                self.rotten.clear()
                self.memory.settle()
                assert not self.memory.requests
        finally:
            super().teardown()
