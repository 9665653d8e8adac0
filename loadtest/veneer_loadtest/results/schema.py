"""The JSON Schema of result files: ``python -m veneer_loadtest.results.schema``.

``make schema`` writes it to ``docs/loadtest-result.schema.json``.
"""

from __future__ import annotations

import inspect
import json

import msgspec

from veneer_loadtest.results.files import Result


def schema_text() -> str:
    """Return the schema, with the classes' docstrings as descriptions."""
    schema = msgspec.json.schema(Result)
    for each in schema["$defs"].values():
        if "description" in each:
            each["description"] = inspect.cleandoc(each["description"])
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Result of a command of veneer-loadtest"
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
