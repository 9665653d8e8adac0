"""Limits the digits of JSON numbers, for schemas that do not limit them.

A schema says that a number ends somewhere, not where: a small model writes 0.8499999999...
until its tokens are used up, and the answer is not JSON. So after a number of digits in a row,
tokens that begin with a digit are removed from the mask, unless the schema allows no others.
The output stays valid by the schema, and a schema that needs longer numbers still gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

EXPONENT: Final = 3
"""Maximum digits of an exponent: no floating-point number has more."""

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_DIGITS: Final = frozenset(b"0123456789")
_IN_EXPONENT: Final = frozenset(b"+-")


class Digits:
    """Follows one output, a JSON text.

    Args:
        most: maximum digits in a row, before the decimal point and after it.
        bytes_of: returns the bytes of a token.
    """

    def __init__(self, most: int, bytes_of: Callable[[int], bytes]) -> None:
        self._most = most
        self._bytes_of = bytes_of
        self._in_text = False
        self._escaped = False
        self._run = 0
        self._exponent = False

    def take(self, tokens: Sequence[int]) -> None:
        """Follow more tokens of the output."""
        for token in tokens:
            for byte in self._bytes_of(token):
                self._byte(byte)

    def bounded(self, bits: bytes) -> bytes:
        """Remove tokens that would make a number too long from a mask (little-endian bits).

        Cheap: it looks at single tokens only while a number is long, when few are allowed.
        """
        if self._in_text or self._run < (EXPONENT if self._exponent else self._most):
            return bits
        left = bytearray(bits)
        for at, byte in enumerate(bits):
            for bit in range(8) if byte else ():
                if byte >> bit & 1 and self._bytes_of(8 * at + bit)[:1].isdigit():
                    left[at] &= ~(1 << bit)
        return bytes(left) if any(left) else bits

    def _byte(self, byte: int) -> None:
        if self._in_text:
            if self._escaped:
                self._escaped = False
            elif byte == _BACKSLASH:
                self._escaped = True
            elif byte == _QUOTE:
                self._in_text = False
        elif byte in _DIGITS:
            self._run += 1
        elif self._exponent and not self._run and byte in _IN_EXPONENT:
            pass  # the exponent's sign
        else:
            self._exponent = bool(self._run) and byte in b"eE"
            self._run = 0
            self._in_text = byte == _QUOTE
