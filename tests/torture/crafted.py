"""Craft about 200 adapters, valid and invalid, which row 1 damages further; and size bombs."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from veneer_registry.adapter import PROJECTIONS

from tests.torture.mutations import STRANGE
from tests.unit.registry.kit import bundle_files, make_adapter, make_tensors, raw_file

Files = dict[str, bytes]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINING, TEMPLATE = "training_manifest.json", "chat_template.jinja"

ODD_KEYS: dict[str, Any] = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 2]],
    "rank_pattern": {"(a+)+$": 4},
    "alpha_pattern": {"no_such_module": 4},
    "target_modules": "(a|a)*$",
    "auto_mapping": {"parent_library": "os", "base_model_class": "system"},
    "trainable_token_indices": [1],
    "lora_bias": True,
    "new_key": 1,
    "r": 0,
    "lora_alpha": "8",
}


def crafted() -> list[Files]:
    """Return valid adapters with every dtype and some ranks, targets and options; then adapters
    with one error each."""
    good = list(_good())
    return [*good, *_bad(good[0])]


def _good() -> Any:
    targets = (("q_proj",), ("q_proj", "v_proj"), ("up_proj", "down_proj"), PROJECTIONS)
    options: tuple[dict[str, Any], ...] = (
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.0": 3}, "lora_dropout": 0.1},
        {"target_modules": "all-linear", "base_model_name_or_path": "someone/base"},
    )
    many = itertools.product(("F32", "F16", "BF16"), (1, 2, 16), targets, ((0,), (0, 1)))
    with tempfile.TemporaryDirectory() as folder:
        for number, (dtype, rank, projections, layers) in enumerate(many):
            option = options[number % len(options)]
            if "alpha_pattern" in option:
                option = {**option, "alpha_pattern": {projections[0]: 3}}
            tensors = make_tensors(rank, dtype=dtype, layers=layers, projections=projections)
            path = make_adapter(Path(folder), {"r": rank, **option}, tensors)
            files = bundle_files(path)
            if number % 3 == 0:
                files[TEMPLATE] = b"{{ messages }}"
            if number % 4 == 0:
                prints = {"weights": "a" * 64, "tokenizer": "b" * 64}
                document = {"base_fingerprint": prints, "metrics": {"loss": 1.5}, "n": [1]}
                files[TRAINING] = json.dumps(document).encode()
            yield files


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a valid safetensors file into header and data."""
    end = 8 + int.from_bytes(weights[:8], "little")
    return json.loads(weights[8:end]), weights[end:]


def _bad(good: Files) -> Any:
    config = json.loads(good[CONFIG])
    for key, value in ODD_KEYS.items():
        yield {**good, CONFIG: json.dumps({**config, key: value}).encode()}
    header, data = split(good[WEIGHTS])
    first = next(name for name in header if name != "__metadata__")
    for field, value in itertools.product(("dtype", "shape", "data_offsets"), STRANGE[::2]):
        entry = {**header[first], field: value}
        yield {**good, WEIGHTS: raw_file({**header, first: entry}, data)}
    for name in ("../../etc/x", "", "x" * 5000, "base_model.model.lm_head.lora_A.weight"):
        renamed = {name: header[first], **{k: v for k, v in header.items() if k != first}}
        yield {**good, WEIGHTS: raw_file(renamed, data)}
    text = json.dumps(header)
    twice = "{" + f'"{first}":{json.dumps(header[first])},' + text[1:]
    yield {**good, WEIGHTS: raw_file(twice.encode(), data)}
    yield {**good, WEIGHTS: raw_file(header, data + b"tail")}
    yield {**good, WEIGHTS: raw_file(header, data[:-1])}
    yield {**good, WEIGHTS: b"PK\x03\x04" + data}
    yield {**good, CONFIG: b'{"r": 4, ' + good[CONFIG][1:]}
    yield {**good, TRAINING: json.dumps({"base_fingerprint": {"weights": "c" * 64}}).encode()}
    yield {**good, TEMPLATE: b"\xff\xfe"}
    yield {name: value for name, value in good.items() if name != CONFIG}
    yield {**good, "adapter_model.bin": b"pickle"}


def bombs(good: Files, header_bytes: int) -> dict[str, Files]:
    """Return files of the largest allowed size that are expensive to check, by name."""
    header, data = split(good[WEIGHTS])
    rest = json.dumps(header)[1:]
    room = header_bytes - len(rest) - 64

    def weights(filling: str) -> Files:
        return {**good, WEIGHTS: raw_file(f"{{{filling}{rest}".encode(), data)}

    entry = '{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    tensors = (f'"{n}":{entry},' for n in range(room // (len(entry) + 12)))
    config_room = (1 << 20) - 200
    config = good[CONFIG].decode().rstrip()[:-1]
    return {
        "header of empty lists": weights('"x":[' + "[]," * (room // 3 - 3) + "[]],"),
        "header of empty objects": weights('"x":[' + "{}," * (room // 3 - 3) + "{}],"),
        "header of empty tensors": weights("".join(tensors)),
        "header of small numbers": weights('"x":[' + "1," * (room // 2 - 6) + "1],"),
        "header of short keys": weights("".join(f'"{n:x}":0,' for n in range(room // 11))),
        "header of escapes": weights('"x":"' + "\\u00e9" * (room // 6 - 3) + '",'),
        "header of spaces": weights(" " * room),
        "header of one number": weights('"x":' + "9" * (room - 8) + ","),
        "deep header": weights('"x":' + "[" * (room - 8) + ","),
        "config of empty lists": {
            **good,
            CONFIG: (config + ',"x":[' + "[]," * (config_room // 3) + "[]]}").encode(),
        },
        "config of rank patterns": {
            **good,
            CONFIG: (
                config
                + ',"rank_pattern":{'
                + ",".join(f'"a{n}":4' for n in range(config_room // 12))
                + "}}"
            ).encode(),
        },
    }
