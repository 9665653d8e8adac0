"""Packs a checkpoint, one linear at a time, so that memory peaks at the packed base plus one of
its matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from veneer_registry.adapter import Projection

from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.library import (
    BFLOAT16,
    BLOCK,
    EIGHT_BIT,
    FOUR_BIT,
    Library,
)
from veneer_server.backends.native.linear import by_turns, parts_of, table_bits
from veneer_server.backends.native.packed.contents import (
    LINE,
    Contents,
    LayerParts,
    LinearPart,
    TensorPart,
)
from veneer_server.backends.native.packed.quantizing import FourBitBlocks, quantize
from veneer_server.models.checkpoint.reader import Checkpoint, Matrix
from veneer_server.models.checkpoint.rotary import rotary
from veneer_server.models.config import Quantization
from veneer_server.progress import stage

_QKV: Final[tuple[Projection, ...]] = ("q_proj", "k_proj", "v_proj")


def pack(
    library: Library,
    checkpoint: Checkpoint,
    quantization: Quantization,
    threads: int,
    put: Callable[[torch.Tensor], None],
) -> tuple[Contents, dict[int, torch.Tensor]]:
    """Pack a checkpoint.

    Args:
        quantization: the format for linears that are not stored in 4 bits already.
        put: receives the run of bytes, part by part.

    Returns:
        The table of contents, and the run's parts by offset.

    Raises:
        NativeUnavailable: the kernels do not support its linears.
        BaseDamaged: a tensor is missing, or is not as the config says.
    """
    config = checkpoint.config
    packer = _Packer(library, checkpoint, quantization, threads, put)
    four_bit = config.quantization is None and quantization != "none"
    name = "quantizing the base" if four_bit else "packing the base"
    with stage(name, total=config.num_layers, unit="layers") as packing:
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding_name = f"{checkpoint.body}embed_tokens.weight"
        head_name = embedding_name if config.tied_head else "lm_head.weight"
        # In the order of the tensors' names: their digest is computed in that order at the same
        # time, so most bytes are only read from disk once.
        head = packer.dense(EIGHT_BIT, checkpoint.read(head_name, vocabulary))
        embedding = packer.tensor(checkpoint.read(embedding_name, vocabulary).bfloat16())
        layers = {}
        for done, index in enumerate(sorted(range(config.num_layers), key=str)):
            packing.update(done)
            layers[index] = packer.layer(index)
        packing.update(len(layers))
        inv_freq, rotary_scale = rotary(checkpoint.folder)
        contents = Contents(
            layers=tuple(layers[index] for index in range(config.num_layers)),
            embedding=embedding,
            head=head,
            final_norm=packer.norm(f"{checkpoint.body}norm.weight", config.hidden_size),
            inv_freq=packer.tensor(inv_freq),
            rotary_scale=rotary_scale,
            parameters=checkpoint.parameters,
            size=packer.size,
        )
    return contents, packer.parts


class _Packer:
    """Packs tensors one after the other, and appends them to the run.

    Attributes:
        parts: the run's parts by offset.
        size: bytes of the run so far.
    """

    def __init__(
        self,
        library: Library,
        checkpoint: Checkpoint,
        quantization: Quantization,
        threads: int,
        put: Callable[[torch.Tensor], None],
    ) -> None:
        self._library = library
        self._checkpoint = checkpoint
        self._quantization = quantization
        self._threads = threads
        self._put = put
        self.parts: dict[int, torch.Tensor] = {}
        self.size = 0

    def layer(self, index: int) -> LayerParts:
        config, checkpoint = self._checkpoint.config, self._checkpoint
        stem = f"{checkpoint.body}layers.{index}"

        def head_norm(name: str) -> TensorPart | None:
            name = f"{stem}.self_attn.{name}.weight"
            return self.norm(name, config.head_dim) if config.qk_norm else None

        return LayerParts(
            input_norm=self.norm(f"{stem}.input_layernorm.weight", config.hidden_size),
            post_norm=self.norm(f"{stem}.post_attention_layernorm.weight", config.hidden_size),
            query_norm=head_norm("q_norm"),
            key_norm=head_norm("k_norm"),
            qkv=self._linear(index, _QKV),
            output=self._linear(index, ("o_proj",)),
            gate_up=self._linear(index, ("gate_proj", "up_proj")),
            down=self._linear(index, ("down_proj",)),
        )

    def norm(self, name: str, length: int) -> TensorPart:
        return self.tensor(self._checkpoint.rounded(name, (length,)).float())

    def tensor(self, data: torch.Tensor) -> TensorPart:
        """Append a copy of a bfloat16 or float32 tensor."""
        memory = self._library.bytes(data.nbytes)
        memory.copy_(data.contiguous().view(-1).view(torch.uint8))
        dtype: Final = "BF16" if data.dtype == torch.bfloat16 else "F32"
        return TensorPart(self._append(memory), dtype, tuple(data.shape))

    def dense(
        self, kind: int, weight: torch.Tensor, bias: TensorPart | None = None, parts: int = 1
    ) -> LinearPart:
        outputs, inputs = weight.shape
        if inputs % BLOCK:
            raise NativeUnavailable(f"a linear has {inputs} inputs, not a multiple of {BLOCK}")
        packed = self._memory(kind, outputs, inputs)
        self._library.pack_dense(
            kind, by_turns(weight.to(torch.bfloat16), parts), to=packed, threads=self._threads
        )
        return self._packed(kind, packed, (outputs, inputs), parts, (), bias)

    def _linear(self, index: int, projections: Sequence[Projection]) -> LinearPart:
        """Pack linears that share an input as one."""
        matrices = [self._checkpoint.matrix(index, each) for each in projections]
        outputs = sum(each.shape[0] for each in matrices)
        inputs = matrices[0].shape[1]
        parts = parts_of(len(matrices), outputs)
        stored = [bool(each.state) for each in matrices]
        bias = self._bias(matrices)
        if self._checkpoint.config.quantization is None and self._quantization != "none":
            fours = [self._quantized(each) for each in matrices]
        elif all(stored):
            fours = [self._stored(each) for each in matrices]
        elif any(stored):
            raise NativeUnavailable("some linears of a group have 4 bits and others do not")
        else:
            read = self._checkpoint.rounded
            weight = torch.cat([read(each.name, each.shape) for each in matrices])
            return self.dense(BFLOAT16, weight, bias, parts)
        if any(not torch.equal(four.book, fours[0].book) for four in fours):
            raise NativeUnavailable("the 4-bit linears of a group differ in kind")
        packed = self._memory(FOUR_BIT, outputs, inputs)
        self._library.pack_four_bit(
            by_turns(torch.cat([four.codes for four in fours]), parts),
            by_turns(torch.cat([four.scales for four in fours]), parts),
            to=packed,
            threads=self._threads,
        )
        table = table_bits(fours[0].book.to(torch.bfloat16))
        return self._packed(FOUR_BIT, packed, (outputs, inputs), parts, table, bias)

    def _bias(self, matrices: Sequence[Matrix]) -> TensorPart | None:
        if not any(each.bias for each in matrices):
            return None
        biases = [
            self._checkpoint.rounded(each.bias, each.shape[:1]).float()
            if each.bias
            else torch.zeros(each.shape[0])
            for each in matrices
        ]
        return self.tensor(torch.cat(biases))

    def _quantized(self, matrix: Matrix) -> FourBitBlocks:
        _check_inputs(matrix, BLOCK)
        weight = self._checkpoint.read(matrix.name, matrix.shape)
        # Quantize the numbers that would be served without quantization.
        weight = weight.to(torch.bfloat16)
        return quantize(self._library, weight, self._quantization, threads=self._threads)

    def _stored(self, matrix: Matrix) -> FourBitBlocks:
        """Read a weight that the checkpoint stores in bitsandbytes' 4-bit form."""
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        read = self._checkpoint.read
        state = QuantState.from_dict(
            {name: read(name).clone() for name in matrix.state.values()},
            device=torch.device("cpu"),
        )
        _check_inputs(matrix, state.blocksize)
        outputs, inputs = matrix.shape
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        codes = read(matrix.name).view(-1).view(torch.uint8)
        if tuple(state.shape) != matrix.shape or 2 * len(codes) != outputs * inputs:
            raise ValueError(f"the size of {matrix.name} does not match its state")
        return FourBitBlocks(
            codes.view(outputs, inputs // 2).clone(),
            scales.float().view(outputs, inputs // BLOCK),
            state.code,
        )

    def _memory(self, kind: int, outputs: int, inputs: int) -> torch.Tensor:
        return self._library.bytes(self._library.packed_bytes(kind, outputs, inputs))

    def _packed(
        self,
        kind: int,
        packed: torch.Tensor,
        shape: tuple[int, int],
        parts: int,
        table: tuple[int, ...],
        bias: TensorPart | None,
    ) -> LinearPart:
        return LinearPart(
            offset=self._append(packed),
            bytes=packed.nbytes,
            kind=kind,
            outputs=shape[0],
            inputs=shape[1],
            parts=parts,
            table=table,
            bias=bias,
        )

    def _append(self, part: torch.Tensor) -> int:
        offset = self.size
        self.parts[offset] = part
        padding = -part.nbytes % LINE
        self._put(part)
        if padding:
            self._put(torch.zeros(padding, dtype=torch.uint8))
        self.size += part.nbytes + padding
        return offset


def _check_inputs(matrix: Matrix, blocksize: int) -> None:
    inputs = matrix.shape[1]
    if blocksize != BLOCK or inputs % BLOCK:
        raise NativeUnavailable(
            f"a 4-bit linear has {inputs} inputs in blocks of {blocksize}; the kernels "
            f"need blocks of {BLOCK} that fill its rows"
        )
