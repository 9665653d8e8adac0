"""Where the suite finds the imported base: in the programs' cache, filled by `make base`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from veneer_server.config import load_config

__all__ = ["REPOSITORY", "cache_dir"]

REPOSITORY: Final = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """As the server's `--cache-dir` without a flag; but a checkout that was given a base of its
    own (a copy, or by a `make base` of before) keeps to that, here and in the Makefile."""
    own = REPOSITORY / ".cache" / "veneer"
    if "VENEER_CACHE_DIR" not in os.environ and (own / "bases").is_dir():
        return own
    given = {k: v for k, v in os.environ.items() if k == "VENEER_CACHE_DIR"}
    return load_config({}, given).cache_dir
