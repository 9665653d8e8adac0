"""Check forced tool calls on the base and adapters, in three formats, beside plain requests.

    python -m tests.bench.tool_calls --prompts 300

Prints how many calls fitted their tool's schema, and whether every streamed answer equalled the
whole answer; exits with 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.places import cache_dir
from tests.server_harness import running_server
from tests.tool_load import TEMPLATES, check_tool_calls, with_template

_ADAPTER = Path(__file__).parents[2] / "examples" / "adapters" / "chat"


async def _run(prompts: int, seed: int) -> int:
    with TemporaryDirectory() as made:
        folder = Path(made)
        async with running_server(folder / "data", cache_dir()) as server:
            for format_ in TEMPLATES:
                adapter = with_template(_ADAPTER, folder / format_, format_)
                await server.push(adapter, format_.replace("_", "-"))
            models = ["smollm2-135m", *(each.replace("_", "-") for each in TEMPLATES)]
            began = time.perf_counter()
            outcome = await check_tool_calls(server.openai, models, prompts=prompts, seed=seed)
            seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "seed": seed,
                "prompts": outcome.prompts,
                "calls": outcome.calls,
                "plain": outcome.plain,
                "problems": len(outcome.problems),
                "seconds": round(seconds, 1),
            }
        )
    )
    for problem in outcome.problems[:10]:
        print(problem, file=sys.stderr)
    return 1 if outcome.problems else 0


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = parser.parse_args()
    sys.exit(asyncio.run(_run(given.prompts, given.seed)))


if __name__ == "__main__":
    main()
