"""Count good first answers of the bundled base, with the server's defaults and no seed.

::

    python -m tests.bench.first_answers --runs 20

Prints the pass rate of each question (`tests.first_answers`) and of all, and what was counted.
No adapter is used. ``--show`` prints the answers that are not good. Other flags go to the
server.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from veneer_proto.v1 import inference_pb2

from tests.first_answers import COUNTED, QUESTIONS, Question
from tests.places import cache_dir
from tests.server_harness import Server, running_server


async def answer(server: Server, question: Question, seed: int | None = None) -> str:
    """Send a question like ``veneer generate``, with only the prompt set."""
    asked = inference_pb2.GenerateRequest()
    asked.messages.messages.add(role="user", content=question.prompt)
    if seed is not None:
        asked.sampling.seed = seed
    return (await server.inference.Generate(asked)).text


async def main(runs: int, show: bool, cache: Path, flags: list[str]) -> None:
    print(f"asking the bundled base {len(QUESTIONS)} questions {runs} times ...", flush=True)
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        async with running_server(Path(folder) / "data", cache, *flags) as server:
            for question in QUESTIONS:
                texts = await asyncio.gather(*(answer(server, question) for _ in range(runs)))
                good = sum(map(question.good, texts))
                passed += good
                print(f"{good:3} of {runs}  {question.prompt}", flush=True)
                for text in texts:
                    if show and not question.good(text):
                        print(f"      {text[:300]!r}")
    asked = runs * len(QUESTIONS)
    print(f"{passed} of {asked} ({passed / asked:.0%}) of the base alone. Counted: {COUNTED}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--cache-dir", type=Path, default=cache_dir())
    given, flags = parser.parse_known_args()
    try:
        asyncio.run(main(given.runs, given.show, given.cache_dir, flags))
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped: nothing was saved; run the same command to start over"
        ) from None
