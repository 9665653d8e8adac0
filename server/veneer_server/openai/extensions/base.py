"""The strict base of all records of fields, tolerant where nothing is lost."""

from __future__ import annotations

from functools import cache

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Fields", "is_neutral"]


def is_neutral(value: object) -> bool:
    """Whether a member that nobody knows can be left out: null, or nothing at all. SDKs write
    these for what was never set."""
    return value is None or (isinstance(value, list | dict | str) and not value)


@cache
def _members_of(kind: type[BaseModel]) -> frozenset[str]:
    return frozenset(each.alias or name for name, each in kind.model_fields.items())


class Fields(BaseModel):
    """Drops null members, and unknown ones that are empty. Of the other unknown ones pydantic
    sees, and names, only the first."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _members(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = _members_of(cls)
        kept = {
            name: value for name, value in given.items() if name in known and value is not None
        }
        # Only one: pydantic makes an error for each, which is slow for many.
        for name, value in given.items():
            if name not in known and not is_neutral(value):
                return {**kept, name: value}
        return kept
