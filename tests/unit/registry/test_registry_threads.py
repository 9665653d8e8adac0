"""Requests, replaces, deletes and sweeps from many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_registry.errors import AdapterNotFound
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights

from tests.unit.registry.kit import BASE, make_adapter, make_tensors, push

ROUNDS = 25


def run(*jobs: Callable[[], None]) -> None:
    """All jobs to their end; the first error any of them had is raised."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[job]) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.push
def test_requests_go_on_while_everything_changes(tmp_path: Path) -> None:
    adapters = [
        make_adapter(
            tmp_path / str(n),
            tensors=make_tensors(seed=n, layers=[0], projections=["q_proj"]),
        )
        for n in range(3)
    ]
    stop = threading.Event()
    served: set[str] = set()
    # Retention of 0 makes each replace drop the revision that requests just found.
    with Registry.open(tmp_path / "data", BASE, retain_superseded=0) as registry:
        push(registry, "steady", adapters[0])

        def replace() -> None:
            for n in range(ROUNDS):
                push(registry, "steady", adapters[n % 3], allow_replace=True)

        def come_and_go() -> None:
            for n in range(ROUNDS):
                push(registry, "fleeting", adapters[n % 3], allow_replace=True)
                registry.delete("fleeting")

        def request(name: str, may_be_gone: bool) -> Callable[[], None]:
            def job() -> None:
                while not stop.is_set():
                    try:
                        lease = registry.acquire(name)
                    except AdapterNotFound:
                        assert may_be_gone, "a replace must never make a name unknown"
                        continue
                    with lease:
                        served.add(lease.ref.revision)
                        verify_weights(
                            registry.weights_folder(lease.ref), lease.ref.weights_digest
                        )
                    if registry.needs_sweep:
                        registry.sweep()

            return job

        def change() -> None:
            try:
                run(replace, come_and_go)
            finally:
                stop.set()

        run(
            change,
            request("steady", False),
            request("steady", False),
            request("fleeting", True),
        )
        registry.sweep()
        assert len(served) == 3
        (record,) = registry.list()
        assert registry.leases(record.ref.weights_digest) == 0
        store = tmp_path / "data" / "store"
        assert [p.name for p in (store / "weights").iterdir()] == [record.ref.weights_digest]
        assert [p.name for p in (store / "revisions").iterdir()] == [record.ref.revision]
        assert list((store / "staging").iterdir()) == []
