"""The kernels for ARM, cross-compiled, in QEMU: the tests of the native kernels, over a library
whose functions run there. On a CPU with ARM's BF16 and on one with no more than ARMv8-A.

QEMU computes what the instructions are specified to compute; how fast they are it cannot tell,
nor does it reorder memory accesses as ARM does. For the order of those see ``make sanitize``:
ThreadSanitizer goes by C++'s rules, not by the CPU's.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from veneer_server.backends.native import compiler
from veneer_server.backends.native.chosen import find_library
from veneer_server.backends.native.compiler import NativeUnavailable, build, cpu_flags
from veneer_server.backends.native.draws import NativeDraws
from veneer_server.backends.native.forms import best_form
from veneer_server.backends.native.library import FOUR_BIT
from veneer_server.config import load_config
from veneer_server.operate.doctor import backends

from tests.arm import tools
from tests.arm.remote import RemoteLibrary
from tests.places import REPOSITORY
from tests.unit.server.engine import test_sampler
from tests.unit.server.native import test_int8, test_kernels, test_native, test_packing
from tests.unit.server.native.model_kit import Served, adapter_of, make_base, table_of

pytestmark = pytest.mark.verify

CPUS = {"neon-bf16": "max", "neon": "cortex-a72"}
"""A CPU for each form, as QEMU names it."""

SAME = (
    test_int8.test_a_product_is_that_of_the_rounded_inputs,
    test_int8.test_halves_are_rounded_to_even,
    test_int8.test_rows_threads_and_chunks_change_nothing,
    test_int8.test_what_is_no_number_stays_none_in_its_own_row,
    test_kernels.test_a_norm_divides_by_the_root_of_the_mean_square_and_epsilon,
    test_kernels.test_chunks_find_what_earlier_ones_wrote,
    test_kernels.test_clear_makes_blocks_finite_again,
    test_kernels.test_layers_have_weights_of_their_own,
    test_kernels.test_logits_are_of_the_rows_that_are_asked_for,
    test_kernels.test_neighbours_have_their_own_adapters,
    test_kernels.test_query_and_key_norms_have_epsilon_too,
    test_kernels.test_scores_far_from_zero_do_not_overflow,
    test_native.test_a_broken_adapter_harms_its_own_rows_alone,
    test_native.test_a_product_is_the_sum_in_float32,
    test_native.test_a_row_s_logits_do_not_depend_on_its_company,
    test_native.test_q_k_and_v_are_multiplied_as_one,
    test_native.test_what_is_no_number_in_a_query_stays_none,
    test_sampler.test_equal_tokens_are_kept_by_id_wherever_the_cut_falls,
    test_sampler.test_every_row_is_what_the_oracle_says,
    test_sampler.test_extreme_temperatures_are_finite,
    test_sampler.test_thousands_of_impossible_tokens_weigh_nothing,
)
"""Tests of the kernels that run here too, with this module's library. Pytest finds them here by
their names. Those that take long are left out, or run below with fewer arguments."""
globals().update({test.__name__: test for test in SAME})


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that calls a library's functions. Without compiler and emulator the test is
    skipped, except in CI."""
    if said := tools.missing():
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    made = tmp_path_factory.mktemp("driver") / "driver"
    done = subprocess.run(
        [tools.CXX, "-std=c++17", "-O1", "-o", made, tools.DRIVER],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return made


def with_cpu(patch: pytest.MonkeyPatch, driver: Path, cpu: str, folder: Path) -> None:
    """This machine as if it had a CPU: its /proc/cpuinfo is QEMU's, its compiler is for ARM.
    FAKE: the library is not tried out, which takes a Python for ARM."""
    said = subprocess.run(tools.command(cpu, driver), capture_output=True, check=True)
    (folder / "cpuinfo").write_bytes(said.stdout)
    patch.setattr(compiler, "CPUINFO", folder / "cpuinfo")
    patch.setattr(compiler, "try_out", lambda file, fix="": "")
    patch.setenv("CXX", str(tools.CXX))


@pytest.fixture(scope="module", params=sorted(CPUS))
def library(
    request: pytest.FixtureRequest, driver: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RemoteLibrary]:
    """Compiled as at a server's first start on that CPU."""
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        with_cpu(patch, driver, CPUS[request.param], folder)
        file = build(folder)
    made = RemoteLibrary(driver, file, CPUS[request.param])
    assert made.instructions == request.param
    yield made
    made.close()


@pytest.fixture
def draws(library: RemoteLibrary) -> NativeDraws:
    """For the tests of the sampler."""
    return NativeDraws(library)


@pytest.mark.parametrize("rows", [1, 3, 7, 97])
def test_any_number_of_rows(library: RemoteLibrary, rows: int) -> None:
    test_kernels.test_any_number_of_rows(library, rows)


@pytest.mark.parametrize("shape", ["heads of whole blocks", "heads of parts of a block"])
def test_a_step_rounds_what_its_weights_are_multiplied_by(
    library: RemoteLibrary, shape: str
) -> None:
    test_int8.test_a_step_rounds_what_its_weights_are_multiplied_by(library, shape, FOUR_BIT)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_no_number_is_told(library: RemoteLibrary, bad: float) -> None:
    test_kernels.test_a_row_that_is_no_number_is_told(library, 71, bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_bitsandbytes(
    library: RemoteLibrary, dtype: torch.dtype
) -> None:
    test_packing.test_codes_and_scales_are_those_of_bitsandbytes(
        library, "nf4", dtype, nested=False
    )


def test_the_gate_is_silu_times_up(library: RemoteLibrary) -> None:
    test_kernels.test_the_gate_is_silu_times_up(library, 192)


@pytest.mark.parametrize("name", ["k", "up"])
def test_a_bias_is_added_once(library: RemoteLibrary, name: str) -> None:
    test_kernels.test_a_bias_is_added_once(library, name)


@pytest.mark.parametrize("shape", ["a key each", "one key", "wide heads"])
@pytest.mark.parametrize("window", [None, 24])
def test_attention(library: RemoteLibrary, shape: str, window: int | None) -> None:
    test_kernels.test_attention(library, shape, window)


@pytest.mark.parametrize(
    ("name", "dtype"), [("q", torch.bfloat16), ("v", torch.float32), ("down", torch.bfloat16)]
)
def test_an_update_is_scaled_and_added(
    library: RemoteLibrary, name: str, dtype: torch.dtype
) -> None:
    test_kernels.test_an_update_is_scaled_and_added(library, name, dtype)


@pytest.mark.parametrize("name", sorted(CPUS))
def test_the_cpu_s_features_choose(
    name: str, driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cpu(monkeypatch, driver, CPUS[name], tmp_path)
    best = best_form(cpu_flags())
    assert best is not None
    assert best.name == name


@pytest.mark.parametrize(
    ("cpu", "asked", "said"),
    [
        ("cortex-a72", "neon-bf16", "this CPU supports at most neon"),
        ("max", "avx2", "this CPU supports at most neon-bf16"),
        (None, "neon", "this CPU supports at most "),
    ],
    ids=["without BF16", "of x86", "of ARM"],
)
def test_instructions_of_another_cpu_are_refused(
    cpu: str | None,
    asked: str,
    said: str,
    driver: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is compiled. None: this machine's own CPU."""
    if cpu is not None:
        with_cpu(monkeypatch, driver, cpu, tmp_path)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(NativeUnavailable) as refused:
        find_library(tmp_path / "cache", asked)
    assert str(refused.value).startswith(said)
    assert str(refused.value).endswith(f"not --native-instructions {asked}")


def test_the_doctor_says_what_this_cpu_has(tmp_path: Path) -> None:
    config = load_config(
        {"cache_dir": str(tmp_path), "device": "cpu", "native_instructions": "neon"}, {}
    )
    check = backends.native_check(config)
    assert check.status == "warning"
    assert check.found.endswith(", not --native-instructions neon")


def test_a_compiler_that_knows_no_bf16_compiles_the_other_form(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GCC 9. A FAKE one, which refuses the flag and compiles an empty library."""
    with_cpu(monkeypatch, driver, "max", tmp_path)
    fake = tmp_path / "c++"
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path / "calls"}\n'
        'case " $* " in *+bf16*) exit 1;; *" -### "*) exit 0;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n: > "$out"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    build(tmp_path / "cache")
    assert "-march=armv8-a" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_four_threads_change_nothing(library: RemoteLibrary) -> None:
    generator = test_kernels.seeded()
    base = make_base(generator)
    adapter = adapter_of(generator, base, dict.fromkeys(base.layers[0], 17))
    parts = [
        (test_kernels.some_tokens(generator, 20), 0, [1, 2], table_of(base, adapter)),
        (test_kernels.some_tokens(generator, 3), 0, [3], None),
    ]
    want = torch.cat(Served.over(library, base).step(parts))
    for _ in range(3):  # chunks fall to threads by chance
        got = torch.cat(Served.over(library, base, threads=4).step(parts))
        assert torch.equal(got, want)


def test_the_thread_pool_with_threads_that_are_preempted(driver: Path, tmp_path: Path) -> None:
    """Its program for the sanitizers (``tests/sanitize``), without them."""
    program = tmp_path / "thread_pool"
    source = REPOSITORY / "tests" / "sanitize" / "thread_pool.cpp"
    include = Path(compiler.__file__).with_name("cpp")
    flags = ["-std=c++17", "-O1", "-pthread", "-DVENEER_STALLS", f"-I{include}"]
    subprocess.run([tools.CXX, *flags, "-o", program, source], check=True)
    done = subprocess.run(
        tools.command("max", program, "5"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
