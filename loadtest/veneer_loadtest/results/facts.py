"""What all result files have in common."""

from __future__ import annotations

from typing import Final

FORMAT: Final = 1
"""Increased when an older reader would misunderstand a file."""
