"""Compiles constraints with llguidance, and explains what is wrong with them.

Only the processes of `veneer_server.constraints.process` import this: the library may
take any amount of time or memory, panic, or abort.
"""

from __future__ import annotations

import json
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from veneer_server.constraints.frames import Limit
from veneer_server.wire.messages import Constraint, ConstraintLimits

_JSON_SPACES: Final = " ?"
"""Whitespace between the parts of a JSON text: at most one space. If more were allowed, a
small model could waste its tokens on blanks. A schema's ``x-guidance`` overrides this."""

_LONGEST_PROBLEM: Final = 300
_LIMITED: Final = ("limits.", "too many", "too large", "too complex", "max is")
"""Phrases by which the library's messages about its own limits are recognized."""

_NO_TEXT: Final = "it admits no text"
_NO_TEXT_CODE: Final = "NoExtension"


class ConstraintRefused(Exception):
    """A constraint cannot be used.

    Attributes:
        limit: the limit that it exceeded; empty if it is invalid or not supported.
        problem: a phrase for the caller.
    """

    def __init__(self, limit: Limit, problem: str) -> None:
        super().__init__(problem)
        self.limit = limit
        self.problem = problem


def load_tokenizer(path: str, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """Load a ``tokenizer.json``. May raise any exception."""
    with open(path, encoding="utf-8") as file:
        return LLTokenizer(file.read(), n_vocab=vocab_size, eos_token=eos_token_ids)


def library_limits(limits: ConstraintLimits) -> LLParserLimits:
    """The library's own limits, which cover neither time nor bytes."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=limits.fuel,
        max_grammar_size=100_000,
        max_lexer_states=20_000,  # 1 to 2 KB each
        verbose_errors=False,  # keep parser state out of messages
    )


def compile_matcher(
    tokenizer: LLTokenizer, constraint: Constraint, limits: LLParserLimits
) -> LLMatcher:
    """Compile a constraint. Raises only ConstraintRefused, whatever the library raises."""
    try:
        matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=limits)
    except ValueError as error:
        raise ConstraintRefused("", _sentence(str(error))) from error
    except MemoryError as error:
        raise ConstraintRefused("memory", "it needs too much memory") from error
    except BaseException as error:  # a panic is not an Exception
        raise ConstraintRefused("library", "the library that compiles it failed") from error
    if matcher.is_error():
        raise first_problem(matcher)
    return matcher


def first_problem(matcher: LLMatcher) -> ConstraintRefused:
    """The refusal for a matcher that is in error or allows no token."""
    text = matcher.get_error()
    if text.startswith("panic"):
        return ConstraintRefused("library", "the library that compiles it failed")
    limited = any(words in text for words in _LIMITED)
    return ConstraintRefused("fuel" if limited else "", _sentence(text))


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form."""
    match constraint.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                constraint.text, {"whitespace_pattern": _JSON_SPACES}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "choice":
            texts = json.loads(constraint.text)
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))
        case "grammar":
            return LLMatcher.grammar_from_lark(constraint.text)


def _sentence(problem: str) -> str:
    """The library's message on one line, without its echo of the grammar."""
    for line in problem.splitlines():
        if line.startswith("error: "):
            return line.removeprefix("error: ")[:_LONGEST_PROBLEM].rstrip(".")
    first = problem.splitlines()[0] if problem else _NO_TEXT
    if first.startswith(_NO_TEXT_CODE):
        return _NO_TEXT
    return first[:_LONGEST_PROBLEM].rstrip(".")
