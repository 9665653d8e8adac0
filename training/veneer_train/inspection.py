"""Shows which tokens are masked and which are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from veneer_train.data import IGNORE, DataSet, TrainingSample

_LEARNED = "bold green"
_MASKED = "dim"


def coloured(sample: TrainingSample, tokenizer: Any) -> Text:
    """The sample as text: learned tokens green, masked ones dim.

    Adjacent tokens of one kind are decoded together, so that a character of several tokens
    stays whole.
    """
    text = Text()
    ids, labels = sample.input_ids, sample.labels
    # The first token is never predicted, whatever its label.
    learned = [False, *(label != IGNORE for label in labels[1:])]
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or learned[at] != learned[start]:
            style = _LEARNED if learned[start] else _MASKED
            text.append(tokenizer.decode(list(ids[start:at])), style=style)
            start = at
    return text


def summary(data: DataSet) -> dict[str, Any]:
    """Counts and lengths (tokens) of a data set."""
    lengths = sorted(len(sample.input_ids) for sample in data.samples)
    return {
        "file": data.file,
        "samples": len(lengths),
        "tokens": data.tokens,
        "learned_tokens": data.learned,
        "learned_share": data.learned / data.tokens,
        "dropped": data.dropped,
        "truncated": data.truncated,
        "with_check": sum(sample.task is not None for sample in data.samples),
        **{
            f"length_{name}": _quantile(lengths, share)
            for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
        },
    }


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
