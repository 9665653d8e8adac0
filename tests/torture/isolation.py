"""Judge a run of `tests.torture.churn`: did every answer come from its own weights?

An answer must name a revision that its name may have had between the request's start and
its first token. Its tokens must be those of this revision's weights, according to a reference
that is independent of the server. If a request ended early, its tokens must be those of one of
the revisions that it may have had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.torture.churn_record import Attempt, Churn, Content
from tests.torture.hash_backend import BASE, expected_tokens, identity_of_folder

EXPLAINED = {"ADAPTER_IN_USE", "ADAPTER_PINNED", "ADAPTER_EVICTED", "ADAPTER_BUDGET_EXCEEDED"}
"""Errors that an operator's call may get while other operators evict and pin."""
EXPLAINED_MOVES = {"alias: ADAPTER_NOT_FOUND", "rollback: ADAPTER_NOT_FOUND"}
"""Allowed because the earlier revision may no longer be kept."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answer, and the weights that should have produced it (None is the base)."""

    attempt: Attempt
    content: Content | None


class Reference(Protocol):
    """A reference that knows the right answers of weights."""

    def differences(self, cases: Sequence[Case]) -> list[str]:
        """Return how each case's answer differs from the right one; "" if it does not."""


class HashReference:
    """Reference for `HashBackend`: tokens are either equal or wrong."""

    def differences(self, cases: Sequence[Case]) -> list[str]:
        identities: dict[str, bytes] = {"": BASE}
        return [self._difference(case, identities) for case in cases]

    def _difference(self, case: Case, identities: dict[str, bytes]) -> str:
        attempt, content = case.attempt, case.content
        key = content.digest if content is not None else ""
        if content is not None and key not in identities:
            identities[key] = identity_of_folder(content.folder)
        count = len(attempt.tokens)
        right = expected_tokens(identities[key], attempt.prompt, count)
        if attempt.tokens == right:
            return ""
        at = next(i for i in range(count) if attempt.tokens[i] != right[i])
        return f"token {at} is {attempt.tokens[at]}, not {right[at]}"


def outcomes(run: Churn) -> Counter[str]:
    """Count requests by outcome."""
    return Counter(attempt.outcome for attempt in run.attempts)


def failures_of(run: Churn, reference: Reference) -> tuple[str, ...]:
    """Return all violations of isolation, one line each."""
    found: list[str] = []
    cases: list[Case] = []
    choices: list[tuple[Attempt, range]] = []
    for attempt in run.attempts:
        wrong = _wrong_claim(run, attempt)
        if wrong:
            found.append(f"{_who(attempt)}: {wrong}")
        elif attempt.tokens:
            begin = len(cases)
            cases += [Case(attempt, content) for content in _possible(run, attempt)]
            choices.append((attempt, range(begin, len(cases))))
    differences = reference.differences(cases)
    for attempt, places in choices:
        if all(differences[at] for at in places):
            said = differences[places[0]] if places else "no weights that it may be of"
            found.append(
                f"{_who(attempt)}: not the answer of {_claimed(attempt, len(places))}: {said}"
            )
    found += _operations(run)
    return tuple(found)


def _who(attempt: Attempt) -> str:
    return f"request {attempt.number} ({attempt.asked or 'base'}, {attempt.outcome})"


def _claimed(attempt: Attempt, possible: int) -> str:
    if attempt.outcome == "finished":
        return f"revision {attempt.revision[:12]}" if attempt.revision else "the base"
    return f"any of the {possible} revisions that it may have had"


def _possible(run: Churn, attempt: Attempt) -> list[Content | None]:
    """Return the weights that may have answered."""
    if not attempt.name:
        return [None]
    contents = run.ledger.contents
    if attempt.outcome == "finished":
        return [contents[attempt.revision]]
    return [contents[revision] for revision in dict.fromkeys(_revisions(run, attempt))]


def _revisions(run: Churn, attempt: Attempt) -> list[str]:
    """Return the revisions that the request may have had."""
    _, _, wanted = attempt.asked.partition("@")
    if wanted:
        return [r for r in run.ledger.contents if r.startswith(wanted)]
    spans = run.ledger.between(attempt.asked, attempt.began, attempt.settled)
    return [revision for span in spans for revision in span.revisions]


def _wrong_claim(run: Churn, attempt: Attempt) -> str:
    """Return what is wrong with an answer apart from its tokens, or ""."""
    match attempt.outcome:
        case "finished":
            return _wrong_provenance(run, attempt)
        case "cancelled":
            return "" if attempt.cancel_at is not None else "nobody cancelled it"
        case "ADAPTER_EVICTED":
            return "" if _was_aborted(run, attempt) else "nobody evicted its adapter"
        case "ADAPTER_NOT_FOUND":
            spans = run.ledger.between(attempt.asked, attempt.began, attempt.settled)
            gone = "@" in attempt.asked or any(not span.revisions for span in spans)
            return "" if gone else "its adapter was there all the time"
        case reason:
            return f"must not end with {reason}"


def _wrong_provenance(run: Churn, attempt: Attempt) -> str:
    if len(attempt.tokens) != attempt.most:
        return f"{len(attempt.tokens)} tokens instead of {attempt.most}"
    if attempt.adapter != attempt.name:
        return f"answered by {attempt.adapter or 'the base'}"
    if not attempt.name:
        return f"the base has a revision: {attempt.revision}" if attempt.revision else ""
    possible = _revisions(run, attempt)
    if attempt.revision not in possible:
        had = ", ".join(revision[:12] for revision in possible)
        return f"revision {attempt.revision[:12]}, but its name had {had or 'none'} meanwhile"
    right = run.ledger.contents[attempt.revision].digest
    if attempt.digest != right:
        return f"weights digest {attempt.digest[:12]} for a revision that has {right[:12]}"
    return ""


def _was_aborted(run: Churn, attempt: Attempt) -> bool:
    digests = {run.ledger.contents[revision].digest for revision in _revisions(run, attempt)}
    return any(
        digest in digests and end >= attempt.began for digest, _, end in run.ledger.aborted
    )


def _operations(run: Churn) -> Iterator[str]:
    """Yield unexplained refusals of operators' calls."""
    for kind, count in run.changes.items():
        reason = kind.partition(": ")[2]
        if reason and reason not in EXPLAINED and kind not in EXPLAINED_MOVES:
            yield f"{count} x {kind}"
