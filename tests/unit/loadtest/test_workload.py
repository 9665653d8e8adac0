"""Synthetic adapters, prompts, options and statistics of the load tester."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from veneer_client import VeneerError
from veneer_loadtest import report, setup, workload
from veneer_loadtest.workload import BaseShape, make_adapter, make_adapters, make_streams
from veneer_registry.format import read_adapter

SHAPE = BaseShape("tiny", layers=2, hidden=32, intermediate=64, q_out=32, kv_out=16, vocab=5000)


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


def test_b_is_not_zero(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", SHAPE, rank=4, seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.float().std() > 0.01 for tensor in tensors.values())


@example([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # half-way: to even
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_rounding_is_torchs(values: list[float]) -> None:
    ours = workload._bf16(np.array(values, dtype=np.float64))
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


def test_streams() -> None:
    streams = make_streams(("a", "b", "c"), count=7, prompt_tokens=(16, 64), vocab=500, seed=3)
    assert [s.adapter for s in streams] == list("abcabca")
    lengths = sorted(len(s.prompt) for s in streams)
    assert (lengths[0], lengths[-1]) == (16, 64)
    assert all(0 < token < 500 for s in streams for token in s.prompt)
    assert len({s.prompt for s in streams}) == 7
    again = make_streams(("a", "b", "c"), count=7, prompt_tokens=(16, 64), vocab=500, seed=3)
    assert again == streams


def test_options() -> None:
    assert setup.parse_streams("1,8,32") == (1, 8, 32)
    assert setup.parse_range("16..64") == (16, 64)
    assert setup.parse_range("40") == (40, 40)
    for bad in ("", "0", "a", "1,,2", "8,-1"):
        with pytest.raises(VeneerError, match="--streams"):
            setup.parse_streams(bad)
    for bad in ("", "64..16", "0..3", "a..b"):
        with pytest.raises(VeneerError, match="--prompt-tokens"):
            setup.parse_range(bad)


def test_adapter_folders(tmp_path: Path) -> None:
    make_adapter(tmp_path / "One", SHAPE, rank=4, seed=1)
    (tmp_path / "notes").mkdir()
    assert setup.find_adapters(tmp_path) == {"one": tmp_path / "One"}
    with pytest.raises(VeneerError, match="--adapters"):
        setup.find_adapters(tmp_path / "notes")


async def test_a_server_must_be_given(tmp_path: Path) -> None:
    for spawn, address in ((False, None), (True, "127.0.0.1:1")):
        with pytest.raises(VeneerError, match="either --spawn"):
            async with setup.target(
                spawn=spawn, address=address, base_folder=tmp_path, threads=1, flags=()
            ):
                pass


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    wanted = float(np.quantile(values, share))
    assert report.percentile(values, share) == pytest.approx(wanted, rel=1e-9, abs=1e-6)
