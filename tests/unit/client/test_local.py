"""`LocalServer`, and the client and command line against the real server."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner
from veneer_client import (
    Chat,
    Client,
    FinishReason,
    ServerUnreachable,
    ServingStatus,
    Text,
    Tier,
    Tokens,
)
from veneer_client.cli.main import cli
from veneer_client.local import LocalServer
from veneer_loadtest.workload import make_adapter, read_base_shape
from veneer_registry.errors import AdapterExists, AdapterNotFound, ContextTooLong

from tests.refused import refused


def test_server_that_cannot_start_says_why() -> None:
    with refused(ServerUnreachable, status=2, command="veneer-server --no-such-flag"):
        LocalServer(["--no-such-flag"])


def test_server_that_is_not_ready_in_time_is_ended() -> None:
    with refused(ServerUnreachable, status=-9):
        LocalServer(start_timeout_s=0.001)


@pytest.mark.push
@pytest.mark.real_base
def test_a_whole_session(base_folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    shape = read_base_shape(base_folder)
    first = make_adapter(tmp_path / "one", shape, rank=4, seed=1)
    second = make_adapter(tmp_path / "two", shape, rank=8, seed=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--cache-dir", str(cache_dir), "--threads", "1"]
    log: list[str] = []
    with LocalServer(flags, environment=environment, told=log.append) as server:
        assert any("starting the engine: done in " in line for line in log)
        with Client(server.address) as client:
            assert client.health() is ServingStatus.SERVING
            assert client.info().base_model.quantization == "nf4"
            pushed = client.push(first, "one", labels={"team": "x"})
            assert pushed.published
            assert not client.push(first, "one").published, "the same content again"
            with refused(AdapterExists, adapter="one"):
                client.push(second, "one")
            other = client.push(second, "two", activate=True).adapter
            assert client.get("two").adapter.tier is Tier.DEVICE
            assert [adapter.name for adapter in client.list(page_size=1)] == ["one", "two"]
            assert [a.name for a in client.list(labels={"team": "x"})] == ["one"]

            cold = client.generate(
                Text("Once upon"), adapter="one", max_tokens=4, temperature=0, logprobs=True
            )
            assert cold.provenance.tier is Tier.DISK
            assert cold.provenance.revision == pushed.adapter.revision
            assert len(cold.logprobs) == cold.usage.completion_tokens == 4
            assert cold.finish_reason is FinishReason.LENGTH
            stream = client.generate_stream(
                Text("Once upon"), adapter="one", max_tokens=4, temperature=0
            )
            chunks = list(stream)
            assert "".join(chunk.text for chunk in chunks) == cold.text
            assert stream.final.provenance.tier is Tier.DEVICE
            echoed = client.generate(
                Tokens((10, 20, 30)), max_tokens=1, logprobs=True, echo=True
            )
            assert [item.token_id for item in echoed.prompt_logprobs] == [20, 30]

            with pytest.raises(AdapterNotFound) as caught:
                client.generate(Chat.user("hi"), adapter="onee")
            assert caught.value.metadata["did_you_mean"] == "one"
            with pytest.raises(ContextTooLong):
                client.generate(Text("hi"), max_tokens=10**6)

            assert client.evict("two").evicted
            assert client.get("two").adapter.tier is Tier.DISK
            assert client.activate("two", tier=Tier.HOST).tier is Tier.HOST
            assert client.delete("two") == (other.revision,)

        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
            assert b"veneer_requests_total" in page.read()
        run = CliRunner()
        done = run.invoke(
            cli,
            ["generate", "-a", "one", "--raw", "Once upon", "--max-tokens", "4",
             "--temperature", "0", "--server", server.address],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == cold.text.strip()
        assert f"one@{pushed.adapter.revision[:12]}" in done.stderr
        assert run.invoke(cli, ["--server", server.address, "call"]).exit_code == 0
        assert server.stop() == 0
