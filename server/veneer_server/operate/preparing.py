"""``veneer-server model prepare``: everything that a start would write to the cache folder,
written before, so that many servers which share the folder need not each do it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
from veneer_registry.adapter import BaseSpec
from veneer_registry.disk import sync

from veneer_server import __version__
from veneer_server.config import ServerConfig
from veneer_server.engine_client.connection import EngineConnection
from veneer_server.models.config import read_decoder_config
from veneer_server.models.source import BaseUnavailable, resolve_base
from veneer_server.startup import engine_config, fingerprint_of, memory_for
from veneer_server.system.disk import make_private
from veneer_server.wire.messages import EngineConfig


def prepare(config: ServerConfig, say: Callable[[str], None]) -> Path:
    """Download the base, hash its weights and, unless the role is ``registry``, load it with an
    engine once. Returns the base's folder.

    One process at a time prepares in a cache folder; others wait for it and then find it done.
    If it ends in whatever way, the next one continues.

    Args:
        say: called with lines for the operator.

    Raises:
        BaseUnavailable: the base was not found, or the folder cannot be written.
        EngineFailed: the engine cannot load the base; its log on stderr says why.
    """
    with _alone(config.cache_dir, say):
        base = resolve_base(config.base, config.cache_dir, progress=say)
        decoder = read_decoder_config(base.path)
        if decoder.quantization is not None:  # such a folder is served as it is
            config = replace(config, quantization=decoder.quantization)
        fingerprint = fingerprint_of(base.path, config)
        if config.role == "registry":
            say(f"{base.name} is in {config.cache_dir}; a registry needs no more")
            return base.path
        spec = BaseSpec(base.name, decoder.num_layers, decoder.shapes, fingerprint)
        engine = engine_config(config, base, spec, memory_for(decoder, config))
        # What it writes depends neither on the memory that happens to be free, nor on budgets.
        engine = msgspec.structs.replace(engine, kv_cache_bytes=64 << 20, host_adapter_bytes=0)
        mark = _mark(config.cache_dir, engine)
        if mark.exists():
            say(f"{base.name} was prepared in {config.cache_dir} before")
            return base.path
        asyncio.run(_load_once(engine))
        make_private(mark.parent)
        mark.touch()
        sync(mark.parent)
        say(f"{base.name} is prepared in {config.cache_dir}")
        return base.path


async def _load_once(config: EngineConfig) -> None:
    await (await EngineConnection.open(config)).close()


def _mark(cache_dir: Path, engine: EngineConfig) -> Path:
    """The file that tells that an engine with this configuration has loaded the base. It is a
    hint: an engine checks all that it reads, and makes again what is missing."""
    asked = msgspec.msgpack.encode((__version__, engine))
    return cache_dir / "prepared" / hashlib.sha256(asked).hexdigest()[:32]


@contextlib.contextmanager
def _alone(cache_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process."""
    try:
        make_private(cache_dir)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(cache_dir / "prepare.lock", flags, 0o600)
    except OSError as error:
        raise BaseUnavailable(
            f"--cache-dir {cache_dir} cannot be written ({error.strerror}): give another, or "
            f"let user {os.geteuid()} write to it"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that prepares a base in {cache_dir}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            # Without locks several processes do the same work, and the last one's files stay.
            say(f"not waiting for others: {cache_dir} has no locks ({error.strerror})")
        yield
    finally:
        os.close(lock)
