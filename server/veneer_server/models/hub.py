"""Downloads a base model from a hub into the hub's cache; run as a process.

``python -m veneer_server.models.hub NAME`` prints the folder's path.
"""

from __future__ import annotations

import sys
from typing import Final

from huggingface_hub import snapshot_download

FILES: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def main() -> None:
    """Entry point. On failure, the last line of stderr begins with the error's name."""
    try:
        print(snapshot_download(sys.argv[1], allow_patterns=list(FILES)))  # nosec B615 # the user names the base
    except Exception as error:  # the hub client's errors have no common base class
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
