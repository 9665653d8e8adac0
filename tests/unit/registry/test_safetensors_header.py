"""Every rule of the header parser, each with its own crafted file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from veneer_registry.errors import AdapterInvalid
from veneer_registry.safetensors_header import CHECKPOINT_LIMITS, HeaderLimits, read_header

from tests.adapter_files import parse_header
from tests.refused import refused
from tests.unit.registry.kit import raw_file


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD: dict[str, tuple[bytes, str | None, str]] = {
    # name -> (file, tensor to blame, words of the message)
    "empty file": (b"", None, "has 0 bytes"),
    "no header": (b"\x01\x02", None, "has 2 bytes"),
    "header past the end": ((100).to_bytes(8, "little") + b"{}", None, "cut off"),
    "huge header": ((1 << 62).to_bytes(8, "little") + b"{}", None, "more than"),
    "not JSON": (raw_file(b"{x}", b""), None, "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}', b""), None, "not valid JSON"),
    "a list": (raw_file(b"[]", b""), None, "one JSON object"),
    "NaN": (raw_file(b'{"a": NaN}', b""), None, "not valid JSON"),
    "float overflow": (raw_file(b'{"a": 1e999}', b""), None, "not valid JSON"),
    "long integer": (raw_file(b'{"a": ' + b"9" * 5000 + b"}", b""), None, "not valid JSON"),
    "deep nesting": (raw_file(b"[" * 100_000 + b"]" * 100_000, b""), None, "nested"),
    "lone surrogate": (raw_file(b'{"\\ud800": 1}', b""), None, "not valid JSON"),
    "duplicate tensor": (
        raw_file(b'{"a": {}, "a": {}}', b""),
        None,
        "'a' occurs twice",
    ),
    "duplicate field": (
        raw_file(
            b'{"a": {"dtype":"F32","dtype":"F16","shape":[2,2],"data_offsets":[0,16]}}',
            bytes(16),
        ),
        None,
        "'dtype' occurs twice",
    ),
    "metadata list": (raw_file({"__metadata__": []}, b""), None, "__metadata__"),
    "metadata number": (raw_file({"__metadata__": {"a": 1}}, b""), None, "__metadata__"),
    "no entry object": (raw_file({"a": 3}, b""), "a", "exactly"),
    "extra field": (raw_file({"a": {**entry(), "x": 1}}, bytes(16)), "a", "exactly"),
    "missing field": (raw_file({"a": {"dtype": "F32"}}, b""), "a", "exactly"),
    "dtype I64": (raw_file({"a": entry("I64")}, bytes(16)), "a", "'I64'"),
    "dtype list": (raw_file({"a": entry(["F32"])}, bytes(16)), "a", "dtype"),
    "shape string": (raw_file({"a": entry(shape="22")}, bytes(16)), "a", "not a list of sizes"),
    "shape float": (
        raw_file({"a": entry(shape=[2.0, 2])}, bytes(16)),
        "a",
        "not a list of sizes",
    ),
    "shape bool": (
        raw_file({"a": entry(shape=[True, 4])}, bytes(16)),
        "a",
        "not a list of sizes",
    ),
    "shape negative": (raw_file({"a": entry(shape=[-2, -2])}, bytes(16)), "a", "not a list"),
    "zero size": (raw_file({"a": entry(shape=[0, 1 << 60], offsets=[0, 0])}, b""), "a", "size"),
    "vast size": (raw_file({"a": entry(shape=[1 << 60, 1])}, bytes(16)), "a", "each size"),
    "many dimensions": (
        raw_file({"a": entry(shape=[1] * 9, offsets=[0, 4])}, bytes(4)),
        "a",
        "9 dimensions",
    ),
    "product overflow": (
        raw_file({"a": entry(shape=[1 << 28] * 4)}, bytes(16)),
        "a",
        "spans 16 bytes",
    ),
    "offsets short": (raw_file({"a": entry(offsets=[0])}, bytes(16)), "a", "data_offsets"),
    "offsets negative": (raw_file({"a": entry(offsets=[-16, 0])}, b""), "a", "data_offsets"),
    "offsets backwards": (raw_file({"a": entry(offsets=[16, 0])}, bytes(16)), "a", "spans -16"),
    "size differs": (raw_file({"a": entry(offsets=[0, 12])}, bytes(12)), "a", "spans 12"),
    "overlap": (
        raw_file({"a": entry(), "b": entry(offsets=[8, 24])}, bytes(24)),
        "b",
        "overlaps",
    ),
    "same bytes": (raw_file({"a": entry(), "b": entry()}, bytes(16)), "b", "overlaps"),
    "hole": (raw_file({"a": entry(), "b": entry(offsets=[20, 36])}, bytes(36)), "b", "hole"),
    "hole in front": (raw_file({"a": entry(offsets=[4, 20])}, bytes(20)), "a", "hole"),
    "cut off": (raw_file({"a": entry()}, bytes(15)), None, "cut off"),
    "trailing bytes": (raw_file({"a": entry()}, bytes(17)), None, "belong to no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    data, tensor, words = BAD[case]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterInvalid) as caught:
        parse_header(path)
    assert words in caught.value.message
    assert caught.value.metadata["file"] == "adapter_model.safetensors"
    assert caught.value.metadata.get("tensor") == tensor
    if tensor is not None:
        assert repr(tensor) in caught.value.message


def test_too_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        raw_file({f"t{n}": entry(shape=[0], offsets=[0, 0]) for n in range(5)}, b"")
    )
    limits = HeaderLimits(1 << 20, 4, {"F32": 32}, 4, 0, 8)
    with (
        refused(AdapterInvalid, file="x.safetensors", cause="tensors"),
        path.open("rb") as file,
    ):
        read_header(file, "x.safetensors", limits)


def test_foreign_names_are_cut_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file({"n" * 100_000: 1}, b""))
    with pytest.raises(AdapterInvalid) as caught:
        parse_header(path)
    assert len(caught.value.message) < 400
    assert all(len(value) < 400 for value in caught.value.metadata.values())


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    import numpy as np

    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16).reshape(4, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = parse_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    whole = (tmp_path / "x.safetensors").read_bytes()
    for name, array in tensors.items():
        info = header.tensors[name]
        assert info.shape == array.shape
        assert whole[info.begin : info.end] == array.tobytes()


def test_checkpoints_may_hold_scalars_and_other_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {
        "a": entry("U8", [3], [0, 3]),
        "b": entry("F32", [], [3, 7]),
        "c": entry("I64", [0], [7, 7]),
    }
    path.write_bytes(raw_file(header, bytes(7)))
    assert set(parse_header(path, CHECKPOINT_LIMITS).tensors) == {"a", "b", "c"}
    with pytest.raises(AdapterInvalid):
        parse_header(path)
