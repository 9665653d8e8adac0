"""``veneer adapter``: publish, inspect, move, name and remove adapters."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from veneer_registry.adapter import Tier
from veneer_registry.command_line import Program
from veneer_registry.converting import convert_adapter
from veneer_registry.errors import InvalidField
from veneer_registry.screen import Screen, cell

from veneer_client.cli import alias, changes, push, watch
from veneer_client.cli.complete import adapter_names, modes
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.details import detail_rows
from veneer_client.cli.show import (
    adapter_table,
    as_json,
    byte_size,
    count,
    print_rows,
    print_table,
)
from veneer_client.cli.values import MODES, parse_labels, parse_mode

__all__ = ["adapter_cli"]

adapter_cli = Program(
    help="Publish, inspect, move, name and remove adapters.",
    epilog="Examples:\n\n  veneer adapter push runs/sql/adapter --name sql\n\n"
    "  veneer adapter ls --tier device\n\n  veneer adapter watch\n\n"
    "  veneer adapter alias sql/prod 1a2b3c4d5e6f\n\n  veneer adapter rollback sql",
    guesses={
        "list": "veneer adapter ls",
        "delete": "veneer adapter rm",
        "remove": "veneer adapter rm",
        "upload": "veneer adapter push",
        "publish": "veneer adapter push",
        "add": "veneer adapter push",
        "download": "veneer adapter pull",
        "load": "veneer adapter activate",
        "unload": "veneer adapter evict",
        "info": "veneer adapter show",
        "get": "veneer adapter show",
        "tag": "veneer adapter alias",
        "log": "veneer adapter history",
    },
)

adapter_cli.command(epilog=push.EXAMPLES)(push.push)
adapter_cli.command(epilog=push.PULL_EXAMPLES)(push.pull)


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter convert mlx/adapters runs/sql/adapter\n\n"
    "  veneer adapter convert sql.gguf runs/sql/adapter --base models/Llama-3.2-1B"
)
def convert(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="Adapter folder of mlx-lm, or GGUF file of a LoRA."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Destination folder; it must not exist.")
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            help="Hugging Face folder of the base, or its config.json; needed for a GGUF file "
            "for a Llama or Mistral.",
        ),
    ] = None,
    json_: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Convert an adapter from mlx-lm or llama.cpp to a folder that can be pushed. Needs no
    server."""
    with errors_shown(context, debug):
        done = convert_adapter(source, out, base=base)
        for note in done.notes:
            Screen(stderr=True, highlight=False).print(f"note: {cell(note)}", soft_wrap=True)
        told = f"converted to {out} ({count(done.modules, 'module')}, rank {done.rank})"
        print(as_json(done) if json_ else f"{told}: publish it with `veneer adapter push`")


NameArgument = Annotated[
    str, typer.Argument(help="NAME or NAME@REVISION.", autocompletion=adapter_names)
]
AnyNameArgument = Annotated[
    str,
    typer.Argument(help="NAME, NAME@REVISION or NAME/ALIAS.", autocompletion=adapter_names),
]
ModeOption = Annotated[
    str,
    typer.Option(
        "--mode",
        metavar="|".join(MODES),
        help="What to do with its running requests.",
        autocompletion=modes,
    ),
]


class _Memory(Enum):
    """The tiers that an adapter can be loaded into."""

    HOST = Tier.HOST.value
    DEVICE = Tier.DEVICE.value


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter ls\n\n  veneer adapter ls --prefix sql --tier device"
)
def ls(
    context: typer.Context,
    prefix: Annotated[str, typer.Option("--prefix", help="Only names with this prefix.")] = "",
    tier: Annotated[
        Tier | None, typer.Option("--tier", help="Only adapters whose nearest tier is this.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="KEY=VALUE", help="Only adapters with this label; repeatable."
        ),
    ] = None,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """List adapters and the memory tier of each."""
    with errors_shown(context, debug), connect(context, server) as client:
        found = tuple(
            client.list(name_prefix=prefix, tier=tier, labels=parse_labels(label or ()))
        )
        if json_:
            print(as_json(found))
        elif found:
            print_table(adapter_table(found))
        elif prefix or tier or label:
            print("no adapter matches: `veneer adapter ls` lists all")
        else:
            print("no adapters: publish one with `veneer adapter push FOLDER --name NAME`")


def ps(
    context: typer.Context,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """List the adapters that are in memory."""
    with errors_shown(context, debug), connect(context, server) as client:
        found = tuple(each for each in client.list() if each.tier in (Tier.DEVICE, Tier.HOST))
        if json_:
            print(as_json(found))
        elif found:
            print_table(adapter_table(found))
        else:
            print("no adapter is in memory: `veneer ls` lists all")


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter show sql\n\n  veneer adapter show sql@1a2b3c4d5e6f"
    "\n\n  veneer adapter show sql/prod\n\n  veneer adapter show sql --full"
)
def show(
    context: typer.Context,
    name: AnyNameArgument,
    full: Annotated[
        bool, typer.Option("--full", help="Also show etag, digests and training manifest.")
    ] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show one adapter and its revisions."""
    with errors_shown(context, debug), connect(context, server) as client:
        details = client.get(name)
        if json_:
            print(as_json(details))
            return
        print_rows(detail_rows(details, full=full))


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter activate sql\n\n  veneer adapter activate sql --pin"
)
def activate(
    context: typer.Context,
    name: NameArgument,
    tier: Annotated[
        _Memory, typer.Option("--tier", help="The memory to load it into.")
    ] = _Memory.DEVICE,
    pin: Annotated[
        bool, typer.Option("--pin", help="Pin it: it is never evicted automatically.")
    ] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Load an adapter into memory before the first request needs it."""
    with errors_shown(context, debug), connect(context, server) as client:
        adapter = client.activate(name, tier=Tier(tier.value), pin=pin)
        pinned = ", pinned" if adapter.pinned else ""
        print(
            as_json(adapter) if json_ else f"{adapter.short} is in {adapter.tier.value}{pinned}"
        )


@adapter_cli.command(epilog="Examples:\n\n  veneer adapter pin sql")
def pin(
    context: typer.Context,
    name: NameArgument,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Load an adapter onto the device and keep it there."""
    with errors_shown(context, debug), connect(context, server) as client:
        adapter = client.pin(name)
        print(as_json(adapter) if json_ else f"{adapter.short} is pinned")


@adapter_cli.command(epilog="Examples:\n\n  veneer adapter unpin sql")
def unpin(
    context: typer.Context,
    name: NameArgument,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Unpin an adapter; it stays in memory until the space is needed."""
    with errors_shown(context, debug), connect(context, server) as client:
        adapter = client.unpin(name)
        print(
            as_json(adapter)
            if json_
            else f"{adapter.short} is in {adapter.tier.value}, unpinned"
        )


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter evict sql\n\n  veneer adapter evict sql --mode abort"
    "\n\n  veneer adapter evict sql --mode fail-if-busy || echo busy"
)
def evict(
    context: typer.Context,
    name: NameArgument,
    mode: ModeOption = MODES[0],
    unpin: Annotated[bool, typer.Option("--unpin", help="Remove its pin first.")] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Free an adapter's memory; it stays registered."""
    with errors_shown(context, debug), connect(context, server) as client:
        eviction = client.evict(name, mode=parse_mode(mode), unpin=unpin)
        if json_:
            print(as_json(eviction))
        elif eviction.evicted:
            print(f"evicted {name}, freed {byte_size(eviction.freed_bytes)}")
        else:
            print(f"{name} will be evicted when its running requests finish")


@adapter_cli.command(
    epilog="Examples:\n\n  veneer adapter rm sql\n\n  veneer adapter rm sql@1a2b3c4d5e6f"
    "\n\n  veneer adapter rm sql --mode fail-if-busy"
)
def rm(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="NAME (all revisions) or NAME@REVISION.", autocompletion=adapter_names
        ),
    ],
    etag: Annotated[
        str, typer.Option("--etag", help="Only if the etag still matches (see `show --full`).")
    ] = "",
    mode: ModeOption = MODES[0],
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Delete an adapter permanently."""
    with errors_shown(context, debug), connect(context, server) as client:
        if "/" in name:
            raise InvalidField(
                f"{name} is an alias: remove it with `veneer adapter alias {name} --remove`",
                metadata={"field": "name"},
            )
        revisions = client.delete(name, etag=etag, mode=parse_mode(mode))
        removed = ", ".join(revision[:12] for revision in revisions)
        print(as_json(revisions) if json_ else f"deleted {name} ({removed})")


for command, examples in (
    (alias.alias, alias.EXAMPLES),
    (alias.aliases, alias.LIST_EXAMPLES),
    (alias.rollback, alias.ROLLBACK_EXAMPLES),
    (changes.label, changes.LABEL_EXAMPLES),
    (changes.retain, changes.RETAIN_EXAMPLES),
    (changes.share, changes.SHARE_EXAMPLES),
    (changes.history, changes.HISTORY_EXAMPLES),
    (watch.watch, watch.EXAMPLES),
):
    adapter_cli.command(epilog=examples)(command)
