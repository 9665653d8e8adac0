"""A conversation of two turns with an adapter, both answered by the same revision.

python examples/chat.py [HOST:PORT]
"""

import sys

from veneer_client import ChatMessage, Client
from veneer_registry.errors import AdapterNotFound

address = sys.argv[1] if len(sys.argv) > 1 else None  # VENEER_SERVER, or this machine
turns = [ChatMessage("system", "You are a brief assistant.")]

try:
    with Client(address) as client, client.adapter("chat", activate=True) as chat:
        print(f"talking to {chat.info.short}\n")
        for question in ("My name is Ada. What is an adapter?", "What is my name?"):
            turns.append(ChatMessage("user", question))
            answer = chat.chat(turns, temperature=0, max_tokens=40)
            turns.append(ChatMessage("assistant", answer.text))
            print(f"> {question}\n{answer.text.strip()}\n")
except AdapterNotFound as error:
    hint = "veneer adapter push examples/adapters/chat --name chat"
    raise SystemExit(f"{error}\n{hint}") from error
