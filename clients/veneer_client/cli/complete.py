"""Adapter names for the shell's completion; nothing, at once, when there is no server."""

from __future__ import annotations

import itertools
from typing import Final

import typer
from veneer_registry.adapter import SHORT_REVISION
from veneer_registry.errors import VeneerError

from veneer_client.calls import DEFAULT_ADDRESS
from veneer_client.client import Client
from veneer_client.failures import RetryPolicy

__all__ = ["adapter_names"]

PATIENCE_S: Final = 0.5
"""A shell waits for this at every press of Tab."""
_MOST: Final = 100


def adapter_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names that begin so; after an ``@`` the revisions of that name."""
    name, at, revision = incomplete.partition("@")
    try:
        with Client(
            _server(context), timeout_s=PATIENCE_S, retry=RetryPolicy(attempts=1)
        ) as client:
            if not at:
                found = client.list(name_prefix=name, page_size=_MOST)
                return [adapter.name for adapter in itertools.islice(found, _MOST)]
            revisions = (r.revision for r in client.get(name).revisions)
            return [
                f"{name}@{digits[: max(SHORT_REVISION, len(revision))]}"
                for digits in revisions
                if digits.startswith(revision)
            ]
    except VeneerError:
        return []


def _server(context: typer.Context) -> str:
    # The commands themselves do not run now: `--server` is only parsed, here or above.
    place: typer.Context | None = context
    while place is not None:
        if isinstance(server := place.params.get("server"), str):
            return server
        place = place.parent  # type: ignore[assignment]  # typer's are click's
    return DEFAULT_ADDRESS
