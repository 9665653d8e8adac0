"""One log line per event, with unmodified fields; label values are bounded."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from prometheus_client import generate_latest
from veneer_server import logs
from veneer_server.logs import REQUEST_ID, get_logger
from veneer_server.telemetry.adapter_log import AdapterLog
from veneer_server.telemetry.metrics import Metrics
from veneer_server.wire.messages import (
    AdapterFailed,
    AdapterLoaded,
    Evicted,
    Occupancy,
    ResidencyChanged,
    StepDone,
    WireError,
)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_fields_and_the_request_id(stream: io.StringIO) -> None:
    logs.configure("json", stream)
    token = REQUEST_ID.set("abc")
    get_logger("veneer_server.x").info("request", tokens=3, adapter="a\nb")
    REQUEST_ID.reset(token)
    try:
        raise ValueError("boom")
    except ValueError as error:
        get_logger("veneer_server.x").error("failed", error, method="M")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["tokens"], first["adapter"]) == ("request", 3, "a\nb")
    assert (first["request_id"], first["level"]) == ("abc", "info")
    assert "boom" in second["trace"]
    assert "request_id" not in second


def test_lines_of_a_tenants_calls_name_it(stream: io.StringIO) -> None:
    logs.configure("json", stream)
    log = get_logger("veneer_server.x")
    token = logs.TENANT.set("team-a")
    log.info("upload", adapter="chat")
    log.info("tenant opened", tenant="team-b")
    logs.TENANT.reset(token)
    log.info("upload", adapter="chat")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("tenant") for line in lines] == ["team-a", "team-b", None]


def test_a_console_event_is_one_line_whatever_the_fields(stream: io.StringIO) -> None:
    logs.configure("console", stream)
    get_logger("veneer_server.x").info("request", adapter="a\nb c", seconds=0.123456)
    assert stream.getvalue().count("\n") == 1
    assert 'adapter="a\\nb c" seconds=0.1235' in stream.getvalue()


def test_what_strangers_repeat_is_counted_and_hides_no_other_line(
    stream: io.StringIO,
) -> None:
    logs.configure("json", stream)
    log = get_logger("veneer_server.test")
    for _ in range(5000):
        log.often("KEY", "call refused", method="x")
    log.often("OTHER", "call refused", method="y")
    token = logs.TENANT.set("team-a")
    log.often("KEY", "call refused", method="z")
    logs.TENANT.reset(token)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) <= logs.BURST + 10, "and one a second"
    assert [line["method"] for line in lines[-2:]] == ["y", "z"]


@pytest.mark.parametrize("kind", ["console", "json"])
def test_nothing_in_a_log_line_controls_a_terminal(
    stream: io.StringIO, kind: Literal["console", "json"]
) -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"{seed=}")
    logs.configure(kind, stream)
    log = get_logger("veneer_server.test")
    controls = [*map(chr, (*range(32), *range(127, 160))), *"\u202e\u2067"]
    for _ in range(100):
        evil = "a" + "".join(rng.choice(controls) for _ in range(8)) + "b"
        log.info(f"event {evil}", name=evil, what=[evil], plain=evil.replace(" ", ""))
        try:
            raise ValueError(evil)
        except ValueError as error:
            log.error("failed", error, why=str(error))
        if kind == "json":
            last = json.loads(stream.getvalue().splitlines()[-1])
            assert last["why"] == evil, "JSON has the text itself"
    left = stream.getvalue().replace("\n", "").replace("\t", "")
    assert not [each for each in left if each in controls]


def test_a_log_that_nobody_reads_stops_nothing_and_says_what_it_lost(
    stream: io.StringIO,
) -> None:
    """A full pipe stopped the front: no call was answered, and SIGTERM did nothing."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as unread, os.fdopen(writing, "w") as pipe:
        logs.configure("json", pipe)
        for number in range(3000):
            get_logger("veneer_server.x").info("request", number=number, text="a" * 100)
        found = unread.read(1 << 20).splitlines()
        get_logger("veneer_server.x").info("again")
        notice, again = map(json.loads, unread.read(1 << 16).splitlines())
    assert [json.loads(line)["number"] for line in found] == list(range(len(found)))
    assert (notice["event"], notice["level"]) == ("log lines were lost", "warning")
    assert 0 < notice["lines"] == 3000 - len(found)
    assert again["event"] == "again"


@pytest.mark.parametrize("kind", ["terminal", "socket", "full disk"])
def test_what_else_cannot_be_written_to_stops_nothing(stream: io.StringIO, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "terminal":  # whose emulator has stopped
            unread, terminal = os.openpty()
            stack.callback(os.close, unread)
            file = stack.enter_context(os.fdopen(terminal, "w"))
        elif kind == "socket":
            pair = socket.socketpair()
            for end in pair:
                stack.enter_context(end)
            file = stack.enter_context(pair[1].makefile("w"))
        else:
            file = stack.enter_context(open("/dev/full", "w"))
        logs.configure("console", file)
        for number in range(3000):
            get_logger("veneer_server.x").info("request", number=number, text="a" * 100)


def test_a_log_whose_reader_has_gone_stops_nothing(stream: io.StringIO) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        logs.configure("console", pipe)
        get_logger("veneer_server.x").info("request")


def test_a_long_line_is_written_whole(stream: io.StringIO, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        logs.configure("console", file)
        get_logger("veneer_server.x").info("request", text="é" * 5000, odd="\udcff")
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1
    assert text.count("é") == 5000
    assert "\\udcff" in text


def test_a_line_that_cannot_be_formatted_ends_nothing(
    stream: io.StringIO, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w") as file:
        logs.configure("console", file)
        logging.getLogger("veneer_server.x").info("%d rows", "three")
    assert "'%d rows'" in (tmp_path / "log").read_text()


def test_others_debug_and_info_stay_out(stream: io.StringIO) -> None:
    logs.configure("console", stream)
    logging.getLogger("someone.else").info("chatter")
    logging.getLogger("someone.else").warning("trouble")
    assert "chatter" not in stream.getvalue()
    assert "trouble" in stream.getvalue()


def exposed(metrics: Metrics) -> dict[str, float]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_engine_events() -> None:
    metrics = Metrics()
    metrics.on_event(ResidencyChanged("d1", "device", False, 10, 20, 10, 1, 1))
    metrics.on_event(ResidencyChanged("d2", "host", False, 10, 30, 10, 2, 1))
    metrics.on_event(AdapterLoaded("d1", "disk", {"read": 0.5, "copy": 0.25}))
    metrics.on_event(Evicted("d1", "device", "capacity"))
    metrics.on_event(AdapterFailed("d3", WireError("DATA_LOSS", "it is gone", {}, None)))
    metrics.engine_health(True)
    metrics.on_event(StepDone(1, 0.1, 8, 2, 1))
    metrics.on_event(StepDone(2, 0.1, 8, 0, 1, prefix_asked=40, prefix_found=16))
    metrics.on_event(StepDone(3, 0.1, 0, 1, 1, drafted=5, accepted=3))
    metrics.on_event(Occupancy(3, 4, 1, 1, 4, kv_blocks_cached=2))
    found = exposed(metrics)
    assert found['veneer_adapters_resident{tier="device"}'] == 1
    assert found['veneer_adapters_resident{tier="host"}'] == 2
    assert found['veneer_adapter_bytes{tier="host"}'] == 30
    assert found['veneer_adapter_load_seconds_sum{source="disk",stage="read"}'] == 0.5
    assert found["veneer_adapter_activate_seconds_sum"] == 0.75
    assert found['veneer_adapter_evictions_total{cause="capacity",tier="device"}'] == 1
    assert found['veneer_adapter_load_failures_total{reason="DATA_LOSS"}'] == 1
    assert found["veneer_engine_healthy"] == 1
    assert found['veneer_step_seconds_count{phase="mixed"}'] == 1
    assert found['veneer_step_seconds_count{phase="prefill"}'] == 1
    assert found["veneer_step_batch_rows_sum"] == 18 + 6
    assert found["veneer_speculation_drafted_tokens_total"] == 5
    assert found["veneer_speculation_accepted_tokens_total"] == 3
    assert found["veneer_num_requests_waiting"] == 4
    assert found["veneer_kv_cache_usage_ratio"] == 0.25
    assert found["veneer_prefix_cache_usage_ratio"] == 0.5
    assert found["veneer_prefix_cache_queried_tokens_total"] == 40
    assert found["veneer_prefix_cache_hit_tokens_total"] == 16
    metrics.on_event(ResidencyChanged("d1", "disk", False, 10, 10, 0, 1, 0))
    metrics.engine_health(False)
    found = exposed(metrics)
    assert found['veneer_adapters_resident{tier="device"}'] == 0
    assert found["veneer_num_requests_running"] == 0
    assert found["veneer_engine_healthy"] == 0


class Names:
    """FAKE registry: ``d1`` has two names."""

    def names(self, key: str) -> list[str]:
        return ["sql", "chat"] if key.endswith("d1") else []


def test_loads_evictions_and_failures_are_told_by_name(stream: io.StringIO) -> None:
    logs.configure("json", stream)
    adapters = AdapterLog(Names())
    adapters.on_engine_event(AdapterLoaded("d1", "disk", {"read": 0.51234, "copy": 0.25}))
    adapters.on_engine_event(Evicted("d2", "device", "capacity"))
    adapters.on_engine_event(
        AdapterFailed("d1", WireError("DATA_LOSS", "it is gone", {}, None))
    )
    adapters.on_engine_event(Occupancy(3, 4, 1, 1, 4))
    adapters.on_engine_event(AdapterLoaded("team-a:d1", "disk", {}))
    loaded, evicted, failed, other = map(json.loads, stream.getvalue().splitlines())
    assert "tenant" not in loaded
    assert (other["tenant"], other["adapter"], other["weights"]) == ("team-a", "chat,sql", "d1")
    assert (loaded["event"], loaded["adapter"], loaded["source"]) == (
        "adapter loaded",
        "chat,sql",
        "disk",
    )
    assert (loaded["read_s"], loaded["copy_s"]) == (0.5123, 0.25)
    assert (evicted["adapter"], evicted["weights"]) == ("", "d2")
    assert (evicted["tier"], evicted["cause"]) == ("device", "capacity")
    assert (failed["level"], failed["reason"], failed["error"]) == (
        "warning",
        "DATA_LOSS",
        "it is gone",
    )


def test_the_engines_lines_say_whose_they_are(stream: io.StringIO) -> None:
    logs.configure("json", stream, process="engine")
    logging.getLogger("veneer_server.engine.x").info("%d rows", 3)
    logs.configure("console", stream, process="engine")
    logging.getLogger("veneer_server.engine.x").info("%d rows", 3)
    first, second = stream.getvalue().splitlines()
    assert json.loads(first)["process"] == "engine"
    assert json.loads(first)["event"] == "3 rows"
    assert second.endswith("engine: 3 rows")
