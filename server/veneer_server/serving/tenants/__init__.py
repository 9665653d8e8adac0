"""Tenants: what each has to itself, and what it sees of the others."""

from __future__ import annotations

from typing import Final

__all__ = ["FOLDER"]

FOLDER: Final = "tenants"
"""In the data folder: a folder for each tenant but the default one."""
