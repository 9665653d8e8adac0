"""The doctor: a healthy machine passes; each problem is named with a fix."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.extras import install_extra
from veneer_registry.lock import OwnerLock
from veneer_server import openai
from veneer_server.config import load_config
from veneer_server.operate.doctor import backends, machine
from veneer_server.operate.doctor import base as doctor_base
from veneer_server.operate.doctor.check import Check
from veneer_server.operate.doctor.report import examine, report
from veneer_server.system.machine import HostMemory


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "veneer_server", "doctor", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def flags(tmp_path: Path, base_folder: Path) -> dict[str, str]:
    return {
        "base": str(base_folder),
        "data_dir": str(tmp_path / "data"),
        "cache_dir": str(tmp_path / "cache"),
        "device": "cpu",
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks that import torch in a process of its own."""
    monkeypatch.setattr(backends, "torch_checks", lambda config: iter(()))


def checks(**flags: str) -> dict[str, Check]:
    return {check.name: check for check in examine(load_config(flags, {}))}


@pytest.mark.push
def test_a_healthy_machine_by_the_command(flags: dict[str, str]) -> None:
    words = [w for name, v in flags.items() for w in ("--" + name.replace("_", "-"), v)]
    done = run(*words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["healthy"]
    found = {check["name"]: check for check in answer["checks"]}
    step = found.get("native kernels")
    by = "native" if step is not None and step["status"] == "ok" else "torch"
    assert found["backend"]["found"].startswith(f"the {by} backend on the CPU")
    if by == "native":
        assert "--int8-activations would" in found["8-bit inputs"]["found"]
    assert "agrees" in found["4-bit matmul"]["found"]
    assert found["torch"]["found"]
    assert "auto: " in found["memory"]["found"], "what the KV cache's size goes by"


@pytest.mark.push
def test_without_a_compiler_it_says_who_would_serve_and_why(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    found = checks(**flags, backend="auto")
    assert found["backend"].found.startswith("the torch backend on the CPU")
    assert found["native kernels"].status == "warning"
    assert "/nowhere/c++" in found["native kernels"].found


@pytest.mark.usefixtures("quick")
def test_folders_that_cannot_be(flags: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = checks(**flags | {"data_dir": str(tmp_path / "file" / "d")})["data folder"]
    assert (check.status, check.fix) == ("problem", "choose another --data-dir")
    shm = Path("/dev/shm")
    if shm.is_dir():
        check = checks(**flags | {"data_dir": str(shm / "veneer-doctor")})["data folder"]
        assert (check.status, "tmpfs" in check.found) == ("warning", True)


@pytest.mark.usefixtures("quick")
def test_memory_that_cannot_fit(flags: dict[str, str]) -> None:
    check = checks(**flags, host_cache_bytes="900TiB")["memory"]
    assert check.status == "problem"
    assert "--host-cache-bytes" in check.fix


@pytest.mark.push
def test_a_registry_needs_no_engine(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    wants = flags | {"role": "registry", "device": "cuda", "host_cache_bytes": "900TiB"}
    found = checks(**wants)
    assert all(check.status != "problem" for check in found.values()), found
    assert not {"backend", "native kernels", "4-bit matmul", "device", "threads"} & {*found}
    assert "processes" in found["memory"].found
    monkeypatch.setattr(doctor_base, "host_memory", lambda: HostMemory(1 << 28, 1 << 28, True))
    assert checks(**wants)["memory"].status == "problem"
    monkeypatch.setattr(doctor_base, "host_memory", lambda: HostMemory(1 << 30, 1 << 28, True))
    assert checks(**wants)["memory"].status == "warning"


@pytest.mark.usefixtures("quick")
def test_a_base_that_cannot_be_served(flags: dict[str, str], tmp_path: Path) -> None:
    check = checks(**flags | {"base": str(tmp_path / "none")})["base"]
    assert check.status == "problem"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba"}')
    check = checks(**flags | {"base": str(tmp_path / "other")})["base"]
    assert (check.status, "mamba" in check.found) == ("problem", True)


@pytest.mark.usefixtures("quick")
def test_a_problem_is_listed_once(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checks(**flags | {"base": str(tmp_path / "none")})
    assert [c.name for c in found.values() if c.status == "problem"] == ["base"]
    small = checks(**flags, kv_cache_bytes="1")["memory"]
    assert (small.status, "128 tokens" in small.fix) == ("problem", True)
    # Without a package, its own check says so.
    monkeypatch.setitem(sys.modules, "veneer_server.text.tokenizer", None)
    assert checks(**flags)["tokenizer"].status == "ok"


@pytest.mark.usefixtures("quick")
def test_a_taken_port_and_a_running_server(flags: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        found = checks(**flags | {"listen": address})
        assert found["listen"].status == "problem"
        assert "server" not in found
        with OwnerLock(tmp_path / "data"):
            found = checks(**flags | {"listen": address})
        assert found["listen"].status == "warning"
        assert str(os.getpid()) in found["server"].found
        assert "peak memory" in found["server"].found


@pytest.mark.usefixtures("quick")
def test_the_kernels_package_must_be_absent(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks(**flags)["kernels"].status == "ok"
    monkeypatch.setattr(machine, "find_spec", lambda name: object())
    check = checks(**flags)["kernels"]
    assert check.status == "problem"
    assert "pip uninstall kernels" in check.fix


@pytest.mark.usefixtures("quick")
def test_the_report_shows_each_fix(flags: dict[str, str], tmp_path: Path) -> None:
    lines: list[str] = []
    config = load_config(flags | {"base": str(tmp_path / "none")}, {})
    assert not report(config, lines.append, as_json=False)
    problem = next(i for i, line in enumerate(lines) if line.startswith("problem"))
    assert "-> choose another --base" in lines[problem + 1]


@pytest.mark.push
@pytest.mark.usefixtures("quick")
def test_the_gateway_needs_its_packages(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "gateway" not in checks(**flags)
    assert checks(**flags, openai_listen="127.0.0.1:0")["gateway"].status == "ok"
    monkeypatch.setattr(openai, "find_spec", lambda name: None)
    assert "gateway" not in checks(**flags)
    check = checks(**flags, openai_listen="127.0.0.1:0")["gateway"]
    assert check.status == "problem"
    assert check.found == "--openai-listen needs fastapi and uvicorn"
    assert check.fix == f"{install_extra('gateway')}; or leave the flag out"


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> Path:
    """The base as far as the doctor reads it, to be changed."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / name, folder)
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.push
@pytest.mark.usefixtures("quick")
def test_text_that_could_not_be_served(flags: dict[str, str], base: Path) -> None:
    flags |= {"base": str(base)}
    assert checks(**flags)["tokenizer"].status == "ok"
    change(base / "config.json", vocab_size=49000)
    check = checks(**flags)["tokenizer"]
    assert (check.status, "49152" in check.found, "49000" in check.found) == (
        "warning",
        True,
        True,
    )
    change(base / "tokenizer_config.json", chat_template="{% if %}")
    assert checks(**flags)["tokenizer"].status == "problem"
    change(base / "tokenizer_config.json", chat_template=None)
    change(base / "tokenizer.json", decoder={"type": "CTC"})
    assert checks(**flags)["tokenizer"].status == "problem"
    (base / "tokenizer.json").unlink()
    check = checks(**flags)["tokenizer"]
    assert (check.status, "save_pretrained" in check.fix) == ("problem", True)


@pytest.mark.usefixtures("quick")
def test_a_folder_stored_in_4_bits_is_planned_as_it_is_served(
    flags: dict[str, str], base: Path
) -> None:
    # Not auto, which depends on what other programs use at the moment.
    flags |= {"base": str(base), "kv_cache_bytes": "1GiB"}
    plain, four_bits = (checks(**flags, quantization=q)["memory"] for q in ("none", "nf4"))
    assert plain.found != four_bits.found
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change(base / "config.json", quantization_config=settings)
    planned = checks(**flags, quantization="none")["memory"]
    assert planned.found.partition(";")[0] == four_bits.found.partition(";")[0]
