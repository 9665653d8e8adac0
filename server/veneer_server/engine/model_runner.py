"""Carries out a `StepPlan`: plain arrays in, one backend call, tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from veneer_server.engine.sampler import sample, token_logprobs
from veneer_server.engine.sequence import PlannedSequence, StepPlan, StepResult
from veneer_server.lora.batch import Segment
from veneer_server.lora.table import AdapterTable
from veneer_server.models.arrays import Backend, StepArrays

__all__ = ["ModelRunner"]


class ModelRunner:
    """Turns plans into results.

    Args:
        tables: resident adapters by weights digest, kept up to date by the loop;
            every digest of a plan is in it.
    """

    def __init__(
        self, backend: Backend, tables: Mapping[str, AdapterTable], block_size: int
    ) -> None:
        self._backend = backend
        self._tables = tables
        self._block_size = block_size

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        arrays, places = _to_arrays(plan, self._tables, self._block_size)
        logits = self._backend.execute(arrays)
        # A sum is finite only if every term is; one pass and no mask.
        finite_rows = logits.sum(dim=-1).isfinite().tolist()
        finite = [all(finite_rows[p.begin : p.end]) for p in places]
        tokens: list[int | None] = [None] * len(places)
        logprobs: list[float | None] = [None] * len(places)
        scores: list[tuple[float, ...]] = [()] * len(places)
        sampling = [i for i, p in enumerate(places) if finite[i] and p.sample is not None]
        if sampling:
            rows = logits.index_select(
                0, _index([places[i].sample or 0 for i in sampling], logits)
            )
            planned = [plan.sequences[i] for i in sampling]
            chosen = sample(rows, [p.sampling for p in planned], [p.position for p in planned])
            wanted = [k for k, p in enumerate(planned) if p.logprobs]
            for i, token in zip(sampling, chosen, strict=True):
                tokens[i] = token
            if wanted:
                picked = [chosen[k] for k in wanted]
                values = token_logprobs(rows[wanted], _index(picked, logits)).tolist()
                for k, value in zip(wanted, values, strict=True):
                    logprobs[sampling[k]] = value
        for i, (place, sequence) in enumerate(zip(places, plan.sequences, strict=True)):
            if sequence.score and finite[i]:
                rows = logits[place.begin : place.begin + len(sequence.score)]
                following = _index(list(sequence.score), logits)
                scores[i] = tuple(token_logprobs(rows, following).tolist())
        return StepResult(tuple(tokens), tuple(logprobs), tuple(scores), tuple(finite))


@dataclass(frozen=True, slots=True)
class _Place:
    """A sequence's rows among the logits: scored ones from ``begin``, then the
    sampled one at ``sample`` if there is one; ``end`` is past both."""

    begin: int
    end: int
    sample: int | None


def _index(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _to_arrays(
    plan: StepPlan, tables: Mapping[str, AdapterTable], block_size: int
) -> tuple[StepArrays, list[_Place]]:
    tokens: list[int] = []
    row_starts = [0]
    logit_rows: list[int] = []
    places: list[_Place] = []
    for sequence in plan.sequences:
        first = len(tokens)
        tokens.extend(sequence.tokens)
        row_starts.append(len(tokens))
        begin = len(logit_rows)
        logit_rows.extend(range(first, first + len(sequence.score)))
        sampled = None
        if sequence.samples:
            sampled = len(logit_rows)
            logit_rows.append(len(tokens) - 1)
        places.append(_Place(begin, len(logit_rows), sampled))
    starts = np.array([s.start for s in plan.sequences], dtype=np.int64)
    counts = np.diff(row_starts)
    width = max(len(s.blocks) for s in plan.sequences)
    table = np.zeros((len(plan.sequences), width), dtype=np.int64)
    for i, sequence in enumerate(plan.sequences):
        table[i, : len(sequence.blocks)] = sequence.blocks
    owner = np.repeat(np.arange(len(plan.sequences)), counts)
    within = np.arange(len(tokens)) - np.repeat(row_starts[:-1], counts)
    positions = starts[owner] + within
    slots = table[owner, positions // block_size] * block_size + positions % block_size
    arrays = StepArrays(
        tokens=np.array(tokens, dtype=np.int64),
        positions=positions,
        slots=slots,
        row_starts=np.array(row_starts, dtype=np.int64),
        contexts=starts + counts,
        block_tables=table,
        segments=_segments(plan.sequences, row_starts, tables),
        logit_rows=np.array(logit_rows, dtype=np.int64),
    )
    return arrays, places


def _segments(
    sequences: tuple[PlannedSequence, ...],
    row_starts: list[int],
    tables: Mapping[str, AdapterTable],
) -> tuple[Segment, ...]:
    """Runs of rows with the same adapter; the plan is sorted by adapter."""
    segments: list[Segment] = []
    begin = 0
    for i, sequence in enumerate(sequences):
        last = i + 1 == len(sequences) or sequences[i + 1].digest != sequence.digest
        if not last:
            continue
        if sequence.digest is not None:
            segments.append(
                Segment(row_starts[begin], row_starts[i + 1], tables[sequence.digest])
            )
        begin = i + 1
    return tuple(segments)
