"""``adapter_model.safetensors``: which modules it adapts, its digest, its tensors.

Files that others may still write to are read with plain reads into one buffer; only files
of the store are mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from types import MappingProxyType
from typing import BinaryIO, Final

from veneer_registry.adapter import (
    PROJECTIONS,
    BaseSpec,
    LoraModule,
    Projection,
)
from veneer_registry.lora_config import LoraSettings
from veneer_registry.safetensors_header import SafetensorsHeader, TensorInfo, read_header
from veneer_registry.strict_json import refuse, show
from veneer_registry.tensor_names import Side, module_path, parse_tensor_name, tensor_keys
from veneer_registry.values import ServingDtype, find_problem, peak_bits

WEIGHTS_FILE: Final = "adapter_model.safetensors"
MAX_SCALING: Final = 1e4
"""Largest |scaling|: with the bound on elements, it keeps scaled products finite."""

_CHUNK: Final = 1 << 20
_DIGEST_TAG: Final = b"veneer.weights.v1\0"


# ------------------------------------------------------------------ which modules


def read_weights_header(file: BinaryIO) -> SafetensorsHeader:
    """Read the header of an adapter's weights, with tensors under the names that PEFT's
    ``save_pretrained`` gives them, so that all name variants (`tensor_names`) have the same
    digest.

    A `TensorInfo` keeps the name that is in the file, for messages.

    Raises:
        AdapterInvalid: as `read_header`, or the file mixes variants.
    """
    header = read_header(file, WEIGHTS_FILE)
    tensors: dict[str, TensorInfo] = {}
    variants: dict[tuple[bool, str], list[str]] = {}
    for name, tensor in header.tensors.items():
        if (found := parse_tensor_name(name)) is not None:
            variants.setdefault(found.variant, []).append(name)
            name = tensor_keys(found.layer, found.projection)[found.side == "B"]
        tensors[name] = tensor
    if len(variants) > 1:
        rare, *_, usual = sorted(variants.values(), key=len)
        refuse(
            WEIGHTS_FILE,
            f"is named differently from {show(usual[0])}, so they may belong to two adapters; "
            "save one adapter with save_pretrained",
            tensor=rare[0],
            cause="mixed_names",
        )
    return SafetensorsHeader(MappingProxyType(tensors), header.metadata)


def find_modules(
    header: SafetensorsHeader, settings: LoraSettings, base: BaseSpec | None
) -> tuple[LoraModule, ...]:
    """Pair A and B of every projection and determine its rank and scaling.

    Returns modules sorted by (layer, order of `PROJECTIONS`). Raises
    `AdapterInvalid` for any tensor that is not part of such a pair, for shapes
    that do not match each other or ``base``, and for an adapter without tensors.
    """
    pairs: dict[tuple[int, Projection], dict[Side, TensorInfo]] = {}
    for tensor in header.tensors.values():
        name = parse_tensor_name(tensor.name)
        if name is None:
            refuse(
                WEIGHTS_FILE,
                "is not a LoRA matrix of a decoder projection (attention q, k, v, o; MLP gate, "
                "up, down); retrain without biases, embeddings, heads or other layers",
                tensor=tensor.name,
            )
        pairs.setdefault((name.layer, name.projection), {})[name.side] = tensor
    if not pairs:
        refuse(WEIGHTS_FILE, "contains no LoRA tensors; save the adapter after training it")
    places = sorted(pairs, key=lambda place: (place[0], PROJECTIONS.index(place[1])))
    if base is not None:  # before patterns are matched, which takes a while for many modules
        for place in places:
            _check_place(base, *place, next(iter(pairs[place].values())))
    paths = [module_path(*place) for place in places]
    ranks, alphas = settings.ranks(paths), settings.alphas(paths)
    return tuple(
        _module(*place, pairs[place], ranks[path], alphas[path], settings, base)
        for place, path in zip(places, paths, strict=True)
    )


def _module(
    layer: int,
    projection: Projection,
    pair: dict[Side, TensorInfo],
    declared: int,
    alpha: float,
    settings: LoraSettings,
    base: BaseSpec | None,
) -> LoraModule:
    if len(pair) != 2:
        (alone,) = pair.values()
        other = "lora_B" if "A" in pair else "lora_A"
        refuse(
            WEIGHTS_FILE, f"has no matching {other}; save the adapter again", tensor=alone.name
        )
    a, b = pair["A"], pair["B"]
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            refuse(WEIGHTS_FILE, f"has shape {tensor.shape}; need a matrix", tensor=tensor.name)
    rank, in_features = a.shape
    out_features, b_rank = b.shape
    if rank != b_rank:
        refuse(
            WEIGHTS_FILE,
            f"has rank {b_rank}, but its lora_A has rank {rank}; save both from one model",
            tensor=b.name,
        )
    if rank != declared:
        refuse(
            WEIGHTS_FILE,
            f"has rank {rank}, but adapter_config.json says {declared}; correct r or "
            "rank_pattern",
            tensor=a.name,
        )
    if base is not None:
        _check_base(base, projection, a, b, (out_features, in_features))
    scaling = settings.scaling(alpha, rank)
    if abs(scaling) > MAX_SCALING:
        refuse(
            WEIGHTS_FILE,
            f"would be scaled by {scaling:g}; at most {MAX_SCALING:g} is allowed: correct "
            "lora_alpha",
            tensor=a.name,
        )
    return LoraModule(layer, projection, rank, scaling, *tensor_keys(layer, projection))


def _check_place(
    base: BaseSpec, layer: int, projection: Projection, tensor: TensorInfo
) -> None:
    if layer >= base.num_layers:
        refuse(
            WEIGHTS_FILE,
            f"targets layer {layer}, but {base.name} has layers 0 to {base.num_layers - 1}; "
            "push it to a server with its base",
            tensor=tensor.name,
        )
    if projection not in base.shapes:
        refuse(
            WEIGHTS_FILE,
            f"targets {projection}, but {base.name} has no such module",
            tensor=tensor.name,
        )


def _check_base(
    base: BaseSpec, projection: Projection, a: TensorInfo, b: TensorInfo, shape: tuple[int, int]
) -> None:
    out_features, in_features = base.shapes[projection]
    if shape[1] != in_features:
        refuse(
            WEIGHTS_FILE,
            f"has {shape[1]} inputs, but {projection} of {base.name} has {in_features}; "
            "push it to a server with its base",
            tensor=a.name,
        )
    if shape[0] != out_features:
        refuse(
            WEIGHTS_FILE,
            f"has {shape[0]} outputs, but {projection} of {base.name} has {out_features}; "
            "push it to a server with its base",
            tensor=b.name,
        )


# ------------------------------------------------------------------------ digest


Pieces = Callable[[TensorInfo], Iterable[memoryview]]
"""Yields a tensor's bytes in pieces of whole elements, each valid until the next one."""


def digest_weights(
    pieces: Pieces,
    header: SafetensorsHeader,
    modules: Iterable[LoraModule],
    serving: ServingDtype | None,
) -> str:
    """SHA-256 of everything that changes the result; refuses bad numbers on the way.

    Each field is length-prefixed, tensors are hashed in name order, and the config enters
    as the scaling of each module. So the order of the file, its metadata and the spelling
    of the config do not matter.

    Args:
        serving: None if the numbers were checked at publishing.

    Raises:
        AdapterInvalid: a tensor is not finite in ``serving``, or too large.
    """
    digest = hashlib.sha256(_DIGEST_TAG)
    names = sorted(header.tensors)
    digest.update(struct.pack(">Q", len(names)))
    for name in names:
        tensor = header.tensors[name]
        size = tensor.end - tensor.begin
        shape = struct.pack(
            f">{len(tensor.shape) + 2}Q", len(tensor.shape), *tensor.shape, size
        )
        digest.update(_fields(name.encode(), tensor.dtype.encode()) + shape)
        peak = 0
        for piece in pieces(tensor):
            digest.update(piece)
            if serving is not None:
                peak = max(peak, peak_bits(piece, tensor.dtype))
        if serving is not None:
            _check_peak(peak, tensor, serving)
    for module in modules:
        digest.update(_fields(module.a_key.encode()) + struct.pack(">d", module.scaling))
    return digest.hexdigest()


def check_numbers(pieces: Pieces, header: SafetensorsHeader, serving: ServingDtype) -> None:
    """Refuse what `digest_weights` refuses, without computing a digest."""
    for name in sorted(header.tensors):
        tensor = header.tensors[name]
        peaks = (peak_bits(piece, tensor.dtype) for piece in pieces(tensor))
        _check_peak(max(peaks, default=0), tensor, serving)


def _check_peak(peak: int, tensor: TensorInfo, serving: ServingDtype) -> None:
    problem = find_problem(peak, tensor.dtype, serving)
    if problem is not None:
        refuse(WEIGHTS_FILE, problem, tensor=tensor.name)


def read_pieces(file: BufferedReader) -> Pieces:
    """Return `Pieces` that read with plain reads into one buffer of 1 MiB, and refuse a file
    that is truncated meanwhile."""
    buffer = memoryview(bytearray(_CHUNK))
    return lambda tensor: _chunks(file, tensor, buffer)


@contextlib.contextmanager
def mapped(file: BinaryIO) -> Iterator[memoryview]:
    """Map the whole file copy-on-write: writing does not change the file. Only for files of the
    store, since truncating a mapped file would kill the process."""
    # Private and writable: torch warns about read-only buffers.
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        with memoryview(mapping) as whole:
            yield whole
    finally:
        _close(mapping)


def _fields(*fields: bytes) -> bytes:
    return b"".join(struct.pack(">Q", len(field)) + field for field in fields)


def _chunks(
    file: BufferedReader, tensor: TensorInfo, buffer: memoryview
) -> Iterator[memoryview]:
    """The tensor's bytes in pieces of whole elements; each is overwritten by the next."""
    file.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        want = min(left, len(buffer))
        got = 0
        while got < want:
            count = file.readinto(buffer[got:want])
            if not count:
                refuse(
                    WEIGHTS_FILE,
                    "is cut off; copy the file again",
                    tensor=tensor.name,
                    cause="cut_off",
                )
            got += count
        yield buffer[:want]
        left -= want


# ------------------------------------------------------------------------- views


@dataclass(frozen=True, slots=True)
class TensorView:
    """One matrix, row-major, in the byte order and dtype of the file.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``.
        shape: (rows, columns).
        data: its bytes, mapped from the file copy-on-write: writing does not change the file.
    """

    dtype: str
    shape: tuple[int, int]
    data: memoryview


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """A [rank, in_features] and B [out_features, rank] of one module."""

    module: LoraModule
    a: TensorView
    b: TensorView


@contextlib.contextmanager
def view_tensors(
    content: memoryview, header: SafetensorsHeader, modules: Iterable[LoraModule]
) -> Iterator[Sequence[ModuleTensors]]:
    """Zero-copy views of the tensors of ``modules``, in their order.

    The views are invalid after the block: copy what you keep.

    Args:
        content: the whole file.
    """
    views = [
        ModuleTensors(
            module, _view(header, module.a_key, content), _view(header, module.b_key, content)
        )
        for module in modules
    ]
    try:
        yield views
    finally:
        for view in views:
            view.a.data.release()
            view.b.data.release()


def _view(header: SafetensorsHeader, key: str, whole: memoryview) -> TensorView:
    tensor = header.tensors[key]
    rows, columns = tensor.shape
    return TensorView(tensor.dtype, (rows, columns), whole[tensor.begin : tensor.end])


def _close(mapping: mmap.mmap) -> None:
    # If a caller still holds an array over a view, the mapping is unmapped when the last
    # array is gone.
    with contextlib.suppress(BufferError):
        mapping.close()
