"""``veneer-server model``: base models on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from veneer_registry.command_line import Program

from veneer_server.config import OPTIONS, load_config
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


@model_cli.command(
    "prepare",
    epilog="""
Examples:

  veneer-server model prepare --base Qwen/Qwen3-1.7B --cache-dir /srv/bases

  veneer-server model prepare --config veneer.toml
""",
)
@with_flags(OPTIONS)
def prepare_model(
    *,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.")
    ] = None,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Write everything that a server's first start would write to --cache-dir.

    Downloads and converts the base, and loads it once. Several servers may share the folder;
    if several of these commands run at once, one does the work and the others wait. Takes the
    flags of `serve`.
    """

    def run() -> None:
        from veneer_server.logs import configure
        from veneer_server.operate.preparing import prepare
        from veneer_server.progress import SINK, Display

        settings = load_config(flags, os.environ, config)
        configure(settings.log_format)
        SINK.set(Display(structured=settings.log_format == "json"))
        print(prepare(settings, lambda line: print(line, file=sys.stderr, flush=True)))

    guarded(run, debug)


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
