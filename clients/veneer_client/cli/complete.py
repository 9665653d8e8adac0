"""Adapter names for shell completion; returns none at once if there is no server."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Final

import typer
from veneer_registry.adapter import SHORT_REVISION
from veneer_registry.errors import AdapterNotFound, VeneerError

from veneer_client.address import DEFAULT_ADDRESS
from veneer_client.cli.values import MODES
from veneer_client.client import Client
from veneer_client.failures import RetryPolicy

__all__ = ["adapter_names", "kept_revisions", "modes"]

PATIENCE_S: Final = 0.5
"""Short, since the shell blocks at every press of Tab."""
_MOST: Final = 100


def adapter_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names with this prefix; after an ``@`` the name's revisions, after a ``/`` also its
    aliases."""
    name, at, revision = incomplete.partition("@")
    try:
        with _client(context) as client:
            if at:
                return [f"{name}@{digits}" for digits in _revisions(client, name, revision)]
            listed = client.list(name_prefix=name, page_size=_MOST)
            names = [adapter.name for adapter in itertools.islice(listed, _MOST)]
            if "/" in name:
                with suppress(AdapterNotFound):  # the part before / is a tenant
                    found = client.list_aliases(name.rpartition("/")[0])
                    names += [one.alias for one in found if one.alias.startswith(name)]
            return names
    except VeneerError:
        return []


def kept_revisions(context: typer.Context, incomplete: str) -> list[str]:
    """Revisions with this prefix, of the name in the previous argument."""
    name = str(context.params.get("name") or "").partition("/")[0]
    try:
        with _client(context) as client:
            return _revisions(client, name, incomplete) if name else []
    except VeneerError:
        return []


def modes(incomplete: str) -> list[str]:
    """Eviction modes with this prefix."""
    return [mode for mode in MODES if mode.startswith(incomplete)]


def _client(context: typer.Context) -> Client:
    return Client(_server(context), timeout_s=PATIENCE_S, retry=RetryPolicy(attempts=1))


def _revisions(client: Client, name: str, begin: str) -> list[str]:
    revisions = (r.revision for r in client.get(name).revisions)
    return [
        digits[: max(SHORT_REVISION, len(begin))]
        for digits in revisions
        if digits.startswith(begin)
    ]


def _server(context: typer.Context) -> str:
    # No command has run: `--server` is only parsed, in this context or a parent.
    place: typer.Context | None = context
    while place is not None:
        if isinstance(server := place.params.get("server"), str):
            return server
        place = place.parent  # type: ignore[assignment]  # typer's are click's
    return DEFAULT_ADDRESS
