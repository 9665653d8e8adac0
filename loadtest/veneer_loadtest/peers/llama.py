"""Peer for llama.cpp: its ``llama-server``, built for this machine and given by path.

A request lists its adapters by their numbers on the command line. ``llama-server`` batches
only requests whose lists are equal.

Its ``ignore_eos`` bans every token that ends a generation, so such a token is never in its
answers, however likely; vLLM and Veneer continue after such a token. ``llama-server`` closes
connections that were idle for a few seconds, so a client must not reuse an old one.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from veneer_loadtest.errors import PeerError
from veneer_loadtest.peers.http_peer import HttpPeer, free_port

_ARCHITECTURES: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM"})
"""The architectures that GGUF calls ``llama``."""


def convert_adapter(folder: Path, base_folder: Path, out: Path) -> None:
    """Write an adapter folder as the GGUF file that ``llama-server`` reads.

    Args:
        base_folder: Hugging Face folder of the base; only its ``config.json`` is read.

    Raises:
        AdapterInvalid: the folder is not a LoRA of a decoder's projections.
        PeerError: the base is not a Llama.
    """
    config = json.loads((base_folder / "config.json").read_text("utf-8"))
    architectures = config.get("architectures") or ["no architecture"]
    if not _ARCHITECTURES.intersection(architectures):
        raise PeerError(
            f"adapters of {', '.join(architectures)} cannot be written for llama.cpp yet: "
            "use a base of the Llama architecture",
            metadata={"architectures": ", ".join(architectures)},
        )
    # Here, not above: gguf is of the extra train, and other commands run without it.
    from veneer_registry.gguf_adapter import write_gguf_adapter

    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    write_gguf_adapter(folder, out, heads=heads, kv_heads=kv_heads)


def llama_peer(
    program: Path,
    gguf: Path,
    base_folder: Path,
    adapters: Mapping[str, Path],
    threads: int,
    log: Path,
    *,
    parallel: int,
    folder: Path,
    context: int = 1024,
    start_timeout_s: float = 120.0,
) -> HttpPeer:
    """Define a ``llama-server`` peer with every adapter loaded and none applied.

    It never reuses a prompt, neither from a slot nor from its cache of finished prompts.

    Args:
        program: path of ``llama-server``.
        gguf: file of the base, in the quantization to be measured.
        base_folder: the same base as a Hugging Face folder, for converting adapters.
        parallel: sequences decoded at once; more requests wait.
        folder: folder for the converted adapters.
        context: maximum tokens of one sequence, prompt and answer together.

    Raises:
        PeerError: the program cannot be run, or the base is not a Llama.
        AdapterInvalid: an adapter folder cannot be read.
    """
    versions = {"llama.cpp": _version(program), "gguf": gguf.name}
    converted = []
    for name, adapter in adapters.items():
        converted.append(folder / f"{name}.gguf")
        convert_adapter(adapter, base_folder, converted[-1])
    port = free_port()
    arguments = [str(program), "--host", "127.0.0.1", "--port", str(port)]
    # Without an alias every response contains the path of the file.
    arguments += ["-m", str(gguf), "--alias", gguf.stem]
    arguments += ["-t", str(threads), "-tb", str(threads)]
    arguments += ["-np", str(parallel), "-c", str(parallel * context), "--cont-batching"]
    arguments += ["--no-ui", "--no-cache-prompt", "--cache-ram", "0"]
    for path in converted:
        arguments += ["--lora", str(path)]
    if converted:
        arguments += ["--lora-init-without-apply"]
    numbers = {name: number for number, name in enumerate(adapters)}

    def request_fields(adapter: str) -> dict[str, object]:
        if adapter and adapter not in numbers:
            raise PeerError(
                f"llama-server was started without the adapter {adapter!r}",
                metadata={"adapter": adapter},
            )
        # A missing or empty list applies every adapter at full scale, even with
        # --lora-init-without-apply: for the base, list one adapter with scale 0.
        chosen = [{"id": numbers.get(adapter, 0), "scale": 1.0 if adapter else 0.0}]
        return {
            "model": adapter or gguf.stem,
            "lora": chosen if numbers else [],
            "cache_prompt": False,
        }

    return HttpPeer(
        name="llama-server",
        arguments=arguments,
        environment={},
        port=port,
        ready_path="/health",
        request_fields=request_fields,
        versions=versions,
        log=log,
        start_timeout_s=start_timeout_s,
    )


def _version(program: Path) -> str:
    """Return the version that ``--version`` prints."""
    try:
        asked = subprocess.run(
            [str(program), "--version"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(
            f"{program} cannot be run ({error}): give the path of a llama-server built on "
            "this machine",
            metadata={"program": str(program)},
        ) from error
    match = re.search(r"^version: (.*)$", asked.stdout, re.MULTILINE)
    return match[1] if match else "unknown"
