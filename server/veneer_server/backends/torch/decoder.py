"""One lean decoder for Llama, Mistral, Qwen2, Qwen3 and their kin, in torch.

It is the reference backend: it executes a whole `StepArrays`, rows of many
sequences side by side, with LoRA added per segment. Its oracle in tests is the
transformers class of the same checkpoint. The residual stream and the norms are
float32; linears and attention run in the serving dtype.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from veneer_server.backends.torch.attention import AttentionPlan, KvCache, attend
from veneer_server.backends.torch.lora import LoraBatch, LoraBuffers
from veneer_server.backends.torch.threads import Threads
from veneer_server.models.linear import ServedLinear
from veneer_server.models.loader import DecoderWeights, LayerWeights
from veneer_server.step.arrays import StepArrays, finite_rows
from veneer_server.step.layout import MEMBERS, Group


class Decoder:
    """Implements `Backend` over `DecoderWeights` and a `KvCache`.

    Args:
        lora_dtype: dtype of resident adapters. On a CPU this is float32: small
            float32 GEMMs are 2 to 3 times faster there than bfloat16 ones,
            and it is what PEFT computes in.

    Attributes:
        weights: the base's weights.
        cache: K and V by slot.
    """

    def __init__(
        self, weights: DecoderWeights, cache: KvCache, lora_dtype: torch.dtype
    ) -> None:
        self.weights = weights
        self.cache = cache
        shapes = weights.config.shapes
        self._work = {
            group: sum(shapes[member][0] * shapes[member][1] for member in members)
            for group, members in MEMBERS.items()
        }
        """Multiplications per row."""
        self._buffers = LoraBuffers(
            fan_in={group: shapes[members[0]][1] for group, members in MEMBERS.items()},
            fan_out={
                group: tuple(shapes[member][0] for member in members)
                for group, members in MEMBERS.items()
            },
            dtype=lora_dtype,
            device=weights.device,
        )
        self._windows = frozenset(weights.config.windows)
        self._threads = Threads(weights.device)

    @torch.inference_mode()
    def execute(self, step: StepArrays) -> torch.Tensor:
        """See `Backend.execute`."""
        widest = len(step.tokens) * 2 * self.weights.config.intermediate_size
        with self._threads.step(widest):
            return self._execute(step)

    def finite(self, logits: torch.Tensor) -> list[bool]:
        """See `Backend.finite`."""
        return finite_rows(logits)

    def clear(self, blocks: list[int]) -> None:
        """See `Backend.clear`."""
        self.cache.clear(blocks)

    def _execute(self, step: StepArrays) -> torch.Tensor:
        weights, device = self.weights, self.weights.device
        positions = torch.from_numpy(step.positions).to(device)
        slots = torch.from_numpy(step.slots).to(device)
        plan = AttentionPlan.of(step, cache=self.cache, windows=self._windows, device=device)
        angles = positions.unsqueeze(1).float() * weights.inv_freq
        # [rows, 1, head_dim / 2]
        cos = (angles.cos() * weights.rotary_scale).unsqueeze(1)
        sin = (angles.sin() * weights.rotary_scale).unsqueeze(1)
        lora = None
        if step.segments:
            lora = LoraBatch(step.segments, len(step.tokens), self._buffers)
        tokens = torch.from_numpy(step.tokens).to(device)
        hidden = weights.embedded(tokens)
        for index, layer in enumerate(weights.layers):
            attended = self._attention(index, layer, hidden, lora, plan, slots, cos, sin)
            hidden = hidden + attended
            hidden = hidden + self._mlp(index, layer, hidden, lora)
        rows = torch.from_numpy(step.logit_rows).to(device)
        final = self._norm(hidden.index_select(0, rows), weights.final_norm)
        config = weights.config
        with self._threads.product(len(rows) * config.vocab_size * config.hidden_size):
            return weights.logits(final)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # torch's own rms_norm takes 40 us on a few rows; this takes 10.
        mean_square = x.square().mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(mean_square.add_(self.weights.config.rms_norm_eps))
        return (x * scale).mul_(weight)

    def _project(
        self,
        linear: ServedLinear,
        index: int,
        group: Group,
        x: torch.Tensor,
        lora: LoraBatch | None,
    ) -> torch.Tensor:
        """Return base(x) + LoRA(x), in the adapters' dtype if any row has an adapter."""
        rounded = linear.rounded(x)
        with self._threads.product(len(x) * self._work[group]):
            y = linear(rounded)
        if lora is None:
            return y
        with self._threads.product(lora.work[group.value]):
            return lora.add(index, group, x, y)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        lora: LoraBatch | None,
        plan: AttentionPlan,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        config = self.weights.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        x = self._norm(hidden, layer.input_norm)
        qkv = self._project(layer.qkv, index, Group.QKV, x, lora)
        # [rows, heads + 2 * kv_heads, head_dim]
        parts = qkv.view(-1, heads + 2 * kv_heads, dim)
        turned = parts[:, : heads + kv_heads].float()
        if layer.query_norm is not None and layer.key_norm is not None:
            turned = torch.cat(
                (
                    self._norm(turned[:, :heads], layer.query_norm),
                    self._norm(turned[:, heads:], layer.key_norm),
                ),
                dim=1,
            )
        turned = _rotate(turned, cos, sin).to(self.weights.dtype)
        query, key = turned[:, :heads], turned[:, heads:]
        value = parts[:, heads + kv_heads :].to(self.weights.dtype)
        self.cache.write(index, slots, key, value)
        window = config.windows[index]
        attended = attend(plan, self.cache, index, window, query, key, value, self._threads)
        return self._project(layer.output, index, Group.OUTPUT, attended, lora)

    def _mlp(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, lora: LoraBatch | None
    ) -> torch.Tensor:
        x = self._norm(hidden, layer.post_norm)
        gate, up = self._project(layer.gate_up, index, Group.GATE_UP, x, lora).chunk(2, dim=-1)
        # In place: both are views of a buffer that is free once this is done.
        activated = F.silu(gate, inplace=True).mul_(up)
        return self._project(layer.down, index, Group.DOWN, activated, lora)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding, halves convention, to [rows, heads, head_dim] float32."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
