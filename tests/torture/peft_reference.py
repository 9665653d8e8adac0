"""Use PEFT, one adapter at a time in float32, as the reference for a server's answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.torture.churn_record import Content
from tests.torture.isolation import Case

BOUND = 1e-4
"""Bound on the difference of a log-probability (natural logarithm), with float32 on both sides:
only the order of sums differs."""
MARGIN = 1e-3
"""If the two likeliest tokens are closer than this, rounding may choose either."""


class PeftReference:
    """Implements `isolation.Reference` for float32.

    Attributes:
        worst: largest difference of a log-probability among the accepted answers.
        near_ties: number of greedy tokens for which the two likeliest were closer than
            `MARGIN`.
    """

    def __init__(self, base: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.worst = 0.0
        self.near_ties = 0

    def differences(self, cases: Sequence[Case]) -> list[str]:
        """See `Reference.differences`: answers need log-probabilities."""
        by_content: dict[Content | None, list[int]] = {}
        for index, case in enumerate(cases):
            by_content.setdefault(case.content, []).append(index)
        found = [""] * len(cases)
        for content, indexes in by_content.items():
            texts = [[*cases[i].attempt.prompt, *cases[i].attempt.tokens] for i in indexes]
            for index, rows in zip(indexes, self._rows(content, texts), strict=True):
                found[index] = self._difference(cases[index], rows)
        return found

    def _rows(self, content: Content | None, texts: list[list[int]]) -> list[torch.Tensor]:
        if content is None:
            return teacher_forced(self._model.eval(), texts)
        wrapped = PeftModel.from_pretrained(self._model, content.folder).eval()
        rows = teacher_forced(wrapped, texts)
        self._model = wrapped.unload()
        return rows

    def _difference(self, case: Case, rows: torch.Tensor) -> str:
        attempt = case.attempt
        tokens = torch.tensor(attempt.tokens)
        if len(attempt.logprobs) != len(tokens):
            return f"{len(attempt.logprobs)} log-probabilities for {len(tokens)} tokens"
        begin = len(attempt.prompt) - 1
        rows = rows[begin : begin + len(tokens)]
        right = rows.gather(1, tokens[:, None]).squeeze(1)
        apart = float((right - torch.tensor(attempt.logprobs)).abs().max())
        if not apart <= BOUND:
            return f"a log-probability differs by {apart:.1e}, more than {BOUND:.0e}"
        if not attempt.temperature:
            # The likeliest token, or one within the margin.
            behind = rows.max(dim=1).values - right
            if float(behind.max()) > MARGIN:
                return f"token {int(behind.argmax())} is not the likeliest"
            top = rows.topk(2, dim=1).values
            self.near_ties += int((top[:, 0] - top[:, 1] <= MARGIN).sum())
        self.worst = max(self.worst, apart)
        return ""


@torch.no_grad()
def teacher_forced(model: Any, texts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Compute log-probabilities [tokens, vocabulary] after each token of each text.

    Texts are padded at the end; earlier positions do not attend to the padding.
    """
    width = max(map(len, texts))
    padded = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    logits = model(padded).logits
    if logits.dtype is not torch.float64:
        logits = logits.float()
    return [
        torch.log_softmax(rows[: len(text)], dim=-1)
        for rows, text in zip(logits, texts, strict=True)
    ]


def each_adapter(model: Any, folders: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Yield the bare model, under "", then the model with one adapter at a time."""
    yield "", model.eval()
    double = model.dtype is torch.float64
    for name, folder in folders.items():
        wrapped = PeftModel.from_pretrained(model, folder).eval()
        yield name, wrapped.double() if double else wrapped
        model = wrapped.unload()
