"""The real server on PostgreSQL and S3, beside another registry on the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from veneer_registry.adapter import BaseSpec
from veneer_registry.base_names import known_names
from veneer_registry.fingerprint import fingerprint_base
from veneer_registry.records import UploadFile, UploadRequest
from veneer_registry.registry import Registry
from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.postgres import PostgresAddress
from veneer_server.models.config import read_decoder_config

from tests.server_harness import read_files, running_server
from tests.shared_services import BUCKET, running

pytestmark = [pytest.mark.push, pytest.mark.real_base, pytest.mark.asyncio(loop_scope="module")]


def base_of(folder: Path, cache_dir: Path) -> BaseSpec:
    """The server's base, as far as it decides what fits."""
    decoder = read_decoder_config(folder)
    fingerprint = fingerprint_base(folder, cache_dir=cache_dir)
    names = known_names("smollm2-135m", folder)
    return BaseSpec("real", decoder.num_layers, decoder.shapes, fingerprint, names=names)


def push(registry: Registry, name: str, folder: Path) -> str:
    """Publish a folder; returns the revision."""
    files = read_files(folder)
    listed = tuple(
        UploadFile(file, len(data), hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    )
    upload = registry.begin_upload(UploadRequest(name, listed))
    for file, data in files.items():
        upload.write(file, 0, data)
    return registry.publish(upload).record.ref.revision


async def test_a_server_serves_what_another_registry_published(
    base_folder: Path,
    cache_dir: Path,
    real_adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running() as services:
        for variable, value in services.s3.environment().items():
            monkeypatch.setenv(variable, value)
        address = PostgresAddress(services.postgres.url, services.postgres.password_file)
        flags = (
            *("--store", f"s3://{BUCKET}/real", "--catalog", address.url),
            *("--catalog-password-file", str(address.password_file)),
        )
        log = tmp_path / "server.log"
        # First, so that what it publishes is known to the server when that is ready.
        places = SharedLocations(
            tmp_path / "other", address, services.s3.objects("real"), cache_bytes=1 << 30
        )
        base = base_of(base_folder, cache_dir)
        with Registry.open(tmp_path / "other", base, places=places) as other:
            before = push(other, "before", real_adapters["rank-4"])
            async with running_server(tmp_path / "data", cache_dir, *flags, log=log) as server:
                first = await server.generate(prompt="Hello", adapter="before")
                assert first.provenance.revision == before
                pushed = await server.push(real_adapters["mlp"], "own")
                second = await server.generate(prompt="Hello", adapter="own")
                # It takes the lock, and so has the server's publication.
                other.set_alias("own/prod", [(second.provenance.revision, 1)])
                assert other.get("own").ref.revision == pushed.adapter.revision
                # And the server, publishing again, has the alias.
                await server.push(real_adapters["rank-1"], "another")
                third = await server.generate(prompt="Hello", adapter="own/prod")
                assert third.text == second.text
                assert await server.stop() == 0
        assert services.postgres.password not in log.read_text()
        assert not (tmp_path / "data" / "catalog.sqlite").exists()
