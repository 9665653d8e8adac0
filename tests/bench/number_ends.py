"""Count the answers that end by themselves if a schema does not bound a number:
``python -m tests.bench.number_ends URL``. URL is the address of a server with the bundled base,
such as http://127.0.0.1:8000/v1; start it with ``--constraint-number-digits 0`` to see answers
without the server's bound.

There are a hundred cases: questions, greedy and sampled, for ``{"score": number}``, a bare
number and a bare integer.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import httpx

QUESTIONS: Final = (
    "Rate this review from 0 to 1: 'A wonderful film.'",
    "How likely is rain tomorrow?",
    "What is the value of pi?",
    "How tall is Mount Everest in metres?",
    "Give the similarity of 'cat' and 'dog'.",
    "What share of the Earth is covered by water?",
    "Score the grammar of: 'He go to school.'",
    "What is one third?",
    "How confident are you?",
    "Convert 100 miles to kilometres.",
)
OPEN: Final[tuple[dict[str, Any], ...]] = (
    {
        "type": "object",
        "properties": {"score": {"type": "number"}},
        "required": ["score"],
        "additionalProperties": False,
    },
    {"type": "number"},
    {"type": "integer"},
)
TEMPERATURES: Final = (0.0, 0.2, 1.0, 1.0)
CASES: Final = 100


def case(number: int) -> dict[str, Any]:
    """Build the request of a case; its seed is the case's number."""
    question = QUESTIONS[number % len(QUESTIONS)]
    rest = number // len(QUESTIONS)
    schema = OPEN[rest % len(OPEN)]
    return {
        "messages": [{"role": "user", "content": f"{question} Answer in JSON."}],
        "temperature": TEMPERATURES[rest % len(TEMPERATURES)],
        "seed": number,
        "max_tokens": 128,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        },
    }


def main(url: str) -> None:
    """Print how many cases ended, and those that did not."""
    ended = 0
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        model = http.get("models").json()["data"][0]["id"]
        for number in range(CASES):
            reply = http.post("chat/completions", json={"model": model, **case(number)})
            [choice] = reply.raise_for_status().json()["choices"]
            text = choice["message"]["content"]
            if choice["finish_reason"] == "stop":
                json.loads(text)
                ended += 1
            else:
                print(f"case {number}: {text[:90]!r}")
    print(f"{ended} of {CASES} ended by themselves")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") + "/")
