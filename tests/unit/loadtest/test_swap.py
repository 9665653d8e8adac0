"""What a swap of adapters costs, and how uploads affect running streams."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner
from veneer_client import AsyncClient
from veneer_loadtest import churn, page_cache, swap
from veneer_loadtest.churn import ChurnPhase, figures, measured
from veneer_loadtest.cli import cli
from veneer_loadtest.commands.swap import KEYS
from veneer_loadtest.results import Case
from veneer_loadtest.swap import SwapOptions, WrongTier
from veneer_loadtest.tables import churn_table, swap_table
from veneer_loadtest.workload import BaseSizes, make_adapter
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import NonFiniteOutput

from tests.refused import refused
from tests.unit.client.fake_server import FakeServer, Refusal

SHAPE = BaseSizes("tiny", layers=1, hidden=8, intermediate=8, q_out=8, kv_out=8, vocab=5000)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


async def test_refuses_figures_from_the_wrong_tier(server: FakeServer, tmp_path: Path) -> None:
    server.tier = inference_pb2.TIER_HOST  # whatever is asked for
    options = SwapOptions(SHAPE, rank=2, prompt_tokens=4, samples=1, seed=1)
    async with AsyncClient(server.address) as client:
        with refused(WrongTier, tier="host", wanted="device"):
            await swap.swap(client, options, tmp_path)
    assert server.adapters == {}, "what the run published is gone"


async def test_a_failure_halfway_leaves_nothing(server: FakeServer, tmp_path: Path) -> None:
    server.tier = inference_pb2.TIER_DEVICE
    options = SwapOptions(SHAPE, rank=2, prompt_tokens=4, samples=1, seed=1)
    server.break_after = Refusal(grpc.StatusCode.ABORTED, "no", "NON_FINITE_OUTPUT")
    async with AsyncClient(server.address) as client:
        bench = swap.Bench(client, options, tmp_path)
        with pytest.raises(NonFiniteOutput):
            await bench.publish_and_run()
        await bench.close()
    assert server.adapters == {}


def _samples(*ms: float) -> list[swap.SwapSample]:
    return [swap.SwapSample(value / 1e3, 0.0) for value in ms]


def test_deltas_are_of_the_same_round() -> None:
    cases: dict[Case, list[swap.SwapSample]] = {
        "same": _samples(10, 50, 90),  # the machine gets slower
        "device": _samples(11, 51, 91),
        "host": _samples(13, 53, 99),
        "disk": _samples(30, 70, 110),
        "disk_cold": _samples(40, 80, 120),
        "publish": _samples(60, 60, 60),
    }
    found = swap.case_figures(cases)
    assert swap.summary(found, None) == {
        "first_token_ms": pytest.approx(50),
        "device_delta_ms": pytest.approx(1),
        "host_delta_ms": pytest.approx(3),
        "disk_delta_ms": pytest.approx(30),
        "disk_cached_delta_ms": pytest.approx(20),
        "publish_to_first_token_ms": pytest.approx(60),
    }
    assert swap_table(found).row_count == 6
    cases["disk_cold"] = []
    warm = swap.case_figures(cases)
    assert swap.summary(warm, None)["disk_delta_ms"] == pytest.approx(20)
    assert swap_table(warm).row_count == 5


def _phase(times: list[float], *windows: tuple[float, float]) -> ChurnPhase:
    return ChurnPhase(begin=1.0, arrivals=[np.array(times)], windows=windows)


def test_gaps_inside_an_upload_are_told_from_the_others() -> None:
    quiet = _phase([0.0, 1.0, *(1 + 0.01 * i for i in range(1, 101))])
    # A token every 10 ms; while an adapter is loaded (1.205 to 1.225) one takes 40 ms.
    steps = [0.01] * 20 + [0.04] + [0.01] * 20
    churned = _phase([1.0, *(1.0 + np.cumsum(steps))], (1.205, 1.225))
    found = figures(1, [quiet], [churned])
    assert (found.quiet_gaps, found.publishes) == (100, 1)
    assert found.quiet_ms.p99 == pytest.approx(10)
    assert found.longest_ms == pytest.approx(40)
    assert found.steps == pytest.approx(4)
    # The long one, and the three after the upload's end.
    assert found.inside_gaps == 4
    assert found.outside_ms is not None
    assert found.outside_ms.high == pytest.approx(10)
    assert found.publish_ms.p50 == pytest.approx(20)
    assert churn_table(found).row_count == 4


def test_a_stream_that_began_after_an_upload_has_nothing_in_it() -> None:
    churned = ChurnPhase(
        begin=1.0,
        arrivals=[np.array([1.0, 1.01, 1.05, 1.06]), np.array([5.0, 5.1, 5.2])],
        windows=[(1.02, 1.04)],
    )
    found = figures(2, [_phase([1.0, 1.01, 1.02])], [churned])
    assert found.longest_ms == pytest.approx(40)
    assert found.outside_ms is not None
    assert found.outside_ms.high == pytest.approx(100)


def test_tokens_that_arrive_together_have_no_gap() -> None:
    quiet = _phase([1.0, 1.03, 1.03, 1.03])
    found = figures(1, [quiet], [_phase([1.0, 1.05, 1.1], (1.0, 1.08))])
    assert found.steps == pytest.approx(5)


def test_uploads_without_a_break_between_them() -> None:
    """A slow machine: each takes longer than the time until the next."""
    churned = _phase([1.0, 1.05, 1.1, 1.15], (1.0, 1.08), (1.08, 1.2))
    found = figures(1, [_phase([1.0, 1.01, 1.02])], [churned])
    assert found.outside_ms is None
    assert found.inside_gaps == 3
    assert churn_table(found).row_count == 3


def test_what_a_slow_machine_leaves_empty() -> None:
    nothing = ChurnPhase(begin=1.0, arrivals=[], windows=[(1.0, 1.1)])
    one = _phase([1.05], (1.0, 1.1))
    outside = _phase([2.0, 2.1], (1.0, 1.1))
    inside = _phase([1.0, 1.05, 1.1], (1.0, 1.08))
    never = _phase([1.0, 1.05, 1.1])  # no adapter was brought
    for lacking in (nothing, one, outside, never):
        assert not measured([lacking], inside=True)
    assert not measured([nothing, one])
    assert measured([nothing, inside], inside=True)
    found = figures(1, [nothing, _phase([1.0, 1.01, 1.02])], [nothing, inside])
    assert found.inside_gaps == 2
    assert swap.case_figures({"same": [], "device": []}) == {}
    assert swap.summary({}, None) == {}
    assert swap_table({}).row_count == 0


def test_quiet_tokens_that_arrive_together_have_no_ratio() -> None:
    assert not measured([_phase([1.0, 1.0, 1.0])])
    quiet = _phase([1.0] * 200 + [1.01])
    together = figures(1, [quiet], [_phase([1.0, 1.05], (1.0, 1.08))])
    cases = swap.case_figures(
        {case: _samples(1.0) for case in ("same", "device", "host", "disk", "publish")}
    )
    found = swap.summary(cases, together)
    assert "churn_itl_p99_ratio" not in found
    assert found["churn_added_p99_ms"] == pytest.approx(50)


async def test_nobodys_adapter_is_replaced_or_deleted(
    server: FakeServer, tmp_path: Path
) -> None:
    server.add("churn-1")
    folders = iter(make_adapter(tmp_path / str(n), SHAPE, rank=2, seed=n) for n in range(2))
    async with (
        AsyncClient(server.address) as client,
        churn.published(client, churn.NAMES, folders),
    ):
        assert set(server.adapters) == {"churn-0", "churn-1"}
    assert set(server.adapters) == {"churn-1"}
    assert not any(upload.spec.allow_replace for upload in server.uploads)


def test_a_file_can_be_dropped_from_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as out:
        out.write(os.urandom(2 << 20))
        os.fsync(out.fileno())  # pages that are not on disk yet cannot be dropped
    assert page_cache.is_cached(file)
    if not page_cache.drop(tmp_path):
        pytest.skip("this file system keeps its pages")
    assert not page_cache.is_cached(file)
    file.read_bytes()
    assert page_cache.is_cached(file)


def test_nothing_to_drop_is_not_dropped(tmp_path: Path) -> None:
    assert not page_cache.drop(tmp_path)


@pytest.mark.real_base
def test_on_the_real_server(
    base_folder: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(churn, "SETTLE_S", 0.5)
    file = tmp_path / "s.json"
    done = CliRunner().invoke(
        cli,
        [
            "swap",
            "--spawn",
            "--base-folder",
            str(base_folder),
            "--threads",
            "2",
            *("--server-flag", "--cache-dir", "--server-flag", str(cache_dir)),
            *("--samples", "1", "--rank", "4", "--churn", "1500ms", "--churn-phases", "1"),
            *("--json", str(file), "--fail-if", "churn_max_stall_steps<=0"),
        ],
    )
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert result["kind"] == "swap"
    assert result["cases"]["disk"]["load_ms"]["p50"] > 0
    assert result["cases"]["device"]["load_ms"]["p50"] == 0
    assert set(result["summary"]) == set(KEYS)
    assert result["churn"]["publishes"] >= 1
    assert result["churn"]["inside_gaps"] > 0


def test_error_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["swap", "--spawn", "--base-folder", str(tmp_path)])
    assert done.exit_code == 1
    assert "has no config.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
