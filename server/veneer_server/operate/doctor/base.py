"""The base model, and whether there is enough memory for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from veneer_registry.errors import VeneerError

from veneer_server.config import ServerConfig
from veneer_server.models.config import DecoderConfig, read_decoder_config
from veneer_server.models.source import (
    BUNDLED,
    bundled_damage,
    bundled_folder,
    resolve_base,
)
from veneer_server.operate.doctor.check import Check
from veneer_server.operate.doctor.places import folder_checks
from veneer_server.sizing.memory_plan import plan_memory, plan_registry
from veneer_server.system.gpu import choose_gpu
from veneer_server.system.machine import HostMemory, host_memory


def base_checks(config: ServerConfig) -> Iterator[Check]:
    try:
        folder = _base_folder(config)
    except VeneerError as error:  # of a GGUF file
        found, _, fix = str(error).partition(": ")
        yield Check("base", "problem", found, fix or "choose another --base")
        return
    if folder is None:
        fix = f"veneer-server model import {config.base}" if config.base == BUNDLED else ""
        if any(check.status == "problem" for check in folder_checks("", "", config.cache_dir)):
            found = f"{config.base} is not local, and it cannot be stored in {config.cache_dir}"
            yield Check(
                "base", "problem", found, "choose another --cache-dir, or give a folder"
            )
            return
        yield Check(
            "base",
            "ok",
            f"{config.base} is not local: it is downloaded at the first start",
            fix,
        )
        return
    if config.base == BUNDLED and (damage := bundled_damage(folder)):
        found = f"{folder} is damaged: {damage}"
        yield Check("base", "warning", found, "it is downloaded again at the next start")
        return
    try:
        decoder = read_decoder_config(folder)
    except (VeneerError, KeyError, ValueError) as error:
        yield Check("base", "problem", str(error), "choose another --base")
        return
    yield _shape(config.base, decoder)
    yield _tokenizer(folder, decoder)


def _shape(name: str, decoder: DecoderConfig) -> Check:
    scaled = "" if decoder.rope == "default" else f" ({decoder.rope} rotary scaling)"
    found = f"{name}: {decoder.architecture}, {decoder.context_length:,} tokens{scaled}"
    if decoder.rope == "dynamic":
        return Check(
            "base",
            "warning",
            f"{found}: beyond that, its frequencies would depend on each sequence's length",
            "for longer contexts set rope_scaling in its config.json to yarn",
        )
    if decoder.stored is not None and decoder.stored.is_codes:
        return Check(
            "base",
            "warning",
            f"{found}, stored as {decoder.stored.format}: only the torch backend serves it, "
            "several times slower than the native kernels",
            "for speed, give the original's folder, which is quantized to NF4",
        )
    return Check("base", "ok", found)


def _tokenizer(folder: Path, decoder: DecoderConfig) -> Check:
    """Check the parts of the base that the front process reads: tokenizer and chat template."""
    try:
        # Imported here, since the doctor itself must report a missing package.
        from veneer_server.text.template import ChatTemplate, read_base_template
        from veneer_server.text.tokenizer import TextTokenizer

        tokenizer = TextTokenizer.from_folder(folder)
        template, special = read_base_template(folder)
        if template is not None:
            ChatTemplate(template, special)
    except ImportError:  # the check of the package says so
        return Check("tokenizer", "ok", "not checked without its packages")
    except (VeneerError, ValueError, KeyError) as error:
        found, _, fix = str(error).partition(": ")
        return Check("tokenizer", "problem", found, fix or "choose another --base")
    chats = "a chat template" if template is not None else "no chat template"
    found = f"{tokenizer.vocab_size} tokens, {chats}"
    if tokenizer.vocab_size > decoder.vocab_size:
        return Check(
            "tokenizer",
            "warning",
            f"{found}, but the model has {decoder.vocab_size}",
            "text that needs the other tokens is refused: resize the model's embeddings to "
            "serve it",
        )
    return Check("tokenizer", "ok", found)


def _base_folder(config: ServerConfig) -> Path | None:
    """The base's folder, if it is or should be on this machine. For a GGUF file it is made now.

    Raises:
        UnsupportedModel, BaseUnavailable: the GGUF file cannot be served.
    """
    if config.base.lower().endswith(".gguf"):
        return resolve_base(config.base, config.cache_dir).path
    bundled = bundled_folder(config.cache_dir)
    if config.base == BUNDLED:
        return bundled if bundled.is_dir() else None
    folder = Path(config.base).expanduser()
    looks_local = folder.is_absolute() or config.base.startswith((".", "~"))
    return folder if folder.is_dir() or looks_local else None


def memory_check(config: ServerConfig) -> Check:
    host = host_memory()
    where = "this container" if host.contained else "this machine"
    free = f"{host.available >> 20} MiB of {host.limit >> 20} available in {where}"
    if config.role == "registry":
        return _registry_memory(host, free)
    try:
        folder = _base_folder(config)
        if folder is None:
            return Check("memory", "ok", f"{free}; no plan: the base is not local")
        decoder = read_decoder_config(folder)
    except (VeneerError, KeyError, ValueError):  # the check of the base says why
        return Check("memory", "ok", f"{free}; no plan without a supported base")
    try:
        plan = plan_memory(decoder, config, host, choose_gpu(config.device).gpu)
    except VeneerError as error:
        needed, _, fix = str(error).rpartition(": ")
        return Check("memory", "problem", needed, fix)
    needs = next(pool.total for pool in plan.pools if pool.name == "host")
    if needs > host.available:
        return Check(
            "memory", "warning", f"{plan}; {free}", "stop other programs, or lower the budgets"
        )
    if plan.kv_cache.short:
        fix = "for a larger KV cache, lower the adapter budgets or set --kv-cache-bytes"
        return Check("memory", "warning", f"{plan}; {free}", fix)
    return Check("memory", "ok", f"{plan}; {free}")


def _registry_memory(host: HostMemory, free: str) -> Check:
    """Check the memory of a registry, which loads no base and no adapter, whatever the budgets
    say."""
    pool = plan_registry(host)
    if not pool.fits:
        return Check("memory", "problem", f"{pool}; {free}", "give it more memory")
    if pool.total > host.available:
        return Check("memory", "warning", f"{pool}; {free}", "stop other programs")
    return Check("memory", "ok", f"{pool}; {free}")
