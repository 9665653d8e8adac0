"""Turns samples into batches: order, packing, padding and masking."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from veneer_train.data import IGNORE, PAD, TrainingSample

_BUCKET: Final = 32
"""Samples are sorted by length in chunks of this many batches: lengths are close within a
batch, but batches still differ from epoch to epoch."""

Packed = tuple[TrainingSample, ...]
"""Samples that share a row, one after another."""


class Order(torch.utils.data.Sampler[int]):
    """The order of samples in an epoch. It depends only on seed and epoch, so a resumed run
    repeats it.

    Args:
        lengths: tokens of each sample, to put samples of similar length next to each other.
            None: ignore lengths.
        batch: samples per step.
    """

    def __init__(
        self, count: int, seed: int, *, lengths: Sequence[int] | None = None, batch: int = 1
    ) -> None:
        self._count = count
        self._seed = seed
        self._lengths = lengths
        self._batch = batch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed} {self._epoch}")  # nosec B311 # not for secrets
        order = list(range(self._count))
        draw.shuffle(order)
        if self._lengths is None:
            return iter(order)
        size = self._batch * _BUCKET
        lengths = self._lengths
        batches: list[list[int]] = []
        for start in range(0, self._count, size):
            near = sorted(order[start : start + size], key=lambda i: -lengths[i])
            batches += [near[at : at + self._batch] for at in range(0, len(near), self._batch)]
        # Short batches stay last: only the last batch of an epoch may be short.
        whole = [batch for batch in batches if len(batch) == self._batch]
        rest = [batch for batch in batches if len(batch) < self._batch]
        draw.shuffle(whole)
        return iter([index for batch in (*whole, *rest) for index in batch])


def pack(samples: Sequence[TrainingSample], room: int) -> list[Packed]:
    """Rows of at most ``room`` tokens, by first-fit decreasing.

    A sample is never cut: one with more than ``room`` tokens gets its own row.
    """
    rows: list[list[TrainingSample]] = []
    left: list[int] = []
    for sample in sorted(samples, key=lambda s: (-len(s.input_ids), s.line)):
        size = len(sample.input_ids)
        fits = next((n for n, free in enumerate(left) if free >= size), None)
        if fits is None:
            rows.append([sample])
            left.append(room - size)
        else:
            rows[fits].append(sample)
            left[fits] -= size
    return [tuple(row) for row in rows]


def collate(samples: Sequence[TrainingSample]) -> dict[str, torch.Tensor]:
    """One batch, padded on the right to its longest sample and masked by length.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each int64 [batch, longest].
    """
    longest = max(len(sample.input_ids) for sample in samples)

    def rows(values: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

    return {
        "input_ids": rows([sample.input_ids for sample in samples], PAD),
        "attention_mask": rows([[1] * len(sample.input_ids) for sample in samples], 0),
        "labels": rows([sample.labels for sample in samples], IGNORE),
    }


def collate_packed(rows: Sequence[Packed]) -> dict[str, torch.Tensor]:
    """One batch of packed rows.

    Positions restart with each sample. Given positions but no mask and no cache, transformers
    lets a token attend only to earlier tokens of its own sample; the padding counts as a
    separate sample.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each int64 [batch, longest].
    """
    longest = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    ids, positions, labels = [], [], []
    for row in rows:
        fill = longest - sum(len(sample.input_ids) for sample in row)
        ids.append([t for s in row for t in s.input_ids] + [PAD] * fill)
        lengths = [*(len(s.input_ids) for s in row), fill]
        positions.append([place for length in lengths for place in range(length)])
        # A sample's first token follows another sample's last one: it is never learned.
        learned = [t for s in row for t in (IGNORE, *s.labels[1:])]
        labels.append(learned + [IGNORE] * fill)
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "labels": torch.tensor(labels),
    }
