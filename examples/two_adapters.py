"""The base and two adapters answer the same prompt at once, in the same batches.

python examples/two_adapters.py [HOST:PORT]
"""

import asyncio
import sys

from veneer_client import AsyncClient, Chat
from veneer_registry.errors import AdapterNotFound

address = sys.argv[1] if len(sys.argv) > 1 else None  # VENEER_SERVER, or this machine
question = Chat.user("Write a function that adds two numbers.")


async def main() -> None:
    """Ask all three side by side."""
    async with AsyncClient(address) as client:
        answers = await asyncio.gather(
            *(
                client.generate(question, adapter=name, temperature=0, max_tokens=40)
                for name in ("", "chat", "code")
            )
        )
    for answer in answers:
        print(f"--- {answer.provenance.short}\n{answer.text.strip()}\n")


try:
    asyncio.run(main())
except AdapterNotFound as error:
    raise SystemExit(
        f"{error}\nveneer adapter push examples/adapters/chat --name chat\n"
        "veneer adapter push examples/adapters/code --name code"
    ) from error
