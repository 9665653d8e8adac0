"""Samples a step's tokens and log-probabilities on the device, right after its logits.

The host writes a step's settings to pinned memory and reads its results from there. There are
two sets, and a row can take its token from the last step's results on the device (`carry`). So
the next step may be enqueued before the host knows the last one's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.inputs import SETS
from veneer_server.backends.cuda.sampling.draw import draw, given
from veneer_server.backends.cuda.sampling.logprobs import TOPS, logprobs
from veneer_server.step.ahead import Sampled, Submitted
from veneer_server.step.choice import TokenChoice


class SampledRows:
    """The sampling of all steps, in static memory.

    Args:
        rows: most rows of logits of a step.
        sequences: most rows of logits that the host gets from a step.
    """

    def __init__(self, device: Device, rows: int, sequences: int, vocab: int) -> None:
        self._device = device
        self._handed = [
            device.pinned(sequences, vocab, dtype=torch.float32) for _ in range(SETS)
        ]
        asked: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "settings": ((rows, 2), torch.float32),
            "top_k": ((rows,), torch.int32),
            "shares": ((rows, 2), torch.float64),
            "counts": ((rows,), torch.int32),
            "carried": ((rows,), torch.int64),
            "follows": ((rows,), torch.bool),
            "scored": ((rows,), torch.int64),
            "scores": ((rows,), torch.bool),
        }
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((rows,), torch.int64),
            "sums": ((rows,), torch.float32),
            "own": ((rows,), torch.float32),
            "tops": ((rows, TOPS), torch.int32),
            "top_own": ((rows, TOPS), torch.float32),
        }
        self._results = tuple(made)
        both = asked | made
        self._there = {n: device.empty(*s, dtype=kind) for n, (s, kind) in both.items()}
        self._here = [
            {n: device.pinned(*s, dtype=kind) for n, (s, kind) in both.items()}
            for _ in range(SETS)
        ]
        self._known = device.empty(rows, dtype=torch.int64)
        """The last step's tokens; 0 where nothing could be sampled."""
        self._picked = device.empty(rows, dtype=torch.int64)
        self._asked = device.empty(rows, dtype=torch.int64)
        """The tokens whose log-probabilities are wanted."""
        device.call(torch.Tensor.zero_, self._known)

    def carry(self, turn: int, carried: Sequence[int], tokens: torch.Tensor) -> None:
        """Enqueue the replacement of rows' tokens by tokens that the last step sampled.

        Args:
            carried: for each row of the step, the row of the last step's logits, or -1.
            tokens: [rows] int64, the step's tokens, which are written to.
        """
        count = len(carried)
        rows = np.array(carried, dtype=np.int64)
        self._give(turn, "carried", np.maximum(rows, 0))
        self._give(turn, "follows", rows >= 0)
        there = self._there
        picked, tokens = self._picked[:count], tokens[:count]
        self._device.call(
            torch.index_select, self._known, 0, there["carried"][:count], out=picked
        )
        self._device.call(torch.where, there["follows"][:count], picked, tokens, out=tokens)

    def sample(
        self,
        turn: int,
        logits: torch.Tensor,
        choices: Sequence[TokenChoice],
        tops: Sequence[int],
        scored: Sequence[int] = (),
    ) -> None:
        """Enqueue sampling, and the copies of its results to the host.

        Args:
            turn: index of the set of pinned memory.
            logits: [rows, vocab] float32.
            choices: one for each row; bias, penalties and masks are not supported.
            tops: for each row, how many of the likeliest tokens are wanted.
            scored: see `AheadBackend.submit`.
        """
        count, call = len(choices), self._device.call
        for name, numbers in given(choices).items():
            self._give(turn, name, numbers)
        self._give(turn, "counts", tops)
        t = {name: tensor[:count] for name, tensor in self._there.items()}
        call(torch.sum, logits, dim=1, out=t["sums"])
        call(draw, logits, t["settings"], t["top_k"], t["shares"], t["tokens"])
        known = self._known[:count]
        call(torch.clamp, t["tokens"], min=0, out=known)
        asked = known
        if scored:
            self._give(turn, "scored", scored)
            self._give(turn, "scores", np.array(scored) >= 0)
            asked = self._asked[:count]
            call(torch.where, t["scores"], t["scored"], known, out=asked)
        call(logprobs, logits, asked, t["counts"], t["own"], t["tops"], t["top_own"])
        for name in self._results:
            call(self._here[turn][name][:count].copy_, t[name], non_blocking=True)

    def hand(self, turn: int, logits: torch.Tensor, rows: Sequence[int]) -> None:
        """Enqueue copies of some rows of logits to the host."""
        for at, row in enumerate(rows):
            self._device.call(self._handed[turn][at].copy_, logits[row], non_blocking=True)

    def read(self, submitted: Submitted) -> Sampled:
        """Return the results of a step that has finished."""
        turn, tops = submitted.turn, submitted.tops
        here = {name: self._here[turn][name][: len(tops)] for name in self._results}
        ids, values = here["tops"].tolist(), here["top_own"].tolist()
        return Sampled(
            [None if token < 0 else token for token in here["tokens"].tolist()],
            here["sums"].isfinite().tolist(),
            here["own"].tolist(),
            [
                list(zip(i[:count], v[:count], strict=True))
                for i, v, count in zip(ids, values, tops, strict=True)
            ],
            self._handed[turn][: submitted.handed],
        )

    def _give(self, turn: int, name: str, numbers: Any) -> None:
        here = self._here[turn][name][: len(numbers)]
        here.numpy()[:] = numbers
        self._device.call(self._there[name][: len(numbers)].copy_, here, non_blocking=True)
