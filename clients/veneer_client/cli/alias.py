"""``veneer adapter alias|aliases|rollback``: which revision people get."""

from __future__ import annotations

from typing import Annotated

import typer
from veneer_registry.errors import InvalidField

from veneer_client.cli.complete import adapter_names, kept_revisions
from veneer_client.cli.context import (
    DebugFlag,
    JsonFlag,
    ServerOption,
    connect,
    errors_shown,
)
from veneer_client.cli.show import alias_table, as_json, print_table, shares
from veneer_client.cli.values import parse_shares
from veneer_client.records import AdapterDetails, AdapterInfo, AliasMove

__all__ = ["EXAMPLES", "LIST_EXAMPLES", "ROLLBACK_EXAMPLES", "alias", "aliases", "rollback"]

EXAMPLES = """
Examples:

  veneer adapter alias chat/prod 1a2b3c4d5e6f                 for all requests

  veneer adapter alias chat/prod --canary 1a2b3c4d5e6f=90 --canary 6f5e4d3c2b1a=10

  veneer adapter alias chat/prod --rollback                   what it was before

  veneer adapter alias chat/prod --remove

Requests name it as they name an adapter: veneer generate -a chat/prod "..."
"""

LIST_EXAMPLES = """
Examples:

  veneer adapter aliases

  veneer adapter aliases chat --json
"""

ROLLBACK_EXAMPLES = """
Examples:

  veneer adapter rollback chat                                the revision before

  veneer adapter rollback chat 1a2b3c4d5e6f                   that one

  veneer adapter rollback chat/prod                           an alias, as --rollback
"""

EtagOption = Annotated[
    str, typer.Option("--etag", help="Only if it is still this (see `aliases`).")
]


def alias(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME/ALIAS", help="The alias to set.", autocompletion=adapter_names
        ),
    ],
    revision: Annotated[
        str,
        typer.Argument(
            help="12 or more digits of a kept revision.",
            show_default=False,
            autocompletion=kept_revisions,
        ),
    ] = "",
    canary: Annotated[
        list[str] | None,
        typer.Option("--canary", metavar="REVISION=WEIGHT", help="Its share; repeatable."),
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Back to what it meant before.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="The alias ends.")] = False,
    etag: EtagOption = "",
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Move an alias to a revision, share it out, roll it back or remove it."""
    with errors_shown(context, debug), connect(context, server) as client:
        targets = parse_shares(canary or ())
        if [bool(revision), bool(targets), rollback, remove].count(True) != 1:
            raise InvalidField(
                f"what shall {name} mean? Give one of REVISION, --canary REVISION=WEIGHT "
                "..., --rollback and --remove",
                metadata={"field": "revision"},
            )
        move = client.set_alias(
            name,
            _digits(revision),
            targets={_digits(target): weight for target, weight in targets.items()},
            rollback=rollback,
            remove=remove,
            etag=etag,
        )
        print(as_json(move) if json_ else _moved(move))


def _digits(revision: str) -> str:
    """Of ``name@revision`` the revision, as `show` prints it."""
    return revision.rpartition("@")[2]


def _moved(move: AliasMove) -> str:
    before = f" (before: {shares(move.previous)})" if move.previous else ""
    if not move.alias.targets:
        return f"removed {move.alias.alias}{before}"
    return f"{move.alias.alias} means {shares(move.alias.targets)}{before}"


def aliases(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="Only this name's.", show_default=False, autocompletion=adapter_names
        ),
    ] = "",
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """List aliases and what they mean."""
    with errors_shown(context, debug), connect(context, server) as client:
        found = client.list_aliases(name)
        if json_:
            print(as_json(found))
        elif found:
            print_table(alias_table(found))
        else:
            of = f" of {name}" if name else ""
            print(f"no aliases{of}: set one with `veneer adapter alias NAME/ALIAS REVISION`")


def rollback(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="NAME or NAME/ALIAS.", autocompletion=adapter_names)
    ],
    revision: Annotated[
        str,
        typer.Argument(
            help="A kept revision; else the one before.",
            show_default=False,
            autocompletion=kept_revisions,
        ),
    ] = "",
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Make an earlier revision what the name means, or roll an alias back."""
    with errors_shown(context, debug), connect(context, server) as client:
        if "/" in name:
            if revision:
                raise InvalidField(
                    f"an alias rolls back to what it meant before; to another revision move "
                    f"it: `veneer adapter alias {name} {revision}`",
                    metadata={"field": "revision"},
                )
            move = client.set_alias(name, rollback=True)
            print(as_json(move) if json_ else _moved(move))
            return
        plain, _, pinned_down = name.partition("@")
        target, etag = _digits(revision) or pinned_down, ""
        if not target:
            details = client.get(plain)
            # The etag: what was published since is not rolled back by this.
            target, etag = _before(details).revision, details.adapter.etag
        adapter = client.update_adapter(f"{plain}@{target}", current=True, etag=etag)
        print(as_json(adapter) if json_ else f"{plain} means {adapter.short} again")


def _before(details: AdapterDetails) -> AdapterInfo:
    """The newest revision that is older than the current one."""
    older = iter(details.revisions)
    for revision in older:
        if revision.current:
            break
    found = next(older, None)
    if found is None:
        name = details.adapter.name
        raise InvalidField(
            f"{name} has no earlier revision that is kept: `veneer adapter show {name}` lists "
            f"what there is; push the earlier one again, and keep more with `veneer adapter "
            f"retain {name} N`",
            metadata={"field": "name"},
        )
    return found
