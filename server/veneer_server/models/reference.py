"""What a prompt's log-probabilities must be, by the shortest way from the weights.

Written to be read, not to be fast, and apart from the serving path: no fused
projections, no segments, no resident adapter, no KV cache, float32 throughout. An
adapter's A and B come from its files, verified by their digest. What is shared is what
was loaded: the base's weights and its rotary frequencies.

A 4-bit weight is expanded a slice at a time, so that a whole pass needs little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from veneer_registry.adapter import Projection
from veneer_registry.format import ModuleTensors, TensorView, open_stored

from veneer_server.engine.messages import AdapterSource
from veneer_server.models.linear import Expanded, Linear
from veneer_server.models.loader import DecoderWeights, LayerWeights
from veneer_server.models.packed import row_slices

__all__ = ["reference_logprobs"]

Modules = Mapping[tuple[int, Projection], ModuleTensors]
"""An adapter's modules by layer and projection."""

_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@torch.inference_mode()
def reference_logprobs(
    weights: DecoderWeights, tokens: list[int], adapter: AdapterSource | None
) -> list[float]:
    """Log-probability of each token after the first, given those before it.

    Args:
        tokens: at least one, within the vocabulary.
        adapter: None for the base alone.

    Raises:
        AdapterCorrupt: the adapter's files do not have their digest any more.
    """
    with _modules(adapter) as modules:
        hidden = _Reference(weights, modules, len(tokens)).hidden(tokens)
    logits = _multiply(hidden[:-1], _rows_of(weights.head))
    following = torch.tensor(tokens[1:], dtype=torch.int64, device=weights.device)
    logprobs: list[float] = (
        torch.log_softmax(logits, dim=-1).gather(1, following.unsqueeze(1)).squeeze(1).tolist()
    )
    return logprobs


@contextmanager
def _modules(adapter: AdapterSource | None) -> Iterator[Modules]:
    if adapter is None:
        yield {}
        return
    with open_stored(Path(adapter.folder), adapter.weights_digest) as (_, tensors):
        yield {(pair.module.layer, pair.module.projection): pair for pair in tensors}


class _Reference:
    """One sequence from its first token on.

    Args:
        length: number of tokens.
    """

    def __init__(self, weights: DecoderWeights, modules: Modules, length: int) -> None:
        self._weights = weights
        self._config = weights.config
        self._modules = modules
        positions = torch.arange(length, device=weights.device)
        angles = positions.unsqueeze(1).float() * weights.inv_freq
        # [length, 1, head_dim / 2]
        self._cos = (angles.cos() * weights.rotary_scale).unsqueeze(1)
        self._sin = (angles.sin() * weights.rotary_scale).unsqueeze(1)
        self._distance = positions.unsqueeze(1) - positions.unsqueeze(0)
        """[query, key]: how many tokens back the key is."""

    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, hidden], normed for the head."""
        ids = torch.tensor(tokens, device=self._weights.device)
        hidden = self._weights.embedding[ids].float()
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + self._attention(index, layer, hidden)
            hidden = hidden + self._mlp(index, layer, hidden)
        return self._norm(hidden, self._weights.final_norm)

    def _attention(self, index: int, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        config = self._config
        x = self._norm(hidden, layer.input_norm)
        query, key, value = (
            y.view(len(x), -1, config.head_dim)
            for y in self._project(layer.qkv, index, ("q_proj", "k_proj", "v_proj"), x)
        )
        if layer.query_norm is not None:
            query = self._norm(query, layer.query_norm)
        if layer.key_norm is not None:
            key = self._norm(key, layer.key_norm)
        # Each K and V head serves as many neighbouring query heads.
        shared = config.num_heads // config.num_kv_heads
        keys = self._rotate(key).repeat_interleave(shared, dim=1)
        values = value.repeat_interleave(shared, dim=1)
        scores = torch.einsum("qhd,khd->hqk", self._rotate(query), keys) * config.head_dim**-0.5
        seen = self._distance >= 0
        if (window := config.windows[index]) is not None:
            seen = seen & (self._distance < window)
        shares = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        attended = torch.einsum("hqk,khd->qhd", shares, values).reshape(len(x), -1)
        (y,) = self._project(layer.output, index, ("o_proj",), attended)
        return y

    def _mlp(self, index: int, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        x = self._norm(hidden, layer.post_norm)
        gate, up = self._project(layer.gate_up, index, ("gate_proj", "up_proj"), x)
        activated = gate * torch.sigmoid(gate) * up
        (y,) = self._project(layer.down, index, ("down_proj",), activated)
        return y

    def _project(
        self, linear: Linear, index: int, members: tuple[Projection, ...], x: torch.Tensor
    ) -> list[torch.Tensor]:
        """W x + scaling B (A x) of each projection that the linear holds, in order."""
        sizes = [self._config.shapes[member][0] for member in members]
        outputs = list(torch.split(_multiply(x, linear.expanded()), sizes, dim=1))
        for place, member in enumerate(members):
            pair = self._modules.get((index, member))
            if pair is not None:
                a, b = (_matrix(view, x.device) for view in (pair.a, pair.b))
                outputs[place] = outputs[place] + pair.module.scaling * ((x @ a.T) @ b.T)
        return outputs

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self._config.rms_norm_eps) * weight

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding, halves convention: [tokens, heads, head_dim]."""
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            (
                first * self._cos - second * self._sin,
                second * self._cos + first * self._sin,
            ),
            dim=-1,
        )


def _multiply(x: torch.Tensor, weight: Iterable[Expanded]) -> torch.Tensor:
    """x [tokens, in_features] times a weight that comes in slices of its rows."""
    outputs = []
    for rows, bias in weight:
        y = x @ rows.T
        outputs.append(y if bias is None else y + bias)
    return torch.cat(outputs, dim=1)


def _rows_of(head: torch.Tensor) -> Iterator[Expanded]:
    for rows in row_slices(*head.shape):
        yield head[rows].float(), None


def _matrix(view: TensorView, device: torch.device) -> torch.Tensor:
    """A copy in float32: the view ends with the file's mapping."""
    stored = torch.frombuffer(view.data, dtype=_DTYPES[view.dtype]).view(view.shape)
    return stored.to(device=device, dtype=torch.float32, copy=True)
