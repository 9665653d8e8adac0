"""Checks of the backend that would execute steps here, tested in separate processes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from veneer_registry.child_python import child_python

from veneer_server.backends.native.chosen import find_library
from veneer_server.backends.native.compiler import NativeUnavailable, try_out
from veneer_server.config import ServerConfig
from veneer_server.operate.doctor.check import Check
from veneer_server.system.gpu import try_kernels
from veneer_server.system.machine import usable_cores
from veneer_server.system.placement import place


def torch_checks(config: ServerConfig) -> Iterator[Check]:
    facts = _probe(config.device)
    if isinstance(facts, str):
        yield Check("torch", "problem", facts, "install the torch build that fits this machine")
        return
    if facts["device"] == "cuda":
        kernels = cuda_check(try_kernels(), chosen=config.device == "cuda")
        yield kernels
        if kernels.status == "problem" and config.device == "auto":
            facts["device"] = "cpu"
    native = None
    if facts["device"] == "cpu" and config.backend != "torch":
        native = native_check(config)
    by = "native" if native is not None and native.status == "ok" else "torch"
    cores = usable_cores()
    on = facts["cuda"] if facts["device"] == "cuda" else f"the CPU, {cores} cores"
    if config.device == "cuda" and not facts["cuda"]:
        yield Check("device", "problem", "torch finds no CUDA device", "use --device cpu")
    else:
        yield Check("backend", "ok", f"the {by} backend on {on}")
    if config.int8_activations and by == "torch":
        found = "--int8-activations needs the native kernels, which cannot run here"
        yield Check("int8 activations", "problem", found, "serve without --int8-activations")
    placement = place(config.threads)
    fix = f"--threads {cores}, or auto" if placement.threads > cores else ""
    found = f"{placement.threads} on {cores} usable CPUs, {facts['cpu']}: {placement.why}"
    if placement.others and by == "native":
        tried = " and ".join(map(str, placement.others))
        found += f"; the server compares with {tried} when it starts, see `veneer info`"
    yield Check("threads", "warning" if fix else "ok", found, fix)
    if facts["four_bit"]:
        yield Check(
            "4-bit matmul",
            "problem",
            facts["four_bit"],
            "install a bitsandbytes for this machine, or serve --quantization none",
        )
    else:
        yield Check("4-bit matmul", "ok", f"agrees with full precision on {facts['device']}")
    if facts["device"] == "cpu":
        if native is not None:
            yield native
            if native.status == "ok" and by != "torch":
                yield from _int8(config)
        if by == "torch":
            yield _packed(facts["packed"])


def cuda_check(found: Mapping[str, Any], *, chosen: bool) -> Check:
    """Report the self-test of the CUDA kernels.

    Args:
        chosen: whether --device cuda was given; otherwise a GPU that fails is not used.
    """
    card = (
        f"{found.get('name', 'the GPU')} (sm_{found.get('capability', '?').replace('.', '')})"
    )
    if why := found["why"]:
        fix = "use --device cpu, or install the triton that fits this torch"
        kept = "" if chosen else "; --device auto serves from the CPU"
        return Check("CUDA kernels", "problem", f"{card}: {why}{kept}", fix)
    subjects = len(found["checked"])
    versions = f"torch {found['torch']}, CUDA {found['cuda']}, triton {found['triton']}"
    return Check(
        "CUDA kernels",
        "ok",
        f"{card}: {subjects} subjects right in {found['seconds']:.1f} s; {versions}",
    )


def native_check(config: ServerConfig) -> Check:
    """Check whether the native kernels can execute steps: compile them, and try them in a
    separate process."""
    fix = "see --backend; the torch backend takes several times as long"
    if config.dtype != "bfloat16":
        return Check("native kernels", "warning", f"not for {config.dtype}", fix)
    try:
        library = find_library(config.cache_dir, config.native_instructions)
        instructions = try_out(library.file)
    except NativeUnavailable as reason:
        return Check("native kernels", "warning", str(reason), fix)
    wanted = config.native_instructions
    if wanted not in ("auto", instructions):
        found = f"this CPU supports at most {instructions}, not --native-instructions {wanted}"
        return Check("native kernels", "warning", found, fix)
    if library.why_prebuilt:
        found = (
            f"prebuilt, and runs here ({instructions}); not compiled: {library.why_prebuilt}"
        )
        return Check("native kernels", "ok", found)
    return Check(
        "native kernels", "ok", f"compiled for this CPU, and runs here ({instructions})"
    )


def _int8(config: ServerConfig) -> Iterator[Check]:
    if config.quantization not in ("nf4", "fp4"):
        return
    if config.int8_activations:
        yield Check("8-bit inputs", "ok", "used, as --int8-activations says")
        return
    kernels = find_library(config.cache_dir, config.native_instructions).file
    facts = _probe("cpu", str(kernels))
    if isinstance(facts, str):
        yield Check("8-bit inputs", "warning", facts, "see `native kernels`")
    else:
        found = facts["int8_gain"] or "--int8-activations would gain little on this CPU"
        yield Check("8-bit inputs", "ok", found)


def _probe(*arguments: str) -> dict[str, Any] | str:
    """Run the probe in a separate process; return what it found, or its last line."""
    done = subprocess.run(
        child_python("-m", "veneer_server.operate.doctor.probe", *arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return facts


def _packed(packed: bool) -> Check:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    cpu = "this CPU has AVX512-BF16" if "avx512_bf16" in flags else "no AVX512-BF16"
    if packed:
        return Check("packed 4-bit", "ok", f"yes: {cpu}")
    return Check(
        "packed 4-bit",
        "warning",
        f"no: {cpu}",
        "steps take several times as long: use a CPU with AVX512-BF16, or a GPU",
    )
