"""Limits on what tenants store and send, over gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from veneer_proto.v1 import adapters_pb2
from veneer_registry.errors import QuotaExceeded
from veneer_registry.records import UploadRequest
from veneer_server.access.edit_keys import add_key
from veneer_server.quotas.quota import Account, Quota
from veneer_server.quotas.stores import TenantStorage
from veneer_server.quotas.uploads import UploadQuotas
from veneer_server.quotas.usage import UsageBook
from veneer_server.quotas.usage_store import UsageStore

from tests.refused import refused
from tests.unit.server.quotas.kit import Caller, Limited
from tests.unit.server.rpc.front_harness import failure, make_adapter, running, until, upload

pytestmark = pytest.mark.asyncio(loop_scope="module")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def push(caller: Caller, folder: Path, name: str, **options: Any) -> Any:
    messages = upload(folder, name, **options)
    return caller.front.adapters.UploadAdapter(messages, metadata=caller.metadata)


async def delete(caller: Caller, name: str) -> None:
    request = adapters_pb2.DeleteAdapterRequest(name=name)
    await caller.front.adapters.DeleteAdapter(request, metadata=caller.metadata)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("folders")
    return [make_adapter(root / str(seed), seed=seed) for seed in range(8)]


async def test_adapters_stored(limited: Limited, folders: list[Path]) -> None:
    caller = limited.caller(role="admin", adapters=2)
    await push(caller, folders[0], "one")
    await push(caller, folders[1], "two")
    failed = await failure(push(caller, folders[2], "three"))
    assert (failed.reason, failed.metadata["limit"], failed.metadata["allowed"]) == (
        "QUOTA_EXCEEDED",
        "adapters",
        "2",
    )
    assert "RetryInfo" not in failed.details
    (over,) = failed.details["QuotaFailure"].violations
    assert (over.subject, over.quota_metric, over.quota_value) == (
        f"key:{caller.id}",
        "adapters",
        2,
    )
    await push(caller, folders[2], "two", allow_replace=True)  # no new name
    await push(caller, folders[3], "three", validate_only=True)  # nothing is stored
    await delete(caller, "one")
    await push(caller, folders[3], "three")


async def test_adapter_bytes_stored(limited: Limited, folders: list[Path]) -> None:
    size = size_of(folders[0])
    caller = limited.caller(role="admin", adapter_bytes=2 * size + 10)
    await push(caller, folders[0], "one")
    await push(caller, folders[1], "two")
    failed = await failure(push(caller, folders[2], "three"))
    assert failed.metadata["limit"] == "adapter_bytes"
    failed = await failure(push(caller, folders[2], "two", allow_replace=True))
    assert failed.metadata["limit"] == "adapter_bytes", "old revisions are kept"
    await push(caller, folders[1], "two")  # what is stored already
    await push(caller, folders[1], "again")
    await delete(caller, "one")
    await push(caller, folders[2], "three")


async def test_uploads_at_once_do_not_pass_the_limit_together(
    limited: Limited, folders: list[Path]
) -> None:
    caller = limited.caller(role="admin", adapters=3)
    for _ in range(3):
        calls = [push(caller, folder, f"a{n}") for n, folder in enumerate(folders[:6])]
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(not isinstance(each, Exception) for each in told) == 3
        listed = await caller.front.adapters.ListAdapters(
            adapters_pb2.ListAdaptersRequest(), metadata=caller.metadata
        )
        for adapter in listed.adapters:
            await delete(caller, adapter.name)


class Racing:
    """FAKE stores: while one upload looks, another one is stored and ends."""

    def __init__(self) -> None:
        self.count = 0
        self.meanwhile: list[Callable[[], None]] = []

    def tenants(self) -> list[str]:
        return ["a"]

    def stored(self, tenant: str) -> TenantStorage:
        seen = self.count
        for end in self.meanwhile:
            end()
        self.meanwhile.clear()
        return TenantStorage(seen, 0)

    def adds(self, tenant: str, request: UploadRequest) -> TenantStorage:
        return TenantStorage(1, 0)

    def there(self, tenant: str, request: UploadRequest) -> int:
        return 0


async def test_an_upload_that_ends_while_another_looks_is_seen(tmp_path: Path) -> None:
    stores, loop = Racing(), asyncio.get_running_loop()
    book = UsageBook(UsageStore(tmp_path / "u.db"), stores)
    quotas, limit = UploadQuotas(stores, book), Account("tenant:a", Quota(adapters=1))

    def reserve() -> Any:
        request = UploadRequest(name="x", files=())
        return quotas.reserve([limit], "a", request, publish=True, resume=False)

    first = await reserve()

    def end() -> None:
        stores.count += 1
        ended = threading.Event()
        loop.call_soon_threadsafe(lambda: (first.close(), ended.set()))
        assert ended.wait(30)

    stores.meanwhile.append(end)
    with refused(QuotaExceeded, limit="adapters", used="1"):
        await reserve()
    await book.stop()


async def test_an_upload_that_fails_gives_back(limited: Limited, folders: list[Path]) -> None:
    size = size_of(folders[0])
    caller = limited.caller(
        role="admin", adapters=1, adapter_bytes=size + 10, upload_bytes_per_day=3 * size
    )
    messages = list(upload(folders[0], "one"))
    broken = adapters_pb2.UploadAdapterRequest()
    broken.CopyFrom(messages[-1])
    broken.chunk.data = b"x" * len(broken.chunk.data)
    for messages_ in ([*messages[:-1], broken], [messages[0], broken]):
        await failure(
            caller.front.adapters.UploadAdapter(iter(messages_), metadata=caller.metadata)
        )
    call = caller.front.adapters.UploadAdapter(metadata=caller.metadata)
    await call.write(messages[0])
    await until(lambda: caller.front.calls == 1)
    call.cancel()
    await until(lambda: caller.front.calls == 0)
    await push(caller, folders[0], "one")


async def test_bytes_uploaded_a_day(limited: Limited, folders: list[Path]) -> None:
    size = size_of(folders[0])
    caller = limited.caller(role="admin", upload_bytes_per_day=2 * size)
    small = limited.caller(role="admin", upload_bytes_per_day=10)
    await push(caller, folders[0], "one")
    await push(caller, folders[1], "two", validate_only=True)
    failed = await failure(push(caller, folders[2], "three"))
    assert (failed.reason, failed.metadata["limit"]) == (
        "QUOTA_EXCEEDED",
        "upload_bytes_per_day",
    )
    assert 0 < failed.details["RetryInfo"].retry_delay.ToSeconds() <= 86400
    (spec, *_) = upload(folders[0], "again", resume=True)  # the content is there
    await caller.front.adapters.UploadAdapter(iter([spec]), metadata=caller.metadata)
    failed = await failure(push(small, folders[2], "three"))
    assert "RetryInfo" not in failed.details, "tomorrow is no better"


@pytest.mark.push
async def test_sent_bytes_and_usage_survive_a_restart(
    base_folder: Path, front_cache: Path, tmp_path: Path, folders: list[Path]
) -> None:
    file, size = tmp_path / "keys.toml", size_of(folders[0])
    limits = {"upload_bytes_per_day": size + 10}
    key = add_key(
        file, name="x", tenant="a", roles=["operator"], expires=None, limits=limits
    ).key

    async def begun(number: int) -> Any:
        async with running(base_folder, front_cache, tmp_path, keys_file=str(file)) as front:
            caller = Caller(front, key, "a")
            if not number:
                await push(caller, folders[0], "one")
            failed = await failure(push(caller, folders[1], "two"))
            await caller.generate(_ids())
            return failed, (await caller.usage()).tenants[0], await caller.metrics()

    first, used, metrics = await begun(0)
    second, more, _ = await begun(1)
    assert first.metadata["limit"] == second.metadata["limit"] == "upload_bytes_per_day"
    assert (used.requests, used.prompt_tokens, used.generated_tokens) == (1, 3, 2)
    assert (more.requests, more.prompt_tokens, more.generated_tokens) == (2, 6, 4)
    assert 'veneer_tenant_requests_total{tenant="a"} 1.0' in metrics
    assert 'veneer_tenant_generation_tokens_total{tenant="a"} 2.0' in metrics


def _ids() -> Any:
    from tests.unit.server.quotas.test_generate_limits import ids

    return ids(3, 2)
