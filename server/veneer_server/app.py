"""Composition root of the front process: startup, serve, drain, stop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Final

from veneer_registry.adapter import BaseSpec
from veneer_registry.base_names import declared_origin, known_names
from veneer_registry.core import ReadAdapter
from veneer_registry.lock import OwnerLock
from veneer_registry.replacing import replace_file

from veneer_server import __version__
from veneer_server.adapters.checkers import Checkers
from veneer_server.config import ServerConfig
from veneer_server.doors import Bound, Doors
from veneer_server.engine_client.client import EngineClient, EngineEvent
from veneer_server.engine_client.no_engine import NoEngine
from veneer_server.logs import get_logger, quiet_in_background, show_status
from veneer_server.models.config import read_decoder_config
from veneer_server.models.source import BaseFolder, resolve_base
from veneer_server.openai import require_gateway
from veneer_server.progress import SINK, Display
from veneer_server.queues.refusal_pace import RefusalPace
from veneer_server.queues.upload_flow import UploadFlow
from veneer_server.quotas.meter import Meter
from veneer_server.quotas.rates import Quotas
from veneer_server.quotas.uploads import UploadQuotas
from veneer_server.quotas.usage import UsageBook
from veneer_server.quotas.usage_store import UsageStore
from veneer_server.roles import role_of
from veneer_server.rpc.inference_service import InferenceService
from veneer_server.rpc.server_service import Health, ServerService
from veneer_server.serving.changes import AdapterBudgets
from veneer_server.serving.generation import Calls, Phase
from veneer_server.serving.generator import Generator
from veneer_server.serving.registering import Transfers
from veneer_server.serving.spare_time import Background
from veneer_server.serving.tenants import CatalogTenants, Furnish, Tenants, TenantStores
from veneer_server.serving.uploads import UploadPlaces
from veneer_server.sizing.memory_plan import MemoryPlan
from veneer_server.startup import (
    engine_config,
    fingerprint_of,
    memory_for,
    replan,
    vocabulary_of,
)
from veneer_server.system.descriptors import share_descriptors
from veneer_server.telemetry.adapter_log import AdapterLog
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.tracing import Tracing
from veneer_server.telemetry.vllm_names import VllmSeries
from veneer_server.text.defaults import read_defaults
from veneer_server.text.prompts import Prompts
from veneer_server.wire.messages import EngineInfo

_STOP_GRACE_S: Final = 1.0

_log = get_logger(__name__)


class App:
    """One server, from start to stop; `run` does all of it."""

    def __init__(
        self,
        config: ServerConfig,
        announce: Callable[[str], None],
        make_engine: Callable[..., EngineClient] = EngineClient,
        read: ReadAdapter | None = None,
        lock: OwnerLock | None = None,
    ) -> None:
        """Args:
        announce: called with one line when the server is ready.
        make_engine: takes the arguments of `EngineClient`; tests pass a substitute.
        read: checks uploads; None checks them in separate processes.
        lock: the data folder's lock, already held; None makes `startup` take it. It is
            released at the end of `run`.
        """
        self._config = config
        self._announce = announce
        self._role = role_of(config)
        self._generates = config.role != "registry"
        self._make_engine = make_engine if self._generates else NoEngine
        self._read = read
        self._lock = lock
        self._resources = AsyncExitStack()
        self._metrics = Metrics()
        self._display = Display(structured=config.log_format == "json")
        self._calls = Calls(lambda: self._display.doing)
        self._health = Health(generates=self._generates)
        self._pace = RefusalPace(config.refusal_rate)
        self._quotas = Quotas()
        self._stop_asked = asyncio.Event()
        self._doors = Doors(
            config,
            metrics=self._metrics,
            calls=self._calls,
            health=self._health,
            pace=self._pace,
            quotas=self._quotas,
        )
        self._tenants = Tenants(config.data_dir, self._doors.access.accepts)
        self._engine_up = False

    async def run_until_signal(self) -> None:
        """Call `run`; SIGTERM or SIGINT stops it, and a second one ends the process at once.
        SIGHUP is ignored: closing a terminal must not end other users' streams."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(
            signal.SIGHUP,
            lambda: _log.info("SIGHUP ignored", why="nothing to reload; use SIGTERM to stop"),
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        await self.run()

    @property
    def phase(self) -> Phase:
        """Current phase, which decides about new calls."""
        return self._calls.phase

    def stop(self) -> None:
        """Make `run` drain and return."""
        self._stop_asked.set()

    async def run(self) -> None:
        """Serve until `stop` is called; then drain and return.

        Raises:
            VeneerError: the server could not start; the message says why and what to do.
        """
        SINK.set(self._display)
        async with self._resources:
            starting = asyncio.ensure_future(self.startup())
            asked = asyncio.ensure_future(self._stop_asked.wait())
            await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                await asked
            else:
                self._display.stop()  # threads do not notice cancellation
                starting.cancel()
                await asyncio.wait({starting})
            await self.drain()
        _log.info("stopped")

    # ------------------------------------------------------------------- lifecycle

    async def startup(self) -> None:
        """Lock the data folder, open the sockets, prepare the base, load the engine."""
        config = self._config
        if config.openai_listen is not None:
            require_gateway()
        tracing = Tracing.to(config.otlp_traces_endpoint, __version__)
        self._resources.push_async_callback(asyncio.to_thread, tracing.stop)
        descriptors = share_descriptors(
            wanted=config.max_connections,
            ports=1 + (config.openai_listen is not None) + (config.admin_listen is not None),
            tenants=config.max_tenants,
        )
        lock = self._resources.enter_context(self._lock or OwnerLock(config.data_dir))
        # Open the ports first, so that a port in use is reported at once, and callers learn
        # that the base is being fetched and loaded.
        bound = await self._doors.open(self._resources, descriptors.connections)
        _log.info("listening", **bound.told("off"))
        base_folder = await asyncio.to_thread(
            resolve_base,
            config.base,
            config.cache_dir,
            progress=lambda line: _log.warning("base", what=line),
        )
        decoder = read_decoder_config(base_folder.path)
        if decoder.quantization is not None:
            # A folder stored in 4 bits is served as it is, regardless of the flag.
            config = self._config = replace(config, quantization=decoder.quantization)
        memory = await asyncio.to_thread(memory_for, decoder, config)
        prompts = Prompts(base_folder.path, config.reasoning_parser)
        self._resources.push_async_callback(prompts.close)
        fingerprint, _ = await asyncio.gather(
            asyncio.to_thread(fingerprint_of, base_folder.path, config), prompts.start()
        )
        base = BaseSpec(
            name=base_folder.name,
            num_layers=decoder.num_layers,
            shapes=decoder.shapes,
            fingerprint=fingerprint,
            serving_dtype=config.dtype,
            names=known_names(base_folder.name, base_folder.path, *config.allow_base_name),
            vocabulary=await asyncio.to_thread(vocabulary_of, base_folder.path),
            folder=str(base_folder.path),
            origin=declared_origin(base_folder.name, base_folder.path)
            if decoder.stored is not None and decoder.stored.is_codes
            else "",
            require_same_weights=config.require_same_weights,
        )
        engine = self._engine(base_folder, base, memory)
        if (read := self._read) is None:
            checkers = Checkers()
            self._resources.callback(checkers.close)
            read = checkers.read
        open_ = self._role.open(base, read, self._metrics)
        default = await asyncio.to_thread(open_, config.data_dir, lock)
        tenants = self._tenants
        self._resources.push_async_callback(tenants.stop)
        self._doors.scrape(tenants, self._resources)
        stores = TenantStores(tenants)
        book = await self._open_usage(stores)
        # Uploads give way to sequences.
        places = UploadPlaces(UploadFlow(busy=lambda: engine.in_flight > 0))
        await tenants.start(
            Furnish(
                config,
                engine,
                prompts,
                places,
                quotas=UploadQuotas(stores, book),
                shares=tenants.shares,
            ),
            default,
            open_=open_,
            max_tenants=descriptors.tenants,
            elsewhere=self._catalog_tenants(),
        )
        self._resources.push_async_callback(self._role.stop)
        await self._role.start(tenants)
        await book.start()
        self._metrics.tenants.waiting = engine.places.waiting
        budgets = AdapterBudgets(
            config.host_cache_bytes,
            config.device_adapter_bytes,
            memory,
            engine=engine,
            metrics=self._metrics,
            plan=partial(replan, decoder, config, memory),
        )
        defaults = read_defaults(
            base_folder.path,
            base.name,
            max_tokens=config.default_max_tokens,
            temperature=config.default_temperature,
            top_p=config.default_top_p,
        )
        background = Background()
        self._resources.push_async_callback(background.finish)
        transfers = await Transfers.start(
            config, tenants, self._calls, self._metrics.watched, places.flow, self._resources
        )
        generator = Generator(
            engine=engine,
            tenants=tenants,
            prompts=prompts,
            defaults=defaults,
            metrics=self._metrics,
            background=background,
            base_name=base.name,
            constraint_bytes=config.constraint_bytes,
            tool_parser=config.tool_parser,
            meter=Meter(self._quotas, book),
            resolving=transfers.resolving,
            tracing=tracing,
            # When nothing is running, the duration of earlier steps says nothing.
            step_seconds=lambda: self._metrics.recent_step_s if engine.in_flight else 0.0,
        )
        self._resources.callback(generator.spare_time.close)
        await self._answer_openai(generator, engine, base)
        self._doors.answer_grpc(
            InferenceService(generator, reader_limit_s=config.reader_limit),
            self._role.adapters(tenants, budgets, transfers),
            ServerService(
                config,
                base,
                tenants,
                engine,
                budgets,
                defaults,
                book,
                replication=self._role.facts,
            ),
            self._role.replication(tenants),
        )
        _log.info("loading", base=base.name, grpc=str(bound.grpc))
        self._resources.push_async_callback(engine.stop)
        info = await engine.start()
        self._metrics.engine_started(info.device, info.backend, self._why_slower(info))
        if config.metrics_names == "vllm" and self._generates:
            series = VllmSeries(self._metrics, model=base.name, kv_tokens=info.kv_cache_tokens)
            self._metrics.registry.register(series)
        # Otherwise each collection would scan all imported objects and stall every stream.
        gc.collect()
        gc.freeze()
        await self._role.ready()
        self._calls.serve()
        self._tell_ready()
        await self._health.loaded()
        self._ready(base, info, memory, bound)

    async def drain(self) -> None:
        """Report NOT_SERVING, refuse new calls, let running ones finish within the grace."""
        await self._health.drain()
        self._calls.drain()
        self._tell_ready()
        self._pace.stop()
        self._tenants.close_watches()
        self._role.drain()
        self._doors.stop_accepting()
        if not self._doors.opened:
            return
        _log.info("draining", running=self._calls.count, grace_s=self._config.grace)
        cut_off = await self._calls.finish(self._config.grace)
        if cut_off:
            _log.warning("calls cancelled after the grace period", calls=cut_off)
        # Only health watches and reflection are left; answers are flushed within the grace.
        await self._doors.stop(_STOP_GRACE_S)

    def _on_signal(self, number: int) -> None:
        if self._stop_asked.is_set():
            # The engine ends by itself when its socket closes.
            os._exit(128 + number)
        self.stop()

    # ----------------------------------------------------------------------- parts

    def _engine(
        self,
        folder: BaseFolder,
        base: BaseSpec,
        memory: MemoryPlan,
    ) -> EngineClient:
        config = self._config
        return self._make_engine(
            engine_config(config, folder, base, memory),
            max_queue=config.max_queue,
            max_wait_s=config.max_queue_wait,
            on_refused=self._metrics.tenants.refused,
            on_event=partial(self._engine_event, AdapterLog(self._tenants)),
            on_health=self._engine_health,
            hold=self._tenants.hold,
        )

    def _catalog_tenants(self) -> CatalogTenants | None:
        """What lists the tenants of the catalog; None if no other registry uses this one's."""
        if not self._config.catalog:
            return None
        found = CatalogTenants(self._config)
        self._resources.callback(found.close)
        return found

    async def _open_usage(self, stores: TenantStores) -> UsageBook:
        """Open the usage book; it is stopped with the app's resources, before the registries
        are closed."""
        file = self._config.data_dir / "usage.db"
        book = UsageBook(await asyncio.to_thread(UsageStore, file), stores)
        self._resources.push_async_callback(book.stop)
        self._metrics.count_usage(book)
        return book

    def _engine_event(self, adapters: AdapterLog, event: EngineEvent) -> None:
        adapters.on_engine_event(event)
        self._metrics.on_event(event)
        self._tenants.on_engine_event(event)

    def _engine_health(self, healthy: bool) -> None:
        self._health.engine_changed(healthy)
        self._metrics.engine_health(healthy)
        self._engine_up = healthy
        self._tell_ready()
        if self._calls.phase is not Phase.DRAINING:
            (_log.info if healthy else _log.warning)("engine health", healthy=healthy)

    def _tell_ready(self) -> None:
        serving = self._calls.phase is Phase.SERVING
        self._metrics.ready.set(serving and (self._engine_up or not self._generates))

    def _why_slower(self, info: EngineInfo) -> str:
        """Why auto fell back from the native kernels to torch; "" if it did not."""
        auto = self._config.backend == "auto" and info.device == "cpu"
        return info.why_not_native if auto else ""

    async def _answer_openai(
        self, generator: Generator, engine: EngineClient, base: BaseSpec
    ) -> None:
        if self._doors.gateway is None:
            return
        # Imported here, since its dependencies are an optional extra.
        from veneer_server.openai.core import ServingParts
        from veneer_server.openai.response_store import ResponseDatabase, StoredResponses

        config, responses = self._config, None
        # A follower is one of several servers, and any of them may get the next call.
        if config.store_responses == "on" or (
            config.store_responses == "auto" and config.role == "all"
        ):
            database = await asyncio.to_thread(
                ResponseDatabase,
                config.data_dir / "responses.sqlite",
                most_bytes=config.stored_responses_bytes,
                age_s=config.stored_responses_age * 3600,
            )
            responses = StoredResponses(database, self._metrics)
            self._resources.push_async_callback(responses.stop)
            responses.start()
        self._doors.gateway.answer_by(
            ServingParts(
                generator, self._tenants, engine, base, self._role.loading(), responses
            )
        )

    def _ready(
        self,
        base: BaseSpec,
        info: EngineInfo,
        memory: MemoryPlan,
        bound: Bound,
    ) -> None:
        config = self._config
        if config.port_file is not None:
            # Written atomically: a waiting program reads the file as soon as it exists.
            replace_file(config.port_file, json.dumps(bound.told("")) + "\n")
        listening = "  ".join(f"{name}={at}" for name, at in bound.told("off").items())
        why = self._why_slower(info)
        slower = f" (several times slower than native: {why})" if why else ""
        show_status("")  # adapters may still be loading
        self._announce(
            f"veneer ready  {listening}  base={base.name} "
            f"({config.quantization}, {config.dtype})  device={info.device}  "
            f"backend={info.backend}{slower}  context={info.context_length}  "
            f"kv={info.kv_cache_tokens} tokens  "
            f"adapters: device {config.device_adapter_bytes >> 20} MiB, "
            f"host {config.host_cache_bytes >> 20} MiB  memory: {memory.summary}"
            f"{info.int8_gain and f'  note: {info.int8_gain}'}"
        )
        quiet_in_background()
