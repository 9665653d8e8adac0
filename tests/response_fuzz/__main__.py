"""Random requests to ``/v1/responses``, whole, streamed and as chats, over a fake engine.

    python -m tests.response_fuzz --cases 10000

Prints its seed and what was seen; exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from veneer_server.text.tokenizer import TextTokenizer

from tests import seeds
from tests.places import cache_dir
from tests.response_fuzz.check import check_responses, push_models
from tests.unit.server.openai.tool_kit import long_context
from tests.unit.server.rpc.front_harness import running


async def _run(count: int, seed: int) -> int:
    base = cache_dir() / "bases" / "smollm2-135m"
    tokenizer = TextTokenizer.from_folder(base)
    with TemporaryDirectory() as made:
        folder = Path(made)
        async with running(
            base, cache_dir(), folder / "data", openai_listen="127.0.0.1:0"
        ) as front:
            url = f"http://{front.addresses['openai']}"
            async with (
                httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http,
                long_context(front),
            ):
                await push_models(front, folder)
                try:
                    seen = await check_responses(front, http, tokenizer, seed, count)
                except AssertionError as error:
                    print(error, file=sys.stderr)
                    return 1
    print(json.dumps({"seed": seed, "cases": count, **seen}))
    return 0


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=seeds.seed())
    given = parser.parse_args()
    print(f"seed {given.seed}", file=sys.stderr)
    sys.exit(asyncio.run(_run(given.cases, given.seed)))


if __name__ == "__main__":
    main()
