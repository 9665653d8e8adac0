"""Rounds of requests, and the command that measures the prefix cache by them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner
from veneer_loadtest.cli import cli
from veneer_loadtest.load.rounds import send_round
from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec
from veneer_loadtest.load.targets import VeneerSpec

from tests.unit.client.fake_server import FakeServer, Refusal


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


async def test_round_over_grpc(server: FakeServer) -> None:
    names = tuple(f"load-{number}" for number in range(4))
    load = LoadSpec(
        adapters=names,
        arrivals=Closed(4),
        popularity=AdapterMix("roundrobin"),
        prompt_tokens=Lengths(3, 3),
        tokens=Lengths(5, 5),
        duration_s=0.0,
        warmup_s=0.0,
        requests=4,
        cancel_share=0.0,
        seed=1,
        vocab=5000,
    )
    spec = VeneerSpec(server.address, beginnings={"load-2": (7, 8)})
    done = await send_round("veneer", load, spec)
    assert done.tokens == 4 * 5
    assert len(done.first_token_s) == 4
    assert len(done.gaps_s) == 4 * 4
    assert all(first <= done.wall_s for first in done.first_token_s)
    asked = [request for name, request in server.calls if name == "GenerateStream"]
    assert sorted(request.adapter for request in asked) == [
        "load-0",
        "load-1",
        "load-2",
        "load-3",
    ]
    prompts = {request.adapter: list(request.token_ids.ids) for request in asked}
    assert prompts["load-2"][:2] == [7, 8]
    assert [len(prompts[name]) for name in names] == [3, 3, 5, 3]
    for request in asked:
        assert (request.stopping.max_tokens, request.stopping.ignore_eos) == (5, True)
        assert request.sampling.HasField("temperature")
        assert request.sampling.temperature == 0


@pytest.mark.real_base
def test_prefix_command_on_the_real_server(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    flags = ["--spawn", "--base-folder", str(base_folder), "--threads", "2"]
    flags += ["--server-flag", "--cache-dir", "--server-flag", str(cache_dir)]
    flags += ["--streams", "2", "--generate", "1", "--shared", "64", "--own", "4"]
    flags += ["--tokens", "2", "--repeat", "1", "--json", str(tmp_path / "p.json")]
    done = CliRunner().invoke(cli, ["prefix", *flags])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "p.json").read_text())
    assert result["kind"] == "prefix"
    assert set(result["summary"]) == {"first_token_gain_2", "throughput_gain_2"}
    (level,) = result["levels"]
    assert level["cached_share"] == pytest.approx(64 / 68)


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """A folder that says only how large its model is."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    heads = {"num_attention_heads": 1, "vocab_size": 5000}
    (folder / "config.json").write_text(json.dumps({**sizes, **heads}))
    return folder


@pytest.mark.parametrize("fails", [False, True])
def test_prefix_leaves_somebodys_server_as_it_was(
    fails: bool, server: FakeServer, tiny_base: Path
) -> None:
    server.add("sql")
    server.add("load-1")  # with the very content that the run would publish
    if fails:
        server.break_after = Refusal(grpc.StatusCode.ABORTED, "no", "NON_FINITE_OUTPUT")
    flags = ["--server", server.address, "--base-folder", str(tiny_base), "--streams", "2"]
    flags += ["--generate", "3", "--rank", "2", "--shared", "4", "--own", "2", "--tokens", "2"]
    done = CliRunner().invoke(cli, ["prefix", *flags, "--repeat", "1"])
    assert (done.exit_code == 1) is fails, done.output
    assert server.count("UploadAdapter") == 3
    assert set(server.adapters) == {"sql", "load-1"}
    assert not any(upload.spec.allow_replace for upload in server.uploads)


def test_prefix_needs_no_negative_number_of_adapters() -> None:
    done = CliRunner().invoke(cli, ["prefix", "--spawn", "--generate", "-1"])
    assert done.exit_code == 2
    assert "--generate" in done.output
