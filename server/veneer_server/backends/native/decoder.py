"""The native backend: executes a step (`StepArrays`) in one call of the library."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch

from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.draws import NativeDraws
from veneer_server.backends.native.engine import NativeEngine
from veneer_server.backends.native.library import (
    BFLOAT16,
    BLOCK,
    EIGHT_BIT,
    Layer,
    Library,
    Linear,
    LoraAdapter,
    LoraGroup,
    Model,
    Segment,
    Step,
    address,
    pointer,
)
from veneer_server.backends.native.linear import NativeLinear, pack_dense
from veneer_server.models.config import DecoderConfig
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import StepArrays
from veneer_server.step.layout import Group

_RUN = 16
"""Tokens stored together in the cache."""

_KEPT_LOGITS = 64
"""Rows of logits whose memory is kept between steps, enough for decoding. More rows, for
scored prompts, are allocated per step."""


def check(config: DecoderConfig, block_size: int) -> None:
    """Raise NativeUnavailable if the kernels do not support the base."""
    if config.stored is not None and config.stored.is_codes:
        raise NativeUnavailable(
            f"its kernels do not read weights that are stored as {config.stored.format} yet"
        )
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads * head_dim": config.num_heads * config.head_dim,
    }
    for name, width in widths.items():
        if width % BLOCK:
            raise NativeUnavailable(f"the base's {name} is {width}, not a multiple of {BLOCK}")
    if config.head_dim % 16:
        raise NativeUnavailable(
            f"the base's head_dim is {config.head_dim}, not a multiple of 16"
        )
    if block_size % _RUN:
        raise NativeUnavailable(f"KV blocks hold {block_size} tokens, not a multiple of {_RUN}")


class NativeDecoder:
    """Implements `Backend` over weights whose linears are all `NativeLinear`.

    Args:
        threads, bound: see `NativeEngine`.
        head: how the output head is stored, `BFLOAT16` or `EIGHT_BIT`. Eight bits halve the
            bytes that a step of one row reads of it, with an error of up to half a 127th of
            the largest weight of each block of 64.
        packed_head: the head, if it is packed already.
        int8_activations: round the inputs of linears of 4 and 8 bits to 8 bits
            (``cpp/kernels/gemm/int8_rows.h``).

    Attributes:
        draws: samples tokens from logits, on the same threads.
        engine_in_use: the engine whose threads execute steps.
        weights: the base's weights; kept alive, since the kernels have their addresses.
    """

    def __init__(
        self,
        library: Library,
        weights: DecoderWeights,
        *,
        num_blocks: int,
        block_size: int,
        threads: int,
        bound: Sequence[Sequence[int]] = (),
        head: int = EIGHT_BIT,
        packed_head: NativeLinear | None = None,
        int8_activations: bool = False,
    ) -> None:
        config = weights.config
        self._library = library
        self.weights = weights
        self._vocab = config.vocab_size
        self._logits = library.zeros((_KEPT_LOGITS, self._vocab), torch.float32)
        self._finite = torch.empty(_KEPT_LOGITS, dtype=torch.bool)
        shape = (num_blocks, config.num_kv_heads, block_size * config.head_dim)
        self._keys = [library.zeros(shape, torch.bfloat16) for _ in weights.layers]
        self._values = [library.zeros(shape, torch.bfloat16) for _ in weights.layers]
        self._head = packed_head or pack_dense(library, head, weights.head)
        self._layers = (Layer * len(weights.layers))()
        for index, layer in enumerate(weights.layers):
            to = self._layers[index]
            for number, linear in enumerate(
                (layer.qkv, layer.output, layer.gate_up, layer.down)
            ):
                assert isinstance(linear, NativeLinear)
                to.linears[number] = _with_inputs(linear, int8=int8_activations)
            to.input_norm = address(layer.input_norm)
            to.post_norm = address(layer.post_norm)
            to.query_norm = address(layer.query_norm)
            to.key_norm = address(layer.key_norm)
            to.keys = address(self._keys[index])
            to.values = address(self._values[index])
            to.window = config.windows[index] or 0
        self._model = Model(
            layers=self._layers,
            embedding=address(weights.embedding),
            final_norm=address(weights.final_norm),
            inv_freq=address(weights.inv_freq),
            head=_with_inputs(self._head, int8=int8_activations),
            layer_count=len(weights.layers),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            dim=config.head_dim,
            vocab=config.vocab_size,
            block_size=block_size,
            epsilon=config.rms_norm_eps,
            rotary_scale=weights.rotary_scale,
        )
        self._adapters: weakref.WeakKeyDictionary[AdapterTable, _Adapter] = (
            weakref.WeakKeyDictionary()
        )
        self.engine_in_use = self.engine(threads, bound)
        self.draws = NativeDraws(library, self.engine_in_use.handle)

    @property
    def handle(self) -> int:
        """The handle of the engine in use, for the library's functions."""
        return self.engine_in_use.handle

    def engine(self, threads: int, bound: Sequence[Sequence[int]] = ()) -> NativeEngine:
        """Make another engine, to be passed to `use`; see `NativeEngine`."""
        return NativeEngine(self._library, self._model, threads, bound)

    def use(self, engine: NativeEngine) -> None:
        """Execute the next steps on this engine. Results do not depend on it."""
        self.engine_in_use = engine
        self.draws.engine = engine.handle

    def execute(self, step: StepArrays) -> torch.Tensor:
        """See `Backend.execute`."""
        wanted = len(step.logit_rows)
        kept = wanted <= len(self._logits)
        logits = self._logits[:wanted] if kept else torch.empty(wanted, self._vocab)
        if wanted > len(self._finite):
            self._finite = torch.empty(wanted, dtype=torch.bool)
        segments = (Segment * len(step.segments))()
        for to, segment in zip(segments, step.segments, strict=True):
            to.begin, to.end = segment.begin, segment.end
            to.adapter = self._adapter(segment.table)
        self._library.step(
            self.handle,
            Step(
                tokens=pointer(step.tokens),
                positions=pointer(step.positions),
                slots=pointer(step.slots),
                row_starts=pointer(step.row_starts),
                contexts=pointer(step.contexts),
                block_tables=pointer(step.block_tables),
                segments=segments,
                logit_rows=pointer(step.logit_rows),
                logits=address(logits),
                finite=address(self._finite),
                rows=len(step.tokens),
                sequences=len(step.contexts),
                table_width=step.block_tables.shape[1],
                segment_count=len(step.segments),
                logit_count=len(step.logit_rows),
            ),
        )
        return logits

    def finite(self, logits: torch.Tensor) -> list[bool]:
        """See `Backend.finite`; the kernels have already checked."""
        return self._finite[: len(logits)].tolist()

    def clear(self, blocks: list[int]) -> None:
        """See `Backend.clear`."""
        for cache in (*self._keys, *self._values):
            cache[blocks] = 0

    def _adapter(self, table: AdapterTable) -> ctypes._Pointer[LoraAdapter]:
        found = self._adapters.get(table)
        if found is None:
            found = self._adapters[table] = _Adapter(table)
        return found.pointer


def _with_inputs(linear: NativeLinear, *, int8: bool) -> Linear:
    struct = Linear.from_buffer_copy(linear.struct)
    struct.int8_inputs = int(int8 and struct.kind != BFLOAT16)
    return struct


class _Adapter:
    """An adapter's structs for the kernels, valid for as long as its table lives."""

    def __init__(self, table: AdapterTable) -> None:
        is_float = table.run.dtype == torch.float32
        assert table.layout.paired != is_float
        layers = len(table.views[0])
        self._groups = (LoraGroup * (layers * len(Group)))()
        for group in Group:
            for layer, views in enumerate(table.views[group.value]):
                if views is None:
                    continue
                to = self._groups[layer * len(Group) + group.value]
                to.a, to.ranks = views.a_t.data_ptr(), sum(views.ranks)
                first = 0
                for member, rank, (b_t, scaling) in zip(
                    views.members, views.ranks, views.expands, strict=True
                ):
                    place = to.members[member]
                    place.b, place.rank, place.first = b_t.data_ptr(), rank, first
                    place.scaling = scaling
                    first += rank
        self._adapter = LoraAdapter(groups=self._groups, is_float=int(is_float))
        self.pointer = ctypes.pointer(self._adapter)
