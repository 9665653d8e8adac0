"""Loads a compiled library and runs small GEMMs: ``python -I -S trial.py DESCRIPTOR``.

It runs in a separate process, since a broken library may end the process: by an instruction
that this CPU does not run although its flags say so, or because the file is damaged. It imports
only the standard library and nothing of the package: it runs at every start, and more imports
would take longer than the trial. It prints the instruction set, and exits with a message if a
result is wrong.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_float, c_int8, c_int32, c_int64, c_uint8, c_uint16, c_void_p
from operator import mul
from typing import Any, ClassVar, Final

FOUR_BIT, BFLOAT16, EIGHT_BIT = range(3)
OUTPUTS: Final = 64
INPUTS: Final = 128
ROWS: Final = 5
NOT_PERMITTED: Final = 3
"""Exit status if the operating system denies the matrix registers; see `compiler`."""
_LINE: Final = 64
"""Bytes of a cache line, to which weights are aligned."""


class TrialLinear(ctypes.Structure):
    """A copy of ``Linear`` in `veneer_server.backends.native.structs`."""

    _fields_: ClassVar[Any] = [
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("kind", c_int32),
        ("parts", c_int32),
        ("int8_inputs", c_int32),
        ("unit", c_float),
        ("table", c_uint16 * 16),
        ("bytes", c_int8 * 16),
    ]


class TrialField(ctypes.Structure):
    """A copy of ``Field`` in `veneer_server.backends.native.structs`. The first row describes
    ``Linear``."""

    _fields_: ClassVar[Any] = [
        ("struct", c_char_p),
        ("name", c_char_p),
        ("offset", c_int64),
        ("size", c_int64),
    ]


def bf16(number: float) -> int:
    """Return the upper half of a float, which is exact for this trial's small integers."""
    return int(ctypes.c_uint32.from_buffer_copy(c_float(number)).value) >> 16


def weight(kind: int, output: int, place: int) -> int:
    """Return a weight of the trial. Weights are integers from -7 to 8, so that sums are exact
    in any order. Each 8-bit block also has one 127, so that its scale, a 127th of the largest
    weight, is 1."""
    if kind == EIGHT_BIT and place % 64 == 0:
        return 127
    return (5 * output + 3 * place) % 16 - 7


def main(descriptor: int) -> None:
    """Run the trial; see the module's docstring."""
    library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    library.veneer_fields.restype = ctypes.POINTER(TrialField)
    first = library.veneer_fields()[0]
    if (first.struct, first.size) != (b"Linear", ctypes.sizeof(TrialLinear)):
        raise SystemExit("the library expects a different struct Linear")
    if not library.veneer_permit():
        raise SystemExit(NOT_PERMITTED)
    inputs = [[(7 * row + place) % 9 - 4 for place in range(INPUTS)] for row in range(ROWS)]
    x = (c_uint16 * (ROWS * INPUTS))(*(bf16(each) for row in inputs for each in row))
    for kind in (FOUR_BIT, BFLOAT16, EIGHT_BIT):
        numbers = [[weight(kind, o, place) for place in range(INPUTS)] for o in range(OUTPUTS)]
        wanted = [sum(map(mul, row, column)) for row in inputs for column in numbers]
        if product(library, kind, numbers, x) != wanted:
            raise SystemExit(f"a GEMM of kind {kind} has a wrong result")
    int8_trial(library)
    library.veneer_instructions.restype = ctypes.c_char_p
    print(library.veneer_instructions().decode())


def int8_trial(library: Any) -> None:
    """Try GEMMs with 8-bit inputs: integers, and 127 as the largest of each 64, so that none is
    rounded."""
    inputs = [
        [127 if place % 64 == 0 else (7 * row + place) % 9 - 4 for place in range(INPUTS)]
        for row in range(ROWS)
    ]
    x = (c_uint16 * (ROWS * INPUTS))(*(bf16(each) for row in inputs for each in row))
    for kind in (FOUR_BIT, EIGHT_BIT):
        numbers = [[weight(kind, o, place) for place in range(INPUTS)] for o in range(OUTPUTS)]
        largest = 127 if kind == FOUR_BIT else 8
        weights = [[largest if n == 8 else n for n in row] for row in numbers]
        wanted = [sum(map(mul, row, column)) for row in inputs for column in weights]
        for rows in (2, ROWS):  # few and many rows may use different instructions
            got = product(library, kind, numbers, x, rows, int8=True)
            if got != wanted[: rows * OUTPUTS]:
                raise SystemExit(f"a GEMM of kind {kind} and 8-bit inputs has a wrong result")


def product(
    library: Any,
    kind: int,
    numbers: list[list[int]],
    x: Any,
    rows: int = ROWS,
    *,
    int8: bool = False,
) -> list[float]:
    """Multiply the first rows of x by the numbers, packed as ``kind``. With inputs of 8 bits,
    the code book has 127 in place of 8."""
    library.veneer_packed_bytes.restype = c_int64
    size = library.veneer_packed_bytes(kind, OUTPUTS, INPUTS)
    memory = (c_uint8 * (size + _LINE))()
    begin = -ctypes.addressof(memory) % _LINE
    packed = c_void_p(ctypes.addressof(memory) + begin)
    shape = c_int32(OUTPUTS), c_int32(INPUTS)
    linear = TrialLinear(
        weights=packed.value, outputs=OUTPUTS, inputs=INPUTS, kind=kind, parts=1
    )
    linear.int8_inputs, linear.unit = int(int8), 1.0
    if kind == FOUR_BIT:
        # The earlier of two neighbours is in the high half. Code n is (n - 7) / 2, scaled by 2.
        codes = (c_uint8 * (OUTPUTS * INPUTS // 2))(
            *((n[i] + 7) << 4 | n[i + 1] + 7 for n in numbers for i in range(0, INPUTS, 2))
        )
        scales = (c_float * (OUTPUTS * INPUTS // 64))(*[2.0] * (OUTPUTS * INPUTS // 64))
        linear.table[:] = [bf16((code - 7) / 2) for code in range(16)]
        linear.bytes[:] = [*range(-7, 8), 127]
        if int8:
            scales[:] = [1.0] * len(scales)
        library.veneer_pack_four_bit(codes, scales, *shape, packed, c_int32(1))
    else:
        weights = (c_uint16 * (OUTPUTS * INPUTS))(*(bf16(n) for row in numbers for n in row))
        pack = library.veneer_pack_bf16 if kind == BFLOAT16 else library.veneer_pack_eight_bit
        pack(weights, *shape, packed, c_int32(1))
    y = (c_float * (rows * OUTPUTS))()
    library.veneer_multiply(ctypes.byref(linear), x, c_int64(rows), y)
    return list(y)


if __name__ == "__main__":
    main(int(sys.argv[1]))
