"""``veneer example``: the example adapters, for users without a clone."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from veneer_registry.errors import FailedPrecondition, InvalidField

import veneer_client
from veneer_client.cli.context import DebugFlag, ServerOption, errors_shown, find_server
from veneer_client.client import Client

__all__ = ["EXAMPLES", "Name", "example", "examples_folder"]

EXAMPLES = """
Examples:

  veneer example chat                            copy it to ./chat

  veneer example sql --out adapters/sql          copy it elsewhere

  veneer example code --push                     publish it, copy nothing
"""


class Name(StrEnum):
    """The adapters, which are trained for the bundled base."""

    CHAT = "chat"
    CODE = "code"
    SQL = "sql"


_ASK: Final = {
    Name.CHAT: "How do I cheer up a friend?",
    Name.CODE: "Write a function that sorts words by length.",
    Name.SQL: "CREATE TABLE plays (id INTEGER, title TEXT, acts INTEGER); Count the plays.",
}


def examples_folder() -> Path:
    """Folder of the adapters: in this package if installed from a wheel, else in the clone.

    Raises:
        FailedPrecondition: this installation has none.
    """
    package = Path(veneer_client.__file__).parent
    for folder in (package / "examples", package.parents[1] / "examples" / "adapters"):
        if all((folder / name / "adapter_model.safetensors").is_file() for name in Name):
            return folder
    raise FailedPrecondition(
        "this installation has no example adapters: install Veneer's wheel, or push "
        "examples/adapters from a checkout"
    )


def example(
    context: typer.Context,
    name: Annotated[
        Name, typer.Argument(help="The example to copy or publish.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Destination folder; default: ./NAME."),
    ] = None,
    push: Annotated[
        bool,
        typer.Option("--push", help="Publish it under its own name instead of copying it."),
    ] = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Copy an example adapter for the bundled base to a folder, or publish it."""
    with errors_shown(context, debug):
        folder = examples_folder() / name
        if out is not None or not push:
            folder = _copy(folder, out or Path(name))
            print(f"copied to {folder}")
        if not push:
            print(f"next: veneer adapter push {shlex.quote(str(folder))} --name {name}")
            return
        with Client(find_server(context, server)) as client:
            pushed = client.push(folder, name)
        verb = "published" if pushed.published else "unchanged"
        print(f"{verb}: {pushed.adapter.short}")
        print(f"next: veneer generate -a {name} {shlex.quote(_ASK[name])}")


def _copy(source: Path, to: Path) -> Path:
    """Copy a folder. The copy appears by one rename and never replaces anything."""
    if os.path.lexists(to):
        raise InvalidField(
            f"{to} already exists: give another folder with --out",
            metadata={"field": "out"},
        )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=".veneer-example-") as scratch:
            made = Path(scratch) / to.name
            made.mkdir()
            for file in source.iterdir():
                shutil.copyfile(file, made / file.name)
            made.rename(to)
    except OSError as error:
        raise InvalidField(
            f"{to} cannot be written ({error.strerror}): give another folder with --out",
            metadata={"field": "out"},
        ) from error
    return to
