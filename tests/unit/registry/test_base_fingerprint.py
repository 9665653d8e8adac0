"""A base's fingerprint depends on its files, and only on what identifies it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from veneer_registry.errors import InvalidField
from veneer_registry.fingerprint import fingerprint_base

from tests.refused import refused
from tests.unit.registry.kit import raw_file

TENSORS = {f"model.w{n}": np.full((2, 3), n, np.float32) for n in range(4)}


def make_base(folder: Path, shards: int = 1) -> Path:
    folder.mkdir()
    if shards == 1:
        save_file(TENSORS, folder / "model.safetensors")
    else:
        names = sorted(TENSORS)
        where = {name: f"model-{n % shards}.safetensors" for n, name in enumerate(names)}
        for file in set(where.values()):
            save_file({n: TENSORS[n] for n in names if where[n] == file}, folder / file)
        index = json.dumps({"weight_map": where})
        (folder / "model.safetensors.index.json").write_text(index)
    (folder / "tokenizer.json").write_text('{"b": 1, "a": [1.5, "é"]}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    return folder


def test_sharding_does_not_matter(tmp_path: Path) -> None:
    one = fingerprint_base(make_base(tmp_path / "1"))
    two = fingerprint_base(make_base(tmp_path / "2", shards=2))
    assert one == two
    assert all(len(part) == 64 for part in (one.weights, one.tokenizer, one.template))
    assert one.quantization == ""


def test_files_that_no_index_names_are_ignored(tmp_path: Path) -> None:
    one = make_base(tmp_path / "1", shards=2)
    before = fingerprint_base(one)
    save_file({"model.w0": np.ones(3, np.float32)}, one / "consolidated.safetensors")
    assert fingerprint_base(one) == before


def test_each_part_follows_its_file(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "1")
    before = fingerprint_base(folder)
    (folder / "tokenizer.json").write_text('{ "a": [1.5, "\\u00e9"], "b": 1 }')
    assert fingerprint_base(folder) == before, "spelling of JSON must not matter"
    (folder / "tokenizer.json").write_text('{"b": 2, "a": [1.5, "é"]}')
    changed = fingerprint_base(folder)
    assert changed.tokenizer != before.tokenizer
    assert changed.weights == before.weights
    (folder / "chat_template.jinja").write_text("{{ y }}")
    assert fingerprint_base(folder).template != before.template
    save_file({**TENSORS, "model.w0": TENSORS["model.w1"]}, folder / "model.safetensors")
    assert fingerprint_base(folder).weights != before.weights


def test_renamed_tensor_and_reshaped_tensor_differ(tmp_path: Path) -> None:
    whole = make_base(tmp_path / "1")
    prints = {fingerprint_base(whole).weights}
    save_file(
        {**TENSORS, "model.w0": np.zeros((3, 2), np.float32)}, whole / "model.safetensors"
    )
    prints.add(fingerprint_base(whole).weights)
    renamed = {name.replace("w3", "w9"): array for name, array in TENSORS.items()}
    save_file(renamed, whole / "model.safetensors")
    prints.add(fingerprint_base(whole).weights)
    assert len(prints) == 3


def test_quantization_is_canonical(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "1")
    one = fingerprint_base(folder, quantization={"a": 1, "b": True})
    two = fingerprint_base(folder, quantization={"b": True, "a": 1})
    assert one.quantization == two.quantization != ""


def test_template_in_the_tokenizer_config(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "1")
    as_file = fingerprint_base(folder).template
    (folder / "chat_template.jinja").unlink()
    assert fingerprint_base(folder).template == ""
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    assert fingerprint_base(folder).template == as_file
    (folder / "tokenizer_config.json").write_text("{}")
    assert fingerprint_base(folder).template == ""


def test_sentencepiece_and_no_tokenizer(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "1")
    (folder / "tokenizer.json").unlink()
    assert fingerprint_base(folder).tokenizer == ""
    (folder / "tokenizer.model").write_bytes(b"\x00")
    assert len(fingerprint_base(folder).tokenizer) == 64


def test_cache_is_used_and_notices_changes(tmp_path: Path) -> None:
    folder, cache = make_base(tmp_path / "1"), tmp_path / "cache"
    first = fingerprint_base(folder, cache_dir=cache)
    (entry,) = (cache / "fingerprints").iterdir()
    kept = entry.read_text()
    # It is read: a content that changes without its size and time is not noticed.
    file = folder / "model.safetensors"
    data, status = file.read_bytes(), file.stat()
    for content, noticed in ((data[:-1] + bytes([data[-1] ^ 1]), True), (data, False)):
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert fingerprint_base(folder, cache_dir=cache) == first, "not read"
        assert (fingerprint_base(folder) != first) == noticed
    # What is kept is believed only with its checksum.
    digest = json.loads(kept)["weights"]
    other = kept.replace(digest, "f" * 64)
    assert other != kept
    for damaged in (other, kept[: len(kept) // 2], "", "damaged", '{"weights": []}', "[]"):
        entry.write_text(damaged)
        assert fingerprint_base(folder, cache_dir=cache) == first
        assert entry.read_text() == kept
    # Another copy of the same size and time has another key.
    copy = make_base(tmp_path / "2")
    os.utime(copy / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint_base(copy, cache_dir=cache) == first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert fingerprint_base(folder, cache_dir=cache) == first


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    """It is a file here, which stops root too."""
    folder = make_base(tmp_path / "1")
    (tmp_path / "cache").touch()
    assert fingerprint_base(folder, cache_dir=tmp_path / "cache") == fingerprint_base(folder)


@pytest.mark.parametrize(
    ("file", "data", "named"),
    [
        ("model.safetensors", None, {"file": "*.safetensors", "cause": "missing"}),
        ("model.safetensors", b"\x01", {"cause": "damaged"}),
        ("model.safetensors", raw_file({"a": 1}, b""), {"cause": "damaged"}),
        ("tokenizer.json", b"{", {"file": "tokenizer.json", "cause": "json"}),
        ("tokenizer_config.json", b"[]", {"file": "tokenizer_config.json", "cause": "json"}),
    ],
)
def test_broken_bases(
    tmp_path: Path, file: str, data: bytes | None, named: Mapping[str, str]
) -> None:
    folder = make_base(tmp_path / "1")
    (folder / "chat_template.jinja").unlink()
    if data is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data)
    with refused(InvalidField, field="base", **named):
        fingerprint_base(folder)


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{}", {"cause": "damaged"}),
        ('{"weight_map": {"a": "../x.safetensors"}}', {"cause": "outside"}),
        (
            '{"weight_map": {"a": "gone.safetensors"}}',
            {"file": "gone.safetensors", "cause": "missing"},
        ),
    ],
)
def test_broken_index(tmp_path: Path, index: str, named: Mapping[str, str]) -> None:
    folder = make_base(tmp_path / "1", shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with refused(InvalidField, field="base", **named):
        fingerprint_base(folder)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "1", shards=2)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.w0": TENSORS["model.w0"]}, folder / "more.safetensors")
    with refused(InvalidField, tensor="model.w0", cause="two_files"):
        fingerprint_base(folder)
