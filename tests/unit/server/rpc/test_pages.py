"""Pages of listings stay below gRPC's default receive limit of 4 MiB, however large the entries
are, and the token resumes where the page ended."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc
from veneer_registry.integrity import add_functions

from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = 2000
LABELS = {f"key-{n:02}": "é" * 255 + chr(33 + n) for n in range(64)}
"""The most that an adapter may carry."""
GRPC_DEFAULT = 4 << 20
DIGESTED = {
    "names": "name, current, generation, retain",
    "revisions": "name, revision, weights, base, created, labels, bytes, sequence, "
    "manifest_sha256",
    "aliases": "name, alias, targets, previous, generation, updated",
    "history": "time, name, event, revision, actor, peer, detail",
}
"""What the digest of a row is of, by table."""


def multiply(catalog: Path) -> None:
    """Give one adapter 1,999 more names, its name 200 more revisions, each as many labels
    and lines of history. Uploading them would take minutes."""
    labels = json.dumps(LABELS)
    with contextlib.closing(sqlite3.connect(catalog)) as db, db:
        add_functions(db)
        ((name, revision),) = db.execute("SELECT name, current FROM names")
        columns = "weights, base, created"
        rest = "bytes, sequence, manifest_sha256, '', manifest"
        for at in range(NAMES - 1):
            other = f"many-{at:04}"
            db.execute("INSERT INTO names VALUES (?, ?, 1, NULL, '')", (other, revision))
            db.execute(
                f"INSERT INTO revisions SELECT ?, revision, {columns}, ?, {rest} "
                "FROM revisions WHERE name = ? AND revision = ?",
                (other, labels, name, revision),
            )
            key, value = next(iter(LABELS.items()))
            db.execute("INSERT INTO labels VALUES (?, ?, ?, ?)", (other, revision, key, value))
        folder = catalog.parent / "store" / "revisions"
        for at in range(200):
            shutil.copytree(folder / revision, folder / f"{at:064x}")
            db.execute(
                f"INSERT INTO revisions SELECT name, ?, {columns}, ?, bytes, -1 - ?, "
                "manifest_sha256, '', manifest "
                "FROM revisions WHERE name = ? AND revision = ?",
                (f"{at:064x}", labels, at, name, revision),
            )
        for _ in range(500):
            db.execute(
                "INSERT INTO history (time, name, event, revision, actor, peer, detail) "
                "VALUES (1, ?, 'labels', ?, '', 'server', ?)",
                (name, revision, ", ".join(f"{k}={v}" for k, v in LABELS.items())),
            )
        targets = json.dumps([[revision, 1]])
        for at in range(30_000):
            db.execute(
                "INSERT INTO aliases VALUES (?, ?, ?, ?, 1, 1, '')",
                (f"many-{at % 100:04}", f"alias-{at:05}", targets, "[]"),
            )
        for table, values in DIGESTED.items():
            db.execute(f"UPDATE {table} SET digest = row_digest('{table}', {values})")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def many(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    data = tmp_path_factory.mktemp("many")
    async with running(base_folder, front_cache, data) as front:
        await front.push(make_adapter(data / "a"), "a-first")
    multiply(data / "data" / "catalog.sqlite")
    async with running(base_folder, front_cache, data, retain_superseded="1000") as front:
        yield front


async def all_pages(
    front: Front, rpc: str, request: Any, entries: str
) -> tuple[list[Any], list[int]]:
    """Entries of all pages, and the bytes of each page. The channel has gRPC's default
    limit of 4 MiB on what it takes."""
    found: list[Any] = []
    sizes: list[int] = []
    async with grpc.aio.insecure_channel(front.addresses["grpc"]) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        while True:
            page = await getattr(stub, rpc)(request)
            found += getattr(page, entries)
            sizes.append(page.ByteSize())
            if not page.next_page_token:
                return found, sizes
            request.page_token = page.next_page_token


@pytest.mark.push
@pytest.mark.parametrize("size", [0, 7, 1000])
async def test_a_page_of_adapters_is_bounded_in_bytes(many: Front, size: int) -> None:
    found, sizes = await all_pages(
        many, "ListAdapters", pb.ListAdaptersRequest(page_size=size), "adapters"
    )
    names = [adapter.name for adapter in found]
    assert names == ["a-first", *(f"many-{at:04}" for at in range(NAMES - 1))]
    assert dict(found[-1].labels) == LABELS
    assert max(sizes) < GRPC_DEFAULT - (512 << 10)
    if size == 1000:
        assert min(sizes[:-1]) > 2 << 20, "pages are as full as they may be"


async def test_filters_go_on_over_pages(many: Front) -> None:
    key, value = next(iter(LABELS.items()))
    found, _ = await all_pages(
        many, "ListAdapters", pb.ListAdaptersRequest(labels={key: value}), "adapters"
    )
    assert len(found) == NAMES - 1


async def test_a_page_of_history_is_bounded_in_bytes(many: Front) -> None:
    found, sizes = await all_pages(
        many, "GetHistory", pb.GetHistoryRequest(page_size=1000), "entries"
    )
    assert len(found) == 501
    assert found[-1].event == "published"
    assert max(sizes) < GRPC_DEFAULT - (512 << 10)


async def test_aliases_have_pages(many: Front) -> None:
    found, sizes = await all_pages(many, "ListAliases", pb.ListAliasesRequest(), "aliases")
    assert len(found) == 30_000
    names = [alias.alias for alias in found]
    assert names == sorted(set(names))
    assert max(sizes) < GRPC_DEFAULT - (512 << 10)
    ten, sizes = await all_pages(
        many, "ListAliases", pb.ListAliasesRequest(name="many-0003", page_size=100), "aliases"
    )
    assert [alias.alias for alias in ten] == [n for n in names if n.startswith("many-0003/")]
    assert len(sizes) == 3
    asked = pb.ListAliasesRequest(page_size=1001)
    assert (await failure(many.adapters.ListAliases(asked))).metadata["field"] == "page_size"


async def test_revisions_that_do_not_fit_are_counted(many: Front) -> None:
    got = await many.adapters.GetAdapter(pb.GetAdapterRequest(name="a-first"))
    assert got.ByteSize() < GRPC_DEFAULT - (512 << 10)
    assert got.revisions[0].revision == got.adapter.revision
    assert len(got.revisions) + got.revisions_left_out == 201
    few = await many.adapters.GetAdapter(pb.GetAdapterRequest(name="many-0000"))
    assert (len(few.revisions), few.revisions_left_out) == (1, 0)


@pytest.mark.parametrize("rpc", ["ListAdapters", "GetHistory", "ListAliases"])
@pytest.mark.parametrize("token", ["é", "x", "====", "AA", "/w==", "a" * 100_000])
async def test_a_token_of_nowhere_is_the_callers_fault(
    many: Front, rpc: str, token: str
) -> None:
    request = getattr(pb, f"{rpc}Request")(page_token=token)
    try:
        await getattr(many.adapters, rpc)(request)
    except grpc.aio.AioRpcError:
        refused = await failure(getattr(many.adapters, rpc)(request))
        assert (refused.reason, refused.metadata["field"]) == ("INVALID_FIELD", "page_token")


async def test_more_labels_than_an_adapter_may_have_are_refused_as_a_filter(
    many: Front,
) -> None:
    request = pb.ListAdaptersRequest(labels={f"k{n}": "x" for n in range(2000)})
    refused = await failure(many.adapters.ListAdapters(request))
    assert (refused.reason, refused.metadata["field"]) == ("INVALID_FIELD", "labels")
