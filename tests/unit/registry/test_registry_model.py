"""The registry against a dictionary: any sequence of operations, restarts included."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from veneer_registry.bundle_files import TEMPLATE_FILE
from veneer_registry.errors import (
    AdapterExists,
    AdapterNotFound,
    EtagMismatch,
    FailedPrecondition,
)
from veneer_registry.lease import RevisionLease
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights

from tests.unit.registry.kit import BASE, make_adapter, make_tensors, push

NAMES = st.sampled_from(["a", "b", "c"])
CONTENTS = st.integers(0, 4)
RETAIN = 1


class RegistryMachine(RuleBasedStateMachine):
    """``model`` maps a name to contents, newest (current) first."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="veneer-test-"))
        self.registry = Registry.open(self.root / "data", BASE, retain_superseded=RETAIN)
        self.model: dict[str, list[int]] = {}
        self.etags: set[str] = set()
        self.held: list[RevisionLease] = []
        self.refs: dict[int, tuple[str, str]] = {}

    @initialize()
    def make_contents(self) -> None:
        # Contents 3 and 4 have the weights of 0 and 1 and a template: shared weights.
        for number in range(5):
            tensors = make_tensors(4, seed=number % 3, layers=[0], projections=["q_proj"])
            folder = make_adapter(self.root / str(number), tensors=tensors)
            if number > 2:
                (folder / TEMPLATE_FILE).write_text("{{ x }}")

    @rule(name=NAMES, content=CONTENTS, allow=st.booleans())
    def publish(self, name: str, content: int, allow: bool) -> None:
        kept = self.model.get(name, [])
        if kept and kept[0] != content and not allow:
            with pytest.raises(AdapterExists):
                push(self.registry, name, self.root / str(content))
            return
        published = push(self.registry, name, self.root / str(content), allow_replace=allow)
        ref = published.record.ref
        same = kept[:1] == [content]
        assert published.published == (not same)
        assert published.replaced == (bool(kept) and not same)
        if not same:
            assert published.record.etag not in self.etags
        self.etags.add(published.record.etag)
        self.refs.setdefault(content, (ref.revision, ref.weights_digest))
        assert self.refs[content] == (ref.revision, ref.weights_digest)
        if not same:
            others = [other for other in kept if other != content]
            self.model[name] = [content, *others[:RETAIN]]

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(AdapterNotFound):
                self.registry.delete(name)
            return
        gone = self.registry.delete(name, self.registry.get(name).etag)
        assert list(gone) == [self.refs[content][0] for content in self.model.pop(name)]

    @rule(name=NAMES, content=CONTENTS)
    def delete_revision(self, name: str, content: int) -> None:
        kept = self.model.get(name, [])
        if content not in self.refs:
            return
        spec = f"{name}@{self.refs[content][0][:12]}"
        if content not in kept:
            with pytest.raises(AdapterNotFound):
                self.registry.delete(spec)
        elif kept[0] == content and len(kept) > 1:
            with pytest.raises(FailedPrecondition):
                self.registry.delete(spec)
        else:
            with pytest.raises(EtagMismatch):
                self.registry.delete(spec, "stale")
            assert self.registry.delete(spec) == (self.refs[content][0],)
            kept.remove(content)
            if not kept:
                del self.model[name]

    @rule(target=leases, name=NAMES)
    def acquire(self, name: str) -> RevisionLease | None:
        if name not in self.model:
            with pytest.raises(AdapterNotFound):
                self.registry.acquire(name)
            return None
        lease = self.registry.acquire(name)
        assert lease.ref.revision == self.refs[self.model[name][0]][0]
        assert lease.record.current
        self.held.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: RevisionLease | None) -> None:
        if lease is not None:
            lease.release()
            if lease in self.held:
                self.held.remove(lease)

    @rule()
    def sweep(self) -> None:
        self.registry.sweep()
        assert not self.registry.needs_sweep

    @rule()
    def reopen(self) -> None:
        self.registry.close()
        self.held.clear()
        self.registry = Registry.open(self.root / "data", BASE, retain_superseded=RETAIN)

    @invariant()
    def names_mean_what_the_model_says(self) -> None:
        listed = [record.ref.name for record in self.registry.list()]
        assert listed == sorted(self.model)
        assert len(self.registry) == len(self.model)
        for name, kept in self.model.items():
            records = self.registry.revisions(name)
            assert [r.ref.revision for r in records] == [self.refs[c][0] for c in kept]
            assert [r.current for r in records] == [True] + [False] * (len(kept) - 1)
            assert self.registry.get(name) == records[0]

    @invariant()
    def needed_content_is_whole_and_nothing_else_stays(self) -> None:
        named = [self.refs[content] for kept in self.model.values() for content in kept]
        leased = [(lease.ref.revision, lease.ref.weights_digest) for lease in self.held]
        needed = set(named) | set(leased)
        store = self.root / "data" / "store"
        on_disk = set(os.listdir(store / "weights"))
        assert on_disk >= {digest for _, digest in needed}
        for digest in {digest for _, digest in needed}:
            verify_weights(store / "weights" / digest, digest)
            holders = sum(lease.ref.weights_digest == digest for lease in self.held)
            assert self.registry.leases(digest) == holders
        if not self.registry.needs_sweep:
            assert on_disk == {digest for _, digest in needed}
            assert set(os.listdir(store / "revisions")) == {revision for revision, _ in needed}
        assert os.listdir(store / "staging") == []

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.root)


RegistryMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    print_blob=True,  # what reproduces a failure
    suppress_health_check=[HealthCheck.too_slow],
)
TestRegistryModel = RegistryMachine.TestCase
