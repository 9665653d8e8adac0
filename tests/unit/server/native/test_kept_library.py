"""The cached compiled library: what is loaded, what never is, and what happens then.

The compiler is a FAKE in most tests: a script that copies a library made by the real one, and
records that it was called.
"""

from __future__ import annotations

import grp
import os
import pwd
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from veneer_server.backends.native import compiler, kept
from veneer_server.backends.native.compiler import NativeUnavailable, build
from veneer_server.backends.native.library import Library
from veneer_server.config import load_config
from veneer_server.operate.doctor import backends

from tests.kernels_once import kernels_built

ROOT = os.geteuid() == 0
SOMEBODY = 54321


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the real compiler makes."""
    try:
        return kernels_built(tmp_path_factory)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


@dataclass
class Bench:
    """A cache folder and a compiler.

    Attributes:
        cache: does not exist at first.
        library: what the compiler copies.
    """

    cache: Path
    library: Path
    compiler: Path

    @property
    def compiled(self) -> int:
        """How often the compiler has compiled."""
        calls = self.compiler.with_name("calls")
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def build(self) -> Path:
        return build(self.cache)

    def sound(self, file: Path) -> bool:
        return file.read_bytes() == self.library.read_bytes()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def copying(library: Path, calls: Path, identity: str = "/usr/lib/cc1plus-1") -> str:
    """The text of a compiler."""
    return f"""
case " $* " in
  *" -### "*) echo " {identity} -quiet" >&2; exit 0;;
  *" --version "*) echo "g++ 14"; exit 0;;
esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
echo >> {calls}
cp {library} "$out"
"""


@pytest.fixture
def bench(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    tools = tmp_path / "tools"
    fake = script(tools / "g++", copying(real, tools / "calls"))
    monkeypatch.setenv("CXX", str(fake))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return Bench(tmp_path / "cache", real, fake)


def test_it_is_compiled_once(bench: Bench) -> None:
    assert bench.sound(bench.build())
    assert bench.sound(bench.build())
    assert bench.compiled == 1


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").touch()


def make_link(file: Path) -> None:
    """A link to a sound library is refused too: what it points to may be anybody's."""
    moved = file.with_name("moved")
    file.rename(moved)
    file.symlink_to(moved)


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def for_a_group(file: Path) -> None:
    """Not for the user's own one, in which nobody else is."""
    if ROOT:
        os.chown(file, -1, SOMEBODY)
    file.chmod(0o664)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b"") and None,
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a folder": make_directory,
    "a link": make_link,
    "a pipe": make_pipe,
    "group may write": for_a_group,
    "all may write": lambda file: file.chmod(0o646),
    "another's": lambda file: os.chown(file, SOMEBODY, -1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_may_be_anybodys_is_compiled_again(
    bench: Bench, damage: str
) -> None:
    """At once, so that no start fails, and the next start finds the new one."""
    if damage in ("another's", "group may write") and not ROOT:
        pytest.skip("only root gives files away")
    DAMAGE[damage](bench.build())
    made = bench.build()
    assert bench.sound(made)
    status = made.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert (status.st_uid, status.st_mode & 0o022) == (os.geteuid(), 0)
    assert bench.compiled == 2
    assert bench.sound(bench.build())
    assert bench.compiled == 2
    assert Library(made).instructions


def test_a_user_private_group_may_write(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ubuntu's and Fedora's umask 002 has it; the account database is a FAKE."""
    file = bench.build()
    file.chmod(0o664)
    me, gid = os.geteuid(), file.stat().st_gid
    users = [pwd.struct_passwd(("jo", "x", me, gid, "", "/", "/"))]
    groups = {gid: grp.struct_group(("jo", "x", gid, []))}
    monkeypatch.setattr(pwd, "getpwuid", {me: users[0]}.__getitem__)
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    monkeypatch.setattr(grp, "getgrgid", groups.__getitem__)
    for _ in range(2):
        os.close(kept.open_checked(file))
        file.chmod(0o660)
    for name, members in (("jo", ["mo"]), ("staff", [])):
        groups[gid] = grp.struct_group((name, "x", gid, members))
        # `Refused` and `NativeUnavailable` have words for the operator only, here and below.
        with pytest.raises(kept.FileRefused, match="others can write"):
            kept.open_checked(file)
    groups[gid] = grp.struct_group(("jo", "x", gid, ["jo"]))
    os.close(kept.open_checked(file))
    users.append(pwd.struct_passwd(("mo", "x", me + 1, gid, "", "/", "/")))
    with pytest.raises(kept.FileRefused, match="others can write"):
        kept.open_checked(file)
    groups.clear()  # a container often has no name for a number
    with pytest.raises(kept.FileRefused, match="others can write"):
        kept.open_checked(file)


@pytest.mark.push
def test_one_flipped_bit_anywhere_is_seen(bench: Bench) -> None:
    print("seed 19")
    chance = random.Random(19)
    file = bench.build()
    data = bytearray(file.read_bytes())
    for compiled in range(2, 12):
        at = chance.randrange(len(data))
        flipped = bytes((*data[:at], data[at] ^ 1 << chance.randrange(8), *data[at + 1 :]))
        file.write_bytes(flipped)
        assert bench.sound(bench.build()), at
        assert bench.compiled == compiled


def test_it_is_private_whatever_the_umask(bench: Bench) -> None:
    before = os.umask(0)
    try:
        made = bench.build()
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o022 == 0
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(bench.cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_nothing_is_loaded_from_a_folder_that_others_write_to(bench: Bench, mode: int) -> None:
    """It is ours, so it is closed, and what was in it is compiled again."""
    folder = bench.build().parent
    if ROOT:
        os.chown(folder, -1, SOMEBODY)
    folder.chmod(mode)
    made = bench.build()
    assert bench.compiled == 2
    assert stat.S_IMODE(made.parent.stat().st_mode) & 0o022 == 0
    bench.build()
    assert bench.compiled == 2


def test_nothing_is_loaded_from_a_folder_of_somebody_else(bench: Bench) -> None:
    if not ROOT:
        pytest.skip("only root gives folders away")
    theirs = bench.build()
    os.chown(theirs.parent, SOMEBODY, -1)
    made = bench.build()
    assert made.parent != theirs.parent
    assert bench.compiled == 2
    assert theirs.exists()  # what is another's is left alone
    assert bench.build() == made
    assert bench.compiled == 2


def test_a_cache_that_cannot_be_written(bench: Bench) -> None:
    """It is a file here, which stops root too. The next start finds what this one made."""
    bench.cache.touch()
    made = bench.build()
    assert made.is_relative_to(tempfile.gettempdir())
    assert stat.S_IMODE(made.parents[1].stat().st_mode) == 0o700
    assert bench.build() == made
    assert bench.compiled == 1


def test_a_library_in_a_folder_that_cannot_be_written_is_used(bench: Bench) -> None:
    made = bench.build()
    made.parent.chmod(0o500)
    assert bench.build() == made
    assert bench.compiled == 1
    made.parent.chmod(0o700)


def test_without_any_place_the_reason_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.cache.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(bench.cache))
    with pytest.raises(NativeUnavailable, match="no folder to compile"):
        bench.build()


# --------------------------------------------------------------------- a trial of it


def broken(tmp_path: Path, multiply: str, permit: int = 1) -> Path:
    """A library with the right functions, of which one does this.

    Args:
        permit: what it says of the operating system's permission.
    """
    source = tmp_path / "broken.c"
    source.write_text(
        'struct { const char *of, *name; long offset, size; } t = {"Linear", "", 0, 88};\n'
        "void* veneer_fields(void) { return &t; }\n"
        'const char* veneer_instructions(void) { return "none"; }\n'
        "long veneer_packed_bytes(int k, int o, int i) { return 4 * o * i; }\n"
        "void veneer_pack_four_bit(void) {}\nvoid veneer_pack_bf16(void) {}\n"
        "void veneer_pack_eight_bit(void) {}\n"
        f"int veneer_permit(void) {{ return {permit}; }}\n"
        f"void veneer_multiply(void) {{ {multiply} }}\n"
    )
    compiler_ = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler_ is None:
        pytest.skip("no C compiler")
    out = tmp_path / "broken.so"
    subprocess.run([compiler_, "-w", "-shared", "-fPIC", "-o", out, source], check=True)
    return out


@pytest.mark.parametrize(
    ("multiply", "said"),
    [
        ('__asm__("ud2");', "SIGILL"),
        ("*(volatile int*)0 = 1;", "SIGSEGV"),
        ("", "has a wrong result"),
    ],
)
def test_a_library_that_does_not_run_here_ends_a_process_of_its_own(
    bench: Bench, tmp_path: Path, multiply: str, said: str
) -> None:
    """As on a CPU that does not run what its flags promise. The doctor tells it too."""
    calls = bench.compiler.with_name("calls")
    script(bench.compiler, copying(broken(tmp_path, multiply), calls))
    for _ in range(2):
        with pytest.raises(NativeUnavailable, match=said):
            bench.build()
    assert bench.compiled == 1  # compiling the same again would not help
    config = load_config({"cache_dir": str(bench.cache), "device": "cpu"}, {})
    check = backends.native_check(config)
    assert check.status == "warning"
    assert said in check.found


def test_the_doctor_says_that_it_runs(bench: Bench) -> None:
    config = load_config({"cache_dir": str(bench.cache), "device": "cpu"}, {})
    check = backends.native_check(config)
    assert check.status == "ok"
    assert Library(bench.build()).instructions in check.found


def test_the_doctor_says_that_the_cpu_lacks_what_is_wanted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FAKE CPU, on which the kernels have AVX2: a server would refuse to start with them."""
    monkeypatch.setattr(backends, "try_out", lambda file: "avx2")
    given = {
        "cache_dir": str(bench.cache),
        "device": "cpu",
        "native_instructions": "avx512-bf16",
    }
    check = backends.native_check(load_config(given, {}))
    assert check.status == "warning"
    assert "supports at most avx2" in check.found


# -------------------------------------------------------------------- the compiler


def test_a_compiler_that_hangs_is_ended_with_its_children(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 1.0)
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    # As g++ waits for cc1plus. Who reads the pipe sees its end when both are gone.
    script(
        bench.compiler,
        f'case " $* " in *" -### "*) exit 0;; esac\n(exec sleep 3600) > {alive}',
    )
    reading = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(NativeUnavailable, match="within 1 s"):
        bench.build()
    os.set_blocking(reading, True)
    assert os.read(reading, 1) == b""
    os.close(reading)


@pytest.mark.parametrize("how", ["as a word before it", "by its name"])
def test_another_compiler_behind_a_wrapper_is_another_compiler(
    bench: Bench, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A FAKE ccache, which answers for itself when it is asked for its version."""
    tools, calls = bench.compiler.parent, bench.compiler.with_name("calls")
    wrapper = '[ "$1" = --version ] && echo "ccache version 4" && exit 0\n'
    if how == "by its name":
        script(tmp_path / "masked" / "c++", wrapper + f'exec {bench.compiler} "$@"')
        monkeypatch.setenv("PATH", f"{tmp_path / 'masked'}:{os.environ['PATH']}")
        monkeypatch.delenv("CXX")
    else:
        script(tools / "ccache", wrapper + 'exec "$@"')
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        monkeypatch.setenv("CXX", "ccache g++")
    bench.build()
    bench.build()
    assert bench.compiled == 1
    script(bench.compiler, copying(real, calls, identity="/usr/lib/cc1plus-2"))
    bench.build()
    assert bench.compiled == 2


def test_the_compiler_proper_counts_by_its_file(
    bench: Bench, real: Path, tmp_path: Path
) -> None:
    """A distribution's patch need not change a version."""
    proper, calls = tmp_path / "cc1plus", bench.compiler.with_name("calls")
    proper.write_bytes(b"one")
    script(bench.compiler, copying(real, calls, identity=str(proper)))
    bench.build()
    proper.write_bytes(b"other")
    bench.build()
    assert bench.compiled == 2


def test_nothing_in_the_current_folder_takes_part(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a compiler there, which an empty entry of PATH means, nor headers, which an
    empty entry of CPATH means."""
    here = tmp_path / "here"
    script(here / "c++", f"touch {tmp_path / 'ran'}; exit 1")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f":{bench.compiler.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CPATH", ":/nowhere")
    monkeypatch.delenv("CXX")
    script(bench.compiler, f"pwd >> {tmp_path / 'where'}\n" + bench.compiler.read_text())
    shutil.copy(bench.compiler, bench.compiler.with_name("c++"))
    assert bench.sound(bench.build())
    assert not (tmp_path / "ran").exists()
    assert str(here) not in (tmp_path / "where").read_text()


def test_what_a_killed_compilation_left_goes(bench: Bench) -> None:
    folder = bench.build().parent
    left = folder / "veneer-build-1234"
    left.mkdir()
    os.utime(left, (0, 0))
    for file in folder.glob("*.so"):
        file.unlink()
    bench.build()
    assert not left.exists()


def test_a_relative_cache_folder_works(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler runs in another folder, and must find its output's."""
    monkeypatch.chdir(tmp_path)
    assert build(Path("cache")) == bench.build()
    assert bench.compiled == 1
    assert bench.cache == tmp_path / "cache"
