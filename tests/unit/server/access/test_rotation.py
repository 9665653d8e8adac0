"""Keys and certificates rotated under calls, with a FAKE engine. Five minutes of it, on a real
server: ``python -m tests.bench.rotation``."""

from __future__ import annotations

import itertools
from pathlib import Path

import grpc
import pytest
from veneer_server.access import edit_keys
from veneer_server.access.edit_keys import add_key

from tests.bench.rotation import Report, Rotation
from tests.pki import Pki
from tests.planted import planted
from tests.unit.server.access.test_tls import content
from tests.unit.server.rpc.front_harness import running

ROTATIONS = 6


async def rotated(base: Path, cache: Path, folder: Path, rotations: int) -> Report:
    pki, file = Pki(folder / "pki"), folder / "keys.toml"
    add_key(file, name="first", tenant="default", roles=["metrics"], expires=None)
    async with running(
        base,
        cache,
        folder / "front",
        credentials=grpc.ssl_channel_credentials(content(pki.ca_file)),
        openai_listen="127.0.0.1:0",
        tls_cert=pki.cert,
        tls_key=pki.key,
        keys_file=str(file),
    ) as front:
        done = itertools.count()
        rotation = Rotation(front.addresses, pki, file, "smollm2-135m")
        return await rotation.run(4, lambda: next(done) < rotations, 0.0)


@pytest.mark.push
async def test_no_valid_call_fails_and_no_old_key_is_taken(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    report = await rotated(base_folder, front_cache, tmp_path, ROTATIONS)
    assert report.failures == []
    assert (report.rotations, report.refused) == (ROTATIONS, 3 * ROTATIONS)
    assert len(report.certificate_s) == ROTATIONS
    assert len(report.calls) == 5
    assert min(report.calls.values()) >= ROTATIONS - 1


async def test_a_key_that_is_never_forgotten_is_seen(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    with planted(edit_keys, "del keys[id]", "pass"):
        report = await rotated(base_folder, front_cache, tmp_path, 1)
    assert "gRPC takes a revoked key" in report.failures
    assert "openai takes a revoked key" in report.failures
