"""A FAKE decoder whose likeliest token is a hash of everything read to compute it.

K and V of a position are a number derived from the weights that wrote it, its token and its
position; the next token is SHA-256 of the weights that read it and of every number in the
sequence's blocks. So a wrong table, a changed buffer, another sequence's block or a prefix
computed with other weights certainly gives a different token. It does thousands of steps per
second. `expected_tokens` computes the right tokens from files and prompt alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.numpy import load_file
from veneer_server.step.adapter_table import AdapterTable, Group
from veneer_server.step.arrays import StepArrays, finite_rows

from tests.tiny_llama import LAYERS, VOCABULARY

BASE: Final = hashlib.sha256(b"base").digest()
_SPECIAL: Final = 3
"""Token ids below this are special and never generated."""


def _cell(identity: bytes, token: int, position: int) -> int:
    found = hashlib.sha256(b"%b %d %d" % (identity, token, position)).digest()
    return int.from_bytes(found[:8], "little")


def _next(identity: bytes, cells: bytes) -> int:
    found = int.from_bytes(hashlib.sha256(identity + cells).digest()[:8], "little")
    return _SPECIAL + found % (VOCABULARY - _SPECIAL)


def expected_tokens(identity: bytes, prompt: Sequence[int], count: int) -> list[int]:
    """Return the tokens that these weights must generate for this prompt."""
    tokens = list(prompt)
    cells = bytearray()
    for position in range(len(prompt) + count - 1):
        cells += _cell(identity, tokens[position], position).to_bytes(8, "little")
        if position >= len(prompt) - 1:
            tokens.append(_next(identity, bytes(cells)))
    return tokens[len(prompt) :]


def identity_of_folder(folder: Path) -> bytes:
    """Compute the identity of an adapter from its files; it targets only q_proj, in every
    layer."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = hashlib.sha256()
    for layer in range(LAYERS):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        a, b = (tensors[f"{stem}.lora_{side}.weight"] for side in "AB")
        found.update(b"%d %d 0 1.0" % (Group.QKV.value, layer))
        found.update(np.ascontiguousarray(a.T).tobytes())
        found.update(np.ascontiguousarray(b.T).tobytes())
    return found.digest()


def _identity_of_table(table: AdapterTable) -> bytes:
    """Compute the identity of an adapter from memory; it is read each time, so that a changed
    buffer is detected."""
    found = hashlib.sha256()
    for group in Group:
        for layer, views in enumerate(table.views[group.value]):
            if views is None:
                continue
            pairs = zip(views.members, views.expands, strict=True)
            for member, (b_t, scaling) in pairs:
                found.update(b"%d %d %d " % (group.value, layer, member))
                found.update(str(scaling).encode())
                found.update(views.a_t.numpy().tobytes())
                found.update(b_t.numpy().tobytes())
    return found.digest()


class HashBackend:
    """Replaces `Decoder`; see the module docstring."""

    def __init__(self, weights: Any, cache: Any, lora_dtype: Any) -> None:
        self._size = cache.block_size
        self._pool = np.zeros(cache.keys[0].shape[1] * cache.block_size, dtype=np.uint64)

    def execute(self, step: StepArrays) -> torch.Tensor:
        """See `Backend.execute`: all rows are written before any is read."""
        identities = [BASE] * len(step.tokens)
        for segment in step.segments:
            identity = _identity_of_table(segment.table)
            identities[segment.begin : segment.end] = [identity] * (segment.end - segment.begin)
        rows = zip(identities, step.tokens.tolist(), step.positions.tolist(), strict=True)
        self._pool[step.slots] = np.array([_cell(*row) for row in rows], dtype=np.uint64)
        logits = torch.zeros(len(step.logit_rows), VOCABULARY)
        owners = np.searchsorted(step.row_starts, step.logit_rows, side="right") - 1
        for index, (row, owner) in enumerate(
            zip(step.logit_rows.tolist(), owners.tolist(), strict=True)
        ):
            places = np.arange(int(step.positions[row]) + 1)
            blocks = step.block_tables[owner, places // self._size]
            cells = self._pool[blocks * self._size + places % self._size]
            logits[index, _next(identities[row], cells.tobytes())] = 20.0
        return logits

    def finite(self, logits: torch.Tensor) -> list[bool]:
        """See `Backend.finite`."""
        return finite_rows(logits)

    def clear(self, blocks: list[int]) -> None:
        """See `Backend.clear`."""
        for block in blocks:
            self._pool[block * self._size : (block + 1) * self._size] = 0
