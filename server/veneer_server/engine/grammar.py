"""Constrained output: what a sequence may say next, by the llguidance library.

A `Constraint` is compiled to a matcher, which knows after each token which tokens
may follow. Matchers live in the engine process, one a constrained sequence, from
its submission to its end; a preempted sequence keeps its own, since its tokens stay.

Compiling takes under a millisecond for sensible schemas, but hostile ones take up
to a second, so the front checks first (`check_constraint`, in a thread) and the
engine compiles in a worker thread, never on the step's. No torch here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from veneer_registry.errors import InvalidField

from veneer_server.engine.messages import Constraint

__all__ = ["GrammarFailed", "Grammars", "check_constraint"]

log = logging.getLogger(__name__)

_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=200_000,  # compiling: some tens of milliseconds at most
    max_grammar_size=100_000,
    max_lexer_states=20_000,  # at 1 to 2 KB each: 40 MB a sequence at worst
    verbose_errors=False,  # no state of the parser in messages
)
"""The limits of a single step are the library's own: a mask took 2.6 ms at worst."""

_JSON_SPACES: Final = " ?"
"""Between the parts of a JSON text: at most one space. With more, a small model can
fill its tokens with blanks; a schema's ``x-guidance`` may say otherwise."""


class GrammarFailed(Exception):
    """A sequence's constraint cannot be followed any further; the text says why."""


def check_constraint(constraint: Constraint) -> None:
    """Compile a constraint for nothing. Takes up to a second for hostile ones.

    Raises:
        InvalidField: it is not valid, not supported, or too large; says which.
    """
    problem = LLMatcher.validate_grammar(_grammar(constraint), None, limits=_LIMITS)
    if problem:
        raise _refusal(constraint, problem)


def _grammar(constraint: Constraint) -> str:
    """In llguidance's own form."""
    match constraint.kind:
        case "json_schema":
            try:
                return LLMatcher.grammar_from_json_schema(
                    constraint.text,
                    {"whitespace_pattern": _JSON_SPACES},
                )
            except ValueError as error:
                raise _refusal(constraint, str(error)) from error
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "choice":
            texts = json.loads(constraint.text)
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def _refusal(constraint: Constraint, problem: str) -> InvalidField:
    field = f"constraint.{constraint.kind}"
    return InvalidField(
        f"{field} cannot be used: {_sentence(problem)}. Correct or simplify it",
        metadata={"field": field},
    )


def _sentence(problem: str) -> str:
    """The library's message on one line, without its echo of the grammar."""
    for line in problem.splitlines():
        if line.startswith("error: "):
            return line.removeprefix("error: ").rstrip(".")
    first = problem.splitlines()[0] if problem else "it admits no text"
    return first[:300].rstrip(".")


class Grammars:
    """The matchers of all constrained sequences.

    `compile` and `forget` are called on the step loop's thread, `allowed` and
    `advance` by the runner on the same one; only the compiling happens elsewhere.
    """

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        """Args: vocab_size: of the logits; the tokenizer may know fewer tokens."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._matchers: dict[int, LLMatcher] = {}
        # One: a slow one delays other constrained requests, and nobody else.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @classmethod
    def of_base(
        cls, folder: Path, *, vocab_size: int, eos_token_ids: Iterable[int]
    ) -> Grammars | None:
        """From a base folder's ``tokenizer.json``; None where it has none that fits.

        Takes 0.2 s for 49,152 tokens.
        """
        try:
            tokenizer = LLTokenizer(
                (folder / "tokenizer.json").read_text(encoding="utf-8"),
                n_vocab=vocab_size,
                eos_token=list(eos_token_ids),
            )
        except Exception as error:  # of many kinds; the base serves without constraints
            log.warning("no constrained output with this base: %s", error)
            return None
        return cls(tokenizer, vocab_size)

    def __len__(self) -> int:
        """Matchers there are now."""
        return len(self._matchers)

    def compile(
        self, sequence: int, constraint: Constraint, done: Callable[[InvalidField | None], None]
    ) -> None:
        """Make a sequence's matcher in the worker; then ``done`` is called there, with
        the error if there was one. `forget` it in the end either way."""

        def work() -> None:
            try:
                matcher = LLMatcher(
                    self._tokenizer, _grammar(constraint), log_level=0, limits=_LIMITS
                )
                if matcher.is_error():
                    raise _refusal(constraint, matcher.get_error())
            except InvalidField as error:
                done(error)
            except BaseException as error:  # a panic in Rust is not an Exception
                log.exception("a constraint could not be compiled")
                done(_refusal(constraint, str(error)))
            else:
                self._matchers[sequence] = matcher
                done(None)

        self._worker.submit(work)

    def forget(self, sequence: int) -> None:
        """The sequence has ended; harmless for one without a constraint."""
        self._matchers.pop(sequence, None)

    def allowed(self, sequence: int) -> NDArray[np.bool_]:
        """Tokens that may come next: [vocab] bool, at least one of them True.

        Raises:
            GrammarFailed: the library's limits were hit, or nothing may follow.
        """
        matcher = self._matchers[sequence]
        bits = np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        mask = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocab_size]
        if matcher.is_error() or not mask.any():
            raise GrammarFailed(_sentence(matcher.get_error()))
        return mask.view(np.bool_)

    def advance(self, sequence: int, token: int) -> bool:
        """Take the token that was chosen; True if nothing more may follow.

        Raises:
            GrammarFailed: the library's limits were hit.
        """
        matcher = self._matchers[sequence]
        if not matcher.consume_token(token):
            raise GrammarFailed(_sentence(matcher.get_error()))
        return bool(matcher.is_stopped())
