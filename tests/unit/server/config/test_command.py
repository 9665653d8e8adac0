"""The command line: quick, one line per error, no heavy imports before they are needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from veneer_registry.lock import OwnerLock
from veneer_registry.registry import Registry
from veneer_server import __version__
from veneer_server.__main__ import cli

from tests.places import REPOSITORY
from tests.unit.registry.kit import BASE, make_adapter, push


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "veneer_server", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_shows_examples_and_every_flag() -> None:
    top, serve = command("--help").stdout, command("serve", "--help").stdout
    assert "Examples" in top
    assert "doctor" in top
    assert "--kv-cache-bytes" in serve
    assert "--no-prefix-cache" in serve
    assert "--no-exact" not in serve
    assert "VENEER_MAX_QUEUE" in serve.replace("\n", "")


def test_version() -> None:
    assert command("--version").stdout == f"veneer {__version__}\n"


@pytest.mark.parametrize("words", [(), ("serve",)])
def test_an_error_is_one_line_with_the_fix(words: tuple[str, ...]) -> None:
    done = command(*words, "--listen", "0.0.0.0:1")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("veneer-server: --listen 0.0.0.0:1")
    assert "--insecure" in line
    assert "Traceback" in command(*words, "--debug", "--listen", "0.0.0.0:1").stderr


def test_a_second_server_names_the_first(tmp_path: Path) -> None:
    with OwnerLock(tmp_path / "data"):
        done = command("--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "c"))
    assert done.returncode == 1
    assert "in use by a running server" in done.stderr


def test_a_data_folder_that_links_to_itself_is_told(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    done = command("--data-dir", str(loop), "--cache-dir", str(tmp_path / "c"))
    assert done.returncode == 1
    assert "give another with --data-dir" in done.stderr


def test_a_base_that_is_no_folder(tmp_path: Path) -> None:
    done = command(
        *("--base", str(tmp_path / "none"), "--data-dir", str(tmp_path / "d")),
        *("--cache-dir", str(tmp_path / "c")),
    )
    assert done.returncode == 1
    assert "there is no folder" in done.stderr


def test_model_path_prints_the_folder(base_folder: Path, tmp_path: Path) -> None:
    done = command("model", "path", str(base_folder), "--cache-dir", str(tmp_path))
    assert done.stdout == f"{base_folder.resolve()}\n"


def test_the_front_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, veneer_server.app; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_memory_that_cannot_fit_is_refused_before_anything_is_loaded(
    base_folder: Path, tmp_path: Path
) -> None:
    done = command(
        *("--base", str(base_folder), "--data-dir", str(tmp_path / "d")),
        *("--cache-dir", str(tmp_path / "c"), "--host-cache-bytes", "900TiB"),
        *("--device", "cpu", "--listen", "127.0.0.1:0", "--metrics-listen", ""),
    )
    assert done.returncode == 1
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("veneer-server:")]
    assert "lower --host-cache-bytes" in line
    assert "engine" not in done.stderr


@pytest.mark.push
def test_store_recover_says_what_it_did(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Registry.open(data, BASE) as registry:
        revision = push(registry, "chat", make_adapter(tmp_path / "a")).record.ref.revision
    whole = command("store", "recover", "--data-dir", str(data))
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.startswith("nothing to recover")
    (data / "catalog.sqlite").write_bytes(b"not a catalog")
    done = command("store", "recover", "--data-dir", str(data))
    assert done.returncode == 0
    assert f"chat now points to {revision[:12]}" in done.stdout
    assert "the old catalog is kept" in done.stdout
    assert "are lost" in done.stdout
    with Registry.open(data, BASE) as registry:
        assert registry.resolve("chat").revision == revision
    nothing = command("store", "recover", "--data-dir", str(tmp_path / "none"))
    assert nothing.returncode == 1
    assert "--data-dir" in nothing.stderr


def test_allow_base_name_may_be_given_twice(tmp_path: Path) -> None:
    done = command(
        *("--allow-base-name", "a/b", "--allow-base-name", "c"),
        *("--base", str(tmp_path / "none"), "--data-dir", str(tmp_path / "d")),
        *("--cache-dir", str(tmp_path / "c")),
    )
    assert "there is no folder" in done.stderr


PROGRAMS = ("veneer", "veneer-server", "veneer-train", "veneer-loadtest")


@pytest.mark.push
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_the_usual_flags(program: str) -> None:
    def run(flag: str) -> subprocess.CompletedProcess[str]:
        path = Path(sys.executable).with_name(program)
        return subprocess.run(
            [path, flag], capture_output=True, text=True, check=False, timeout=120
        )

    assert run("--version").stdout == f"veneer {__version__}\n"
    short, long = run("-h"), run("--help")
    assert (short.returncode, short.stdout) == (0, long.stdout)
    assert "Usage" in short.stdout


def test_words_of_other_servers() -> None:
    """An address that is refused shows what was understood."""
    done = command("--model", "x", "--host", "0.0.0.0", "--port", "8000")
    assert done.stderr.startswith("veneer-server: --listen 0.0.0.0:8000")
    done = command("--host", "::")
    assert done.stderr.startswith("veneer-server: --listen [::]:50051")
    both = command("--host", "0.0.0.0", "--listen", "127.0.0.1:0")
    assert both.returncode == 1
    assert "give it, or --host and --port" in both.stderr


def test_a_gguf_file_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path) -> None:
    more = (
        *("--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "c")),
        *("--listen", "127.0.0.1:0", "--metrics-listen", ""),
    )
    file = tmp_path / "my model.gguf"
    done = command("--model", str(file), *more)
    assert done.returncode == 1
    assert f"there is no file {str(file)!r}" in done.stderr
    file.write_bytes(b"GGUF" + bytes(100))
    done = command("--model", str(file), *more)
    assert done.returncode == 1
    assert "my model.gguf is GGUF version 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "extra", "package"),
    [
        ("veneer_server", "server", "uvloop"),
        ("veneer_train", "train", "yaml"),
        ("veneer_loadtest", "loadtest", "psutil"),
    ],
)
def test_a_missing_extra_is_named(
    module: str, extra: str, package: str, tmp_path: Path
) -> None:
    """As after an installation of the client alone, as far as one package goes."""
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['x', *sys.argv[1:]];"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    words = ["--data-dir", str(tmp_path)] if module == "veneer_server" else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    # The suite's installation is an editable one: the command names its folder.
    hint = f"the package {package} is not installed: pip install -e '{REPOSITORY}[{extra}]'"
    assert line.endswith(f": {hint}")


def test_a_missing_package_of_no_extra_is_shown_with_its_trace() -> None:
    """A broken installation, or a bug of ours: another extra would not help."""
    code = (
        "import sys; sys.modules['email'] = None\n"
        "from veneer_registry.extras import run_with_extra\n"
        "run_with_extra('veneer-train', 'train', lambda: __import__('email'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" in done.stderr
    assert "pip install" not in done.stderr


@pytest.mark.push
def test_no_cuda_device_is_one_sentence(base_folder: Path, tmp_path: Path) -> None:
    done = command(
        *("--base", str(base_folder), "--device", "cuda", "--data-dir", str(tmp_path / "d")),
        *(
            "--listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "",
            "--cache-dir",
            str(tmp_path / "c"),
        ),
    )
    if "ready" in done.stdout:
        pytest.skip("this machine has a CUDA device")
    assert done.returncode == 1
    assert "torch finds no CUDA device: use --device cpu" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("Qwen/Qwen3-1.7B",), "`veneer-server --base Qwen/Qwen3-1.7B`"),
        (("serve", "Qwen/Qwen3-1.7B"), "--base MODEL"),
        (("start",), "`veneer-server`"),
        (("push",), "`veneer push`"),
        (("store", "ls"), "`veneer ls`"),
        (("key", "revok"), "`veneer-server key revoke`"),
    ],
)
def test_what_other_servers_are_told_is_answered_with_ours(
    typed: tuple[str, ...], says: str
) -> None:
    failed = CliRunner().invoke(cli, typed, prog_name="veneer-server")
    assert failed.exit_code == 2
    assert says in failed.stderr
