"""``veneer-server model``: base models on this machine."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from veneer_registry.command_line import Program

from veneer_server.config import load_config
from veneer_server.operate.flags import Debug, guarded, options, with_flags

model_cli = Program(help="Manage base models on this machine.")

_Name = Annotated[str, typer.Argument(help="smollm2-135m or a hub name.")]


@model_cli.command("import")
@with_flags(options("cache_dir"))
def import_model(name: _Name, *, debug: Debug = False, **flags: Any) -> None:
    """Download and convert a base model, for example smollm2-135m, and print its folder."""
    guarded(lambda: _resolve(name, flags), debug)


@model_cli.command("path")
@with_flags(options("cache_dir"))
def model_path(name: _Name, *, debug: Debug = False, **flags: Any) -> None:
    """Print the local Hugging Face folder of a base model, downloading it if necessary."""
    guarded(lambda: _resolve(name, flags), debug)


def _resolve(name: str, flags: dict[str, Any]) -> None:
    from veneer_server.logs import configure
    from veneer_server.models.source import resolve_base
    from veneer_server.progress import SINK, Display

    config = load_config(flags, os.environ)
    configure("console")
    SINK.set(Display())
    folder = resolve_base(
        name, config.cache_dir, progress=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(folder.path)
