"""Adapter names in metrics: bounded, and correct while adapters come and go."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from veneer_server.telemetry.adapter_series import MAX_NAMES, AdapterSeries
from veneer_server.wire.messages import Occupancy, ResidencyChanged, TierName


class FakeCatalog(dict[str, str]):
    """FAKE tenants: name -> key of its weights, whichever tenant is asked for the name."""

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and super().__contains__(key[1])

    def names(self, key: str) -> list[str]:
        return sorted(name for name, digest in self.items() if digest == key)


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.catalog = FakeCatalog()
        self._registry = CollectorRegistry()
        self.series = AdapterSeries(self._registry, clock=lambda: self.now)
        self.series.catalog = self.catalog

    def resident(self, digest: str, tier: TierName, *, pinned: bool = False) -> None:
        self.series.residency(ResidencyChanged(digest, tier, pinned, 10, 0, 0, 0, 0))

    def occupied(self, running: tuple[str, ...], waiting: tuple[str, ...]) -> None:
        self.series.occupancy(
            Occupancy(1, 1, 0, 0, 1, running_adapters=running, waiting_adapters=waiting)
        )

    def shown(self, metric: str) -> dict[str, float]:
        """Labels -> value."""
        lines = generate_latest(self._registry).decode().splitlines()
        pairs = (line.removeprefix(f"veneer_{metric}").rsplit(" ", 1) for line in lines)
        return {labels: float(value) for labels, value in pairs if labels.startswith("{")}


@pytest.fixture
def world() -> World:
    return World()


def loaded(name: str, tier: str, pinned: str = "false", tenant: str = "default") -> str:
    labels = f'adapter_name="{name}",pinned="{pinned}",tenant="{tenant}",tier="{tier}"'
    return f"{{{labels}}}"


def requested(name: str, tenant: str = "default") -> str:
    return f'{{adapter_name="{name}",tenant="{tenant}"}}'


def test_an_adapter_is_shown_by_all_its_names_until_it_is_evicted(world: World) -> None:
    world.catalog |= {"chat": "d1", "talk": "d1", "code": "d2"}
    world.resident("d1", "device", pinned=True)
    world.resident("d2", "host")
    assert world.shown("adapter_loaded") == {
        loaded("chat", "device", "true"): 1,
        loaded("talk", "device", "true"): 1,
        loaded("code", "host"): 1,
    }
    world.resident("d1", "host")
    assert world.shown("adapter_loaded")[loaded("chat", "host")] == 1
    world.resident("d1", "disk")
    assert world.shown("adapter_loaded") == {loaded("code", "host"): 1}


def test_a_pinned_adapter_is_not_shown_before_it_is_in_memory(world: World) -> None:
    """A pin outlasts the copy: until it is loaded again, there is nothing in memory."""
    world.catalog["chat"] = "d1"
    world.resident("d1", "disk", pinned=True)
    assert world.shown("adapter_loaded") == {}
    world.resident("d1", "device", pinned=True)
    assert world.shown("adapter_loaded") == {loaded("chat", "device", "true"): 1}


def test_a_replaced_name_is_not_shown_with_what_it_was(world: World) -> None:
    world.catalog["chat"] = "d1"
    world.resident("d1", "device")
    world.catalog["chat"] = "d2"
    assert world.shown("adapter_loaded") == {}
    world.resident("d2", "host")
    assert world.shown("adapter_loaded") == {loaded("chat", "host"): 1}


def test_a_name_is_1_whatever_number_of_its_revisions_is_in_memory(world: World) -> None:
    class Kept(FakeCatalog):
        def names(self, key: str) -> list[str]:
            return ["chat"]

    world.series.catalog = Kept()
    world.resident("d1", "device")
    world.resident("d2", "device")
    assert world.shown("adapter_loaded") == {loaded("chat", "device"): 1}
    world.resident("d1", "host")
    assert world.shown("adapter_loaded") == {
        loaded("chat", "device"): 1,
        loaded("chat", "host"): 1,
    }


def test_names_beyond_the_cap_are_summed(world: World) -> None:
    for n in range(MAX_NAMES + 50):
        name = f"a{n:03}"
        world.catalog[name] = name
        world.resident(name, "device")
        world.series.requested("default", name)
        world.series.requested("default", name)
    found = world.shown("adapter_loaded")
    assert len(found) == MAX_NAMES + 1
    assert found[loaded("_other", "device", tenant="_other")] == 50
    requests = world.shown("adapter_requests_total")
    assert len(requests) == MAX_NAMES + 1
    assert requests[requested("_other", "_other")] == 100
    assert requests[requested("a000")] == 2


def test_a_deleted_name_ends_its_series_and_frees_its_label(world: World) -> None:
    for n in range(MAX_NAMES):
        world.catalog[f"a{n}"] = "d"
        world.series.requested("default", f"a{n}")
    del world.catalog["a7"]
    assert requested("a7") not in world.shown("adapter_requests_total")
    world.catalog["new"] = "d"
    world.series.requested("default", "new")
    assert world.shown("adapter_requests_total")[requested("new")] == 1


def test_a_name_of_two_tenants_has_a_series_of_each(world: World) -> None:
    world.catalog |= {"chat": "d1", "talk": "team-a:d1"}
    world.resident("d1", "host")
    world.resident("team-a:d1", "device")
    assert world.shown("adapter_loaded") == {
        loaded("chat", "host"): 1,
        loaded("talk", "device", tenant="team-a"): 1,
    }
    for tenant in ("default", "team-a", "team-a"):
        world.series.requested(tenant, "chat")
    assert world.shown("adapter_requests_total") == {
        requested("chat"): 1,
        requested("chat", "team-a"): 2,
    }


def info(at_most: int, running: str, waiting: str) -> str:
    return (
        f'{{max_lora="{at_most}",running_lora_adapters="{running}",'
        f'waiting_lora_adapters="{waiting}"}}'
    )


def test_a_router_sees_which_adapters_run_and_wait_and_since_when(world: World) -> None:
    world.catalog |= {"chat": "d1", "code": "d2"}
    world.series.device_budget = 55
    world.resident("d1", "device")  # of 10 bytes
    world.now = 200.0
    world.occupied(("d1",), ("d1", "d2"))
    world.now = 300.0
    world.occupied(("d1",), ("d1", "d2"))
    assert world.shown("lora_requests_info") == {info(5, "chat", "chat,code"): 200.0}
    world.now = 400.0
    world.series.engine_silent()
    assert world.shown("lora_requests_info") == {info(5, "", ""): 400.0}
