"""Open the target that a command's options name, publish its adapters, and check both."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from veneer_client import AsyncClient, RetryPolicy, VeneerError
from veneer_client.local import LocalServer

from veneer_loadtest import report, setup, workload
from veneer_loadtest.errors import BadOption, TargetFailed
from veneer_loadtest.load.adapters import AdapterOptions, chosen, names_of
from veneer_loadtest.load.spec import Traced
from veneer_loadtest.load.targets import OpenAiSpec, TargetSpec, VeneerSpec
from veneer_loadtest.server_metrics import read_counters

__all__ = ["AdapterOptions", "Opened", "TargetOptions", "opened"]


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """The server to load: exactly one of ``spawn``, ``server`` and ``openai``.

    Attributes:
        openai: URL of an OpenAI-compatible server.
        model: model of requests without an adapter, on an OpenAI-compatible server.
        metrics: ``HOST:PORT`` of a Veneer server's metrics; not needed for a spawned server.
        text: prompts are words, not token ids.
    """

    spawn: bool = False
    server: str | None = None
    openai: str | None = None
    model: str = ""
    api: Literal["completions", "chat"] = "completions"
    metrics: str | None = None
    base_folder: Path | None = None
    threads: int = 0
    flags: Sequence[str] = ()
    text: bool = False
    prefix_cache: bool = False

    def check(self) -> None:
        """Raise `BadOption` for options that cannot be combined."""
        if self.spawn + (self.server is not None) + (self.openai is not None) != 1:
            raise BadOption(
                "give one of --spawn (a Veneer server of this run's own), --server HOST:PORT "
                "and --openai URL"
            )
        if self.openai is None and (self.model or self.api != "completions"):
            raise BadOption("--model and --api go with --openai")
        if self.openai is not None and not self.openai.startswith(("http://", "https://")):
            raise BadOption(f"--openai {self.openai!r}: give a URL, such as http://HOST:8000")
        if self.openai is not None and "@" in self.openai:
            raise BadOption(
                "--openai: a password in the URL would be written into result files; set "
                "OPENAI_API_KEY, which is not"
            )
        if self.openai is not None and self.openai.rstrip("/").endswith("/v1"):
            raise BadOption(f"--openai {self.openai!r}: leave out /v1")


@dataclass(frozen=True, slots=True)
class Opened:
    """A target that answers, with its adapters.

    Attributes:
        facts: facts about the target for the result file.
        adapters: names by level; ``("",)`` is the base.
        vocab: number of token ids to sample from; 0: prompts are text.
        metrics: address to scrape, or None.
        notes: notes for readers of the figures.
    """

    spec: TargetSpec
    facts: Mapping[str, str]
    adapters: Sequence[tuple[str, ...]]
    vocab: int
    metrics: str | None
    notes: list[str] = field(default_factory=list)


@asynccontextmanager
async def opened(
    target: TargetOptions,
    adapters: AdapterOptions,
    traced: Traced | None,
    tell: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[Opened]:
    """Start or find the target, publish adapters and check every name.

    Published adapters are deleted at the end, unless they were there before or are to be kept.

    Args:
        tell: called with progress messages if publishing takes long.

    Raises:
        BadOption: options that cannot be combined.
        TargetFailed: no server answers, or it lacks an adapter.
        BadTrace: see `read_trace`.
    """
    target.check()
    adapters.check(openai=target.openai is not None, traced=traced is not None)
    if target.openai is not None:
        yield await _openai(target, adapters, names_of(adapters, traced))
        return
    threads = target.threads or report.usable_cores()
    if target.server is not None:
        async with _veneer(
            target, adapters, traced, target.server, target.metrics, "(running)", tell
        ) as it:
            yield it
        return
    folder = setup.find_base_folder(target.base_folder)
    flags = ["--base", str(folder), "--threads", str(threads), *target.flags]
    with LocalServer(flags) as server:
        async with _veneer(
            target, adapters, traced, server.url, server.metrics_address,
            report.without_folders(server.command), tell,
        ) as it:  # fmt: skip
            yield it


@asynccontextmanager
async def _veneer(
    target: TargetOptions,
    adapters: AdapterOptions,
    traced: Traced | None,
    address: str,
    metrics: str | None,
    command: str,
    tell: Callable[[str], None],
) -> AsyncIterator[Opened]:
    async with AsyncClient(address, timeout_s=120.0, retry=RetryPolicy(attempts=4)) as client:
        info = await client.info()
        if metrics is not None:
            await read_counters(metrics)
        if adapters.synthetic(traced=traced is not None):
            shape: workload.BaseSizes | None = setup.needed_shape(info, target.base_folder)
        else:
            shape = setup.served_shape(info, target.base_folder)
        notes = []
        text = target.text or shape is None
        if text and not target.text:
            notes.append(
                "the server does not report the vocabulary of its base "
                f"{info.base_model.name}: prompts are words (give --base-folder its folder for "
                "token ids)"
            )
        with tempfile.TemporaryDirectory(prefix="veneer-loadtest-") as scratch:
            named, levels = chosen(adapters, traced, shape, Path(scratch), tell)
            async with setup.published(client, named, activate=False, keep=adapters.keep):
                for name in max(levels, key=len):
                    await _check(client, name)
                yield Opened(
                    spec=VeneerSpec(address, target.prefix_cache),
                    facts={
                        "api": "veneer",
                        "command": command,
                        "version": info.version,
                        "device": info.device,
                        "backend": info.backend,
                        "base_model": info.base_model.name,
                        "quantization": info.base_model.quantization,
                    },
                    adapters=levels,
                    vocab=0 if text or shape is None else shape.vocab,
                    metrics=metrics,
                    notes=notes,
                )


async def _check(client: AsyncClient, name: str) -> None:
    if not name:
        return
    try:
        await client.get(name)
    except VeneerError as error:
        raise TargetFailed(str(error)) from error


async def _openai(
    target: TargetOptions, adapters: AdapterOptions, names: tuple[str, ...]
) -> Opened:
    from veneer_loadtest.load.openai_target import list_models  # needs aiohttp

    assert target.openai is not None
    models = await list_models(target.openai)
    asked = [name or target.model for name in names]
    if "" in asked and models:
        target_model = models[0]
        asked = [name or target_model for name in asked]
    else:
        target_model = target.model
    missing = sorted(set(asked) - set(models)) if models is not None else []
    if missing or "" in asked:
        there = ", ".join((models or ())[:10]) or "none"
        raise TargetFailed(
            f"{target.openai} has no model {missing[0] if missing else ''!r}: give --names "
            f"(adapters) and --model (the base) from what it lists: {there}"
        )
    shape = None
    if target.base_folder is not None:
        shape = workload.read_base_shape(setup.find_base_folder(target.base_folder))
    text = target.text or shape is None or target.api == "chat"
    return Opened(
        spec=OpenAiSpec(url=target.openai, base_model=target_model, api=target.api),
        facts={"api": "openai", "endpoint": target.api, "base_model": target_model},
        adapters=adapters.levels(names),
        vocab=0 if text or shape is None else shape.vocab,
        metrics=None,
    )
