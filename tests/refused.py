"""Expect one of our errors by its stable parts: class, `reason` and metadata.

Its message is for people, and can be improved without changing tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
from veneer_registry.errors import VeneerError

_Error = TypeVar("_Error", bound=VeneerError)


@contextmanager
def refused(
    error: type[_Error], /, **metadata: object
) -> Iterator[pytest.ExceptionInfo[_Error]]:
    """Expect exactly this class, not a subclass, with at least this metadata. Values are
    compared as text, as on the wire."""
    with pytest.raises(error) as caught:
        yield caught
    found = caught.value
    assert type(found) is error, f"{type(found).__name__}: {found}"
    assert found.reason == error.reason
    wanted = {key: str(value) for key, value in metadata.items()}
    assert {key: found.metadata.get(key) for key in wanted} == wanted, (
        f"{found} {found.metadata}"
    )
