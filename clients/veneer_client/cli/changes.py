"""``veneer adapter label|retain|share|history``: settings of adapters, and who changed them."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer
from veneer_registry.errors import InvalidField
from veneer_registry.terminal import one_line

from veneer_client.cli.complete import adapter_names
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.show import as_json, history_table, print_table
from veneer_client.cli.values import parse_labels

__all__ = [
    "HISTORY_EXAMPLES",
    "LABEL_EXAMPLES",
    "RETAIN_EXAMPLES",
    "SHARE_EXAMPLES",
    "history",
    "label",
    "retain",
    "share",
]

LABEL_EXAMPLES = """
Examples:

  veneer adapter label chat team=support stage=prod

  veneer adapter label chat@1a2b3c4d5e6f --remove stage
"""

RETAIN_EXAMPLES = """
Examples:

  veneer adapter retain chat 5                                keep the last five

  veneer adapter retain chat 0                                keep only the current one
"""

SHARE_EXAMPLES = """
Examples:

  veneer adapter share chat                                   all tenants can use it

  veneer adapter share chat --stop                            only its own tenant can
"""

HISTORY_EXAMPLES = """
Examples:

  veneer adapter history chat

  veneer adapter history --limit 20                           of all names

  veneer adapter history chat --json | jq '.[].actor'
"""


def label(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="NAME or NAME@REVISION.", autocompletion=adapter_names)
    ],
    labels: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Labels to set.", show_default=False),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="KEY", help="Label to remove; repeatable."),
    ] = None,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Set or remove labels of a revision; other labels stay."""
    with errors_shown(context, debug), connect(context, server) as client:
        given = parse_labels(labels or (), f"veneer adapter label {name} team=data")
        if not given and not remove:
            raise InvalidField(
                f"no label is given: `veneer adapter label {name} KEY=VALUE` sets one, "
                "`--remove KEY` removes one",
                metadata={"field": "labels"},
            )
        adapter = client.update_adapter(name, labels=given, remove_labels=remove or ())
        shown = one_line(" ".join(f"{key}={value}" for key, value in adapter.labels.items()))
        print(as_json(adapter) if json_ else f"{adapter.short}: {shown or 'no labels'}")


def retain(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="NAME.", autocompletion=adapter_names)],
    revisions: Annotated[
        int, typer.Argument(metavar="N", help="Superseded revisions to keep.", min=0)
    ],
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Set how many superseded revisions a name keeps; older ones are removed at once."""
    with errors_shown(context, debug), connect(context, server) as client:
        adapter = client.update_adapter(name, retain=revisions)
        print(
            as_json(adapter)
            if json_
            else f"{adapter.name} keeps {adapter.retain} superseded revisions"
        )


def share(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="NAME.", autocompletion=adapter_names)],
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop sharing; running requests finish.")
    ] = False,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Let other tenants use an adapter as TENANT/NAME, with all revisions and aliases."""
    with errors_shown(context, debug), connect(context, server) as client:
        adapter = client.update_adapter(name, shared=not stop)
        who = "all tenants can use it" if adapter.shared else "only its own tenant can use it"
        print(as_json(adapter) if json_ else f"{adapter.name}: {who}")


def history(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="An adapter's name, including deleted ones; default: all names.",
            show_default=False,
            autocompletion=adapter_names,
        ),
    ] = "",
    limit: Annotated[
        int, typer.Option("--limit", "-n", help="Show at most this many changes.", min=1)
    ] = 100,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Show who changed what and when, newest first."""
    with errors_shown(context, debug), connect(context, server) as client:
        entries = client.history(name, page_size=min(limit, 1000))
        found = tuple(itertools.islice(entries, limit))
        if json_:
            print(as_json(found))
        elif found:
            print_table(history_table(found))
        else:
            print(f"no changes{f' under the name {name}' if name else ''} yet")
