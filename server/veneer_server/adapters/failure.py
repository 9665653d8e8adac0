"""An error that a child process reports, as a record on the wire."""

from __future__ import annotations

import msgspec
from veneer_registry.errors import VeneerError, error_for_reason


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A `VeneerError` as a record."""

    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None
    detail: str

    @classmethod
    def of(cls, error: VeneerError) -> Failure:
        """Make the record of an error."""
        given = (error.reason, error.message, error.metadata)
        return cls(*given, error.retry_after_s, error.detail)

    @property
    def error(self) -> VeneerError:
        """The recorded error."""
        return error_for_reason(self.reason)(
            self.message,
            metadata=self.metadata,
            retry_after_s=self.retry_after_s,
            detail=self.detail,
        )
