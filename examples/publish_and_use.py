"""Publish an adapter on a running server, use it at once, and clean up.

python examples/publish_and_use.py [HOST:PORT]
"""

import sys
from pathlib import Path

from veneer_client import Chat, Client

address = sys.argv[1] if len(sys.argv) > 1 else None  # VENEER_SERVER, or this machine
folder = Path(__file__).parent / "adapters" / "code"
question = Chat.user("Write a function that doubles a number.")

with Client(address) as client:
    pushed = client.push(folder, "example-code", labels={"from": "examples"})
    try:
        print(f"published {pushed.adapter.short}, {pushed.adapter.size / 2**20:.1f} MiB")
        # Pinned while it is in use here, unpinned after.
        with client.adapter("example-code", pin=True) as code:
            answer = code.generate(question, temperature=0, max_tokens=40)
            print(f"in {code.details().adapter.tier.value}, pinned")
        print(f"answered by {answer.provenance.short}:\n{answer.text.strip()}")
    finally:
        client.delete("example-code")
    print("deleted")
