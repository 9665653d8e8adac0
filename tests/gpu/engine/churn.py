"""Captured graphs under random swaps, evictions and batch changes, beside a decoder without.

One decoder captures its decode steps and has room for few adapters, so that their places and
slots are used again and again, also while the step that used them is still enqueued. The other
one captures nothing, evicts nothing, and has a card of its own. Logits must have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest.mock import patch

import torch
from veneer_registry.errors import AdapterBudgetExceeded
from veneer_server.backends.cuda import decoder, inputs
from veneer_server.backends.cuda.memory import adapters, fencing
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.layout import Layout

from tests.gpu.engine.kit import BLOCK_SIZE, SEQUENCES, Card, Part, card, make_run, step_of
from tests.planted import planted

ADAPTERS: Final = 16
"""Of which at most 6 fit at once."""
LONGEST: Final = 3 * BLOCK_SIZE


@dataclass(eq=False)
class _Adapter:
    """An adapter in HOST memory, its table on either card."""

    layout: Layout
    run: torch.Tensor
    beside: AdapterTable
    here: AdapterTable | None = None


@dataclass(eq=False)
class _Sequence:
    adapter: _Adapter | None
    blocks: list[int]
    length: int = 0
    prompt: list[int] = field(default_factory=list)


@dataclass
class Churned:
    """What a run did."""

    steps: int = 0
    swaps: int = 0
    evictions: int = 0
    changes: int = 0
    graphs: int = 0
    prefills: int = 0


class _Run:
    def __init__(self, base: Path, random: Random, instead: Any, *, exact: bool) -> None:
        self.random = random
        seed = str(random.random())
        self.mine = card(base, seed, instead, exact=exact)
        whole = {"adapter_bytes": 4 << 20, "slots": ADAPTERS, "graphs": False}
        self.other = card(base, seed, instead, exact=exact, **whole)
        self.vocab = self.mine.decoder.weights.config.vocab_size
        self.blocks = list(range(1, 40))
        self.done = Churned()
        self.sequences: list[_Sequence] = []
        self.adapters = []
        for _ in range(ADAPTERS):
            layout, run = make_run(self.mine.decoder.weights.config, random)
            self.other.device.enter()
            beside = self.other.decoder.adapters.place(layout, run)
            self.adapters.append(_Adapter(layout, run, beside))

    def join(self) -> None:
        """A sequence with a prompt that its first step computes."""
        if len(self.sequences) == SEQUENCES:
            return
        here = [a for a in self.adapters if a.here is not None]
        adapter = self.random.choice([*here, None]) if here else None
        blocks = [self.blocks.pop() for _ in range(LONGEST // BLOCK_SIZE)]
        prompt = self.tokens(self.random.choice((1, 2, 5, 40)))
        self.sequences.append(_Sequence(adapter, blocks, prompt=prompt))
        self.done.changes += 1

    def leave(self) -> None:
        if self.sequences:
            gone = self.sequences.pop(self.random.randrange(len(self.sequences)))
            self.random.shuffle(gone.blocks)
            self.blocks += gone.blocks
            self.done.changes += 1

    def swap(self) -> None:
        """An adapter comes; if it does not fit, those that no sequence uses go first."""
        away = [a for a in self.adapters if a.here is None]
        adapter = self.random.choice(away)
        while True:
            try:
                self.mine.device.enter()
                adapter.here = self.mine.decoder.adapters.place(adapter.layout, adapter.run)
                self.done.swaps += 1
                return
            except AdapterBudgetExceeded:
                if not self.evict():
                    self.leave()

    def evict(self) -> bool:
        used = {id(s.adapter) for s in self.sequences}
        idle = [a for a in self.adapters if a.here is not None and id(a) not in used]
        if not idle:
            return False
        adapter = self.random.choice(idle)
        assert adapter.here is not None
        self.mine.decoder.adapters.release(adapter.here)
        adapter.here = None
        self.done.evictions += 1
        return True

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(self.vocab) for _ in range(count)]

    def step(self) -> None:
        """One step on both cards; changes come while mine is enqueued."""
        if not self.sequences:
            self.join()
        chosen = [s for s in self.sequences if self.random.random() < 0.8] or self.sequences[:1]
        chosen.sort(key=lambda s: self.adapters.index(s.adapter) if s.adapter else -1)
        rows = {id(s): s.prompt or self.tokens(1) for s in chosen}

        def of(table: Callable[[_Adapter], AdapterTable | None]) -> Any:
            return step_of(
                [
                    Part(rows[id(s)], s.length, s.blocks, s.adapter and table(s.adapter))
                    for s in chosen
                ]
            )

        expected = self.logits(self.other, of(lambda a: a.beside))
        mine = of(lambda a: a.here)
        _on(self.mine, lambda: self.mine.decoder.execute(mine))
        for s in chosen:
            s.length += len(rows[id(s)])
            self.done.prefills += bool(s.prompt)
            s.prompt = []
        for ended in [s for s in chosen if s.length + 1 >= LONGEST]:
            self.sequences.remove(ended)
            self.blocks += ended.blocks
        for _ in range(self.random.choice((0, 0, 1, 2))):
            self.random.choice((self.join, self.leave, self.swap, self.evict, self.swap))()
        # The logits of the step that was enqueued last, whatever came since.
        got = self.logits(self.mine, None, len(expected))
        same = (got == expected).all(dim=1)
        if not same.all():
            row = int((~same).nonzero()[0])
            apart = float((got[row] - expected[row]).abs().max())
            raise AssertionError(
                f"step {self.done.steps}, row {row} of {len(same)}: {apart} from the decoder "
                "without graphs"
            )
        self.done.steps += 1

    def logits(self, one: Card, step: Any, rows: int = 0) -> torch.Tensor:
        """Of a step that is run now, or of the last one."""

        def read() -> torch.Tensor:
            decoder = one.decoder
            found = decoder.execute(step) if step is not None else decoder.last_logits[:rows]
            assert all(decoder.finite(found)), "a step's logits are not finite"
            return found.as_subclass(torch.Tensor).clone()

        return _on(one, read)


def _on(one: Card, what: Callable[[], Any]) -> Any:
    one.device.enter()
    return what()


def churn(base: Path, seed: str, instead: Any, *, changes: int, exact: bool = False) -> Churned:
    """Steps until there were so many swaps, evictions and changes of the batch.

    Raises:
        AssertionError: logits differ.
    """
    run = _Run(base, Random(seed), instead, exact=exact)
    while run.done.swaps + run.done.evictions + run.done.changes < changes:
        run.step()
    run.done.graphs = run.mine.device.captures
    return run.done


# ---------------------------------------------------------------------- planted bugs


@contextmanager
def _tables_move() -> Iterator[None]:
    """An adapter's rows are written to new tables, which a graph does not know."""
    right = adapters.Adapters.slot

    def slot(self: Any, table: AdapterTable) -> int:
        if self._placed[table].slot is None:
            self._tables = [tuple(_fresh(self._device, t) for t in ts) for ts in self._tables]
            for (places, scalings), layers in zip(self._tables, self.places, strict=True):
                for at, place in enumerate(layers):
                    place.places, place.scalings = places[at], scalings[at]
        return right(self, table)

    with patch.object(adapters.Adapters, "slot", slot):
        yield


def _fresh(device: Any, old: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = device.empty(*old.shape, dtype=old.dtype)
    device.call(torch.Tensor.copy_, made, old)
    return made


def _inputs_move() -> AbstractContextManager[None]:
    return planted(
        inputs,
        "here, there = self._here[self.current][name][:size], self._there[name][:size]",
        "here = self._here[self.current][name][:size]; "
        "there = self._device.empty(size, dtype=here.dtype)",
    )


def _logits_move() -> AbstractContextManager[None]:
    return planted(decoder, "if shape.logits > len(logits):", "if True:")


def _sizes_by_step() -> AbstractContextManager[None]:
    """A graph without launches for adapters serves steps that need them."""
    return planted(
        inputs,
        "bucket = LaunchBucket(size, pieces, adapters)",
        "bucket = LaunchBucket(size, pieces, False)",
    )


def _copies_overtake() -> AbstractContextManager[None]:
    return planted(
        fencing,
        "wait = max(wait, uses.get(other, 0))",
        "wait = max(wait, uses.get(other, 0)) if stream is DeviceStream.STEPS else 0",
    )


def _inputs_overwritten() -> AbstractContextManager[None]:
    return planted(decoder, "self._timeline.until_free(turn)  # of", "pass  # of")


def _slots_twice() -> AbstractContextManager[None]:
    return planted(
        adapters,
        "self._free.append(placed.slot)",
        "self._free += [placed.slot, placed.slot]",
    )


PLANTED: Final[dict[str, Callable[[], AbstractContextManager[None]]]] = {
    "stale pointer: the adapters' tables move": _tables_move,
    "stale pointer: a step's inputs move": _inputs_move,
    "stale pointer: the logits move": _logits_move,
    "a graph without adapters serves steps with some": _sizes_by_step,
    "a copy overtakes the step that reads what was there": _copies_overtake,
    "a slot is given twice": _slots_twice,
}
