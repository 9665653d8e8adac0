"""Whether `CudaDecoder.prepare` leaves nothing to compile.

``python -m tests.gpu.engine.prepared``

Triton compiles a kernel for each set of dtypes, constants, and kinds of numbers and addresses
(1; a multiple of 16; others). FAKES in place of the kernels note that set, and compute nothing.
After `prepare`, random steps of prompts and decoding sequences must not add to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any, Final
from unittest.mock import patch

import torch
from veneer_server.step.choice import TokenChoice
from veneer_server.wire.messages import SamplingParams

from tests.gpu import interpreter  # before anything that imports triton
from tests.gpu.engine.kit import (
    BLOCK_SIZE,
    SEQUENCES,
    Card,
    Part,
    card,
    make_run,
    step_of,
    tiny_base,
)

STEPS: Final = 400
LONGEST: Final = 512
KERNEL: Final = interpreter.interpreter.InterpretedFunction
PREFIX: Final = "veneer_server.backends.cuda."


def _kind(argument: Any) -> Any:
    """What of an argument makes Triton compile once more."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and not isinstance(argument, bool):
        return "int", argument == 1, argument % 16 == 0, abs(argument) >= 1 << 31
    return type(argument) if isinstance(argument, float) else argument


class _Noted:
    """FAKE kernel."""

    def __init__(self, name: str, forms: set[tuple[Any, ...]]) -> None:
        self._name, self._forms = name, forms

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            fixed = tuple(sorted(constants.items()))
            self._forms.add((self._name, *map(_kind, args), fixed))

        return launch


@contextmanager
def _noted() -> Iterator[set[tuple[Any, ...]]]:
    forms: set[tuple[Any, ...]] = set()
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if not name.startswith(PREFIX):
                continue
            for attribute, kernel in list(vars(module).items()):
                if isinstance(kernel, KERNEL):
                    fake = _Noted(attribute, forms)
                    stack.enter_context(patch.object(module, attribute, fake))
        yield forms


def _steps(one: Card, random: Random) -> None:
    decoder = one.decoder
    layout, run = make_run(decoder.weights.config, random)
    table = decoder.adapters.place(layout, run)
    vocab = decoder.weights.config.vocab_size
    for _ in range(STEPS):
        parts = []
        for _ in range(random.randint(1, SEQUENCES)):
            new = random.choice((1, 1, random.randint(1, 15)))
            start = random.choice((0, random.randint(0, LONGEST - new)))
            # Which blocks does not matter: no number is read.
            blocks = [1 + at % 30 for at in range(-(-(start + new) // BLOCK_SIZE))]
            adapter = random.choice((None, table))
            parts.append(Part([random.randrange(vocab)] * new, start, blocks, adapter))
        step = step_of(sorted(parts, key=lambda part: part.table is not None))
        choices = [TokenChoice(SamplingParams(), 0)] * len(parts)
        decoder.submit(step, choices, [random.randint(0, 20) for _ in parts])
    one.device.drained("")


def _check(*, exact: bool) -> str:
    random = Random(7)
    with tiny_base() as base, _noted() as forms:
        one = card(base, "prepared", None, exact=exact)
        graphs = one.decoder.prepare()
        one.device.drained("")
        before = set(forms)
        assert graphs == one.device.captures
        _steps(one, random)
    late = [form[0] for form in forms - before]
    assert not late, f"while serving, kernels are compiled: {', '.join(sorted(late))}"
    assert graphs == one.device.captures, "a graph is captured while serving"
    return f"{graphs} graphs, {len(before)} forms of {len({f[0] for f in before})} kernels"


def main() -> int:
    """Entry point."""
    for exact in (False, True):
        print(f"prepared{', exact' if exact else ''}: {_check(exact=exact)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
