"""What moves adapters without a client's upload, made from the server's settings."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

from veneer_server.adapters.fetching.fetchers import Fetchers, FetchSettings
from veneer_server.config import ServerConfig
from veneer_server.logs import get_logger
from veneer_server.queues.upload_flow import UploadFlow
from veneer_server.serving.calls import Calls, Phase
from veneer_server.serving.local_folders import LocalFolders
from veneer_server.serving.tenants.tenants import Tenants
from veneer_server.serving.transfer.downloads import Downloads
from veneer_server.serving.transfer.registering import Registering
from veneer_server.serving.transfer.resolving import Resolving
from veneer_server.serving.transfer.watched import WatchedFolder
from veneer_server.telemetry.watched_series import WatchedSeries

__all__ = ["Transfers"]

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Transfers:
    """The parts that calls use."""

    registering: Registering
    downloads: Downloads
    resolving: Resolving

    @classmethod
    async def start(
        cls,
        config: ServerConfig,
        tenants: Tenants,
        calls: Calls,
        series: WatchedSeries,
        flow: UploadFlow,
        resources: AsyncExitStack,
    ) -> Transfers:
        """Start what the settings ask for; ``resources`` stops it.

        Args:
            flow: of uploads, which downloads share.

        Raises:
            InvalidField: a setting is malformed.
        """
        staging = (config.data_dir / "fetching").absolute()
        fetchers = Fetchers(
            FetchSettings(
                staging=staging,
                allowed=config.fetch_allow,
                tokens=config.fetch_token,
                hub=config.hf_endpoint,
                most_bytes=config.max_adapter_bytes,
                deadline_s=config.fetch_deadline,
                least_rate=config.min_upload_rate,
            )
        )
        await asyncio.to_thread(fetchers.clear)
        for folder in config.lora_root:
            # Not refused: a disk may be mounted later.
            if not await asyncio.to_thread(folder.is_dir):
                _log.warning("there is no such folder: check --lora-root", folder=folder)
        most = config.max_adapter_bytes
        if config.watch_dir is not None:
            watched = WatchedFolder(
                config.watch_dir,
                lambda: tenants.default,
                state=config.data_dir / "watched.json",
                most_bytes=most,
                series=series,
                ready=lambda: calls.phase is Phase.SERVING,
            )
            resources.push_async_callback(watched.stop)
            await watched.start()
        downloads = Downloads(flow, reader_limit_s=config.reader_limit)
        resources.push_async_callback(downloads.stop)
        registering = Registering(
            fetchers,
            roots=LocalFolders(config.lora_root, most, "uri"),
            staging=LocalFolders((staging,), most, "uri"),
        )
        return cls(registering, downloads, Resolving(config.resolve, registering))
