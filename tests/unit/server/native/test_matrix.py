"""The kernels for matrix registers: their software model, AMX itself, and doing without."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from veneer_server.backends.native import compiler
from veneer_server.backends.native.compiler import NativeUnavailable, NotPermitted, build
from veneer_server.backends.native.forms import AMX, FLAGS, HEX, SOFTWARE_MATRIX
from veneer_server.backends.native.library import BFLOAT16, Library
from veneer_server.backends.native.linear import pack_dense

from tests.backends_ran import native_possible
from tests.kernels_once import kernels_built
from tests.places import REPOSITORY
from tests.unit.server.native.test_kept_library import broken
from tests.unit.server.native.test_native import KINDS

pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(not native_possible(), reason="no AVX2 or no compiler"),
]

HERE = Path(__file__).parent
SOURCES = Path(compiler.__file__).with_name("cpp")
AMX_HERE = ("-march=native", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
SMALLEST = np.float32(2.0**-126)
"""That is not denormal."""


@pytest.fixture(scope="module", params=[SOFTWARE_MATRIX.name])
def software(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parameter's name lets `tests.mutants` choose these tests."""
    return kernels_built(tmp_path_factory, SOFTWARE_MATRIX.name)


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For AMX, whatever this CPU has; otherwise with the CPU's own instructions."""
    return compile_kernels(tmp_path_factory.mktemp("amx"), AMX.name, *AMX_HERE)


def compile_kernels(
    folder: Path, name: str, *flags: str, source: Path = SOURCES / "library.cpp"
) -> Path:
    """Under a name under which the library is loaded."""
    draft = folder / "draft.so"
    compile_(*FLAGS, *flags, "-o", draft, source)
    draft.chmod(0o644)
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()[:HEX]
    return draft.rename(folder / f"{name}-{digest}.so")


def compile_(*arguments: object) -> None:
    subprocess.run(["c++", *map(str, arguments)], check=True)


# ------------------------------------------------------------------- the software model


def flushed(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Denormals become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def by_the_manual(
    sums: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32]
) -> NDArray[np.float32]:
    """TDPBF16PS as Intel's manual has it: sums [rows, outputs] + a [rows, 32] b [32, outputs].

    The first of each pair of inputs are summed apart from the second, from zero, by FMAs in
    float32; a product of two bfloat16 is exact in float64.
    """
    chains = []
    for start in (0, 1):
        chain = np.zeros_like(sums)
        for k in range(start, 32, 2):
            product = flushed(a[:, k : k + 1]).astype(np.float64) * flushed(b[k])
            chain = flushed((product + chain).astype(np.float32))
        chains.append(chain)
    return flushed(sums + flushed(chains[0] + chains[1]))


def test_the_software_model_sums_as_the_manual_says(software: Path) -> None:
    """Bit by bit, over numbers of all sizes: rounding, denormals, overflow. A sum of 53 bits of
    float64 and one rounding more differ from an FMA's in a case of 2^29, which none here is."""
    print("seed 7")
    rng = np.random.default_rng(7)
    rows, outputs = 13, 32

    def numbers(*shape: int) -> torch.Tensor:
        spread = 2.0 ** rng.integers(-70, 60, shape)
        return torch.from_numpy((rng.standard_normal(shape) * spread).astype(np.float32))

    weight, x = numbers(outputs, 64).bfloat16(), numbers(rows, 64).bfloat16()
    x[3], x[4, 5], x[5, 6] = 0, float("inf"), float("nan")
    # Denormal inputs, and sums that are denormal.
    x[8] = torch.from_numpy(rng.standard_normal(64) * 2.0**-130)
    x[9], weight[3] = (
        torch.from_numpy(rng.standard_normal(64) * 2.0**power) for power in (-63, -67)
    )
    library = Library(software)
    linear = pack_dense(library, BFLOAT16, weight)
    got = linear(x).numpy()
    with np.errstate(all="ignore"):
        want = np.zeros((rows, outputs), np.float32)
        for half in (slice(0, 32), slice(32, 64)):
            want = by_the_manual(
                want, x[:, half].float().numpy(), weight.float().numpy().T[half]
            )
        want = np.float32(0) + want  # the kernel's total
    ordinary = ~np.isnan(want)
    assert np.array_equal(np.isnan(got), ~ordinary)
    assert np.array_equal(got[ordinary].view(np.int32), want[ordinary].view(np.int32))
    assert ordinary.sum() > 300
    assert (np.abs(want[ordinary]) < 2.0**-100).any(), "small ones are among them"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_few_rows_on_vectors_have_the_registers_bits(software: Path, kind: str) -> None:
    """A few rows are multiplied by vectors, more by the registers, in one order of sums: with
    inputs of all sizes, so that rounding, denormals, overflow and NaN come out the same."""
    print("seed 9")
    rng = np.random.default_rng(9)
    torch.manual_seed(9)
    rows, inputs = 16, 192
    linear, *_ = KINDS[kind][0](Library(software), 80, inputs)
    spread = 2.0 ** rng.integers(-140, 100, (rows, inputs))
    x = torch.from_numpy((rng.standard_normal((rows, inputs)) * spread).astype(np.float32))
    x[5:12] = torch.from_numpy(rng.standard_normal((7, inputs)).astype(np.float32))
    x[12:] *= torch.from_numpy(2.0 ** rng.integers(-160, -100, (4, 1))).float()
    x[3, 7], x[4, 9] = float("inf"), float("nan")
    want = linear(x.bfloat16())
    assert want.isnan().any()
    assert not want.isnan().all()
    for count in (1, 2, 3, 4):
        for first in range(rows - count + 1):
            got = linear(x[first : first + count].bfloat16())
            one = want[first : first + count]
            assert torch.equal(got.isnan(), one.isnan())
            ordinary = ~one.isnan()
            assert torch.equal(got[ordinary].view(torch.int32), one[ordinary].view(torch.int32))


# --------------------------------------------------------------------------------- AMX


def test_amx_gives_the_same_bits_as_the_software_model(amx: Path, tmp_path: Path) -> None:
    """GEMMs of every kind of weights and whole steps, with one row and with many. By the CPU
    where it has AMX; else its instructions are decoded and executed by an EMULATOR. What is not
    done by AMX is compiled alike in both: vectors of another width sum in another order."""
    software = compile_kernels(
        tmp_path, SOFTWARE_MATRIX.name, "-march=native", "-DVENEER_SOFTWARE_MATRIX"
    )
    emulator = tmp_path / "emulator.so"
    source = HERE / "amx_emulator.cpp"
    compile_("-std=c++17", "-O2", "-mfma", "-fPIC", "-shared", "-o", emulator, source, "-ldl")
    module = "tests.unit.server.native.amx_against_software"
    done = subprocess.run(
        [sys.executable, "-m", module, amx, software],
        cwd=REPOSITORY,
        env={**os.environ, "LD_PRELOAD": str(emulator)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "numbers are the same" in done.stdout


def test_every_amx_instruction_is_in_the_library(amx: Path) -> None:
    """Else the comparison above compares nothing."""
    code = amx.read_bytes()
    for name, pattern in {
        "TDPBF16PS": b"\xc4\xe2\x4a\x5c",
        "TDPBSSD": b"\xc4\xe2\x5b\x5e",
        "LDTILECFG": b"\xc4\xe2\x78\x49",
        "TILELOADD": b"\xc4\xe2\x7b\x4b",
        "TILESTORED": b"\xc4\xe2\x7a\x4b",
    }.items():
        assert pattern in code, name


# ---------------------------------------------------------------------------- without


def test_where_the_system_refuses_the_registers_vectors_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old kernel, or a sandbox. A FAKE compiler makes a library that is refused them."""
    fake = tmp_path / "c++"
    fake.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -### "*|*NO_MATRIX*) exec c++ "$@";; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
        f'cp {broken(tmp_path, "", permit=0)} "$out"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    made = Library(build(tmp_path / "cache"))
    assert made.instructions in ("avx512-bf16", "avx2")
    # Asked for by name, there is nothing to fall back to.
    with pytest.raises(NotPermitted):
        build(tmp_path / "cache", AMX.name)


def test_a_process_that_is_refused_them_is_told_what_to_do(tmp_path: Path) -> None:
    """FAKE: the kernels ask a system that says no."""
    source = tmp_path / "refused.cpp"
    source.write_text(
        "#include <unistd.h>\n#define syscall(...) (-1)\n"
        f'#include "{SOURCES / "library.cpp"}"\n'
    )
    file = compile_kernels(tmp_path, AMX.name, *AMX_HERE, source=source)
    with pytest.raises(NativeUnavailable) as raised:
        Library(file)
    assert "--native-instructions avx512-bf16" in str(raised.value)
