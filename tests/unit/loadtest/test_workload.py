"""Synthetic adapters, options and statistics of the load tester."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from veneer_loadtest import report, setup, workload
from veneer_loadtest.commands.load_options import names_of, numbers_of, targets_of
from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.adapters import AdapterOptions, chosen
from veneer_loadtest.load.spec import Lengths, parse_lengths
from veneer_loadtest.quantiles import percentile
from veneer_loadtest.workload import BaseSizes, make_adapter, make_adapters
from veneer_registry.format import read_adapter

from tests.refused import refused

SHAPE = BaseSizes("tiny", layers=2, hidden=32, intermediate=64, q_out=32, kv_out=16, vocab=5000)


def test_adapter_is_accepted_and_whole(tmp_path: Path) -> None:
    manifest = read_adapter(make_adapter(tmp_path / "a", SHAPE, rank=4, seed=1), None)
    assert len(manifest.modules) == 2 * 7
    assert {(m.rank, m.scaling) for m in manifest.modules} == {(4, 2.0)}
    assert manifest.file_dtype == "BF16"


def test_adapters_differ_and_are_reproducible(tmp_path: Path) -> None:
    made = make_adapters(tmp_path / "x", SHAPE, count=3, rank=4, seed=1)
    again = make_adapters(tmp_path / "y", SHAPE, count=3, rank=4, seed=1)
    other = make_adapters(tmp_path / "z", SHAPE, count=3, rank=4, seed=2)
    digests = [read_adapter(path, None).weights_digest for path in made.values()]
    assert len(set(digests)) == 3
    assert digests == [read_adapter(path, None).weights_digest for path in again.values()]
    assert not set(digests) & {read_adapter(p, None).weights_digest for p in other.values()}


def test_an_adapter_on_some_projections(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", SHAPE, rank=2, seed=1, targets=workload.ATTENTION)
    manifest = read_adapter(folder, None)
    assert manifest.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (len(manifest.modules), manifest.max_rank) == (2 * 4, 2)


class Server:
    """FAKE client of a server that has ``old`` and notes what happens to it."""

    def __init__(self) -> None:
        self.names = ["old"]

    async def push(self, _: Path, name: str) -> SimpleNamespace:
        new = name not in self.names
        if new:
            self.names.append(name)
        return SimpleNamespace(published=new)

    async def delete(self, name: str) -> None:
        self.names.remove(name)


@pytest.mark.parametrize("keep", [False, True])
async def test_what_is_published_goes_again_unless_kept(tmp_path: Path, keep: bool) -> None:
    server = Server()
    pairs = ((name, tmp_path) for name in ("old", "new"))
    async with setup.published(server, pairs, activate=False, keep=keep):  # type: ignore[arg-type]
        assert server.names == ["old", "new"]
    assert server.names == (["old", "new"] if keep else ["old"])


def test_synthetic_adapters_take_ranks_in_turn_and_little_disk(tmp_path: Path) -> None:
    options = AdapterOptions(generate=(1, 5), ranks=(2, 4), targets=("q_proj",), seed=3)
    made, levels = chosen(options, None, SHAPE, tmp_path, lambda text: None)
    assert [len(level) for level in levels] == [1, 5]
    ranks = []
    for _, folder in made:
        ranks.append(read_adapter(folder, None).max_rank)
        assert len(list(tmp_path.iterdir())) == 1, "only the one that is being pushed"
    assert ranks == [2, 4, 2, 4, 2]
    assert not list(tmp_path.iterdir())


def test_b_is_not_zero(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", SHAPE, rank=4, seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.float().std() > 0.01 for tensor in tensors.values())


@example([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # half-way: to even
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_rounding_is_torchs(values: list[float]) -> None:
    ours = workload.to_bfloat16(np.array(values, dtype=np.float64))
    torchs = torch.tensor(values, dtype=torch.float32).bfloat16().view(torch.int16)
    assert ours.astype(np.int16).tolist() == torchs.tolist()


def test_shape_of_a_config(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = workload.read_base_shape(tmp_path)
    assert (shape.q_out, shape.kv_out) == (64, 32)
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    assert workload.read_base_shape(tmp_path).q_out == 128


def test_options() -> None:
    assert numbers_of("--streams", "1,8, 32", least=1) == (1, 8, 32)
    assert numbers_of("--first", "0,8") == (0, 8)
    assert numbers_of("--first", "") == ()
    assert parse_lengths("--prompt-tokens", "16..64") == Lengths(16, 64)
    assert parse_lengths("--prompt-tokens", "40") == Lengths(40, 40)
    for bad in ("", "0", "a", "1,,2", "8,-1"):
        with refused(BadOption, field="--streams"):
            numbers_of("--streams", bad, least=1)
    for bad in ("", "64..16", "0..3", "a..b"):
        with refused(BadOption, field="--prompt-tokens"):
            parse_lengths("--prompt-tokens", bad)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("--openai=https://gpu.example/v2/x", "--openai=https://gpu.example/v2/x"),
        ("http://[::1]:8000/a/b,/home/me/x", "http://[::1]:8000/a/b,x"),
        ("s3://bucket/adapters/sql", "s3://bucket/adapters/sql"),
        ("run --openai http://h:1 --json /tmp/a.json", "run --openai http://h:1 --json a.json"),
        ("file:///home/me/adapters/sql", "file://sql"),
        ("--json=/home/me/a.json", "--json=a.json"),
        ("/home/me/bin/veneer-loadtest", "veneer-loadtest"),
        ("--mount=/home/a:/home/b", "--mount=a:b"),
        ("relative/path/a.json", "relative/path/a.json"),
        ("127.0.0.1:50051", "127.0.0.1:50051"),
    ],
)
def test_a_command_in_a_result_keeps_urls_and_no_folders(argument: str, told: str) -> None:
    assert report.without_folders(argument) == told


def test_adapter_folders(tmp_path: Path) -> None:
    make_adapter(tmp_path / "One", SHAPE, rank=4, seed=1)
    (tmp_path / "notes").mkdir()
    assert setup.find_adapters(tmp_path) == {"one": tmp_path / "One"}
    with refused(BadOption, field="--adapters"):
        setup.find_adapters(tmp_path / "notes")


async def test_a_server_must_be_given(tmp_path: Path) -> None:
    for spawn, address in ((False, None), (True, "127.0.0.1:1")):
        with refused(BadOption, one_of="--spawn --server"):
            async with setup.target(
                spawn=spawn, address=address, base_folder=tmp_path, threads=1, flags=()
            ):
                pass


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_lies_between_its_neighbours(values: list[float], share: float) -> None:
    ordered = sorted(values)
    place = share * (len(values) - 1)
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(values) - 1)]
    wanted = low + (high - low) * (place - int(place))
    assert percentile(values, share) == pytest.approx(wanted, rel=1e-9, abs=1e-6)


def test_names_with_a_range() -> None:
    assert names_of("sql, load-{8..10}-x ,chat") == (
        "sql",
        "load-8-x",
        "load-9-x",
        "load-10-x",
        "chat",
    )
    assert names_of("a{1..1}") == ("a1",)
    for bad in ("a-{9..1}", "a-{0..1000000}"):
        with refused(BadOption, field="--names"):
            names_of(bad)


def test_targets() -> None:
    assert targets_of("attention") == workload.ATTENTION
    assert set(targets_of("all")) == {m.rpartition(".")[2] for m in SHAPE.projections()}
    assert targets_of("q_proj, up_proj") == ("q_proj", "up_proj")
    for bad in ("", "mlp", "q_proj,x"):
        with refused(BadOption, field="--targets"):
            targets_of(bad)
