"""``veneer adapter push`` publishes a folder, resuming as often as necessary, or a URI that the
server fetches; ``veneer adapter pull`` gets the files back."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from veneer_registry.adapter import Tier
from veneer_registry.errors import ChecksumMismatch, InvalidField
from veneer_registry.screen import Screen, cell

from veneer_client.cli.complete import adapter_names
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.show import as_json, byte_size
from veneer_client.cli.values import parse_labels
from veneer_client.cli.waiting import WaitReplicasOption, replicas_shown
from veneer_client.records import Pushed, Resumed
from veneer_client.replicas import WaitReplicas

__all__ = ["EXAMPLES", "PULL_EXAMPLES", "pull", "push"]

EXAMPLES = """
Examples:

  veneer adapter push runs/sql/adapter --name sql

  veneer adapter push runs/sql/adapter --name sql --replace --activate --label team=data

  veneer adapter push runs/sql/adapter --name sql --dry-run      check, publish nothing

  veneer adapter push hf://org/sql-lora@main --name sql          fetched by the server

An interrupted push resumes by itself, or when you push again.
"""

PULL_EXAMPLES = """
Examples:

  veneer adapter pull sql adapters/sql

  veneer adapter pull sql@1a2b3c4d5e6f adapters/sql --force      replace the adapter in it
"""


def push(
    context: typer.Context,
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|URI",
            help="Adapter folder, written by PEFT's save_pretrained; or a URI that the server "
            "fetches: hf://, s3://, gs://, https:// or file://.",
        ),
    ],
    name: Annotated[
        str,
        typer.Option("--name", help="Name to publish it under (needed).", show_default=False),
    ] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Publish even if the name holds other content.")
    ] = False,
    activate: Annotated[
        bool, typer.Option("--activate", help="Also load it onto the device.")
    ] = False,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE", help="Label to set; repeatable."),
    ] = None,
    same_base: Annotated[
        bool,
        typer.Option(
            "--same-base",
            help="Declare that the base named in the adapter's config is the served one, under "
            "another name.",
        ),
    ] = False,
    etag: Annotated[
        str,
        typer.Option("--etag", help="Only if the name's etag still matches (see `show`)."),
    ] = "",
    wait_replicas: WaitReplicasOption = WaitReplicas.NONE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run all checks without publishing.")
    ] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Check an adapter folder locally, then publish it."""
    console = Screen(stderr=True, highlight=False)
    with errors_shown(context, debug), connect(context, server) as client:
        labels = parse_labels(label or ())
        if not name:
            named = _name_for(folder)
            raise InvalidField(
                f"--name is missing: give the name to publish it under, such as --name {named}",
                metadata={"field": "name"},
            )
        if "://" in folder:
            with _stopped(
                console,
                "the server stops fetching. Unless it had just finished, nothing is published: "
                f"`veneer show {name}` shows which. No fetched data is kept; the same command "
                "starts over",
            ):
                pushed = client.register(
                    folder,
                    name,
                    labels=labels,
                    validate_only=dry_run,
                    activate=activate,
                    allow_replace=replace,
                    same_base=same_base,
                    etag=etag,
                    wait_replicas=wait_replicas,
                )
        else:
            sent = (
                "nothing was published. The data sent is kept for a while; the same command "
                "resumes from there"
            )
            with _stopped(console, sent), _bar(console) as bar:
                task = bar.add_task(f"checking {cell(folder)}", total=None)
                pushed = client.push(
                    Path(folder),
                    name,
                    labels=labels,
                    validate_only=dry_run,
                    activate=activate,
                    allow_replace=replace,
                    same_base=same_base,
                    etag=etag,
                    wait_replicas=wait_replicas,
                    progress=lambda done, total: bar.update(
                        task, description=f"sending {name}", completed=done, total=total
                    ),
                    on_resume=lambda resumed: console.print(_resumed(resumed), soft_wrap=True),
                )
        _warn(console, pushed)
        told = _outcome(pushed, dry_run) + replicas_shown(pushed.replicas)
        print(as_json(pushed) if json_ else told)


def pull(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="NAME, NAME@REVISION or NAME/ALIAS.", autocompletion=adapter_names),
    ],
    folder: Annotated[Path, typer.Argument(help="Destination folder; it must not exist.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace the adapter that the folder already holds.")
    ] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Download an adapter's files as they were uploaded, and verify them."""
    console = Screen(stderr=True, highlight=False)
    with errors_shown(context, debug), connect(context, server) as client:
        kept = "nothing of it is kept; the same command starts over"
        with _stopped(console, kept), _bar(console) as bar:
            task = bar.add_task(f"receiving {cell(name)}", total=None)
            pulled = client.pull(
                name,
                folder,
                force=force,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        size, count = byte_size(sum(pulled.files.values())), len(pulled.files)
        told = f"pulled: {pulled.adapter.short} to {folder} ({count} files, {size})"
        print(as_json(pulled) if json_ else told)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _name_for(folder: str) -> str:
    """A valid adapter name, made from the last part of a folder or URI."""
    last = re.split("[/@]", folder.partition("://")[2] or os.path.abspath(folder))
    words = [part for part in last if part]
    if len(words) > 1 and "@" in folder:
        words.pop()
    made = re.sub(r"[^a-z0-9._-]+", "-", (words or [""])[-1].lower()).strip("._-")
    return made[:63] or "my-adapter"


@contextlib.contextmanager
def _stopped(console: Console, kept: str) -> Iterator[None]:
    """On Ctrl-C, tell the user what is kept and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped: {cell(kept)}", soft_wrap=True)
        raise typer.Exit(130) from None


def _warn(console: Console, pushed: Pushed) -> None:
    for file in pushed.skipped:
        console.print(f"[yellow]skipped:[/yellow] {cell(file)} (not part of a bundle)")
    for warning in pushed.warnings:
        console.print(f"[yellow]warning:[/yellow] {cell(warning)}", soft_wrap=True)


def _resumed(resumed: Resumed) -> str:
    at, total = byte_size(resumed.at), byte_size(resumed.total)
    if isinstance(resumed.after, ChecksumMismatch):
        return f"the part on the server was damaged: sending all {total} again"
    if resumed.after is None:
        # From an earlier push of it, or from another adapter that shares a file.
        return f"{total if at == total else f'{at} of {total}'} already on the server"
    return f"interrupted; resumed at {at} of {total}"


def _outcome(pushed: Pushed, dry_run: bool) -> str:
    adapter = pushed.adapter
    facts = f"rank {adapter.rank}, {byte_size(adapter.size)} once loaded"
    if dry_run:
        return f"valid: {adapter.short} would be published ({facts}); nothing changed (dry run)"
    if not pushed.published:
        return f"unchanged: {adapter.short} holds this content already"
    verb = "replaced" if pushed.replaced else "published"
    where = "on disk" if adapter.tier is Tier.DISK else f"in {adapter.tier.value} memory"
    return f"{verb}: {adapter.short} ({facts}, now {where})"
