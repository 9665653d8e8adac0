"""Set up a run: find the base's folder and the adapters' folder, and start a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from veneer_client import AsyncClient, ServerInfo, VeneerError
from veneer_client.local import LocalServer
from veneer_registry.child_python import child_python

from veneer_loadtest import workload
from veneer_loadtest.cpus import Cpus, during
from veneer_loadtest.errors import BadOption
from veneer_loadtest.report import without_folders

BUNDLED = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class ReadyServer:
    """A server that is ready.

    Attributes:
        command: how it was started.
        data_dir: data folder of a spawned server, with its adapters' files.
    """

    client: AsyncClient
    command: str
    data_dir: Path | None = None


@asynccontextmanager
async def target(
    *,
    spawn: bool,
    address: str | None,
    base_folder: Path | None,
    threads: int,
    flags: Sequence[str],
    cpus: Cpus | None = None,
) -> AsyncIterator[ReadyServer]:
    """Spawn a server for this run (``spawn``), or connect to the server at ``address``.

    Args:
        base_folder: the base that a spawned server serves; None: the bundled one.
        cpus: CPUs of a spawned server and of this process; None: both use all.

    Raises:
        BadOption: neither or both are given, CPUs are given for a running server, or there is
            no base for a spawned server.
        ServerUnreachable: the server did not start.
    """
    if spawn == (address is not None):
        raise BadOption(
            "give either --spawn, or --server HOST:PORT of a running server",
            metadata={"one_of": "--spawn --server"},
        )
    if address is not None:
        if cpus is not None:
            raise BadOption(
                "--cpus needs --spawn: it cannot set the CPUs of a running server",
                metadata={"field": "cpus"},
            )
        async with AsyncClient(address, timeout_s=120.0) as client:
            yield ReadyServer(client, f"(running at {address})")
        return
    folder = find_base_folder(base_folder)
    all_flags = ["--base", str(folder), "--threads", str(threads), *flags]
    with ExitStack() as stack:
        with during(cpus.server) if cpus else nullcontext():
            server = stack.enter_context(LocalServer(all_flags))
        if cpus:
            stack.enter_context(during(cpus.client))
        async with AsyncClient(server.url, timeout_s=120.0) as client:
            yield ReadyServer(client, without_folders(server.command), server.data_dir)


@asynccontextmanager
async def published(
    client: AsyncClient,
    named: Mapping[str, Path] | Iterable[tuple[str, Path]],
    *,
    activate: bool = True,
    keep: bool = False,
) -> AsyncIterator[None]:
    """Publish adapters on the server and activate them. At the end, delete only the adapters
    that were not there before: the server may be somebody else's.

    Args:
        named: name -> folder, or pairs of them; pairs are taken one at a time, so that not all
            need to be on disk at once.
        activate: if False, only publish them.
        keep: do not delete them.

    Raises:
        AdapterExists: a name is taken by another adapter, which stays as it is.
    """
    async with AsyncExitStack() as new:
        for name, folder in named.items() if isinstance(named, Mapping) else named:
            if (await client.push(folder, name)).published and not keep:
                new.push_async_callback(remove, client, name)
            if activate:
                await client.activate(name)
        yield


async def remove(client: AsyncClient, name: str) -> None:
    """Delete an adapter that this run published. If that fails, the figures are still valid."""
    try:
        await client.delete(name)
    except VeneerError as error:
        print(f"could not delete {name}: {error}", file=sys.stderr)


def served_shape(info: ServerInfo, given: Path | None) -> workload.BaseSizes | None:
    """Return the sizes of the base that a server serves, for making adapters and token ids.

    The server reports them. An older server does not: then read them from the folder ``given``,
    or from the bundled base if the server serves that; return None otherwise.

    Raises:
        BadOption: ``given`` is not a base's folder.
    """
    base = info.base_model
    if base.shape is not None:
        return workload.served_base_shape(base.name, base.shape)
    if given is None and base.name != BUNDLED:
        return None
    return workload.read_base_shape(find_base_folder(given))


def needed_shape(info: ServerInfo, given: Path | None) -> workload.BaseSizes:
    """Return `served_shape` for a load that cannot do without it.

    Raises:
        BadOption: the sizes are unknown, or as in `served_shape`.
    """
    shape = served_shape(info, given)
    if shape is None:
        raise BadOption(
            f"the server (version {info.version}) does not report the layer shapes of its base "
            f"{info.base_model.name!r}: give --base-folder, the Hugging Face folder of that "
            "base, or use --names with adapters on that server"
        )
    return shape


def find_base_folder(given: Path | None) -> Path:
    """Return the base's Hugging Face folder: the given one, or else the bundled base's.

    Raises:
        BadOption: there is no such folder.
    """
    if given is None:
        asked = subprocess.run(
            child_python("-m", "veneer_server", "model", "path", BUNDLED),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if asked.returncode:
            raise BadOption(
                f"`veneer-server model path {BUNDLED}` failed (see its output above): give "
                "--base-folder, a Hugging Face folder"
            )
        given = Path(asked.stdout.strip())
    if not (given / "config.json").is_file():
        raise BadOption(f"{given} has no config.json: give --base-folder a Hugging Face folder")
    return given


def find_adapters(folder: Path) -> Mapping[str, Path]:
    """Find adapter folders under ``folder``, by name.

    Raises:
        BadOption: there is none.
    """
    found = {
        child.name.lower(): child
        for child in sorted(folder.iterdir() if folder.is_dir() else ())
        if (child / "adapter_config.json").is_file()
    }
    if not found:
        raise BadOption(
            f"no folder with an adapter_config.json under {folder}: give --adapters a folder "
            "of adapter folders, or leave it out to make synthetic ones",
            metadata={"field": "--adapters"},
        )
    return found
