"""Embeddings and heads that PEFT saves whole beside a LoRA (``save_embedding_layers``).

PEFT adds them by itself when a vocabulary was resized, or a base's config could not be read,
whether or not they were trained. Those that equal the base's are left out of the adapter. A
trained one is refused, since requests are served with the base's own.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from veneer_registry.adapter import BaseSpec
from veneer_registry.errors import VeneerError
from veneer_registry.fingerprint import weight_files
from veneer_registry.replacing import replacing
from veneer_registry.safetensors_header import (
    CHECKPOINT_LIMITS,
    SafetensorsHeader,
    TensorInfo,
    new_header,
    read_header,
)
from veneer_registry.strict_json import refuse
from veneer_registry.tensor_names import embedding_name
from veneer_registry.values import to_bfloat16
from veneer_registry.weights import WEIGHTS_FILE, Pieces

_CHUNK: Final = 1 << 20
_ITEM: Final = {"F32": 4, "F16": 2, "BF16": 2}
_TIED: Final = "model.embed_tokens.weight"
"""Used as the base's head if its checkpoint has none."""
_REMEDY: Final = (
    "train without embed_tokens and lm_head (not in modules_to_save, no added tokens)"
)

Floats = npt.NDArray[np.float32]


def split_embeddings(
    header: SafetensorsHeader,
) -> tuple[SafetensorsHeader, tuple[TensorInfo, ...]]:
    """Split a header into (header without whole embeddings and heads, those tensors)."""
    rest, found = {}, []
    for name, tensor in header.tensors.items():
        if embedding_name(name) is None:
            rest[name] = tensor
        else:
            found.append(tensor)
    return SafetensorsHeader(rest, header.metadata), tuple(found)


def check_embeddings(
    pieces: Pieces, found: Sequence[TensorInfo], base: BaseSpec | None
) -> tuple[str, ...]:
    """Refuse embeddings that differ from the base's. Returns a note on those that do not.

    Having fewer rows than the base is no difference: a trainer cut off tokens that the base
    only has for padding. Reads both sides piece by piece, in constant memory.

    Args:
        pieces: reads a tensor of the adapter's file; see `weights.read_pieces`.
        base: None compares nothing; the note then says that the server will.

    Raises:
        AdapterInvalid: one differs, has more rows than the base's, or cannot be compared.
    """
    if not found:
        return ()
    names = " and ".join(sorted(str(embedding_name(each.name)) for each in found))
    size = sum(each.end - each.begin for each in found) / 2**20
    if base is None:
        return (
            f"{WEIGHTS_FILE} also has {names} ({size:.0f} MiB): the server leaves them out if "
            "they are its base's, and refuses the adapter if not",
        )
    for tensor in found:
        _compare(pieces, tensor, base)
    return (f"left out {names} ({size:.0f} MiB): unchanged by training, as in {base.name}",)


def drop_embeddings(folder: Path) -> None:
    """Rewrite a checked adapter's weights file without embeddings, if it has any. The old file
    is replaced, not written to: it may be a link into the store."""
    path = folder / WEIGHTS_FILE
    with path.open("rb") as file:
        header = read_header(file, WEIGHTS_FILE)
        rest, found = split_embeddings(header)
        if not found:
            return
        # The widest first, so that all stay aligned.
        kept = sorted(rest.tensors.values(), key=lambda tensor: -_ITEM[tensor.dtype])
        with replacing(path, mode=0o600) as draft, draft.open("wb") as out:
            out.write(new_header(kept, header.metadata))
            for tensor in kept:
                file.seek(tensor.begin)
                left = tensor.end - tensor.begin
                while left:
                    data = file.read(min(left, _CHUNK))
                    if not data:
                        refuse(WEIGHTS_FILE, "is cut off; copy it again", cause="cut_off")
                    out.write(data)
                    left -= len(data)


def _compare(pieces: Pieces, tensor: TensorInfo, base: BaseSpec) -> None:
    name = embedding_name(tensor.name)
    assert name is not None
    with _opened(base, name) as (file, own):
        if len(tensor.shape) != 2 or tensor.shape[1] != own.shape[1]:
            refuse(
                WEIGHTS_FILE,
                f"has shape {tensor.shape}, in {base.name} it is {own.shape}; push it to a "
                "server with its base",
                tensor=tensor.name,
                cause="embedding",
            )
        if tensor.shape[0] > own.shape[0]:
            refuse(
                WEIGHTS_FILE,
                f"has {tensor.shape[0]} rows, but {base.name} has {own.shape[0]} tokens, and "
                f"added tokens are not served; {_REMEDY}",
                tensor=tensor.name,
                cause="added_tokens",
            )
        file.seek(own.begin)
        at = 0
        for piece in pieces(tensor):
            count = len(piece) // _ITEM[tensor.dtype]
            theirs = _floats(file.read(count * _ITEM[own.dtype]), own.dtype)
            same = _cast(theirs, tensor.dtype) == _floats(piece, tensor.dtype)
            if not same.all():
                row = (at + int(np.argmin(same))) // tensor.shape[1]
                refuse(
                    WEIGHTS_FILE,
                    f"differs from that of {base.name}, first in the row of token {row}: it "
                    f"was trained, and trained embeddings and heads are not served; {_REMEDY}",
                    tensor=tensor.name,
                    cause="embedding",
                )
            at += count


@contextmanager
def _opened(base: BaseSpec, name: str) -> Iterator[tuple[io.BufferedReader, TensorInfo]]:
    """Find the base's own tensor of that name. Yields the open checkpoint file and the tensor's
    place in it."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    try:
        for path in weight_files(Path(base.folder)) if base.folder else ():
            with path.open("rb") as file:
                tensors = read_header(file, path.name, CHECKPOINT_LIMITS).tensors
            found |= {each: (path, tensors[each]) for each in (name, _TIED) if each in tensors}
    except (VeneerError, OSError):
        found.clear()  # the checkpoint is gone or incomplete; callers must not see its path
    place = found.get(name) or found.get(_TIED)
    if place is None or place[1].dtype not in _ITEM or len(place[1].shape) != 2:
        refuse(
            WEIGHTS_FILE,
            f"is a whole embedding or head, and {base.name} has none in 16 or 32 bits to "
            f"compare it with; {_REMEDY}, or save with save_embedding_layers=False",
            tensor=name,
            cause="embedding",
        )
    with place[0].open("rb") as file:
        yield file, place[1]


def _floats(data: bytes | memoryview, dtype: str) -> Floats:
    """Convert to float32, exactly."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype(np.float32)


def _cast(numbers: Floats, dtype: str) -> Floats:
    """Round to the dtype in which a trainer loaded the base. The result is float32 again."""
    if dtype == "BF16":
        return _floats(to_bfloat16(numbers).tobytes(), dtype)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).astype(np.float32)
    return numbers
