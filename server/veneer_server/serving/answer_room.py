"""Bounds the size of an answer, and the bytes of all answers that are held at once.

The context bounds an answer's text, but log-probabilities multiply it: with 20 likely tokens at
each position of a prompt of 3,000 tokens, in 16 choices, an answer had 69 MB. So the most bytes
that log-probabilities and token ids can take are computed from the request, once the prompt's
tokens are known and before the engine gets it, and compared with a limit.

Data that callers have not read yet counts towards `MAX_HELD`. An answer with log-probabilities
of its prompt waits while its tenant holds half of that, or all tenants together hold all of it.
A caller that reads slowly, or not at all, must not keep others waiting. So a party (a key; a
host, where callers have no keys; a gateway's user) that holds nothing is admitted, unless
several other parties of its tenant together hold `MAX_HELD`, where each counts at most a
quarter. If no answer of a party is admitted for `PATIENCE_S`, its waiting answers are refused.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import InvalidField, QueueFull

from veneer_server.queues.fair_queue import FairQueue
from veneer_server.queues.fairness import Sender
from veneer_server.text.tokenizer import TokenNames

MAX_ANSWER: Final = 64 << 20
"""Most bytes of an answer's log-probabilities and token ids, as they are sent."""

MAX_HELD: Final = 64 << 20
"""Once the unread log-probabilities of all answers take this many bytes, an answer with
log-probabilities of its prompt waits. A tenant that holds none is always admitted."""

PATIENCE_S: Final = 120.0
"""Seconds that an answer waits for room before its request is refused, if no other answer of
its party is admitted meanwhile. A party with many answers makes room for its own as they
end."""

_RETRY_S: Final = 10.0
"""Retry-after of such a refusal: a slow reader is slow for minutes."""

_SCORE_BYTES: Final = 128
"""Bytes held for one token's log-probability until it is written, without the likely tokens."""

_NUMBERED: Final = 19
"""Characters of a token's name where tokens are named by their ids, with quotes."""


@dataclass(frozen=True, slots=True)
class ScoreForm:
    """The most bytes that an API writes for the log-probabilities at one position.

    Attributes:
        own: bytes for the position's token, without its name.
        top: bytes for each likely token, without its name.
        named: how often the position's token is named.
        listed: characters for each byte that a token stands for.
        copies: how often the answer repeats the log-probabilities.
        numbered: tokens are named by their ids.
    """

    own: int
    top: int
    named: int = 1
    listed: int = 0
    copies: int = 1
    numbered: bool = False

    def position(self, names: TokenNames, tops: int) -> int:
        """Most bytes of one position with ``tops`` likely tokens, in one copy."""
        texts = [_NUMBERED] * (tops + 1) if self.numbered else names.texts[: tops + 1]
        size = self.own + tops * self.top + sum(texts) + texts[0] * (self.named - 1)
        return size + self.listed * sum(names.data[: tops + 1])


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How an API writes log-probabilities and token ids.

    Attributes:
        own: form of the log-probabilities of the answer's tokens.
        prompts: forms of the prompt's log-probabilities, one for each place that has them.
        ids: bytes for each token id of the answer; 0 if it has none.
        prompt_ids: bytes for each token id of the prompt, in all copies; 0 if it has none.
        prompt_field: the field that asks for the prompt's log-probabilities.
        largest: most bytes in total.
        instead: text for the error of a larger answer: the alternative to asking for less.
    """

    own: ScoreForm
    prompts: tuple[ScoreForm, ...] = ()
    ids: int = 0
    prompt_ids: int = 0
    prompt_field: str = "output.prompt_logprobs"
    largest: int = MAX_ANSWER
    instead: str = ""


@dataclass(frozen=True, slots=True)
class AnswerSize:
    """The most bytes that one prompt adds to an answer.

    Attributes:
        held: bytes of the prompt's log-probabilities, in one copy, and of its text in all
            copies.
        fixed: bytes of everything that depends on the prompt.
        token: bytes for each token of the answer.
        prompt_field, field: the request fields that cause most of `fixed`, and of `token`.
    """

    held: int
    fixed: int
    token: int
    prompt_field: str = ""
    field: str = ""

    @classmethod
    def of(
        cls,
        form: AnswerForm,
        names: TokenNames,
        *,
        prompt_tokens: int,
        prompt_tops: int | None,
        tops: int | None,
        echoed: int,
    ) -> AnswerSize:
        """Args:
        prompt_tops, tops: likely tokens with each log-probability of the prompt and of the
            answer; None: no log-probabilities.
        echoed: characters of the prompt's text in all copies.
        """
        held, prompt, own = echoed, Counter[str](), Counter({"return_token_ids": form.ids})
        prompt["output.echo"] = 6 * echoed  # a control character is six characters of JSON
        prompt["return_token_ids"] = prompt_tokens * form.prompt_ids
        for each in form.prompts if prompt_tops is not None else ():
            once = prompt_tokens * each.position(names, prompt_tops or 0)
            held += once
            prompt[form.prompt_field] += once * each.copies
        if tops is not None:
            field = "output.top_logprobs" if tops else "output.logprobs"
            own[field] = form.own.copies * form.own.position(names, tops)
        most = [each.most_common(1)[0][0] for each in (prompt, own)]
        return cls(held, prompt.total(), own.total(), *most)


class AnswerRoom:
    """Counts the bytes that all answers hold. Belongs to one event loop."""

    def __init__(self, most: int = MAX_HELD, *, patience_s: float = PATIENCE_S) -> None:
        self._most = most
        self._patience_s = patience_s
        self._held: Counter[tuple[str, ...]] = Counter()
        """Bytes by party, by key, by tenant, and in total (the empty tuple)."""
        self._counted: Counter[tuple[str, ...]] = Counter()
        """As `_held`, by key and by tenant, but each member counts at most a quarter of
        `_most`."""
        self._waiting: FairQueue[tuple[str, str, str], tuple[int, asyncio.Future[None]]] = (
            FairQueue()
        )
        self._entered: Counter[tuple[str, ...]] = Counter()
        """Number of a party's answers admitted while others of it wait."""

    @property
    def held(self) -> int:
        """Bytes that all answers hold."""
        return self._held[()]

    @contextmanager
    def answer(self, whose: Sender, prompts: int = 1) -> Iterator[AnswerBytes]:
        """Make the room of an answer to ``prompts`` prompts; it is given back when the block
        ends."""
        held = AnswerBytes(self, whose, prompts)
        try:
            yield held
        finally:
            self.add(whose, -held.bytes)

    async def take(self, whose: Sender, wanted: int) -> None:
        """Wait until there is room, and take ``wanted`` bytes. Raises QueueFull if no answer of
        the party is admitted for too long."""
        party = whose.party
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = wanted, turn
        self._waiting.push(party, waiter)
        self._let_in()
        try:
            while not turn.done():
                before = self._entered[party]
                await asyncio.wait({turn}, timeout=self._patience_s)
                if not turn.done() and self._entered[party] == before:
                    raise self._full(whose)
        except BaseException:
            if turn.done():
                self.add(whose, -wanted)
            turn.cancel()
            raise
        finally:
            self._waiting.remove(party, waiter)
            if not self._waiting.waiting(party):
                del self._entered[party]

    def add(self, whose: Sender, count: int) -> None:
        """Take room without waiting, or give some back."""
        party = whose.party
        self._held[()] += count
        for depth in range(1, len(party) + 1):
            group, outer = party[:depth], party[: depth - 1]
            before = self._held[group]
            now = self._held[group] = before + count
            self._counted[outer] += min(now, self._most // 4) - min(before, self._most // 4)
            for counter, name in ((self._held, group), (self._counted, outer)):
                if not counter[name]:
                    del counter[name]
        if count < 0:
            self._let_in()

    def _let_in(self) -> None:
        while (found := self._waiting.pop_with_key(self._rank)) is not None:
            party, (wanted, turn) = found
            if turn.done():  # its caller has left; others may have left too
                self._waiting.drop(lambda waiter: waiter[1].done())
                continue
            self._entered[party] += 1
            self.add(Sender(*party), wanted)  # before the call resumes
            turn.set_result(None)

    def _rank(self, party: tuple[str, str, str]) -> tuple[float, ...] | None:
        """Rank a party; the lowest is next. The tenant that holds least comes first, then its
        key that holds least, then that key's user. None: the party must wait."""
        tenant, key, own = (self._held[party[:depth]] for depth in (1, 2, 3))
        if own:
            wait = tenant >= self._most // 2 or self.held >= self._most
        else:
            wait = any(self._counted[party[:depth]] >= self._most for depth in (1, 2))
        return None if wait else (tenant, key, own)

    def _full(self, whose: Sender) -> QueueFull:
        return QueueFull(
            f"{self.held} bytes of log-probabilities have not been read yet, "
            f"{self._held[whose.party]} of them yours, so for {self._patience_s:g} s there was "
            "no room for your prompts' log-probabilities: read answers to their end, and retry "
            "later",
            metadata={"cause": "unread_answers"},
            retry_after_s=_RETRY_S,
        )


class AnswerBytes:
    """The room of one answer.

    Attributes:
        bytes: bytes held now.
    """

    def __init__(self, room: AnswerRoom, whose: Sender, prompts: int) -> None:
        self.bytes = 0
        self._room = room
        self._whose = whose
        self._uncounted = prompts
        self._counted = asyncio.Event()
        self._whole = 0
        self._prompts = 0
        self._entering = asyncio.Lock()
        self._entered = False

    async def fits(
        self, size: AnswerSize, form: AnswerForm, wanted: int | None, most: int, n: int
    ) -> int:
        """Count one of the answer's prompts, and wait until there is room for all of them.

        Args:
            wanted: tokens per sample that the caller asked for; None if it did not say.
            most: most tokens per sample.
            n: number of samples.

        Returns:
            Most tokens per sample: fewer than ``most`` if the caller set no number and the
            answer could become too large.

        Raises:
            InvalidField: the answer could become too large.
            QueueFull: there was no room for too long.
        """
        # Each of several prompts may use an equal part of the bytes that are left.
        left = (form.largest - self._whole) // max(1, self._uncounted) - size.fixed
        if wanted is None and size.token and left >= size.token * n:
            most = min(most, left // (size.token * n))
        whole = size.fixed + size.token * most * n
        self._whole += whole
        if self._whole > form.largest:
            if size.fixed > whole // 2:
                less = "a shorter prompt, fewer prompts"
                raise _too_large(self._whole, form, size.prompt_field, less)
            raise _too_large(self._whole, form, size.field, "a smaller stopping.max_tokens")
        self._prompts += size.held
        self._uncounted -= 1
        if not self._uncounted:
            self._counted.set()
        await self._counted.wait()  # so that no prompt of a too large answer begins
        async with self._entering:
            if self._prompts and not self._entered:
                await self._room.take(self._whose, self._prompts)
                self.bytes += self._prompts
                self._entered = True
        return most

    def generated(self, tokens: int, tops: int) -> None:
        """Count data that is kept until the answer is complete.

        Args:
            tokens: number of tokens that are kept with their log-probabilities.
            tops: bytes of packed likely tokens.
        """
        count = tokens * _SCORE_BYTES + tops
        self.bytes += count
        self._room.add(self._whose, count)


def _too_large(size: int, form: AnswerForm, field: str, less: str) -> InvalidField:
    """Args:
    field: the request field that causes most of the size.
    less: what to ask for to make it smaller.
    """
    last = "fewer likely tokens" if field.endswith("logprobs") else "leave it out"
    return InvalidField(
        f"{field}: the log-probabilities, token ids and repeated prompts of this answer could "
        f"take {size} bytes, more than the maximum of {form.largest}: ask for {less}, fewer "
        f"samples, or {last}{form.instead}",
        metadata={"field": field, "bytes": str(size), "largest": str(form.largest)},
    )
