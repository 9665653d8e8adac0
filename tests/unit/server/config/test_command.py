"""The command line: quick, one line for an error, nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from veneer_registry.lock import OwnerLock
from veneer_registry.registry import Registry
from veneer_server import __version__

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
    assert "belongs to a running server" in done.stderr


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
    assert f"chat means {revision[:12]} now" in done.stdout
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
