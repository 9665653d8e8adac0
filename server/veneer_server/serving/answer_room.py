"""How large an answer may become, and how much of all answers is held at once.

The context bounds an answer's text. Log-probabilities multiply it: with 20 likely tokens at
each position of a prompt of 3,000 tokens, in 16 choices, an answer had 69 MB. So the most
bytes that they and token ids can take are computed from the request, once the prompt's tokens
are known and before the engine gets it, and compared with a bound.

What callers have not read yet counts towards `MAX_HELD`. An answer with scores of its prompt
waits while its tenant holds half of that, or all tenants hold all of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from veneer_registry.errors import InvalidField

from veneer_server.queues.fair_queue import FairQueue
from veneer_server.text.tokenizer import TokenNames

__all__ = [
    "MAX_ANSWER",
    "MAX_HELD",
    "AnswerForm",
    "AnswerRoom",
    "AnswerSize",
    "Held",
    "ScoreForm",
]

MAX_ANSWER: Final = 64 << 20
"""Most bytes of an answer's log-probabilities and token ids, as they are sent."""

MAX_HELD: Final = 64 << 20
"""Bytes of all answers' log-probabilities that callers have not read yet, from which on an
answer with those of its prompt waits. A tenant that holds none is always let in."""

_SCORE_BYTES: Final = 128
"""Of one token's log-probability, beside those of likely tokens, until it is written."""

_NUMBERED: Final = 19
"""A token's name, where tokens are called by their ids, with quotes."""


@dataclass(frozen=True, slots=True)
class ScoreForm:
    """The most bytes that a door writes for a position's log-probabilities.

    Attributes:
        own: of the position's token, beside its name.
        top: of each likely token, beside its name.
        named: how often the position's token is named.
        listed: characters for each byte that a token stands for.
        copies: how often the answer has all of them.
        numbered: tokens are called by their ids.
    """

    own: int
    top: int
    named: int = 1
    listed: int = 0
    copies: int = 1
    numbered: bool = False

    def position(self, names: TokenNames, tops: int) -> int:
        """Most bytes of a position with so many likely tokens, once."""
        texts = [_NUMBERED] * (tops + 1) if self.numbered else names.texts[: tops + 1]
        size = self.own + tops * self.top + sum(texts) + texts[0] * (self.named - 1)
        return size + self.listed * sum(names.data[: tops + 1])


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What a door makes of log-probabilities and token ids.

    Attributes:
        own: those of the answer's tokens.
        prompts: those of its prompt, in each place where it has them.
        ids: bytes of each of the answer's token ids, 0 without them.
        prompt_ids: the same of the prompt's, in all copies.
        prompt_field: what asks for most of what belongs to the prompt.
        largest: most bytes of all.
        instead: what a caller beyond it may do, beside asking for less.
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
    """The most bytes of what one prompt adds to an answer.

    Attributes:
        held: of the prompt's scores, once, and of its text in all copies.
        fixed: of all that depends on the prompt.
        token: of each token of the answer.
    """

    held: int
    fixed: int
    token: int

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
        prompt_tops, tops: likely tokens beside the prompt's log-probabilities and beside the
            answer's; None: without log-probabilities.
        echoed: characters of the prompt's text in all copies.
        """
        # A control character is six characters of JSON.
        held, fixed, token = echoed, 6 * echoed + prompt_tokens * form.prompt_ids, form.ids
        for each in form.prompts if prompt_tops is not None else ():
            once = prompt_tokens * each.position(names, prompt_tops or 0)
            held += once
            fixed += once * each.copies
        if tops is not None:
            token += form.own.copies * form.own.position(names, tops)
        return cls(held, fixed, token)


class AnswerRoom:
    """What all answers hold. Belongs to one event loop."""

    def __init__(self, most: int = MAX_HELD) -> None:
        self._most = most
        self._by_tenant: Counter[str] = Counter()
        self._waiting: FairQueue[str, tuple[str, int, asyncio.Future[None]]] = FairQueue()

    @property
    def held(self) -> int:
        """Bytes."""
        return self._by_tenant.total()

    @contextmanager
    def answer(self, tenant: str, prompts: int = 1) -> Iterator[Held]:
        """The room of an answer to so many prompts, until the block ends."""
        held = Held(self, tenant, prompts)
        try:
            yield held
        finally:
            self.add(tenant, -held.bytes)

    async def take(self, tenant: str, wanted: int) -> None:
        """Wait until there is room, and take so many bytes of it."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = tenant, wanted, turn
        self._waiting.push(tenant, waiter)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            self._waiting.remove(tenant, waiter)
            if turn.done() and not turn.cancelled():
                self.add(tenant, -wanted)
            raise

    def add(self, tenant: str, count: int) -> None:
        """Take room without waiting, or give some back."""
        self._by_tenant[tenant] += count
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        if count < 0:
            self._let_in()

    def _let_in(self) -> None:
        while (found := self._waiting.pop(self._rank)) is not None:
            tenant, wanted, turn = found
            if not turn.done():
                self.add(tenant, wanted)  # before the call goes on
                turn.set_result(None)

    def _rank(self, tenant: str) -> tuple[float, ...] | None:
        """A tenant may hold one answer more than its half."""
        own = self._by_tenant[tenant]
        if own and (own >= self._most // 2 or self.held >= self._most):
            return None
        return (own > 0,)


class Held:
    """The room of one answer.

    Attributes:
        bytes: held now.
    """

    def __init__(self, room: AnswerRoom, tenant: str, prompts: int) -> None:
        self.bytes = 0
        self._room = room
        self._tenant = tenant
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
            wanted: tokens of each sample that the caller asks for, if it says so.
            most: tokens of each sample, at most.
            n: samples.

        Returns:
            Tokens of each sample: fewer than ``most`` where the caller set no number and the
            answer would become too large.

        Raises:
            InvalidField: the answer may become too large.
        """
        # Each of several prompts may use an equal part of what those before it have left.
        left = (form.largest - self._whole) // max(1, self._uncounted) - size.fixed
        if wanted is None and size.token and left >= size.token * n:
            most = min(most, left // (size.token * n))
        whole = size.fixed + size.token * most * n
        self._whole += whole
        if self._whole > form.largest:
            raise _too_large(self._whole, form, size.fixed > whole // 2)
        self._prompts += size.held
        self._uncounted -= 1
        if not self._uncounted:
            self._counted.set()
        await self._counted.wait()  # none begins of an answer that is too large
        async with self._entering:
            if self._prompts and not self._entered:
                await self._room.take(self._tenant, self._prompts)
                self.bytes += self._prompts
                self._entered = True
        return most

    def generated(self, tokens: int, tops: int) -> None:
        """Count what is kept until the answer is whole.

        Args:
            tokens: with their log-probabilities.
            tops: bytes of packed likely tokens.
        """
        count = tokens * _SCORE_BYTES + tops
        self.bytes += count
        self._room.add(self._tenant, count)


def _too_large(size: int, form: AnswerForm, by_prompt: bool) -> InvalidField:
    """Args: by_prompt: most of it is the prompt's."""
    field, less = "output.top_logprobs", "a smaller max_tokens"
    if by_prompt:
        field, less = form.prompt_field, "a shorter prompt, fewer prompts"
    return InvalidField(
        f"{field}: the log-probabilities and token ids of this answer could take {size} "
        f"bytes, more than the maximum of {form.largest}: ask for {less}, fewer samples, or "
        f"fewer likely tokens{form.instead}",
        metadata={"field": field, "bytes": str(size), "largest": str(form.largest)},
    )
