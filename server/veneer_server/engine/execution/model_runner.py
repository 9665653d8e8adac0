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
    FurtherToken,
    PlannedSequence,
    SequenceResult,
    StepPlan,
)
from veneer_server.step.token_counts import Seen

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
        rows: list[SampledRow] = []
        for sequence, place, result in zip(plan.sequences, places, results, strict=True):
            if sequence.draft and not result.finite:
                # The draft may be to blame, which the sequence must not notice.
                result.finite, result.redo = True, True
                written = sequence.blocks[sequence.start // self._block_size :]
                self.backend.clear(list(written))
                continue
            if not result.finite:
                # Clear the blocks that this step wrote; earlier chunks passed this check.
                written = sequence.blocks[sequence.start // self._block_size :]
                self.backend.clear(list(written))
                continue
            if place.sample is not None:
                rows.append(SampledRow(sequence, place.sample, result, result))
            if sequence.score:
                _score(logits, sequence, place, result, self._draws)
        if rows:
            self._sample(logits, rows)
        return results

    def _sample(self, logits: torch.Tensor, rows: list[SampledRow]) -> None:
        """Sample a token for every row that can take one now, and after drafts for as long as
        they are right. A constraint has to know a token before it allows the next one, so its
        sequences get theirs one after another."""
        until = time.monotonic() + _PATIENCE_S
        taken = self._sample_once(logits, _with_drafts(rows), until)
        until = time.monotonic() + _PATIENCE_S
        while taken:
            rows = [
                row.following()
                for row in taken
                if row.sequence.constraint is not None
                and row.accepted
                and row.result.following is ConstraintState.GOES_ON
                and self._mask_known(row.sequence.sequence, until)
            ]
            taken = self._sample_once(logits, rows, until)

    def _mask_known(self, sequence: int, until: float) -> bool:
        assert self._grammars is not None, "the loop refuses constraints without grammars"
        return self._grammars.ready(sequence, until)

    def _sample_once(
        self, logits: torch.Tensor, rows: list[SampledRow], until: float
    ) -> list[SampledRow]:
        """Sample a token for each row; return the rows that got theirs. The rows after a draft
        token that is not the sampled one get none."""
        choices: list[TokenChoice] = []
        ready: list[SampledRow] = []
        for row in rows:
            if (choice := self._choice(row, until)) is not None:
                choices.append(choice)
                ready.append(row)
        if not ready:
            return []
        at = [row.at for row in ready]
        if at != list(range(len(logits))):
            logits = logits.index_select(0, _index(at, logits))
        constrained = {}
        taken: list[int] = []
        last: SampledRow | None = None
        for k, (row, token) in enumerate(
            zip(ready, sample(logits, choices, self._draws), strict=True)
        ):
            if row.drafted and not row.follows(last):
                continue  # after a refused token
            last = row
            if token is None:
                row.fail()
                continue
            row.take(token)
            taken.append(k)
            if row.sequence.constraint is not None:
                constrained[row.sequence.sequence] = row
        if constrained:
            self._advance(constrained)
        wanted = [k for k in taken if ready[k].sequence.logprobs]
        # To compute them for rows that do not request them is cheaper than to copy the others.
        got = wanted if 2 * len(wanted) < len(ready) or len(taken) < len(ready) else taken
        if wanted:
            if len(got) < len(ready):
                logits = logits.index_select(0, _index(got, logits))
            _add_logprobs(logits, [ready[k] for k in got], self._draws)
        return [ready[k] for k in taken]

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
            position=sequence.position + row.drafted,
            token_counts=row.token_counts(),
            allowed=allowed,
            forbidden=_others_left(sequence.forbidden, allowed),
        )

    def _advance(self, rows: dict[int, SampledRow]) -> None:
        """Pass the sampled tokens to their constraints, by sequence."""
        assert self._grammars is not None
        chosen = {sequence: row.into.token or 0 for sequence, row in rows.items()}
        until = time.monotonic() + _PATIENCE_S
        for sequence, following in self._grammars.advance(chosen, until).items():
            rows[sequence].result.following = following


def _with_drafts(rows: list[SampledRow]) -> list[SampledRow]:
    """Add the rows after drafts, each after the row before it, except under a constraint."""
    found: list[SampledRow] = []
    for row in rows:
        found.append(row)
        if row.sequence.constraint is None:
            for _ in row.sequence.draft:
                found.append(found[-1].following())
    return found


def _others_left(
    forbidden: tuple[int, ...], allowed: NDArray[np.bool_] | None
) -> tuple[int, ...]:
    """Return the forbidden tokens, or none if the constraint allows no others: it is then
    complete."""
    if not forbidden or allowed is None:
        return forbidden
    inside = [token for token in forbidden if token < len(allowed)]
    return forbidden if allowed.sum() > allowed[inside].sum() else ()


@dataclass(slots=True)
class SampledRow:
    """A row of which a token is sampled.

    Attributes:
        at: index of its row of logits.
        result: the sequence's result.
        into: where the token goes: the result or, after a draft, a further token of it.
        drafted: number of draft tokens up to this row.
    """

    sequence: PlannedSequence
    at: int
    result: SequenceResult
    into: SequenceResult | FurtherToken
    drafted: int = 0

    def following(self) -> SampledRow:
        """The row after the next token of the draft."""
        return SampledRow(
            self.sequence, self.at + 1, self.result, FurtherToken(-1), self.drafted + 1
        )

    @property
    def accepted(self) -> bool:
        """Whether its token is the draft's next one."""
        draft = self.sequence.draft
        return self.drafted < len(draft) and self.into.token == draft[self.drafted]

    def follows(self, last: SampledRow | None) -> bool:
        """Whether ``last`` is the row before this one, and its token accepted."""
        if self.sequence.constraint is not None:
            return True  # checked before it was sampled
        if last is None or last.result is not self.result:
            return False
        return last.drafted + 1 == self.drafted and last.accepted

    def take(self, token: int) -> None:
        """Set its token."""
        self.into.token = token
        if isinstance(self.into, FurtherToken):
            self.result.further.append(self.into)

    def fail(self) -> None:
        """Nothing could be sampled from it. After a draft, the next step will tell."""
        if not self.drafted:
            self.result.finite = False

    def token_counts(self) -> Seen | None:
        """The tokens before the one to be sampled, if penalties need them."""
        seen = self.sequence.token_counts
        return seen and seen.after(self.sequence.draft[: self.drafted])


def _add_logprobs(logits: torch.Tensor, rows: list[SampledRow], draws: Draws) -> None:
    """Add raw log-probabilities of the sampled tokens and, if requested, of the likeliest. They
    are computed for rows that do not request them, too: copying the others takes longer."""
    tokens = _index([row.into.token or 0 for row in rows], logits)
    sums = draws.log_sums(logits)
    counts = [row.sequence.top_logprobs for row in rows]
    tops = top_tokens(logits, counts, sums) if any(counts) else [None] * len(rows)
    for row, value, top in zip(
        rows, token_logprobs(logits, tokens, sums).tolist(), tops, strict=True
    ):
        if row.sequence.logprobs:
            row.into.logprob = value
            if row.sequence.top_logprobs:
                row.into.tops = top


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
    """A sequence's rows of logits: scored or only checked ones from ``begin``, then the sampled
    one at ``sample`` if there is one, and those after each token of its draft; ``end`` is past
    the last."""

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
        last = len(tokens) - 1 - len(sequence.draft)
        if window is not None and not sequence.score:
            # In every layer, each row must be seen by a row whose logits are checked. The last
            # row sees no further than its window: a NaN before that would stay in the cache.
            logit_rows += range(first + window - 1, last, window)
        sampled = None
        if sequence.samples:
            sampled = len(logit_rows)
            logit_rows += range(last, len(tokens))
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
