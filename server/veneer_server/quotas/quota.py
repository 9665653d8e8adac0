"""The limits of a key, certificate, token or tenant, as the keys file has them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from veneer_server.config.kinds import BYTES

MAX_LIMIT: Final = 10**15
"""Largest value of a limit: sums of a few are exact as floating-point numbers."""

NONE: Final = "none"
"""The value that lifts a default."""


class QuotaInvalid(ValueError):
    """A limit is not valid; the text completes a sentence that begins with its name.

    Attributes:
        name: name of the limit; empty if the whole table is wrong.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of an account; None for a limit that is not set.

    Attributes:
        requests_per_minute: generate requests.
        tokens_per_minute: tokens of prompts and answers.
        running_requests: samples of requests that run or wait at the same time.
        waiting_requests: samples of requests that wait for their first token.
        adapters: adapter names that the tenant stores.
        adapter_bytes: bytes of all revisions that the tenant stores.
        upload_bytes_per_day: bytes sent in a calendar day (UTC).
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    running_requests: int | None = None
    waiting_requests: int | None = None
    adapters: int | None = None
    adapter_bytes: int | None = None
    upload_bytes_per_day: int | None = None

    @property
    def given(self) -> dict[str, int]:
        """The limits that are set, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}


UNLIMITED: Final = Quota()

_NAMES: Final = tuple(field.name for field in fields(Quota))


@dataclass(frozen=True, slots=True)
class Account:
    """A caller or tenant with limits.

    Attributes:
        id: ``key:ID``, ``certificate:NAME``, ``token:TENANT/SUBJECT`` or ``tenant:NAME``.
            Usage is counted under it.
    """

    id: str
    quota: Quota


def parse_quota(given: object, defaults: Quota = UNLIMITED) -> Quota:
    """Parse the limits of a table.

    Args:
        defaults: limits for names that are not given.

    Raises:
        QuotaInvalid: a name is unknown, or a value is not allowed.
    """
    if not isinstance(given, Mapping):
        raise QuotaInvalid("", f"must be a table, such as {{{_NAMES[0]} = 60}}")
    values: dict[str, int | None] = {}
    for name, value in given.items():
        if name not in _NAMES:
            near = difflib.get_close_matches(str(name).replace("-", "_"), _NAMES, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(_NAMES)}"
            raise QuotaInvalid(str(name), f"is unknown: {hint}")
        values[name] = _parse(name, value)
    return Quota(**{name: getattr(defaults, name) for name in _NAMES} | values)


def _parse(name: str, value: Any) -> int | None:
    if value == NONE:
        return None
    if "bytes" in name and isinstance(value, str):
        try:
            value = BYTES.parse(value)
        except ValueError as error:
            raise QuotaInvalid(name, f"is not allowed: {error}") from error
    if type(value) is not int or not 1 <= value <= MAX_LIMIT:
        raise QuotaInvalid(
            name,
            f'must be a whole number from 1 to 10^15, or "{NONE}" for no limit; to allow '
            "nothing, revoke the key or take away its roles",
        )
    return value
