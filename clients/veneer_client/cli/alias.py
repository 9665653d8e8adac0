"""``veneer adapter alias|aliases|rollback``: choose which revision requests get."""

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
from veneer_client.cli.waiting import WaitReplicasOption, replicas_shown
from veneer_client.records import AdapterDetails, AdapterInfo, AliasMove
from veneer_client.replicas import WaitReplicas

__all__ = ["EXAMPLES", "LIST_EXAMPLES", "ROLLBACK_EXAMPLES", "alias", "aliases", "rollback"]

EXAMPLES = """
Examples:

  veneer adapter alias chat/prod 1a2b3c4d5e6f                 for all requests

  veneer adapter alias chat/prod --canary 1a2b3c4d5e6f=90 --canary 6f5e4d3c2b1a=10

  veneer adapter alias chat/prod --rollback                   to its previous revision

  veneer adapter alias chat/prod --remove

Requests use it like an adapter's name: veneer generate -a chat/prod "..."
"""

LIST_EXAMPLES = """
Examples:

  veneer adapter aliases

  veneer adapter aliases chat --json
"""

ROLLBACK_EXAMPLES = """
Examples:

  veneer adapter rollback chat                                to the previous revision

  veneer adapter rollback chat 1a2b3c4d5e6f                   to this revision

  veneer adapter rollback chat/prod                           an alias, as alias --rollback
"""

EtagOption = Annotated[
    str, typer.Option("--etag", help="Only if the etag still matches (see `aliases`).")
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
            help="4 or more digits of a kept revision.",
            show_default=False,
            autocompletion=kept_revisions,
        ),
    ] = "",
    canary: Annotated[
        list[str] | None,
        typer.Option(
            "--canary",
            metavar="REVISION=WEIGHT",
            help="A revision and its share of requests; repeatable.",
        ),
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Restore its previous targets.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    etag: EtagOption = "",
    wait_replicas: WaitReplicasOption = WaitReplicas.NONE,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Point an alias at one revision or several, roll it back or remove it."""
    with errors_shown(context, debug), connect(context, server) as client:
        targets = parse_shares(canary or ())
        if [bool(revision), bool(targets), rollback, remove].count(True) != 1:
            raise InvalidField(
                f"alias {name} needs one of REVISION, --canary REVISION=WEIGHT ..., "
                "--rollback and --remove",
                metadata={"field": "revision"},
            )
        move = client.set_alias(
            name,
            _digits(revision),
            targets={_digits(target): weight for target, weight in targets.items()},
            rollback=rollback,
            remove=remove,
            etag=etag,
            wait_replicas=wait_replicas,
        )
        print(as_json(move) if json_ else _moved(move))


def _digits(revision: str) -> str:
    """The revision of ``name@revision``, which is the form that `show` prints."""
    return revision.rpartition("@")[2]


def _moved(move: AliasMove) -> str:
    before = f" (before: {shares(move.previous)})" if move.previous else ""
    where = replicas_shown(move.replicas)
    if not move.alias.targets:
        return f"removed {move.alias.alias}{before}{where}"
    return f"{move.alias.alias} now points to {shares(move.alias.targets)}{before}{where}"


def aliases(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="Only aliases of this name.",
            show_default=False,
            autocompletion=adapter_names,
        ),
    ] = "",
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """List aliases and their targets."""
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
            help="A kept revision; default: the previous one.",
            show_default=False,
            autocompletion=kept_revisions,
        ),
    ] = "",
    wait_replicas: WaitReplicasOption = WaitReplicas.NONE,
    json_: JsonFlag = False,
    server: ServerOption = None,
    debug: DebugFlag = False,
) -> None:
    """Make an earlier revision the current one, or roll an alias back."""
    with errors_shown(context, debug), connect(context, server) as client:
        if "/" in name:
            if revision:
                raise InvalidField(
                    f"an alias rolls back only to its previous target; move it to another "
                    f"revision with `veneer adapter alias {name} {revision}`",
                    metadata={"field": "revision"},
                )
            move = client.set_alias(name, rollback=True, wait_replicas=wait_replicas)
            print(as_json(move) if json_ else _moved(move))
            return
        plain, _, pinned_down = name.partition("@")
        target, etag = _digits(revision) or pinned_down, ""
        if not target:
            details = client.get(plain)
            # The etag makes sure that this does not roll back a revision published since.
            target, etag = _before(details).revision, details.adapter.etag
        adapter = client.update_adapter(
            f"{plain}@{target}", current=True, etag=etag, wait_replicas=wait_replicas
        )
        print(as_json(adapter) if json_ else f"{plain} now points to {adapter.short}")


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
            f"no earlier revision of {name} is kept: `veneer adapter show {name}` lists its "
            "revisions; push the earlier one again, and keep more with `veneer adapter "
            f"retain {name} N`",
            metadata={"field": "name"},
        )
    return found
