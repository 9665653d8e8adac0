"""Find the imported base for the suite: in the programs' cache, filled by `make base`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from veneer_server.config import load_config

REPOSITORY: Final = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """Return the server's default `--cache-dir`, unless the checkout has its own copy of the
    base, which takes precedence here and in the Makefile."""
    own = REPOSITORY / ".cache" / "veneer"
    if "VENEER_CACHE_DIR" not in os.environ and (own / "bases").is_dir():
        return own
    given = {k: v for k, v in os.environ.items() if k == "VENEER_CACHE_DIR"}
    return load_config({}, given).cache_dir
