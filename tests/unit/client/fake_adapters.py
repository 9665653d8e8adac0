"""A FAKE of the adapter service for client tests: names, revisions, aliases, history."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from typing import Any

import grpc
from veneer_proto.v1 import adapters_pb2, inference_pb2

from tests.unit.client.fake_uploads import FakeUploads, refused
from tests.unit.client.refusals import Refusal

STARTED = 1_700_000_000
ETAG = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "it has changed", "ETAG_MISMATCH")


def not_found(context: grpc.ServicerContext) -> None:
    Refusal(
        grpc.StatusCode.NOT_FOUND,
        "no such adapter",
        "ADAPTER_NOT_FOUND",
        {"did_you_mean": "chat"},
    ).end(context)


class FakeAdapters(FakeUploads):
    """State that tests set and read, in addition to `FakeUploads`."""

    hold: threading.Event | None
    begun: threading.Event
    cancelled: threading.Event
    break_after: Refusal | None

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, adapters_pb2.Adapter] = {}
        """Current revision of each name."""
        self.older: dict[str, list[adapters_pb2.Adapter]] = {}
        """Superseded revisions that each name keeps, newest first."""
        self.aliases: dict[str, list[adapters_pb2.Alias]] = {}
        """Each alias's states, the present one last."""
        self.changes: list[adapters_pb2.HistoryEntry] = []
        """Newest first."""
        self.budgets = adapters_pb2.UpdateBudgetsResponse(
            host_cache_bytes=4096, device_adapter_bytes=2048, host_bytes=1024, device_bytes=4096
        )
        self.wrong: set[str] = set()
        """Adapters that fail the self-test."""
        self.self_test_note = ""
        """Why no adapter is tested although there are some."""
        self.tier = inference_pb2.TIER_DISK
        self.lost: Refusal | None = None
        """Error of a call that did pin an adapter."""
        # For watches: the events of each call, first call first.
        self.watches: deque[list[adapters_pb2.WatchAdaptersResponse]] = deque()
        self.download: Any = None
        """Answers downloads, as a gRPC method does."""
        self._number = 0

    def has(self, name: str) -> bool:
        return name in self.adapters

    def add(self, name: str) -> adapters_pb2.Adapter:
        """Register an adapter without an upload, replacing the name's present one."""
        digest = (name.encode().hex() * 64)[:64]
        adapter = adapters_pb2.Adapter(
            name=name,
            revision=digest,
            weights_digest=digest[::-1],
            base_model="fake-base",
            rank=4,
            targets=["q_proj"],
            parameters=100,
            bytes=200,
            disk_bytes=3 << 20,
            tier=self.tier,
            current=True,
            etag="e1",
            state=adapters_pb2.ADAPTER_STATE_READY,
            retain=2,
        )
        adapter.created.FromSeconds(STARTED)
        self.adapters[name] = adapter
        return adapter

    def replace(self, name: str) -> adapters_pb2.Adapter:
        """Register another revision of a name, and keep the previous one."""
        before = self.adapters[name]
        before.current = False
        self.older.setdefault(name, []).insert(0, before)
        adapter = self.add(name)
        self._number += 1
        adapter.revision = hashlib.sha256(f"{name} {self._number}".encode()).hexdigest()
        adapter.created.FromSeconds(STARTED + self._number)
        self._new_etag(name)
        return adapter

    def _new_etag(self, name: str) -> None:
        self._number += 1
        for adapter in self._revisions(name):
            adapter.etag = f"e{self._number}"

    def _revisions(self, name: str) -> list[adapters_pb2.Adapter]:
        found = [self.adapters[name], *self.older.get(name, [])]
        return sorted(found, key=lambda one: one.created.seconds, reverse=True)

    def _find(self, spec: str, context: grpc.ServicerContext) -> adapters_pb2.Adapter:
        if "/" in spec and spec in self.aliases:
            target = self.aliases[spec][-1].targets[0]
            spec = f"{spec.partition('/')[0]}@{target.revision}"
        name, at, revision = spec.partition("@")
        if name in self.adapters:
            known = self._revisions(name) if at else [self.adapters[name]]
            for adapter in known:
                if adapter.revision.startswith(revision):
                    return adapter
        not_found(context)
        raise AssertionError("not_found raises")

    def _changed(self, event: str, adapter: adapters_pb2.Adapter, detail: str = "") -> None:
        entry = adapters_pb2.HistoryEntry(
            event=event,
            name=adapter.name,
            revision=adapter.revision,
            actor="ada@desk",
            peer="ipv4:127.0.0.1:1",
            detail=detail,
        )
        entry.time.FromSeconds(STARTED + len(self.changes))
        self.changes.insert(0, entry)

    def GetAdapter(self, request, context):  # noqa: N802
        self.note("GetAdapter", request, context)
        adapter = self._find(request.name, context)
        return adapters_pb2.GetAdapterResponse(
            adapter=adapter, revisions=self._revisions(adapter.name)
        )

    def ListAdapters(self, request, context):  # noqa: N802
        self.note("ListAdapters", request, context)
        names = sorted(n for n in self.adapters if n.startswith(request.name_prefix))
        found, token = _page([self.adapters[name] for name in names], request)
        return adapters_pb2.ListAdaptersResponse(adapters=found, next_page_token=token)

    def ActivateAdapter(self, request, context):  # noqa: N802
        self.note("ActivateAdapter", request, context)
        adapter = self._find(request.name, context)
        adapter.tier, adapter.pinned = request.tier, request.pin
        return adapters_pb2.ActivateAdapterResponse(adapter=adapter)

    def UpdateAdapter(self, request, context):  # noqa: N802
        self.note("UpdateAdapter", request, context)
        adapter = self._find(request.name, context)
        if request.etag and request.etag != adapter.etag:
            ETAG.end(context)
        if request.HasField("pinned"):
            adapter.pinned = request.pinned
            if self.hold is not None and request.pinned:
                self.begun.set()
                self.hold.wait()
            if self.lost is not None and request.pinned:
                self.lost.end(context)
        if request.labels or request.remove_labels:
            adapter.labels.update(request.labels)
            for key in request.remove_labels:
                adapter.labels.pop(key, None)
            self._changed("labels", adapter)
        if request.HasField("retain"):
            adapter.retain = request.retain
            self._changed("retention", adapter)
        if request.HasField("shared"):
            adapter.shared = request.shared
            self._changed("shared" if request.shared else "unshared", adapter)
        if request.current and not adapter.current:
            name = adapter.name
            kept = [one for one in self._revisions(name) if one is not adapter]
            for one in kept:
                one.current = False
            self.adapters[name], self.older[name], adapter.current = adapter, kept, True
            self._new_etag(name)
            self._changed("made_current", adapter)
        return adapters_pb2.UpdateAdapterResponse(adapter=adapter)

    def EvictAdapter(self, request, context):  # noqa: N802
        self.note("EvictAdapter", request, context)
        return adapters_pb2.EvictAdapterResponse(evicted=True, freed_bytes=200)

    def DeleteAdapter(self, request, context):  # noqa: N802
        self.note("DeleteAdapter", request, context)
        gone = self.adapters.pop(request.name)
        return adapters_pb2.DeleteAdapterResponse(revisions=[gone.revision])

    def SetAlias(self, request, context):  # noqa: N802
        self.note("SetAlias", request, context)
        name = request.alias.partition("/")[0]
        meanings = self.aliases.setdefault(request.alias, [])
        previous = list(meanings[-1].targets) if meanings else []
        if request.etag and (not meanings or request.etag != meanings[-1].etag):
            ETAG.end(context)
        targets = list(request.targets)
        if request.revision:
            targets = [adapters_pb2.AliasTarget(revision=request.revision, weight=1)]
        for target in targets:
            if len(target.revision) < 12:
                refused("INVALID_FIELD", "give 12 digits or more", "revision").end(context)
            target.revision = self._find(f"{name}@{target.revision}", context).revision
        if request.rollback:
            if len(meanings) < 2:
                not_found(context)
            targets = list(meanings[-2].targets)
        alias = adapters_pb2.Alias(
            alias=request.alias, targets=targets, etag=f"a{len(meanings) + 1}"
        )
        alias.updated.FromSeconds(STARTED)
        if request.remove:
            del self.aliases[request.alias]
        else:
            meanings.append(alias)
        return adapters_pb2.SetAliasResponse(alias=alias, previous=previous)

    def ListAliases(self, request, context):  # noqa: N802
        self.note("ListAliases", request, context)
        return adapters_pb2.ListAliasesResponse(
            aliases=[
                meanings[-1]
                for alias, meanings in sorted(self.aliases.items())
                if request.name in ("", alias.partition("/")[0])
            ]
        )

    def GetHistory(self, request, context):  # noqa: N802
        self.note("GetHistory", request, context)
        changes = [one for one in self.changes if request.name in ("", one.name)]
        found, token = _page(changes, request)
        return adapters_pb2.GetHistoryResponse(entries=found, next_page_token=token)

    def UpdateBudgets(self, request, context):  # noqa: N802
        self.note("UpdateBudgets", request, context)
        for name in ("host_cache_bytes", "device_adapter_bytes"):
            if request.HasField(name):
                setattr(self.budgets, name, getattr(request, name))
        return self.budgets

    def SelfTest(self, request, context):  # noqa: N802
        self.note("SelfTest", request, context)
        found = [self._find(name, context) for name in request.adapters]
        results = [
            adapters_pb2.SelfTestResult(
                adapter=name,
                passed=name.partition("@")[0] not in self.wrong,
                max_difference=0.5 if name.partition("@")[0] in self.wrong else 0.001,
                bound=0.01,
                nearest_other=2.5,
                detail="answers as chat does" if name.partition("@")[0] in self.wrong else "",
            )
            for name in ["", *(f"{one.name}@{one.revision}" for one in found)]
        ]
        return adapters_pb2.SelfTestResponse(
            passed=all(result.passed for result in results) and not self.self_test_note,
            results=results,
            adapters_mixed=len(found),
            note=self.self_test_note,
        )

    def DownloadAdapter(self, request, context):  # noqa: N802
        self.note("DownloadAdapter", request, context)
        return self.download(request, context)

    def WatchAdapters(self, request, context):  # noqa: N802
        self.note("WatchAdapters", request, context)
        context.add_callback(self.cancelled.set)
        yield from self.watches.popleft()
        if self.break_after is not None:
            broken, self.break_after = self.break_after, None
            broken.end(context)
        if self.hold is not None:
            self.hold.wait()


def _page(items: list[Any], request: Any) -> tuple[list[Any], str]:
    """One page, and the token of the next."""
    start = int(request.page_token or 0)
    end = start + (request.page_size or 100)
    return items[start:end], str(end) if end < len(items) else ""
