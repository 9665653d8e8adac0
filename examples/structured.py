"""Answers that a program can read: JSON of a schema, and one of several choices.

python examples/structured.py [HOST:PORT]
"""

import json
import sys

from veneer_client import Chat, Client

address = sys.argv[1] if len(sys.argv) > 1 else None  # VENEER_SERVER, or this machine
schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["city", "country", "inhabitants"],
    "additionalProperties": False,
}

with Client(address) as client:
    described = client.generate(
        Chat.user("Describe the capital of France as JSON."),
        json_schema=schema,
        temperature=0,
        max_tokens=100,
    )
    chosen = client.generate(
        Chat.user("Is Paris in Europe?"), choice=["yes", "no"], temperature=0
    )

city = json.loads(described.text)
print(f"{city['city']} in {city['country']}: {city['inhabitants']:,} inhabitants")
print(f"in Europe: {chosen.text}")
