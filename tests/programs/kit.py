"""What every program is asked.

The environment says where the server is (``URL``), and which models it has: ``MODEL`` is the
bundled base; ``CALLER`` calls ``paint`` of its own accord, and answers with text once it has
seen a tool's result.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, Field

URL = os.environ["URL"]
MODEL = os.environ["MODEL"]
CALLER = os.environ["CALLER"]
KEY = "none"

HELLO = "Say hello."
ASK = "Name a city in France, and say whether it is large."
PAINT = "Paint it red."
COLOURS = ("red", "blue", "green")
Colour = Literal["red", "blue", "green"]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=16)
    large: bool
