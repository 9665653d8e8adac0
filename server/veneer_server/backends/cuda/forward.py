"""Enqueues a step's kernel launches, from token ids to logits, in static memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import torch

from veneer_server.backends.cuda.attention import decode, prefill
from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.inputs import Filled, LaunchShape
from veneer_server.backends.cuda.linears import CudaLinear, DenseLinear, Scratch
from veneer_server.backends.cuda.lora import panels as lora_panels
from veneer_server.backends.cuda.lora import rows as lora_rows
from veneer_server.backends.cuda.lora.tables import AdapterSlots, column_table
from veneer_server.backends.cuda.memory.arena import Arena
from veneer_server.backends.cuda.pointwise.gate import gate
from veneer_server.backends.cuda.pointwise.norm import normalize
from veneer_server.backends.cuda.pointwise.rotary import place
from veneer_server.backends.parallel.peers import Peers
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.layout import MEMBERS, Group

ATTENTION_SCRATCH: Final = 1 << 26
"""Most float32 numbers (256 MB) for attention's partial sums over pieces of contexts. If the
sequences of a step need more, they attend in several launches."""
KEPT_LOGITS: Final = 64
"""Fewest rows of logits in static memory. A step that needs more, for scored prompts, allocates
them."""


@dataclass(frozen=True, slots=True)
class _Lora:
    """One group's scratch memory for shrunk rows, and its column tables (`lora.tables`), for
    each of the two LoRA kernels: the one for few rows and the one for many."""

    few: torch.Tensor
    many: torch.Tensor
    few_columns: torch.Tensor
    many_columns: torch.Tensor


class Forward:
    """The kernel launches of a base, and the static memory for its activations.

    Args:
        rows: most rows of a step, padded.
        decodes: most sequences of a step that decode, padded.
        positions: most tokens of a sequence.
        most_ranks: for each group, the largest sum of an adapter's ranks.
        exact: whether each row's sums have one order, whatever shares the step.
        peers: the other processes, if ``weights`` are a part of a base.

    Attributes:
        logits: [rows, vocab] float32, static memory.
    """

    def __init__(
        self,
        device: Device,
        weights: DecoderWeights,
        arena: Arena,
        places: list[list[AdapterSlots]],
        *,
        rows: int,
        decodes: int,
        positions: int,
        most_ranks: tuple[int, ...],
        exact: bool,
        peers: Peers | None = None,
    ) -> None:
        self._device = device
        self._peers = peers
        self._weights = weights
        self._config = config = weights.config
        self._arena = arena
        self._places = places
        self._exact = exact
        self._scale = config.head_dim**-0.5
        heads = config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            made = device.empty(*shape, dtype=dtype)
            device.call(torch.Tensor.zero_, made)  # checks for NaN would find it in unused rows
            return made

        self._hidden = empty(rows, hidden, dtype=torch.float32)
        self._x = empty(rows, hidden)
        self._qkv = empty(rows, heads + 2 * kv)
        self._query = empty(rows, config.num_heads, config.head_dim)
        self._attended = empty(rows, config.num_heads, config.head_dim)
        self._asked = empty(decodes, config.num_heads, config.head_dim)
        self._answered = empty(decodes, config.num_heads, config.head_dim)
        self._out = empty(rows, hidden)
        self._sum = empty(rows if peers else 0, hidden, dtype=torch.float32)
        self._pairs = empty(rows, 2 * inner)
        self._gated = empty(rows, inner)
        kept = max(KEPT_LOGITS, decodes)
        self._picked = empty(rows, hidden)
        self._head = DenseLinear(weights.head)
        self._spoken = empty(kept, vocab)
        self.logits = empty(kept, vocab, dtype=torch.float32)
        numbers = min(ATTENTION_SCRATCH, decodes * decode.splits(positions) * heads)
        numbers = max(numbers, decode.splits(positions) * heads)
        self._sums = empty(numbers, dtype=torch.float32)
        self._weighed = empty(2 * numbers // config.head_dim, dtype=torch.float32)
        linears = [linear for layer in range(config.num_layers) for linear in self._of(layer)]
        needs = [linear.scratch for linear in linears]
        self._scratch = Scratch(
            empty(max(partials for partials, _ in needs), dtype=torch.float32),
            empty(max(panel for _, panel in needs)),
        )
        self._lora = [
            self._lora_memory(group, most, rows)
            for group, most in zip(Group, most_ranks, strict=True)
        ]
        self._turns = _turns(device, weights, positions)
        self._norms = [
            None
            if layer.query_norm is None or layer.key_norm is None
            else device.keep(torch.stack((layer.query_norm, layer.key_norm)))
            for layer in weights.layers
        ]

    def enqueue(self, step: Filled, shape: LaunchShape, logits: torch.Tensor) -> None:
        """Enqueue a whole step, which writes to ``logits``, [logits, vocab] float32."""
        call, weights = self._device.call, self._weights
        rows = shape.bucket.rows
        hidden, x = self._hidden[:rows], self._x[:rows]
        call(torch.index_select, weights.embedding, 0, step.tokens, out=x)
        call(torch.Tensor.copy_, hidden, x)
        added: torch.Tensor | None = None
        for index, layer in enumerate(weights.layers):
            self._norm(hidden, added, layer.input_norm, x)
            self._attention(index, x, step, shape)
            out = self._out[:rows]
            self._project(index, Group.OUTPUT, self._attended[:rows].flatten(1), out, step)
            added = self._summed(out)
            self._norm(hidden, added, layer.post_norm, x)
            pairs, gated = self._pairs[:rows], self._gated[:rows]
            self._project(index, Group.GATE_UP, x, pairs, step)
            call(gate, pairs, gated)
            self._project(index, Group.DOWN, gated, out, step)
            added = self._summed(out)
        self._norm(hidden, added, weights.final_norm, x)
        picked = self._picked[: shape.logits]
        call(torch.index_select, x, 0, step.logit_rows, out=picked)
        for begin in range(0, shape.logits, len(self._spoken)):
            part = picked[begin : begin + len(self._spoken)]
            spoken = self._spoken[: len(part)]
            self._head.multiply(self._device, part, spoken, self._scratch, exact=self._exact)
            call(torch.Tensor.copy_, logits[begin : begin + len(part)], spoken)

    def _summed(self, partial: torch.Tensor) -> torch.Tensor:
        """Add up the partial outputs of o or down from all processes, in float32."""
        if self._peers is None:
            return partial
        whole = self._sum[: len(partial)]
        self._device.call(torch.Tensor.copy_, whole, partial)
        self._device.call(self._peers.add, whole)
        return whole

    def _norm(
        self,
        hidden: torch.Tensor,
        added: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._device.call(normalize, hidden, added, weight, out, self._config.rms_norm_eps)

    def _attention(self, index: int, x: torch.Tensor, step: Filled, shape: LaunchShape) -> None:
        call, config = self._device.call, self._config
        rows = len(x)
        qkv = self._qkv[:rows]
        self._project(index, Group.QKV, x, qkv, step)
        query, attended = self._query[:rows], self._attended[:rows]
        keys, values = self._arena.keys[index], self._arena.values[index]
        call(
            place,
            qkv.view(rows, -1, config.head_dim),
            step.positions,
            step.slots,
            self._turns,
            self._norms[index],
            query,
            keys,
            values,
            config.rms_norm_eps,
        )
        how = {"scale": self._scale, "window": config.windows[index], "cap": 0.0}
        if shape.decodes:
            asked, answered = query, attended
            if not shape.graph:
                asked, answered = (b[: shape.decodes] for b in (self._asked, self._answered))
                call(torch.index_select, query, 0, step.decoding, out=asked)
            pieces, heads = shape.bucket.pieces, config.num_heads
            each = pieces * heads
            most = max(1, len(self._sums) // (each * config.head_dim))
            if most > 4:  # Triton compiles again for addresses that are no multiple of 16 bytes
                most -= most % 4
            for begin in range(0, shape.decodes, most):
                end = min(begin + most, shape.decodes)
                sums = self._sums[: (end - begin) * each * config.head_dim]
                weighed = self._weighed[: (end - begin) * each * 2]
                call(
                    decode.attend,
                    asked[begin:end],
                    keys,
                    values,
                    step.tables[begin:end],
                    step.contexts[begin:end],
                    None,
                    sums.view(end - begin, heads, pieces, config.head_dim),
                    weighed.view(end - begin, heads, pieces, 2),
                    answered[begin:end],
                    **how,
                )
            if not shape.graph:
                call(torch.Tensor.index_copy_, attended, 0, step.decoding, answered)
        if shape.tiles:
            call(
                prefill.attend,
                query,
                keys,
                values,
                step.tables,
                step.tiles,
                None,
                attended,
                **how,
            )

    def _of(self, layer: int) -> tuple[CudaLinear, ...]:
        found = self._weights.layers[layer]
        return cast(
            tuple[CudaLinear, ...], (found.qkv, found.output, found.gate_up, found.down)
        )

    def _project(
        self, index: int, group: Group, x: torch.Tensor, y: torch.Tensor, step: Filled
    ) -> None:
        """Enqueue ``y`` = base(x) + LoRA(x)."""
        device, memory = self._device, self._lora[group.value]
        linear = self._of(index)[group.value]
        linear.multiply(device, x, y, self._scratch, exact=self._exact)
        adapters = self._places[group.value][index]
        numbers = self._arena.numbers
        if len(step.few):
            parts, width = lora_rows.splits(adapters.fan_in), memory.many.shape[1]
            few = memory.few[: parts * len(x) * width].view(parts, len(x), width)
            device.call(
                lora_rows.add_rows,
                x,
                y,
                numbers,
                step.few,
                adapters,
                memory.few_columns,
                few,
            )
        if len(step.many):
            device.call(
                lora_panels.add_panels,
                x,
                y,
                numbers,
                step.many,
                adapters,
                memory.many_columns,
                memory.many[: len(x)],
            )

    def _lora_memory(self, group: Group, most: int, rows: int) -> _Lora:
        outs = [self._config.shapes[member][0] for member in MEMBERS[group]]
        parts = lora_rows.splits(self._config.shapes[MEMBERS[group][0]][1])
        # Rows that decode take the kernel for few rows; in exact mode all rows do.
        return _Lora(
            self._device.empty(parts * rows * most, dtype=torch.float32),
            self._device.empty(rows, most, dtype=torch.float32),
            self._columns(outs, lora_rows.BLOCK_COLUMNS),
            self._columns(outs, lora_panels.BLOCK_COLUMNS),
        )

    def _columns(self, outs: list[int], block: int) -> torch.Tensor:
        return self._device.keep(column_table(outs, block, torch.device("cpu")))


def _turns(device: Device, weights: DecoderWeights, positions: int) -> torch.Tensor:
    """Return the rotary table, [positions, 2, head_dim / 2]: see `pointwise.rotary`."""
    frequencies = weights.inv_freq.cpu()
    angles = torch.arange(positions).unsqueeze(1).float() * frequencies
    turns = torch.stack((angles.cos(), angles.sin()), dim=1) * weights.rotary_scale
    return device.keep(turns)
