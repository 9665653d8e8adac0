"""Print an answer as it comes, and what it cost.

python examples/stream.py [HOST:PORT]
"""

import sys

from veneer_client import Chat, Client

address = sys.argv[1] if len(sys.argv) > 1 else None  # VENEER_SERVER, or this machine
question = Chat.user("Name three rivers in Europe.")

with (
    Client(address) as client,
    client.generate_stream(question, temperature=0, max_tokens=48, timeout_s=60) as stream,
):
    for chunk in stream:
        print(chunk.text, end="", flush=True)

end = stream.final
print(f"\n\n{end.usage.completion_tokens} tokens by {end.provenance.short},", end=" ")
print(f"the first after {end.provenance.timings.time_to_first_token_s * 1e3:.0f} ms")
