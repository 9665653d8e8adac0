"""The base model that comes with Veneer: its name, and the folder it is imported to.

``veneer-server model import`` makes the folder; ``veneer-train`` finds it there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

BUNDLED: Final = "smollm2-135m"
CACHE_DIR: Final = "~/.cache/veneer"
CACHE_VARIABLE: Final = "VENEER_CACHE_DIR"


def bundled_folder(cache_dir: Path) -> Path:
    """Folder of the imported bundled base."""
    return cache_dir / "bases" / BUNDLED
