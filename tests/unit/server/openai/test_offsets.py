"""Where each token's text begins, where characters are cut, broken or never complete."""

from __future__ import annotations

import random

import pytest
from veneer_server.openai.choices import Offsets

from tests.torture.doors.scripted import offsets


class Bytes:
    """A FAKE tokenizer: token ``i`` has the bytes ``parts[i]``."""

    strip_first_space = False

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    def token_bytes(self, token: int) -> bytes:
        return self._parts[token]

    def token_name(self, token: int) -> str:
        return f"<{token}>"


def found(parts: list[bytes]) -> list[int]:
    tokenizer: object = Bytes(parts)
    made = Offsets(tokenizer)  # type: ignore[arg-type]
    return [made.of(token) for token in range(len(parts))]


@pytest.mark.parametrize(
    ("parts", "begins"),
    [
        ([b"a", b"\xf0\x9f", b"\x98\x80", b"b"], [0, 1, 1, 2]),
        ([b"\xe2\x82", b"b", b"c"], [0, 1, 2]),
        # A surrogate: what follows b"\xed" cannot belong to it, though Python's incremental
        # decoder waits for a third byte.
        ([b"\xed", b"\xa0"], [0, 1]),
        ([b"\xed", b"\xa0", b"\xf0", b"b"], [0, 1, 2, 3]),
        ([b"\xe0\xed", b"\xc3\xa9\xef\xed", b"\xbf"], [0, 2, 5]),
    ],
)
def test_a_token_begins_where_its_first_byte_is(parts: list[bytes], begins: list[int]) -> None:
    assert found(parts) == begins


def test_whatever_the_bytes_are() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    bytes_ = [bytes([b]) for b in b"\x80\x98\x9f\xa0\xbf\xc3\xe0\xe2\xed\xef\xf0\xf4Ab\xbd"]
    pool = [*bytes_, "😀".encode(), "é".encode(), "€".encode()]
    for _ in range(5000):
        parts = [
            b"".join(draw.choices(pool, k=draw.choice((0, 1, 1, 1, 2, 3))))[
                draw.choice((0, 0, 1)) :
            ]
            for _ in range(draw.randint(2, 6))
        ]
        wanted = offsets(range(len(parts)), Bytes(parts), 0)  # type: ignore[arg-type]
        pairs = zip(found(parts), wanted, strict=True)
        assert all(want is None or got == want for got, want in pairs), (parts, wanted)
