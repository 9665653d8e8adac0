"""Loads a base for the native backend, from its packed file or else from the checkpoint.

A packed file is read into huge pages if the system has them, else mapped. Threads that read
weights in pages of 4 KB are a fifth slower, and the page cache has few larger ones before
Linux 6.16 on ext4. When a file is read, its bytes are hashed in memory, so the bytes that are
served are the bytes that were verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from veneer_server.backends.native.library import Library
from veneer_server.backends.native.linear import NativeLinear
from veneer_server.backends.native.packed.contents import (
    DTYPES,
    Contents,
    LinearPart,
    TensorPart,
)
from veneer_server.backends.native.packed.file import PackedReader
from veneer_server.backends.native.packed.packing import pack
from veneer_server.backends.native.packed.store import PackedStore
from veneer_server.models.checkpoint.reader import Checkpoint
from veneer_server.models.config import DecoderConfig, Quantization, read_decoder_config
from veneer_server.models.loader import DecoderWeights, LayerWeights, verified
from veneer_server.progress import stage

THP: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_At = Callable[[int, int], torch.Tensor]
"""Returns a part of the run, uint8, given its offset and number of bytes."""


@dataclass(frozen=True, slots=True)
class PackedBase:
    """A base whose linears are all `NativeLinear`.

    Attributes:
        head: the output head, in 8 bits.
    """

    weights: DecoderWeights
    head: NativeLinear


def load_packed(
    library: Library,
    folder: Path,
    *,
    quantization: Quantization,
    cache_dir: Path,
    fingerprint: str,
    threads: int,
) -> PackedBase:
    """Load a Hugging Face folder; see `models.loader.load_weights`.

    Args:
        fingerprint: `BaseFingerprint.weights`; "" if unknown, in which case no packed file is
            read or written.

    Raises:
        NativeUnavailable: the kernels do not support its linears.
        UnsupportedModel: the decoder cannot run it.
        BaseDamaged: its weights do not match the fingerprint.
    """
    config = read_decoder_config(folder)

    def read(reader: PackedReader) -> PackedBase:
        contents = reader.contents
        with stage("reading the packed weights", unit="bytes") as reading:
            if huge_pages():
                run = library.bytes(contents.size)
                reader.read(run, threads, reading)
            else:
                run = reader.map(threads, reading)
        return _assembled(library, config, contents, lambda at, size: run[at : at + size])

    def make(put: Callable[[torch.Tensor], None]) -> tuple[Contents, PackedBase]:
        with verified(folder, fingerprint) as verify, Checkpoint(folder) as checkpoint:
            contents, parts = pack(library, checkpoint, quantization, threads, put)
            verify()
        return contents, _assembled(library, config, contents, lambda at, _: parts[at])

    if not fingerprint:
        return make(lambda _: None)[1]
    store = PackedStore(
        cache_dir,
        folder,
        fingerprint=fingerprint,
        quantization=config.quantization or quantization,
        layout=library.layout,
    )
    found = store.load(read)
    if found is not None:
        return found
    with store.draft() as draft:
        contents, base = make(draft.put)
        draft.keep(contents)
    return base


def huge_pages() -> bool:
    """Return True if the system gives huge pages to a process that asks for them."""
    try:
        return "[never]" not in THP.read_text("utf-8")
    except OSError:
        return False


def _assembled(
    library: Library, config: DecoderConfig, contents: Contents, at: _At
) -> PackedBase:
    def tensor(part: TensorPart) -> torch.Tensor:
        dtype = DTYPES[part.dtype]
        size = math.prod(part.shape) * dtype.itemsize
        return at(part.offset, size).view(dtype).view(part.shape)

    def optional(part: TensorPart | None) -> torch.Tensor | None:
        return None if part is None else tensor(part)

    def linear(part: LinearPart) -> NativeLinear:
        return NativeLinear(
            library,
            part.kind,
            at(part.offset, part.bytes),
            (part.outputs, part.inputs),
            optional(part.bias),
            torch.tensor(part.table).to(torch.int16).view(torch.bfloat16)
            if part.table
            else None,
            part.parts,
        )

    embedding = tensor(contents.embedding)
    head = linear(contents.head)
    layers = tuple(
        LayerWeights(
            input_norm=tensor(layer.input_norm),
            post_norm=tensor(layer.post_norm),
            query_norm=optional(layer.query_norm),
            key_norm=optional(layer.key_norm),
            qkv=linear(layer.qkv),
            output=linear(layer.output),
            gate_up=linear(layer.gate_up),
            down=linear(layer.down),
        )
        for layer in contents.layers
    )
    linears = [each for w in layers for each in (w.qkv, w.output, w.gate_up, w.down)]
    weights = DecoderWeights(
        config=config,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        dense_embedding=embedding,
        dense_head=embedding if config.tied_head else None,
        final_norm=tensor(contents.final_norm),
        layers=layers,
        inv_freq=tensor(contents.inv_freq),
        rotary_scale=contents.rotary_scale,
        parameters=contents.parameters,
        nbytes=embedding.nbytes + head.nbytes + sum(each.nbytes for each in linears),
    )
    return PackedBase(weights, head)
