"""Write adapter folders as PEFT would, and read the headers of their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from veneer_registry.lora_config import CONFIG_FILE
from veneer_registry.safetensors_header import (
    ADAPTER_LIMITS,
    HeaderLimits,
    SafetensorsHeader,
    read_header,
)
from veneer_registry.weights import WEIGHTS_FILE

_DTYPES: Final = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
_ALIGNMENT: Final = 8


def write_adapter(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``.

    Args:
        folder: created if missing; the two files are replaced.
        config: PEFT's keys; ``peft_type`` and ``task_type`` are added if absent.
        tensors: full name -> float32, float16, or uint16 with raw bfloat16 bits
            (`to_bfloat16`).

    Raises ValueError for other dtypes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}
    text = json.dumps(whole, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    write_safetensors(folder / WEIGHTS_FILE, tensors)


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a minimal safetensors file. Widest dtypes come first, so that all are aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    at = 0
    for name in order:
        array = tensors[name]
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name} is {array.dtype}: use float32, float16 or bfloat16 bits")
        end = at + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            array = tensors[name]
            file.write(
                np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
            )


def parse_header(path: Path, limits: HeaderLimits = ADAPTER_LIMITS) -> SafetensorsHeader:
    """`read_header` of the file at ``path``."""
    with path.open("rb") as file:
        return read_header(file, path.name, limits)
