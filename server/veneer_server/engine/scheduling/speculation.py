"""Speculation: guess a sequence's next tokens, and compute several rows of it in one step.

A draft is a guess of the tokens that follow. The step computes the newest token and the draft
in adjacent rows, samples a token from every row with the seed and position that it would have
had anyway, and keeps tokens for as long as they equal the draft. So a draft changes how many
tokens a step gives, and never which ones, provided that a row's bits do not depend on the rows
beside it.

Drafts are looked up, not computed: the last tokens of a sequence are searched in its own prompt
and output, in the answer that the caller expects (`SequenceRequest.prediction`), and in earlier
answers of the same tenant, cache scope and adapter (`SuffixStore`); the draft is what followed
there. The idea is prompt lookup decoding (Saxena 2023), with a store as in REST (He et al.
2023).

No torch, no clock. All of it belongs to the step loop.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from veneer_server.engine.scheduling.sequence import Sequence as EngineSequence

MOST_DRAFT: Final = 15
"""Longest draft: with the newest token it makes 16 rows, a tile of the matrix registers."""

STORE_TOKENS: Final = 16_384
"""Tokens of earlier answers kept for each tenant, scope and adapter."""
ALL_STORED_TOKENS: Final = 262_144
"""Tokens kept for all of them, about 100 bytes each; the least recently used go first."""

_NGRAM: Final = 3
"""Fewest tokens that must match."""
_LONGEST_MATCH: Final = 32
"""Tokens that are compared at most: a longer match predicts no better."""
_OCCURRENCES: Final = 6
"""Earlier occurrences that are compared, newest first."""
_OWN_TOKENS: Final = 32_768
"""Tokens of a sequence that are searched, the newest ones: an index takes about 100 bytes a
token."""
_BEFORE: Final = 8
"""Last tokens of the prompt that are stored with an answer, so that its beginning can match."""
_LEAST_STORED: Final = 8
"""Shorter answers are not stored."""
_BITS: Final = 20
_MASK: Final = (1 << _BITS) - 1
_KEY_MASK: Final = (1 << _BITS * _NGRAM) - 1
_GAP: Final = -(1 << 62)
"""Between two stored answers; no token."""

_LENGTHS: Final = (4, 6, 9, 16)
"""Matches are told apart by length: below 4 tokens, below 6, and so on."""
_PRIORS: Final = (0.3, 0.45, 0.6, 0.75, 0.85)
"""Assumed share of accepted tokens for each length, until the sequence shows its own."""
_PRIOR_WEIGHT: Final = 3.0
"""Number of judged tokens that an assumption about a sequence is worth."""
_USUAL_WEIGHT: Final = 10.0
"""The same for an assumption about all sequences of a tenant, scope and adapter: what they show
is what is assumed of the next one."""
_USUAL_DECAY: Final = 0.98
_MOST_USUAL: Final = 1024
"""Tenants, scopes and adapters of which that is kept."""
_DECAY: Final = 0.93
"""What a judged token still counts after the next one."""
_FORGET: Final = 0.985
"""The same after a step in which a match was found and not used, so that it is tried again."""
_LONGEST_PAUSE: Final = 16
"""Steps after which a sequence is searched again at the latest, if its drafts do not pay."""

_MARGIN: Final = 1.05
"""A draft must promise this many times the tokens per second that the step gives without it."""


class IndexedTokens:
    """Tokens, indexed in groups of `_NGRAM`, so that a sequence's last tokens can be found.

    Args:
        tokens: not copied; the owner may append to it.
        start: tokens before this one are left out.
    """

    def __init__(self, tokens: list[int], start: int = 0) -> None:
        self.tokens = tokens
        self._key = 0
        self._start = self._end = start
        self._last: dict[int, int] = {}
        """Position of the last token of a group's latest occurrence, by the group's key."""
        self._before = array("q")
        """For each indexed position, that of the group's previous occurrence, or -1."""

    def index(self, end: int) -> None:
        """Index the groups that end before position ``end``."""
        key, start, last, before = self._key, self._start, self._last, self._before
        for at in range(self._end, end):
            key = (key << _BITS | self.tokens[at] & _MASK) & _KEY_MASK
            if at - start < _NGRAM - 1:
                before.append(-1)
                continue
            before.append(last.get(key, -1))
            last[key] = at
        self._key, self._end = key, max(self._end, end)

    def find(self, suffix: Sequence[int]) -> tuple[int, int]:
        """Find the longest match for the end of ``suffix``.

        Args:
            suffix: newest tokens of a sequence, at most `_LONGEST_MATCH` are compared.

        Returns:
            The length of the match and the position of the token after it; (0, 0) if fewer than
            `_NGRAM` tokens match.
        """
        if len(suffix) < _NGRAM:
            return 0, 0
        key = 0
        for token in suffix[-_NGRAM:]:
            key = key << _BITS | token & _MASK
        at = self._last.get(key, -1)
        best = place = 0
        for _ in range(_OCCURRENCES):
            if at < 0:
                break
            length = self._common(suffix, at)
            if length > best:
                best, place = length, at + 1
            at = self._before[at - self._start]
        return (best, place) if best >= _NGRAM else (0, 0)

    def _common(self, suffix: Sequence[int], at: int) -> int:
        """Length of the longest common end of ``suffix`` and the tokens up to ``at``."""
        most = min(len(suffix), at + 1 - self._start, _LONGEST_MATCH)
        for back in range(most):
            if self.tokens[at - back] != suffix[-1 - back]:
                return back
        return most

    def after(self, at: int, count: int) -> list[int]:
        """Up to ``count`` tokens from position ``at`` on. At the end of the text they go on as
        if the tokens after the match were repeated, which is how loops are drafted."""
        found: list[int] = []
        known = len(self.tokens)
        if at >= known:
            return found
        for offset in range(count):
            place = at + offset
            token = self.tokens[place] if place < known else found[place - known]
            if token == _GAP:
                break
            found.append(token)
        return found


StoreKey = tuple[str, str, str | None]
"""Tenant, cache scope, and weights digest (None for the base)."""


def store_key(sequence: EngineSequence) -> StoreKey:
    """Return whose answers a sequence may be drafted from, and its own answer is kept for."""
    return sequence.request.tenant, sequence.request.cache_scope, sequence.digest


class _Answers:
    """Answers of one key. The newer half is appended to; once it is full, it replaces the
    older half."""

    def __init__(self) -> None:
        self.halves = [IndexedTokens([])]

    def __len__(self) -> int:
        return sum(len(text.tokens) for text in self.halves)

    def add(self, answer: list[int]) -> None:
        newer = self.halves[-1]
        if newer.tokens and len(newer.tokens) + len(answer) > STORE_TOKENS // 2:
            newer = IndexedTokens([])
            self.halves = [self.halves[-1], newer]
        newer.tokens += [*answer[-STORE_TOKENS // 2 + 1 :], _GAP]
        newer.index(len(newer.tokens))


class SuffixStore:
    """Earlier answers by tenant, cache scope and adapter, bounded in memory."""

    def __init__(self) -> None:
        self._answers: OrderedDict[StoreKey, _Answers] = OrderedDict()
        self.tokens = 0
        """Tokens kept for all keys."""

    def add(self, key: StoreKey, answer: list[int]) -> None:
        """Keep an answer: its tokens, after the last ones of its prompt."""
        kept = self._answers.setdefault(key, _Answers())
        self._answers.move_to_end(key)
        self.tokens -= len(kept)
        kept.add(answer)
        self.tokens += len(kept)
        while self.tokens > ALL_STORED_TOKENS:
            _, dropped = self._answers.popitem(last=False)
            self.tokens -= len(dropped)

    def texts(self, key: StoreKey) -> Sequence[IndexedTokens]:
        """What a sequence with this key may be searched in."""
        kept = self._answers.get(key)
        if kept is None:
            return ()
        self._answers.move_to_end(key)
        return kept.halves

    def clear(self) -> None:
        """Forget all answers."""
        self._answers.clear()
        self.tokens = 0


@dataclass(slots=True)
class Guess:
    """A draft for one sequence.

    Attributes:
        tokens: the draft.
        kind: index of its match's length in `_PRIORS`.
        rate: share of its tokens that is expected to be accepted.
    """

    tokens: list[int]
    kind: int
    rate: float


@dataclass(slots=True)
class _Rate:
    """Judged draft tokens and the accepted ones among them; older ones count less."""

    judged: float = 0.0
    accepted: float = 0.0

    def share(self, prior: float, weight: float) -> float:
        return (self.accepted + weight * prior) / (self.judged + weight)

    def take(self, accepted: int, refused: bool, decay: float) -> None:
        for good in (True,) * accepted + (False,) * refused:
            self.judged = decay * self.judged + 1
            self.accepted = decay * self.accepted + good


@dataclass(slots=True)
class _Drafted:
    """A sequence's searched texts and how its drafts did.

    Attributes:
        own: its prompt and output.
        prediction: the answer that its caller expects.
        usual: rates of all sequences of its tenant, scope and adapter.
        rates: by kind of match, see `Guess`.
        kind: that of the draft in the step that is running.
        pause: steps during which it is not searched.
        idle: how often in a row a match was found that did not pay.
    """

    own: IndexedTokens
    prediction: IndexedTokens | None
    usual: list[_Rate]
    rates: list[_Rate] = field(default_factory=lambda: [_Rate() for _ in _PRIORS])
    kind: int = 0
    pause: int = 0
    idle: int = 0
    off: bool = False

    def share(self, kind: int) -> float:
        usual = self.usual[kind].share(_PRIORS[kind], _USUAL_WEIGHT)
        return self.rates[kind].share(usual, _PRIOR_WEIGHT)

    def best_share(self) -> float:
        return max(map(self.share, range(len(_PRIORS))))

    def judge(self, accepted: int, refused: bool) -> None:
        """Take in how a draft did: tokens accepted, and whether the next one was refused."""
        self.rates[self.kind].take(accepted, refused, _DECAY)
        self.usual[self.kind].take(accepted, refused, _USUAL_DECAY)

    def unused(self) -> None:
        """A match was found, and did not pay."""
        self.idle += 1
        self.pause = min(1 << self.idle, _LONGEST_PAUSE) - 1
        for rate in (*self.rates, *self.usual):
            rate.judged *= _FORGET**self.pause
            rate.accepted *= _FORGET**self.pause


class StepTimes:
    """Seconds of a step by its number of rows: as measured before serving, and corrected by
    every step since, so that contexts, adapters and other load are taken into account.

    Args:
        measured: (rows, seconds) of steps that sample from all of their rows, ascending, the
            first with one row.
    """

    _FAST: Final = 0.1
    _SLOW: Final = 0.03
    _BACK: Final = 0.998

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        # A step takes no longer than one with more rows: what says otherwise is noise.
        least, self._measured = float("inf"), list[tuple[int, float]]()
        for rows, seconds in reversed(measured):
            least = min(least, max(seconds, 1e-9))
            self._measured.insert(0, (rows, least))
        self._scale = 1.0
        self._factors: dict[int, float] = {}
        """By bucket of rows; 1 where steps take as long as was measured."""

    def seconds(self, rows: int) -> float:
        """Expected seconds of a step with this many rows, at least 1."""
        return self._shape(rows) * self._factors.get(_bucket(rows), 1.0) * self._scale

    def observe(self, rows: int, seconds: float) -> None:
        """A step with this many rows took this long."""
        if rows < 1 or seconds <= 0:
            return
        # One step that the machine interrupted must not turn drafts off.
        apart = min(2.0, max(0.5, seconds / self.seconds(rows)))
        self._scale *= apart**self._FAST
        bucket = _bucket(rows)
        for other, factor in self._factors.items():
            # What is not measured any more returns to what was measured at first.
            self._factors[other] = factor**self._BACK
        self._factors[bucket] = self._factors.get(bucket, 1.0) * apart**self._SLOW

    def _shape(self, rows: int) -> float:
        points = self._measured
        (left, low) = points[0]
        for right, high in points[1:]:
            if rows <= right:
                break
            left, low = right, high
        else:
            # Beyond the largest measured step every row adds as much as its last ones did.
            (left, low), (right, high) = points[-2:] if len(points) > 1 else points * 2
        if right == left:
            return low
        return low + (high - low) * (rows - left) / (right - left)


def _bucket(rows: int) -> int:
    """Rows that are taken to cost alike: 1, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-24 and so on."""
    high = (rows - 1).bit_length()
    half = high > 1 and rows <= 3 << (high - 2)
    return 2 * high - half


class Speculation:
    """Drafts for all sequences.

    Args:
        measured: see `StepTimes`.
        eos: the model's own stop tokens.

    Attributes:
        store: earlier answers.
        times: how long steps take.
        drafted, accepted: draft tokens that steps verified, and those of them that were the
            sequences' tokens, since `take`.
    """

    def __init__(
        self, measured: Sequence[tuple[int, float]], eos: frozenset[int] = frozenset()
    ) -> None:
        self._eos = eos
        self.store = SuffixStore()
        self.times = StepTimes(measured)
        self.drafted = self.accepted = 0
        self._sequences: dict[int, _Drafted] = {}
        self._usual: OrderedDict[StoreKey, list[_Rate]] = OrderedDict()

    def choose(
        self, sequences: Iterable[EngineSequence], rows: int, most_rows: int, context: int
    ) -> dict[int, list[int]]:
        """Return the drafts, by sequence, that are expected to give the most tokens a second.

        Args:
            sequences: those that get a token in the step.
            rows: the step's rows without drafts.
            most_rows: most rows of the step.
            context: tokens of the longest sequence.
        """
        sampled = list(sequences)
        room = most_rows - rows
        if room <= 0 or not sampled:
            return {}
        states = [self._state(sequence) for sequence in sampled]
        hope = max(state.best_share() for state in states)
        if not self._may_pay(len(sampled), rows, room, hope):
            return {}
        guesses: list[tuple[EngineSequence, _Drafted, Guess]] = []
        for sequence, state in zip(sampled, states, strict=True):
            if state.pause:
                state.pause -= 1
                continue
            most = min(_most(sequence, context), room)
            if most > 0 and not state.off and (guess := self._guess(sequence, state, most)):
                guesses.append((sequence, state, guess))
        lengths = self._lengths([guess for *_, guess in guesses], len(sampled), rows, room)
        drafts: dict[int, list[int]] = {}
        for (sequence, state, guess), length in zip(guesses, lengths, strict=True):
            if length:
                state.kind, state.idle = guess.kind, 0
                drafts[sequence.id] = guess.tokens[:length]
            else:
                state.unused()
        return drafts

    def _state(self, sequence: EngineSequence) -> _Drafted:
        state = self._sequences.get(sequence.id)
        if state is None:
            own = IndexedTokens(sequence.tokens, max(0, len(sequence.tokens) - _OWN_TOKENS))
            expected, prediction = sequence.request.prediction, None
            if expected:
                prediction = IndexedTokens(expected, max(0, len(expected) - _OWN_TOKENS))
                prediction.index(len(expected))
            usual = self._usual_of(store_key(sequence))
            state = self._sequences[sequence.id] = _Drafted(own, prediction, usual)
        return state

    def _usual_of(self, key: StoreKey) -> list[_Rate]:
        usual = self._usual.setdefault(key, [_Rate() for _ in _PRIORS])
        self._usual.move_to_end(key)
        if len(self._usual) > _MOST_USUAL:
            self._usual.popitem(last=False)
        return usual

    def _guess(self, sequence: EngineSequence, state: _Drafted, most: int) -> Guess | None:
        """Return the draft after the longest match, without tokens that would end the
        sequence: the row before them samples them, and no row after them is of use."""
        tokens = sequence.tokens
        state.own.index(len(tokens) - 1)
        suffix = tokens[-_LONGEST_MATCH:]
        texts = [state.own]
        if sequence.request.use_prefix_cache:
            texts += self.store.texts(store_key(sequence))
        best, text, place = 0, state.own, 0
        if state.prediction is not None:
            best, place = _in_prediction(sequence, state.prediction, suffix)
            text = state.prediction
        for other in texts:
            length, at = other.find(suffix)
            if length > best:
                best, text, place = length, other, at
        if not best:
            return None
        request = sequence.request
        ends = frozenset[int]() if request.ignore_eos else self._eos
        draft = text.after(place, most)
        for at, token in enumerate(draft):
            if token in ends or token in request.stop_token_ids:
                del draft[at:]
                break
        if not draft:
            return None
        kind = sum(best >= length for length in _LENGTHS)
        return Guess(draft, kind, state.share(kind))

    def _may_pay(self, sequences: int, rows: int, room: int, share: float) -> bool:
        """Whether any number of drafts could pay if every match were as good as ``share``."""
        least = _MARGIN * sequences / self.times.seconds(rows)
        most = min(room, sequences * MOST_DRAFT)
        added = 1
        while added <= most:
            deep = -(-added // sequences)
            gained = sum(share**at for at in range(1, deep + 1)) * added / deep
            if (sequences + gained) / self.times.seconds(rows + added) > least:
                return True
            added *= 2
        return False

    def _lengths(
        self, guesses: Sequence[Guess], sequences: int, rows: int, room: int
    ) -> list[int]:
        """How much of each draft to verify: the likeliest tokens first, up to the number that
        gives the most tokens a second."""
        chances = sorted(
            (
                (guess.rate ** (at + 1), -which)
                for which, guess in enumerate(guesses)
                for at in range(len(guess.tokens))
            ),
            reverse=True,
        )[:room]
        best, count = _MARGIN * sequences / self.times.seconds(rows), 0
        gained = float(sequences)
        for number, (chance, _) in enumerate(chances, 1):
            gained += chance
            if (speed := gained / self.times.seconds(rows + number)) > best:
                best, count = speed, number
        lengths = [0] * len(guesses)
        for _, which in chances[:count]:
            lengths[-which] += 1
        return lengths

    def judge(self, sequence: EngineSequence, draft: Sequence[int], accepted: int) -> None:
        """Take in the result of a verified draft. Call this when the sequence has its tokens.

        Args:
            accepted: leading tokens of the draft that the sequence took.
        """
        self.drafted += len(draft)
        self.accepted += accepted
        state = self._sequences.get(sequence.id)
        if state is not None:
            # The token after the accepted ones is the newest, if the draft went that far.
            refused = accepted < len(draft) and sequence.tokens[-1] != draft[accepted]
            state.judge(accepted, refused)

    def stop(self, sequence: EngineSequence) -> None:
        """Draft no more for this sequence."""
        self._state(sequence).off = True

    def ended(self, sequence: EngineSequence, *, keep: bool) -> None:
        """Forget a sequence that has ended.

        Args:
            keep: whether its answer may be kept for others of its key.
        """
        self._sequences.pop(sequence.id, None)
        if keep and sequence.request.use_prefix_cache and sequence.generated >= _LEAST_STORED:
            first = max(0, sequence.prompt_length - _BEFORE)
            self.store.add(store_key(sequence), sequence.tokens[first:])

    def take(self) -> tuple[int, int]:
        """Return the draft tokens verified and accepted since the last call."""
        taken = self.drafted, self.accepted
        self.drafted = self.accepted = 0
        return taken

    def check_unused(self) -> None:
        """Assert, when there is no sequence, that nothing is left of any."""
        assert not self._sequences, "drafts of a sequence that has ended"


def _most(sequence: EngineSequence, context: int) -> int:
    """Longest draft that a sequence can use: it must not go past its limits, and up to
    ``min_tokens`` the same tokens are forbidden in all rows."""
    request, generated = sequence.request, sequence.generated
    most = min(
        MOST_DRAFT, request.max_tokens - generated - 1, context - len(sequence.tokens) - 1
    )
    if generated < request.min_tokens:
        most = min(most, request.min_tokens - generated - 1)
    return most


def _in_prediction(
    sequence: EngineSequence, prediction: IndexedTokens, suffix: Sequence[int]
) -> tuple[int, int]:
    """The match in the answer that the caller expects: at its beginning nothing needs to match,
    since it is what is expected after the prompt."""
    generated = sequence.generated
    if (
        generated < _NGRAM
        and sequence.tokens[sequence.prompt_length :] == (prediction.tokens[:generated])
    ):
        return _LENGTHS[-1], generated
    return prediction.find(suffix[-max(generated, 1) :])
