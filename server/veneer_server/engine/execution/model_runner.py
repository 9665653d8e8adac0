"""Executes a `StepPlan`: turns it into arrays, calls the backend once, and samples tokens."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.constraints.grammars import GrammarFailed, Grammars
from veneer_server.engine.execution.sampler import (
    TorchDraws,
    sample,
    token_logprobs,
    token_ranks,
    top_tokens,
)
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.arrays import Backend, Segment, StepArrays
from veneer_server.step.choice import Draws, TokenChoice
from veneer_server.step.plan import (
    ConstraintState,
    PlannedSequence,
    SequenceResult,
    StepPlan,
)

_PATIENCE_S: Final = 0.002
"""How long a step waits for masks, and again to learn whether tokens completed a constraint.
An answer that comes later costs its own sequence a step, and the other sequences nothing."""


class ModelRunner:
    """Turns plans into results.

    Args:
        tables: resident adapters by weights digest, kept up to date by the loop;
            it contains every digest of a plan.
        grammars: say which tokens constrained sequences may generate; None if the base's
            tokenizer does not support constraints, so that no plan has any.
        draws: samples tokens; `TorchDraws` if None.
        window: fewest tokens that any layer attends to; None if all layers attend to all.

    Attributes:
        backend: computes the logits.
    """

    def __init__(
        self,
        backend: Backend,
        tables: Mapping[str, AdapterTable],
        block_size: int,
        grammars: Grammars | None = None,
        draws: Draws | None = None,
        window: int | None = None,
    ) -> None:
        self._window = window
        self._draws = draws or TorchDraws()
        self._grammars = grammars
        self.backend = backend
        self._tables = tables
        self._block_size = block_size

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        arrays, places = to_arrays(plan, self._tables, self._block_size, self._window)
        logits = self.backend.execute(arrays)
        finite_rows = self.backend.finite(logits)
        results = tuple(
            SequenceResult(finite=all(finite_rows[place.begin : place.end])) for place in places
        )
        rows = []
        for sequence, place, result in zip(plan.sequences, places, results, strict=True):
            if not result.finite:
                # Clear the blocks that this step wrote; earlier chunks passed this check.
                written = sequence.blocks[sequence.start // self._block_size :]
                self.backend.clear(list(written))
                continue
            if place.sample is not None:
                rows.append(SampledRow(sequence, place.sample, result))
            if sequence.score:
                _score(logits, sequence, place, result, self._draws)
        if rows:
            self._sample(logits, rows)
        return results

    def _sample(self, logits: torch.Tensor, rows: list[SampledRow]) -> None:
        """Sample a token for every row that can take one now."""
        choices: list[TokenChoice] = []
        ready: list[SampledRow] = []
        until = time.monotonic() + _PATIENCE_S
        for row in rows:
            if (choice := self._choice(row, until)) is not None:
                choices.append(choice)
                ready.append(row)
        if not ready:
            return
        at = [row.at for row in ready]
        if at != list(range(len(logits))):
            logits = logits.index_select(0, _index(at, logits))
        constrained = {}
        for row, token in zip(ready, sample(logits, choices, self._draws), strict=True):
            row.result.token = token
            if token is None:
                row.result.finite = False
            elif row.sequence.constraint is not None:
                constrained[row.sequence.sequence] = row.result
        if constrained:
            self._advance(constrained)
        wanted = [k for k, row in enumerate(ready) if row.sequence.logprobs]
        if wanted and 2 * len(wanted) < len(ready):
            logits = logits.index_select(0, _index(wanted, logits))
            ready = [ready[k] for k in wanted]
        if wanted:
            _add_logprobs(logits, ready, self._draws)

    def _choice(self, row: SampledRow, until: float) -> TokenChoice | None:
        """Return how to sample the row; None if its constraint has no next token, or the mask
        is late."""
        sequence, allowed = row.sequence, None
        if sequence.constraint is not None:
            assert self._grammars is not None, "the loop refuses constraints without grammars"
            try:
                known = self._grammars.allowed(sequence.sequence, until)
            except GrammarFailed as error:
                row.result.failure = error.failure
                return None
            if isinstance(known, ConstraintState):
                row.result.following = known
                return None
            allowed = known
        return TokenChoice(
            params=sequence.sampling,
            position=sequence.position,
            token_counts=sequence.token_counts,
            allowed=allowed,
            forbidden=_others_left(sequence.forbidden, allowed),
        )

    def _advance(self, results: dict[int, SequenceResult]) -> None:
        """Pass the sampled tokens to their constraints, by sequence."""
        assert self._grammars is not None
        chosen = {sequence: result.token or 0 for sequence, result in results.items()}
        until = time.monotonic() + _PATIENCE_S
        for sequence, following in self._grammars.advance(chosen, until).items():
            results[sequence].following = following


def _others_left(
    forbidden: tuple[int, ...], allowed: NDArray[np.bool_] | None
) -> tuple[int, ...]:
    """Return the forbidden tokens, or none if the constraint allows no others: it is then
    complete."""
    if not forbidden or allowed is None:
        return forbidden
    inside = [token for token in forbidden if token < len(allowed)]
    return forbidden if allowed.sum() > allowed[inside].sum() else ()


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A sequence that gets a token, the index ``at`` of its row of logits, and its result."""

    sequence: PlannedSequence
    at: int
    result: SequenceResult


def _add_logprobs(logits: torch.Tensor, rows: list[SampledRow], draws: Draws) -> None:
    """Add raw log-probabilities of the sampled tokens and, if requested, of the likeliest. They
    are computed for rows that do not request them, too: copying the others takes longer."""
    tokens = _index([row.result.token or 0 for row in rows], logits)
    sums = draws.log_sums(logits)
    counts = [row.sequence.top_logprobs for row in rows]
    tops = top_tokens(logits, counts, sums) if any(counts) else [None] * len(rows)
    for row, value, top in zip(
        rows, token_logprobs(logits, tokens, sums).tolist(), tops, strict=True
    ):
        if row.sequence.logprobs:
            row.result.logprob = value
            if row.sequence.top_logprobs:
                row.result.tops = top


def _score(
    logits: torch.Tensor,
    sequence: PlannedSequence,
    place: LogitRows,
    result: SequenceResult,
    draws: Draws,
) -> None:
    """Add the log-probabilities of a chunk of the prompt to the result."""
    rows = logits[place.begin : place.begin + len(sequence.score)]
    following, sums = _index(list(sequence.score), logits), draws.log_sums(rows)
    result.scores = tuple(token_logprobs(rows, following, sums).tolist())
    if sequence.ranks:
        result.score_ranks = tuple(token_ranks(rows, following))
    if sequence.top_logprobs:
        result.score_tops = tuple(top_tokens(rows, [sequence.top_logprobs] * len(rows), sums))


@dataclass(frozen=True, slots=True)
class LogitRows:
    """A sequence's rows of logits: scored or only checked ones from ``begin``, then
    the sampled one at ``sample`` if there is one; ``end`` is past the last."""

    begin: int
    end: int
    sample: int | None


def _index(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def to_arrays(
    plan: StepPlan,
    tables: Mapping[str, AdapterTable],
    block_size: int,
    window: int | None = None,
) -> tuple[StepArrays, list[LogitRows]]:
    # Use lists: most steps have few rows, and each numpy call costs as much as a few rows.
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    contexts: list[int] = []
    row_starts = [0]
    logit_rows: list[int] = []
    places: list[LogitRows] = []
    for sequence in plan.sequences:
        first, start, blocks = len(tokens), sequence.start, sequence.blocks
        end = start + len(sequence.tokens)
        tokens += sequence.tokens
        positions += range(start, end)
        slots += [
            blocks[at // block_size] * block_size + at % block_size for at in range(start, end)
        ]
        contexts.append(end)
        row_starts.append(len(tokens))
        begin = len(logit_rows)
        logit_rows += range(first, first + len(sequence.score))
        if window is not None and not sequence.score:
            # In every layer, each row must be seen by a row whose logits are checked. The last
            # row sees no further than its window: a NaN before that would stay in the cache.
            logit_rows += range(first + window - 1, len(tokens) - 1, window)
        sampled = None
        if sequence.samples:
            sampled = len(logit_rows)
            logit_rows.append(len(tokens) - 1)
        elif not sequence.score:
            # Only to check that the logits are finite, so that the K and V may be shared.
            logit_rows.append(len(tokens) - 1)
        places.append(LogitRows(begin, len(logit_rows), sampled))
    arrays = StepArrays(
        tokens=np.array(tokens, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        slots=np.array(slots, dtype=np.int64),
        row_starts=np.array(row_starts, dtype=np.int64),
        contexts=np.array(contexts, dtype=np.int64),
        block_tables=_block_tables([s.blocks for s in plan.sequences]),
        segments=_segments(plan.sequences, row_starts, tables),
        logit_rows=np.array(logit_rows, dtype=np.int64),
    )
    return arrays, places


def _block_tables(blocks: list[array[int]]) -> NDArray[np.int64]:
    """Return the block tables, [S, B], padded with block 0. Copies memory: with 64 sequences of
    1,024 blocks that takes 0.06 ms, where lists of Python numbers took 1.3 ms."""
    width = max(map(len, blocks))
    table = array("q", [0]) * (width * len(blocks))
    for row, each in enumerate(blocks):
        table[row * width : row * width + len(each)] = each
    return np.frombuffer(table, dtype=np.int64).reshape(len(blocks), width)


def _segments(
    sequences: tuple[PlannedSequence, ...],
    row_starts: list[int],
    tables: Mapping[str, AdapterTable],
) -> tuple[Segment, ...]:
    """Return the runs of rows with the same adapter; the plan is sorted by adapter."""
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
