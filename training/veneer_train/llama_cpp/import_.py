"""Converts a GGUF file to a Hugging Face folder, with the server's importer.

The importer runs as a separate process. Using the same one gives a base the same fingerprint,
whether it is imported for training or for serving.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from veneer_registry.child_python import child_python
from veneer_registry.errors import InvalidField
from veneer_registry.replacing import new_folder

_IMPORTER = "veneer_server.models.importer"


def import_file(file: Path, out: Path) -> None:
    """Import a file; ``out`` appears complete at the end, or not at all.

    Raises:
        InvalidField: there is no such file, ``out`` exists, or the file cannot be converted.
    """
    if not file.is_file():
        raise InvalidField(f"there is no file {file}", metadata={"field": "file"})
    if out.exists():
        raise InvalidField(
            f"{out} exists: remove it, or choose another folder", metadata={"field": "out"}
        )
    with new_folder(out) as staging:
        done = subprocess.run(
            child_python("-m", _IMPORTER, str(file), str(staging)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise InvalidField(
                f"{file.name} could not be converted: {last}", metadata={"field": "file"}
            )
