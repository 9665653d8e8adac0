"""Samples tokens on the device (`sampling.draw`), with one wait for all rows of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.sampling.draw import draw, given
from veneer_server.step.choice import TokenChoice


class CudaDraws:
    """Implements `step.choice.Draws`.

    Args:
        rows: most rows sampled at once; a larger batch is sampled in several rounds.
    """

    def __init__(self, device: Device, rows: int, vocab: int) -> None:
        self._device = device
        self._logits = device.empty(rows, vocab, dtype=torch.float32)
        shapes = {
            "settings": ((rows, 2), torch.float32),
            "top_k": ((rows,), torch.int32),
            "shares": ((rows, 2), torch.float64),
            "tokens": ((rows,), torch.int64),
        }
        self._there = {n: device.empty(*s, dtype=kind) for n, (s, kind) in shapes.items()}
        self._here = {n: device.pinned(*s, dtype=kind) for n, (s, kind) in shapes.items()}

    def tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice]) -> list[int | None]:
        """See `Draws.tokens`."""
        found: list[int | None] = []
        for begin in range(0, len(choices), len(self._logits)):
            end = begin + len(self._logits)
            found += self._tokens(logits[begin:end], choices[begin:end])
        return found

    def log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Draws.log_sums`."""
        return torch.logsumexp(logits, dim=-1)

    def _tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice]) -> list[int | None]:
        count = len(choices)
        here = {name: pinned[:count] for name, pinned in self._here.items()}
        there = {name: tensor[:count] for name, tensor in self._there.items()}
        # The last round's tokens were read, so nothing reads its settings any more.
        for name, numbers in given(choices).items():
            here[name].numpy()[:] = numbers
            self._device.call(there[name].copy_, here[name], non_blocking=True)
        rows = self._logits[:count]
        self._device.call(torch.Tensor.copy_, rows, logits)
        self._device.call(
            draw, rows, there["settings"], there["top_k"], there["shares"], there["tokens"]
        )
        self._device.call(here["tokens"].copy_, there["tokens"], non_blocking=True)
        self._device.sync(self._device.record())
        return [None if token < 0 else token for token in here["tokens"].tolist()]
