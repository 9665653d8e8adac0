"""How many first answers are good, with the server's defaults and no seed.

::

    python -m tests.bench.first_answers --runs 20

Prints the pass rate of each question (`tests.first_answers`) and of all. ``--show`` prints the
answers that are not good.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from veneer_proto.v1 import inference_pb2

from tests.first_answers import QUESTIONS, Question
from tests.places import cache_dir
from tests.server_harness import Server, running_server

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"


async def answer(server: Server, question: Question, seed: int | None = None) -> str:
    """Send a question like ``veneer generate``, with only the prompt set."""
    asked = inference_pb2.GenerateRequest(adapter=question.adapter)
    asked.messages.messages.add(role="user", content=question.prompt)
    if seed is not None:
        asked.sampling.seed = seed
    return (await server.inference.Generate(asked)).text


async def main(runs: int, show: bool, cache: Path, flags: list[str]) -> None:
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        async with running_server(Path(folder) / "data", cache, *flags) as server:
            for name in ("chat", "code", "sql"):
                await server.push(ADAPTERS / name, name)
            for question in QUESTIONS:
                texts = await asyncio.gather(*(answer(server, question) for _ in range(runs)))
                good = sum(map(question.good, texts))
                passed += good
                last = question.prompt.splitlines()[-1]
                print(f"{good:3} of {runs}  {question.adapter or 'base':5} {last}", flush=True)
                for text in texts:
                    if show and not question.good(text):
                        print(f"      {text[:300]!r}")
    print(f"{passed} of {runs * len(QUESTIONS)} ({passed / runs / len(QUESTIONS):.0%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--cache-dir", type=Path, default=cache_dir())
    given, flags = parser.parse_known_args()
    asyncio.run(main(given.runs, given.show, given.cache_dir, flags))
