"""Reference log-probabilities of a prompt, computed as directly from the weights as possible.

Written for readability, not for speed, and independent of the serving path: no fused
projections, no segments, no resident adapter, no KV cache, float32 throughout. An
adapter's A and B come from its files, verified by their digest; the base's weights also come
from its files, not from the weights in memory (`models.source_weights`).

Several adapters share a pass, since reading the base takes most of its time. Weights are
expanded a slice at a time, to save memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Protocol

import torch
from veneer_registry.adapter import Projection
from veneer_registry.errors import AdapterCorrupt
from veneer_registry.stored_adapter import open_stored
from veneer_registry.weights import ModuleTensors, TensorView

from veneer_server.models.config import DecoderConfig
from veneer_server.models.linear import Expanded
from veneer_server.wire.messages import AdapterSource

Modules = Mapping[tuple[int, Projection], ModuleTensors]
"""An adapter's modules by layer and projection."""

_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class BaseLayer(Protocol):
    """One layer. Norm weights are float32 [hidden] (or [head_dim])."""

    @property
    def input_norm(self) -> torch.Tensor: ...
    @property
    def post_norm(self) -> torch.Tensor: ...
    @property
    def query_norm(self) -> torch.Tensor | None: ...
    @property
    def key_norm(self) -> torch.Tensor | None: ...
    @property
    def qkv(self) -> BaseLinear: ...
    @property
    def output(self) -> BaseLinear: ...
    @property
    def gate_up(self) -> BaseLinear: ...
    @property
    def down(self) -> BaseLinear: ...


class BaseLinear(Protocol):
    """One or more linears that share an input."""

    def expanded(self) -> Iterator[Expanded]:
        """See `models.linear.ServedLinear.expanded`."""


class BaseWeights(Protocol):
    """The base's weights: implemented by `SourceWeights` (from files) and `DecoderWeights` (as
    loaded)."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def device(self) -> torch.device: ...
    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `DecoderWeights.embedded`."""

    def head_rows(self) -> Iterator[Expanded]:
        """See `DecoderWeights.head_rows`."""

    @property
    def final_norm(self) -> torch.Tensor: ...
    @property
    def layers(self) -> Iterable[BaseLayer]: ...
    @property
    def inv_freq(self) -> torch.Tensor: ...
    @property
    def rotary_scale(self) -> float: ...


@torch.inference_mode()
def references(
    weights: BaseWeights, tokens: list[int], adapters: Sequence[AdapterSource | None]
) -> list[list[float] | AdapterCorrupt]:
    """Compute the log-probability of each token after the first, given the tokens before it,
    with each adapter.

    Args:
        tokens: at least one token, all within the vocabulary.
        adapters: the adapters; None stands for the base alone.

    Returns:
        One item for each adapter: the log-probabilities, or an error if its files do not match
        their digest.
    """
    found: list[list[float] | AdapterCorrupt] = []
    opened: list[Modules] = []
    with ExitStack() as files:
        for adapter in adapters:
            try:
                opened.append(files.enter_context(_modules(adapter)))
                found.append([])
            except AdapterCorrupt as error:
                found.append(error)
        if not opened:
            return found
        hidden = _Reference(weights, opened, len(tokens)).hidden(tokens)
    following = torch.tensor(tokens[1:], dtype=torch.int64, device=weights.device)
    each = iter(hidden)
    for index, result in enumerate(found):
        if not isinstance(result, AdapterCorrupt):
            logits = _multiply(next(each)[:-1], weights.head_rows())
            logprobs = torch.log_softmax(logits, dim=-1).gather(1, following.unsqueeze(1))
            found[index] = logprobs.squeeze(1).tolist()
    return found


@contextmanager
def _modules(adapter: AdapterSource | None) -> Iterator[Modules]:
    if adapter is None:
        yield {}
        return
    with open_stored(Path(adapter.folder), adapter.digest) as (_, tensors):
        yield {(pair.module.layer, pair.module.projection): pair for pair in tensors}


class _Reference:
    """Computes one sequence from its first token on, with each of several adapters.

    Arrays are [adapters, tokens, ...].

    Args:
        length: number of tokens.
    """

    def __init__(self, weights: BaseWeights, modules: Sequence[Modules], length: int) -> None:
        self._weights = weights
        self._config = weights.config
        self._modules = modules
        positions = torch.arange(length, device=weights.device)
        angles = positions.unsqueeze(1).float() * weights.inv_freq
        # [length, 1, head_dim / 2]
        self._cos = (angles.cos() * weights.rotary_scale).unsqueeze(1)
        self._sin = (angles.sin() * weights.rotary_scale).unsqueeze(1)
        self._distance = positions.unsqueeze(1) - positions.unsqueeze(0)
        """[query, key]: how many tokens before the query the key is."""

    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """Compute the hidden states, normalized for the head: [adapters, tokens, hidden]."""
        ids = torch.tensor(tokens, device=self._weights.device)
        hidden = self._weights.embedded(ids).expand(len(self._modules), -1, -1)
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + self._attention(index, layer, hidden)
            hidden = hidden + self._mlp(index, layer, hidden)
        return self._norm(hidden, self._weights.final_norm)

    def _attention(self, index: int, layer: BaseLayer, hidden: torch.Tensor) -> torch.Tensor:
        config = self._config
        x = self._norm(hidden, layer.input_norm)
        query, key, value = (
            y.view(*x.shape[:2], -1, config.head_dim)
            for y in self._project(layer.qkv, index, ("q_proj", "k_proj", "v_proj"), x)
        )
        if layer.query_norm is not None:
            query = self._norm(query, layer.query_norm)
        if layer.key_norm is not None:
            key = self._norm(key, layer.key_norm)
        # Each K and V head serves this many adjacent query heads.
        shared = config.num_heads // config.num_kv_heads
        keys = self._rotate(key).repeat_interleave(shared, dim=2)
        values = value.repeat_interleave(shared, dim=2)
        scores = torch.einsum("aqhd,akhd->ahqk", self._rotate(query), keys)
        scores = scores * config.head_dim**-0.5
        seen = self._distance >= 0
        if (window := config.windows[index]) is not None:
            seen = seen & (self._distance < window)
        shares = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        attended = torch.einsum("ahqk,akhd->aqhd", shares, values).reshape(*x.shape[:2], -1)
        (y,) = self._project(layer.output, index, ("o_proj",), attended)
        return y

    def _mlp(self, index: int, layer: BaseLayer, hidden: torch.Tensor) -> torch.Tensor:
        x = self._norm(hidden, layer.post_norm)
        gate, up = self._project(layer.gate_up, index, ("gate_proj", "up_proj"), x)
        activated = gate * torch.sigmoid(gate) * up
        (y,) = self._project(layer.down, index, ("down_proj",), activated)
        return y

    def _project(
        self, linear: BaseLinear, index: int, members: tuple[Projection, ...], x: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return W x + scaling B (A x) for each projection that the linear holds, in order."""
        sizes = [self._config.shapes[member][0] for member in members]
        y = _multiply(x.flatten(0, 1), linear.expanded()).view(*x.shape[:2], -1)
        outputs = list(torch.split(y, sizes, dim=2))
        for member, output in zip(members, outputs, strict=True):
            for adapter, modules in enumerate(self._modules):
                pair = modules.get((index, member))
                if pair is not None:
                    a, b = (_matrix(view, x.device) for view in (pair.a, pair.b))
                    output[adapter] += pair.module.scaling * ((x[adapter] @ a.T) @ b.T)
        return outputs

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self._config.rms_norm_eps) * weight

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply rotary embedding, halves convention, to [adapters, tokens, heads, head_dim]."""
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
    """Multiply x [tokens, in_features] by a weight that is given in slices of its rows."""
    outputs = []
    for rows, bias in weight:
        y = x @ rows.T
        outputs.append(y if bias is None else y + bias)
    return torch.cat(outputs, dim=1)


def _matrix(view: TensorView, device: torch.device) -> torch.Tensor:
    """Return a float32 copy of a view, which is valid only while its file is mapped."""
    stored = torch.frombuffer(view.data, dtype=_DTYPES[view.dtype]).view(view.shape)
    return stored.to(device=device, dtype=torch.float32, copy=True)
