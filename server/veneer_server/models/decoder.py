"""One lean decoder for Llama, Mistral, Qwen2, Qwen3 and their kin, in torch.

It is the reference backend: it executes a whole `StepArrays`, rows of many
sequences side by side, with LoRA added per segment. Its oracle in tests is the
transformers class of the same checkpoint. The residual stream and the norms are
float32; linears and attention run in the serving dtype.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from veneer_server.lora.ops import apply_lora
from veneer_server.lora.table import Group
from veneer_server.models.arrays import StepArrays
from veneer_server.models.attention import AttentionPlan, KvCache, attend
from veneer_server.models.linear import Linear
from veneer_server.models.loader import DecoderWeights, LayerWeights

__all__ = ["Decoder"]


class Decoder:
    """Implements `Backend` over `DecoderWeights` and a `KvCache`.

    Args:
        lora_dtype: dtype of resident adapters. On a CPU this is float32: small
            float32 products are 2 to 3 times faster there than bfloat16 ones,
            and it is what PEFT computes in.
    """

    def __init__(
        self, weights: DecoderWeights, cache: KvCache, lora_dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._cache = cache
        self._lora_dtype = lora_dtype
        self._windows = frozenset(weights.config.windows)

    @torch.inference_mode()
    def execute(self, step: StepArrays) -> torch.Tensor:
        """See `Backend.execute`."""
        weights, device = self._weights, self._weights.device
        positions = torch.from_numpy(step.positions).to(device)
        slots = torch.from_numpy(step.slots).to(device)
        plan = AttentionPlan.of(
            step, block_size=self._cache.block_size, windows=self._windows, device=device
        )
        angles = positions.unsqueeze(1).float() * weights.inv_freq
        # [rows, 1, head_dim / 2]
        cos = (angles.cos() * weights.rotary_scale).unsqueeze(1)
        sin = (angles.sin() * weights.rotary_scale).unsqueeze(1)
        tokens = torch.from_numpy(step.tokens).to(device)
        hidden = F.embedding(tokens, weights.embedding).float()
        for index, layer in enumerate(weights.layers):
            attended = self._attention(index, layer, hidden, step, plan, slots, cos, sin)
            hidden = hidden + attended
            hidden = hidden + self._mlp(index, layer, hidden, step)
        rows = torch.from_numpy(step.logit_rows).to(device)
        final = self._norm(hidden.index_select(0, rows), weights.final_norm)
        return F.linear(final.to(weights.dtype), weights.head).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._weights.config.rms_norm_eps)

    def _project(
        self, linear: Linear, index: int, group: Group, x: torch.Tensor, step: StepArrays
    ) -> torch.Tensor:
        """base(x) + LoRA(x), in float32 where anything was added to it."""
        y = linear(x.to(self._weights.dtype))
        if not step.segments:
            return y
        y = y.to(self._lora_dtype)
        apply_lora(step.segments, index, group, x.to(self._lora_dtype), y)
        return y

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        step: StepArrays,
        plan: AttentionPlan,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        config = self._weights.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        x = self._norm(hidden, layer.input_norm)
        qkv = self._project(layer.qkv, index, Group.QKV, x, step)
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
        turned = _rotate(turned, cos, sin).to(self._weights.dtype)
        query, key = turned[:, :heads], turned[:, heads:]
        value = parts[:, heads + kv_heads :].to(self._weights.dtype)
        self._cache.write(index, slots, key, value)
        attended = attend(plan, self._cache, index, config.windows[index], query, key, value)
        return self._project(layer.output, index, Group.OUTPUT, attended, step)

    def _mlp(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, step: StepArrays
    ) -> torch.Tensor:
        x = self._norm(hidden, layer.post_norm)
        gate, up = self._project(layer.gate_up, index, Group.GATE_UP, x, step).chunk(2, dim=-1)
        return self._project(layer.down, index, Group.DOWN, F.silu(gate) * up, step)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves convention: [rows, heads, head_dim] float32."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
