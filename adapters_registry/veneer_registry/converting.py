"""Converts adapters from mlx-lm and llama.cpp into PEFT folders, which a server accepts.

mlx-lm (facts from its ``tuner/lora.py``): ``adapters.safetensors`` has ``lora_a`` [inputs,
rank] and ``lora_b`` [rank, outputs], the transposes of PEFT's, and computes y + ``scale`` (x a)
b. Rotary halves are in the same order as PEFT's. ``alpha`` has had no effect since 0.14.

llama.cpp (``convert_lora_to_gguf.py`` and ``llama-adapter.cpp``): a GGUF file has PEFT's A as
``NAME.lora_a`` and its B as ``NAME.lora_b``, and scales by ``adapter.lora.alpha`` / rank, or
not at all if that is 0. For the architecture ``llama`` the rows of q and k are interleaved
within each head (see `gguf_adapter`): that is undone here, which needs the numbers of heads.

The files are untrusted. Both headers are read by our own bounded readers: the package ``gguf``
loops as often as a file says, and the client does not need it for anything else. Matrices are
written one by one.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeGuard, cast

import numpy as np
import numpy.typing as npt

from veneer_registry.adapter import PROJECTIONS, Projection
from veneer_registry.bundle_files import MLX_FILE
from veneer_registry.errors import InvalidField
from veneer_registry.format import check_adapter
from veneer_registry.gguf_header import (
    ADAPTER_BOUNDS,
    INTERLEAVED,
    PROJECTION_TENSORS,
    GgufTensor,
    read_gguf_header,
)
from veneer_registry.lora_config import CONFIG_FILE, CONFIG_LIMIT, MAX_RANK
from veneer_registry.regular_files import open_regular
from veneer_registry.replacing import new_folder
from veneer_registry.safetensors_header import TensorInfo, new_header, read_header
from veneer_registry.strict_json import parse_object, refuse, show
from veneer_registry.tensor_names import Side, module_path, parse_tensor_name, tensor_keys
from veneer_registry.weights import MAX_SCALING, WEIGHTS_FILE

Kind = Literal["mlx", "gguf"]
Bits = npt.NDArray[Any]
"""A matrix of float32 or float16, or of uint16 that holds raw bfloat16."""

_MOST_MATRIX: Final = 256 << 20
"""Most bytes of a matrix, which is held in memory: rank 4,096, 16,384 inputs, in float32."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Result of a conversion.

    Attributes:
        modules: adapted projections.
        notes: sentences for the user.
    """

    kind: Kind
    modules: int
    rank: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One A or B in PEFT's layout, with the function that reads it."""

    dtype: str
    shape: tuple[int, int]
    read: Callable[[], Bits]


@dataclass(frozen=True, slots=True)
class _Read:
    """An adapter in another trainer's format.

    Attributes:
        matrices: A and B by layer and projection.
        scaling: rank of a module -> its scaling.
    """

    kind: Kind
    base_name: str
    matrices: Mapping[tuple[int, Projection], Mapping[Side, _Matrix]]
    scaling: Callable[[int], float]
    notes: tuple[str, ...] = ()


def convert_adapter(source: Path, out: Path, *, base: Path | None = None) -> Converted:
    """Write an adapter of another trainer as a PEFT folder, which then passes the checks of
    `check_adapter`. ``out`` appears complete at the end, or not at all.

    Args:
        source: a folder that mlx-lm wrote, or a LoRA in a GGUF file (or a folder with one).
        base: Hugging Face folder of the base, or its config.json: for the numbers of heads
            that a GGUF file for ``llama`` lacks.

    Raises:
        InvalidField: ``out`` exists, or ``base`` is missing or not such a folder.
        AdapterInvalid: ``source`` cannot be converted; the message says why.
    """
    if out.exists():
        raise InvalidField(
            f"{out} exists: remove it, or give another folder", metadata={"field": "out"}
        )
    with _opened(source, base) as read:
        modules = sorted(read.matrices, key=lambda at: (at[0], PROJECTIONS.index(at[1])))
        ranks = {at: _rank(at, read.matrices[at]) for at in modules}
        if not ranks:
            refuse(source.name, "contains no LoRA matrices; convert an adapter")
        with new_folder(out) as staging:
            staging.mkdir()
            _write_config(staging / CONFIG_FILE, read, ranks)
            _write_weights(staging / WEIGHTS_FILE, read, modules)
            check_adapter(staging)
        return Converted(read.kind, len(modules), max(ranks.values()), read.notes)


@contextmanager
def _opened(source: Path, base: Path | None) -> Iterator[_Read]:
    """Open and parse the adapter at ``source``. Its matrices can be read inside the block."""
    if source.is_dir():
        names = {path.name for path in source.iterdir()}
        ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
        if WEIGHTS_FILE in names:
            refuse(
                show(str(source)),
                "is a PEFT adapter already: publish it with `veneer adapter push`",
            )
        if MLX_FILE in names:
            with io.BufferedReader(open_regular(source / MLX_FILE)) as file:
                yield _read_mlx(source, file)
            return
        if len(ggufs) != 1:
            refuse(
                show(str(source)),
                f"has neither {MLX_FILE}, as mlx-lm writes it, nor one GGUF file: give the "
                "adapter's folder or file",
            )
        source = source / ggufs[0]
    if not source.exists():
        refuse(show(str(source)), "does not exist; give the adapter's folder or GGUF file")
    with io.BufferedReader(open_regular(source)) as file:
        yield _read_gguf(source, file, base)


def _rank(at: tuple[int, Projection], pair: Mapping[Side, _Matrix]) -> int:
    """Return the rank of a module; refuse one that lacks A or B, or has two ranks."""
    path = module_path(*at)
    if len(pair) != 2:
        refuse(WEIGHTS_FILE, f"{path} has only one of A and B; save the adapter again")
    rank, other = pair["A"].shape[0], pair["B"].shape[1]
    if rank != other or not 1 <= rank <= MAX_RANK:
        refuse(
            WEIGHTS_FILE,
            f"{path} has ranks {rank} and {other}; need the same, 1 to {MAX_RANK}",
        )
    return rank


def _write_config(path: Path, read: _Read, ranks: Mapping[tuple[int, Projection], int]) -> None:
    alphas = {at: _alpha(read.scaling(rank), rank) for at, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": read.base_name or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module_path(*at): n for at, n in ranks.items() if n != rank},
        "alpha_pattern": {module_path(*at): n for at, n in alphas.items() if n != alpha},
        "target_modules": sorted({projection for _, projection in ranks}),
        "layers_to_transform": sorted({layer for layer, _ in ranks}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _alpha(scaling: float, rank: int) -> float:
    """Return an alpha such that alpha / rank is the scaling, to the last bit if possible."""
    near = scaling * rank
    for alpha in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / rank == scaling:
            return alpha
    return near


def _write_weights(path: Path, read: _Read, modules: Sequence[tuple[int, Projection]]) -> None:
    listed: list[tuple[TensorInfo, _Matrix]] = []
    for at in modules:
        for key, side in zip(tensor_keys(*at), ("A", "B"), strict=True):
            matrix = read.matrices[at][cast(Side, side)]
            size = math.prod(matrix.shape) * (4 if matrix.dtype == "F32" else 2)
            listed.append((TensorInfo(key, matrix.dtype, matrix.shape, 0, size), matrix))
    listed.sort(key=lambda each: each[0].dtype != "F32")  # so that all stay aligned
    with path.open("wb") as out:
        out.write(new_header([info for info, _ in listed], {"format": "pt"}))
        for _, matrix in listed:
            out.write(np.ascontiguousarray(matrix.read()).tobytes())


def _is_number(value: object) -> TypeGuard[float]:
    try:
        return type(value) in (int, float) and math.isfinite(cast(float, value))
    except OverflowError:  # an int beyond all floats
        return False


def _bits(file: BinaryIO, name: str, dtype: str, shape: tuple[int, ...], at: int) -> Bits:
    """Read a matrix from a file, in the file's dtype and layout."""
    stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]
    size = math.prod(shape) * np.dtype(stored).itemsize
    return np.frombuffer(_bytes(file, name, at, size), stored).reshape(shape)


def _bytes(file: BinaryIO, name: str, at: int, size: int) -> bytes:
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        refuse(name, "is cut off; copy it again", cause="cut_off")
    return data


def _check_size(name: str, tensor: str, shape: Sequence[int]) -> None:
    if len(shape) != 2 or not all(shape) or math.prod(shape) * 4 > _MOST_MATRIX:
        refuse(
            name,
            f"has shape {tuple(shape)}; need a matrix of at most {_MOST_MATRIX >> 20} MiB",
            tensor=tensor,
        )


# ------------------------------------------------------------------------- mlx-lm


def _read_mlx(folder: Path, file: BinaryIO) -> _Read:
    with open_regular(folder / CONFIG_FILE) as opened:
        text = opened.read(CONFIG_LIMIT + 1) or b""
    if len(text) > CONFIG_LIMIT:
        refuse(CONFIG_FILE, f"is larger than {CONFIG_LIMIT} bytes; make it smaller")
    config = parse_object(text, file=CONFIG_FILE)
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind != "lora":
        refuse(
            CONFIG_FILE,
            f"is {show(kind)}; only LoRA is served: train with --fine-tune-type lora",
            key="fine_tune_type",
        )
    options = config.get("lora_parameters")
    scale = options.get("scale") if isinstance(options, dict) else None
    if not _is_number(scale):
        refuse(
            CONFIG_FILE,
            "has no number `scale`; give the adapter_config.json that mlx-lm wrote",
            key="lora_parameters",
        )
    if abs(scale) > MAX_SCALING:
        refuse(
            CONFIG_FILE,
            f"scales by {scale:g}; at most {MAX_SCALING:g} is served: train with a smaller "
            "scale",
            key="lora_parameters",
        )
    notes: tuple[str, ...] = ()
    if isinstance(options, dict) and "alpha" in options:
        notes = ("alpha was ignored, as mlx-lm does since 0.14: scale alone counts",)
    found: dict[tuple[int, Projection], dict[Side, _Matrix]] = {}
    for name, tensor in read_header(file, MLX_FILE).tensors.items():
        stem, _, side = name.rpartition(".lora_")
        at = parse_tensor_name(f"{stem}.lora_{side.upper()}.weight") if side in "ab" else None
        if at is None or not stem.startswith("model."):
            refuse(
                MLX_FILE,
                "is not a LoRA matrix of a decoder projection (attention q, k, v, o; MLP gate, "
                "up, down); train these alone (`keys` of lora_parameters)",
                tensor=name,
            )
        _check_size(MLX_FILE, name, tensor.shape)
        rows, columns = tensor.shape
        found.setdefault((at.layer, at.projection), {})[at.side] = _Matrix(
            tensor.dtype, (columns, rows), partial(_transposed, file, tensor)
        )
    model = config.get("model")
    return _Read(
        "mlx", model if isinstance(model, str) else "", found, lambda _: float(scale), notes
    )


def _transposed(file: BinaryIO, tensor: TensorInfo) -> Bits:
    return _bits(file, MLX_FILE, tensor.dtype, tensor.shape, tensor.begin).T


# --------------------------------------------------------------------------- GGUF

_TYPES: Final = ("F32", "F16", "BF16", "Q8_0")
"""The types of the matrices that llama.cpp's converter writes."""
_GGUF_NAME: Final = re.compile(
    r"blk\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<part>[a-z_]+)\.weight\.lora_(?P<side>[ab])"
)
_BLOCK: Final = 32
"""Numbers in a Q8_0 block, which has a float16 scale and then this many int8."""

_PROJECTIONS: Final = {part: name for name, part in PROJECTION_TENSORS.items()}
_OWN_BASE: Final = "give --base with the base that it was trained on"


def _read_gguf(path: Path, file: BinaryIO, base: Path | None) -> _Read:
    facts, tensors = _matrices(path.name, file)
    architecture = facts.get("general.architecture")
    if facts.get("general.type") != "adapter" or facts.get("adapter.type") != "lora":
        refuse(
            path.name,
            "is not a LoRA adapter (general.type, adapter.type); a whole model is served by "
            "`veneer-server --base FILE`",
        )
    if "adapter.alora.invocation_tokens" in facts:
        refuse(path.name, "is an activated LoRA, which is not supported; train plain LoRA")
    if not isinstance(architecture, str) or architecture not in INTERLEAVED:
        refuse(
            path.name,
            f"is for the architecture {show(architecture)}; served are "
            f"{', '.join(INTERLEAVED)}: give the PEFT folder that it was made from",
        )
    alpha = facts.get("adapter.lora.alpha")
    if not _is_number(alpha):
        refuse(path.name, "has no number; convert it again", key="adapter.lora.alpha")
    scaling = float(alpha)
    found: dict[tuple[int, Projection], dict[Side, _Matrix]] = {}
    for tensor in tensors:
        at, side = _gguf_place(path.name, tensor.name)
        read = partial(_stored, file, path.name, tensor)
        dtype = "F32" if tensor.kind == "Q8_0" else tensor.kind
        matrix = _Matrix(dtype, cast(tuple[int, int], tensor.shape), read)
        pair = found.setdefault(at, {})
        if side in pair:
            refuse(path.name, "occurs twice; convert it again", tensor=tensor.name)
        pair[side] = matrix
    if INTERLEAVED[architecture]:
        rotary = [at for at in found if at[1] in ("q_proj", "k_proj") and "B" in found[at]]
        if rotary:
            inputs, heads = _heads(path.name, base)
        for at in rotary:
            if "A" in found[at] and found[at]["A"].shape[1] != inputs:
                columns = found[at]["A"].shape[1]
                refuse(path.name, f"has {columns} inputs, but --base has {inputs}; {_OWN_BASE}")
            found[at]["B"] = _separated(path.name, found[at]["B"], *heads[at[1]])
    return _Read(
        "gguf",
        _gguf_base(facts),
        found,
        lambda rank: scaling / rank if scaling else 1.0,
    )


def _matrices(name: str, file: BinaryIO) -> tuple[Mapping[str, Any], Sequence[GgufTensor]]:
    """Read an adapter file's metadata and its matrices."""
    header = read_gguf_header(file, name, ADAPTER_BOUNDS)
    for tensor in header.tensors:
        _check_size(name, tensor.name, tensor.shape)
        if tensor.kind not in _TYPES:
            refuse(
                name,
                f"has the type {tensor.kind}, which is not read; convert it as f32, f16, bf16 "
                "or q8_0",
                tensor=tensor.name,
            )
    return header.facts, header.tensors


def _gguf_place(file: str, name: str) -> tuple[tuple[int, Projection], Side]:
    found = _GGUF_NAME.fullmatch(name)
    if found is None or found["part"] not in _PROJECTIONS:
        refuse(
            file,
            "is not a LoRA matrix of a decoder projection (attention q, k, v, o; MLP gate, up, "
            "down); retrain without embeddings, heads, norms or other layers",
            tensor=name,
        )
    side: Side = "A" if found["side"] == "a" else "B"
    return (int(found["layer"]), _PROJECTIONS[found["part"]]), side


def _stored(file: BinaryIO, name: str, tensor: GgufTensor) -> Bits:
    if tensor.kind != "Q8_0":
        return _bits(file, name, tensor.kind, tensor.shape, tensor.begin)
    block = np.dtype([("scale", "<f2"), ("numbers", "i1", (_BLOCK,))])
    blocks = np.frombuffer(_bytes(file, name, tensor.begin, tensor.size), block)
    numbers = blocks["scale"].astype(np.float32)[:, None] * blocks["numbers"]
    return np.asarray(numbers, np.float32).reshape(tensor.shape)


def _heads(name: str, base: Path | None) -> tuple[int, Mapping[Projection, tuple[int, int]]]:
    """Read the base's config.json. Return (inputs of q and k, projection -> (number of heads,
    rows of each))."""
    if base is None:
        raise InvalidField(
            f"{name} interleaves the rows of each attention head, and does not say how many "
            "heads there are: give --base with the base's Hugging Face folder, or its "
            "config.json",
            metadata={"field": "base", "cause": "heads"},
        )
    path = base / "config.json" if base.is_dir() else base
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(CONFIG_LIMIT))
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        inputs = config["hidden_size"]
        numbers = (heads, kv_heads, inputs, config.get("head_dim") or inputs // heads)
        if not all(type(n) is int and 1 <= n <= 1 << 16 for n in numbers):
            raise ValueError("its numbers of heads are no numbers")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        ZeroDivisionError,
    ) as error:
        raise InvalidField(
            f"{path} is not the config.json of a model ({type(error).__name__}): give --base "
            "with the base's Hugging Face folder",
            metadata={"field": "base"},
        ) from error
    rows = numbers[-1]
    return inputs, {"q_proj": (heads, rows), "k_proj": (kv_heads, rows)}


def _separated(name: str, matrix: _Matrix, heads: int, head_rows: int) -> _Matrix:
    """Return B with the rows of each head in PEFT's order: first half, then second half."""
    rows, rank = matrix.shape
    if rows != heads * head_rows or head_rows % 2:
        refuse(
            name,
            f"has {rows} outputs, but --base has {heads} heads of {head_rows}; {_OWN_BASE}",
        )

    def read() -> Bits:
        pairs = matrix.read().reshape(heads, -1, 2, rank)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, rank)

    return dataclasses.replace(matrix, read=read)


def _gguf_base(facts: Mapping[str, Any]) -> str:
    """Return the base's hub name, from the URL in the adapter's model card, which llama.cpp's
    converter copies; "" if there is none."""
    url = facts.get("general.base_model.0.repo_url")
    parts = url.rstrip("/").split("/")[-2:] if isinstance(url, str) else []
    return "/".join(parts) if len(parts) == 2 and all(parts) else ""
