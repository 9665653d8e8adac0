"""Rounds, ratios, the gate and the peer process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner
from veneer_client import AsyncClient
from veneer_loadtest.cli import cli
from veneer_loadtest.errors import PeerError
from veneer_loadtest.load.rounds import Round
from veneer_loadtest.load.spec import Closed, LoadSpec, Open
from veneer_loadtest.peers import gate
from veneer_loadtest.peers.compare import back_and_forth, level_of, summary
from veneer_loadtest.peers.gate import GateRequest, answers_line, gate_line, gate_requests
from veneer_loadtest.peers.peft import PeftPeerProcess
from veneer_loadtest.peers.peft_messages import Generate, PeftScore, Scored
from veneer_loadtest.peers.systems import System
from veneer_loadtest.results import CompareLevel, SystemFacts
from veneer_loadtest.tables import compare_table
from veneer_loadtest.workload import make_adapters, read_base_shape
from veneer_proto.v1 import inference_pb2
from veneer_registry.extras import install_extra

from tests.refused import refused
from tests.unit.client.fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


def _round(rate: float) -> Round:
    return Round(
        wall_s=100 / rate,
        tokens=100,
        first_token_s=(0.1,),
        gaps_s=(0.01, 0.02),
        client_cpu_s=0.0,
    )


class Named(System):
    """FAKE system: a name."""

    def __init__(self, name: str) -> None:
        super().__init__(name, SystemFacts(command="", versions={}, device="cpu"))

    async def round(self, load: LoadSpec) -> Round:
        raise NotImplementedError


def test_order_is_there_and_back() -> None:
    systems = [Named("veneer"), Named("peft"), Named("vllm")]
    order = [system.name for system in back_and_forth(systems, 3)]
    there = ["veneer", "peft", "vllm"]
    assert order == [*there, *reversed(there), *there]
    assert set(Counter(system.name for system in back_and_forth(systems, 5)).values()) == {5}


def _level(ours: Iterable[float], **peers: Iterable[float]) -> CompareLevel:
    rounds = {"veneer": tuple(map(_round, ours))}
    return level_of(
        Closed(8), rounds | {name: tuple(map(_round, r)) for name, r in peers.items()}
    )


def test_ratio_is_of_medians_and_overlap_is_told() -> None:
    ratio = _level((90, 100, 900), peft=(20, 25, 80)).ratios["peft"]
    assert ratio.ratio == pytest.approx(100 / 25)
    assert (ratio.low, ratio.high) == (pytest.approx(100 / 25), pytest.approx(900 / 80))
    assert not ratio.ranges_overlap
    assert _level((80, 100), peft=(20, 80)).ratios["peft"].ranges_overlap


def test_summary_is_against_the_fastest_peer() -> None:
    level = _level((100,), peft=(25,), vllm=(80,))
    assert summary([level]) == {
        "ratio_8": pytest.approx(1.25),
        "ratio_8_peft": pytest.approx(4),
        "ratio_8_vllm": pytest.approx(1.25),
    }
    assert summary([_level((100,), peft=(25,))]) == {"ratio_8": pytest.approx(4)}
    assert compare_table([level]).row_count == 3


def test_an_open_loop_is_compared_by_its_first_tokens() -> None:
    def at(first_token_s: float) -> Round:
        return replace(_round(100), first_token_s=(first_token_s,) * 3)

    level = level_of(
        Open(2.5), {"veneer": [at(0.1), at(0.2), at(0.1)], "vllm": [at(0.4), at(0.3), at(0.3)]}
    )
    ratio = level.ratios["vllm"]
    assert ratio.ratio == pytest.approx(3)
    assert not ratio.ranges_overlap
    assert (level.title, summary([level])) == (
        "2.5 requests/s",
        {"ratio_2.5rps": pytest.approx(3)},
    )


def test_the_gates_requests() -> None:
    requests = gate_requests(
        ("a", "b", "c"), count=7, prompt_tokens=(16, 64), vocab=500, seed=3
    )
    assert [request.adapter for request in requests] == list("abcabca")
    lengths = sorted(len(request.prompt) for request in requests)
    assert (lengths[0], lengths[-1]) == (16, 64)
    assert all(0 < token < 500 for request in requests for token in request.prompt)
    assert len({request.prompt for request in requests}) == 7
    again = gate_requests(("a", "b", "c"), count=7, prompt_tokens=(16, 64), vocab=500, seed=3)
    assert again == requests


# --------------------------------------------------------------------------- gate


class FakePeer:
    """FAKE: a row begins with its adapter's number, and scores best under that one."""

    def __init__(
        self, own: float = -1.0, other: float = -1.5, regret: float = 0.0, others: float = 0.3
    ) -> None:
        self._own, self._other, self._regret, self._others = own, other, regret, others

    async def score(self, call: PeftScore) -> Scored:
        mine = call.adapter == f"load-{call.row[0]}"
        one = self._own if mine else self._other
        best = one + (self._regret if mine else self._others)
        tokens = len(call.row) - 1
        return Scored(logprobs=[one] * tokens, best=[best] * tokens)


@pytest.mark.parametrize(
    ("peer", "passes"), [(FakePeer(regret=0.15), True), (FakePeer(regret=0.25), False)]
)
async def test_peers_answer_with_the_adapter_that_they_are_asked_for(
    peer: FakePeer, passes: bool
) -> None:
    streams = [GateRequest(f"load-{i}", (i, 7)) for i in range(3)]
    rows = [(1, 2, 3)] * 3
    check = gate.check_answers("vllm", rows, peer, streams)  # type: ignore[arg-type]
    if passes:
        found = await check
        assert (found.own_best, found.answers) == (3, 3)
        assert found.regret == pytest.approx(0.15)
        assert found.other_regret == pytest.approx(0.3)
        assert "3 of 3 are likeliest under their own" in answers_line("vllm", found)
    else:
        with refused(gate.GateFailed, system="vllm"):
            await check


@pytest.mark.parametrize(("regret", "passes"), [(0.2, True), (0.6, False)])
async def test_a_peer_alone_with_one_adapter_is_held_against_a_bound(
    regret: float, passes: bool
) -> None:
    peer = FakePeer(regret=regret)
    check = gate.check_answers("vllm", [(1, 2)], peer, [GateRequest("load-0", (0, 7))])  # type: ignore[arg-type]
    if passes:
        assert (await check).other_regret is None
    else:
        with pytest.raises(gate.GateFailed):
            await check


def _score_minus_one(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
    ids = request.token_ids.ids
    one = [inference_pb2.TokenLogprob(token_id=i, logprob=-1.0) for i in ids[1:]]
    return inference_pb2.GenerateResponse(
        prompt_logprobs=one, finish_reason=inference_pb2.FINISH_REASON_LENGTH
    )


@pytest.mark.parametrize(
    ("peer", "passes"),
    [
        (FakePeer(), True),
        (FakePeer(own=-1 - 0.9 * gate.MEAN_BOUND, other=-2.0), True),
        (FakePeer(own=-1 - 1.1 * gate.MEAN_BOUND, other=-2.0), False),
        (FakePeer(own=-1.1, other=-1.15), False),
        (FakePeer(regret=0.9 * gate.REGRET_BOUND), True),
        (FakePeer(regret=1.1 * gate.REGRET_BOUND), False),
        (FakePeer(regret=0.05, others=0.06), False),
    ],
    ids=["equal", "within", "too far", "too alike", "near ties", "not its own", "anyone's"],
)
async def test_gate(peer: FakePeer, passes: bool, server: FakeServer) -> None:
    server.on_generate = _score_minus_one
    streams = [GateRequest("load-0", (0, 6, 7)), GateRequest("load-1", (1, 9))]
    async with AsyncClient(server.address) as client:
        check = gate.check(client, peer, streams, 4)  # type: ignore[arg-type]
        if passes:
            seen = await check
            # Three tokens of prompt and four of answer, less the first; two and four.
            assert (seen.answers, seen.tokens) == (2, 6 + 5)
            assert seen.other_adapter_regret == pytest.approx(0.3)
            assert "gate passed" in gate_line(seen)
        else:
            with refused(gate.GateFailed, system="veneer"):
                await check


# --------------------------------------------------------------------------- peer


async def test_peer_that_cannot_load_says_why(tmp_path: Path) -> None:
    peer = PeftPeerProcess(tmp_path, {}, 1, tmp_path / "peer.log")
    with refused(PeerError, peer="peft"):
        async with peer:
            pass


@pytest.mark.real_base
async def test_peer_decodes_mixed_batches(base_folder: Path, tmp_path: Path) -> None:
    shape = read_base_shape(base_folder)
    adapters = make_adapters(tmp_path, shape, count=2, rank=4, seed=5)
    async with PeftPeerProcess(base_folder, adapters, 1, tmp_path / "peer.log") as peer:
        prompts = [[2000, 3000, 4000], [2000, 3000, 4000, 5000, 6000]]
        both = await peer.generate(
            Generate(prompts=prompts, adapters=["load-0", "load-1"], tokens=3)
        )
        assert [len(row) for row in both.rows] == [3, 3]
        assert len(both.step_s) == 3
        assert sorted(both.step_s) == both.step_s
        assert both.step_s[-1] <= both.wall_s
        scores = [
            (await peer.score(PeftScore(row=prompts[1], adapter=name))).logprobs
            for name in ("load-0", "load-1", "load-0")
        ]
        assert len(scores[0]) == 4
        assert scores[0] == scores[2]
        assert scores[0] != scores[1]


@pytest.mark.real_base
def test_compare_on_the_real_server(base_folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    common = ["--spawn", "--base-folder", str(base_folder), "--threads", "2"]
    common += ["--server-flag", "--cache-dir", "--server-flag", str(cache_dir)]
    done = CliRunner().invoke(
        cli,
        [
            "compare",
            *common,
            "--streams",
            "2",
            "--generate",
            "2",
            "--rank",
            "4",
            "--tokens",
            "8",
            "--prompt-tokens",
            "8..12",
            "--repeat",
            "1",
            "--json",
            str(tmp_path / "c.json"),
        ],
    )
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["gate"]["answers"] == 2
    assert result["gate"]["regret"] < result["gate"]["other_adapter_regret"]
    assert [level["streams"] for level in result["levels"]] == [2]
    assert result["levels"][0]["systems"]["veneer"]["rounds"][0]["tokens"] == 16
    assert done.output.strip().splitlines()[-1].startswith("ratio_2=")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--peer", "vllm"), "--vllm-python"),
        (("--peer", "llama-server", "--llama-server", "nowhere"), "--llama-server"),
        (("--prompt-tokens", "lognormal:9:1:99"), "--prompt-tokens"),
        (("--streams", "0"), "--streams"),
        (("--rate", "0", "--peer", "vllm"), "--rate"),
        (("--rate", "2"), "PEFT has no server"),
        (("--fail-if", "ratio_2<1"), "ratio_1, ratio_8, ratio_32"),
    ],
)
def test_bad_options_before_anything_is_started(options: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(cli, ["compare", "--spawn", *options])
    assert done.exit_code == 1
    assert told in done.stderr


WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from veneer_loadtest.__main__ import main
main()
"""


def without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`veneer-loadtest` where some packages are not installed."""
    command = [sys.executable, "-P", "-c", WITHOUT, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("peer", ["peft", "llama-server"])
def test_where_peft_is_not_installed_its_extra_is_named(peer: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = str(tmp_path / "file")
    options = ["--peer", peer, "--llama-server", file, "--llama-model", file]
    done = without("bitsandbytes,peft", "compare", "--spawn", *options)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "bitsandbytes, peft are not installed: " in line
    assert line.endswith(install_extra("train"))


TRAIN_ALONE = "torch,transformers,accelerate,bitsandbytes,peft,gguf,safetensors,yaml"


@pytest.mark.parametrize("command", ["compare", "run", "report"])
def test_commands_are_there_without_what_the_peers_run_on(command: str) -> None:
    done = without(TRAIN_ALONE, command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"veneer-loadtest {command}" in done.stdout
