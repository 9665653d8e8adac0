"""``store verify`` of an object store and a catalog in PostgreSQL, beside their servers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from veneer_registry.child_python import child_python
from veneer_registry.errors import FailedPrecondition, InvalidField, Unavailable
from veneer_registry.registry import Registry
from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.postgres import PostgresAddress
from veneer_registry.shared.upkeep import verify_shared

from tests.refused import refused
from tests.shared_services import BUCKET, Services
from tests.unit.registry.kit import BASE, push
from tests.unit.registry.shared_kit import Adapters, Open, execute, flipped

WEIGHTS = "adapter_model.safetensors"


def test_what_is_whole_is_found_whole_and_only_read(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    registry = opened()
    for number in (1, 2):
        push(registry, f"adapter-{number}", adapters(number))
    push(registry, "same", adapters(1))
    objects = services.s3.objects(name)
    before = objects.list("weights") | objects.list("revisions")
    steps: list[tuple[int, int]] = []
    found = verify_shared(services.address(name), objects, lambda *at: steps.append(at))
    assert (found.names, found.weights, found.damaged) == (3, 2, [])
    assert found.bytes == sum(stat.size for stat in before.values())
    assert found.unreferenced == 0
    assert steps[-1] == (len(steps), len(steps))
    assert objects.list("weights") | objects.list("revisions") == before
    registry.delete("same")
    registry.delete("adapter-1")
    found = verify_shared(services.address(name), objects)
    assert (found.names, found.damaged) == (1, [])
    assert found.unreferenced == 2, "weights and a revision wait to be deleted"


def test_damaged_and_missing_objects_are_named_with_their_adapters(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    registry = opened()
    one, two, three = (
        push(registry, f"adapter-{number}", adapters(number)).record.ref for number in (1, 2, 3)
    )
    objects = services.s3.objects(name)
    key = f"weights/{one.weights_digest}/{WEIGHTS}"
    data = objects.read(key)
    assert data is not None
    objects.write(key, flipped(data))
    objects.delete([f"weights/{two.weights_digest}/{WEIGHTS}"])
    key = f"revisions/{three.revision}/bundle.json"
    data = objects.read(key)
    assert data is not None
    objects.write(key, flipped(data))
    found = verify_shared(services.address(name), objects)
    assert {(each.kind, each.digest): each.adapters for each in found.damaged} == {
        ("weights", one.weights_digest): (f"adapter-1@{one.revision[:12]}",),
        ("weights", two.weights_digest): (f"adapter-2@{two.revision[:12]}",),
        ("revisions", three.revision): (f"adapter-3@{three.revision[:12]}",),
    }
    execute(
        services,
        name,
        f"INSERT INTO quarantine VALUES ('{one.weights_digest}', 0, 'a bit flipped')",
    )
    found = verify_shared(services.address(name), objects)
    assert found.quarantined == {one.weights_digest: "a bit flipped"}
    assert one.weights_digest not in {each.digest for each in found.damaged}


def test_what_cannot_be_looked_at_is_no_verdict(
    services: Services, opened: Open, adapters: Adapters, name: str
) -> None:
    push(opened(), "chat", adapters(1))
    address, objects = services.address(name), services.s3.objects(name)
    nowhere = PostgresAddress(address.url, address.password_file, f"{address.schema}x")
    with refused(InvalidField, field="catalog"):
        verify_shared(nowhere, objects)
    services.s3.fail(kind="refuse")
    try:
        with refused(Unavailable, cause="object_store"):
            verify_shared(address, objects)
    finally:
        services.s3.fail()
    execute(services, name, "UPDATE meta SET version = 99")
    with refused(FailedPrecondition, schema="99"):
        verify_shared(address, objects)


@pytest.mark.push
def test_the_command(services: Services, adapters: Adapters, name: str, tmp_path: Path) -> None:
    def command(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            child_python(
                *("-m", "veneer_server", "store", "verify", "--data-dir", str(tmp_path / "x")),
                *("--store", f"s3://{BUCKET}/{name}", "--catalog", services.postgres.url),
                *("--catalog-password-file", str(services.postgres.password_file), *flags),
            ),
            env={**os.environ, **services.s3.environment()},
            capture_output=True,
            text=True,
            check=False,
        )

    # The command knows the places of tenants only, as the servers do.
    address = PostgresAddress(
        services.postgres.url, services.postgres.password_file, f"veneer/{name}"
    )
    objects = services.s3.objects(f"{name}/tenants/{name}")
    places = SharedLocations(tmp_path / "own", address, objects, cache_bytes=1 << 30)
    with Registry.open(tmp_path / "own", BASE, places=places) as registry:
        ref = push(registry, "chat", adapters(1)).record.ref
        done = command("--tenant", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 name, 1 revision, 1 set of weights" in done.stdout
    assert "all intact" in done.stdout
    key = f"weights/{ref.weights_digest}/{WEIGHTS}"
    data = objects.read(key)
    assert data is not None
    objects.write(key, flipped(data))
    done = command("--tenant", name)
    assert done.returncode == 1
    assert f"damaged weights {ref.weights_digest[:12]}" in done.stdout
    assert f"used by chat@{ref.revision[:12]}" in done.stdout
    done = command("--quarantine")
    assert done.returncode == 1
    assert "push the adapters again" in done.stderr
    assert services.postgres.password not in done.stdout + done.stderr
