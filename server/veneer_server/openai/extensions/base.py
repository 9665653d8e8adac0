"""The strict base of all records of fields, tolerant where nothing is lost."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Fields", "is_neutral"]


def is_neutral(value: object) -> bool:
    """Whether a member that nobody knows can be left out: null, or nothing at all. SDKs write
    these for what was never set."""
    return value is None or (isinstance(value, list | dict | str) and not value)


class Fields(BaseModel):
    """Drops null members, and unknown ones that are empty. Of the other unknown ones pydantic
    sees, and names, only the first."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _members(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = {each.alias or name for name, each in cls.model_fields.items()}
        kept = {
            name: value
            for name, value in given.items()
            if name in known and value is not None
        }
        # One unknown member is enough: pydantic makes an error for each, which is slow for many.
        for name, value in given.items():
            if name not in known and not is_neutral(value):
                return {**kept, name: value}
        return kept
