"""The server's sockets: gRPC, the HTTP gateway and Prometheus.

They are opened before the base is loaded, so that a port in use is reported at once, and
callers learn that the model is loading. The services that answer are supplied later.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from veneer_registry.errors import VeneerError

from veneer_server.access.audit import Audit
from veneer_server.access.authenticate import Access, TokenCheck
from veneer_server.access.certificates import Certificates
from veneer_server.access.identity_file import IdentityFile
from veneer_server.access.methods import ADMIN, GENERATES
from veneer_server.config import Address, ServerConfig
from veneer_server.queues.refusal_pace import RefusalPace
from veneer_server.quotas.rates import Quotas
from veneer_server.rpc.adapter_service import AdapterService
from veneer_server.rpc.inference_service import InferenceService
from veneer_server.rpc.interceptors import CallInterceptor
from veneer_server.rpc.open_calls import OpenCalls
from veneer_server.rpc.replication_service import NoFollowers, ReplicationService
from veneer_server.rpc.server_service import SERVICES, Health, ServerService
from veneer_server.rpc.transport.channel import (
    LaterServices,
    channel_options,
    enable_reflection,
    grpc_credentials,
)
from veneer_server.rpc.transport.connections import Connections
from veneer_server.rpc.transport.receiving import Receiving
from veneer_server.serving.gate import Gate
from veneer_server.serving.generation import Calls
from veneer_server.serving.local_folders import LocalFolders
from veneer_server.serving.tenants import Tenants
from veneer_server.system.hosts import AllowedHosts
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.pages import Pages
from veneer_server.telemetry.scrape import ScrapeServer

if TYPE_CHECKING:
    from veneer_server.openai.gateway import Gateway


class CannotListen(VeneerError):
    """An address is in use or does not exist."""

    code = "FAILED_PRECONDITION"
    reason = "CANNOT_LISTEN"


@dataclass(frozen=True, slots=True)
class Bound:
    """Where the sockets listen; None for one that is off."""

    grpc: Address
    metrics: Address | None
    openai: Address | None
    admin: Address | None

    def told(self, off: str) -> dict[str, str]:
        """The addresses as text, by name; ``off`` is the text for sockets that are off."""
        return {
            "grpc": str(self.grpc),
            "metrics": str(self.metrics or off),
            "openai": str(self.openai or off),
            "admin": str(self.admin or off),
        }


class Doors:
    """The server's sockets: `open` opens them, services are supplied later, and
    `stop_accepting` and `stop` close them.

    Attributes:
        access: authenticates calls.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        metrics: Metrics,
        calls: Calls,
        health: Health,
        pace: RefusalPace,
        quotas: Quotas,
    ) -> None:
        """Raises InvalidField if the files with keys or certificates cannot be used."""
        self.gateway: Gateway | None = None
        self.access = Access(
            None if config.keys_file is None else IdentityFile(config.keys_file),
            _tokens(config),
        )
        self._audit = Audit(None)
        self._certificates = None
        if config.tls_cert is not None and config.tls_key is not None:
            self._certificates = Certificates(
                config.tls_cert, config.tls_key, config.tls_client_ca
            )
        self._config = config
        self._metrics = metrics
        self._calls = calls
        self._health = health
        self._pace = pace
        self._quotas = quotas
        self._servers: list[Any] = []
        self._scraping: ScrapeServer | None = None
        self._pages = Pages(metrics.registry)
        # Both gRPC ports share these bounds.
        self._receiving = Receiving(limit_s=config.reader_limit)
        self._open_calls = OpenCalls(watchers=config.max_watchers)
        self._services = LaterServices()
        self._check_wire: Callable[[bytes], None] = lambda request: None

    async def open(self, resources: AsyncExitStack, connections: int) -> Bound:
        """Listen on all configured addresses; ``resources`` closes the sockets.

        Args:
            connections: maximum for each port.

        Raises:
            CannotListen: an address cannot be bound.
            InvalidField: the audit log cannot be opened.
        """
        audit_log = self._config.audit_log
        if audit_log is None and self.access.asks:
            audit_log = self._config.data_dir / "audit.jsonl"
        self._audit = Audit(
            audit_log,
            keyed=self.access.asks,
            on_written=self._metrics.audit_written.inc,
            on_lost=self._metrics.audit_lost.inc,
            on_left_out=self._metrics.audit_left_out.inc,
        )
        resources.callback(self._audit.close)
        resources.callback(self._pages.close)
        metrics = await self._open_metrics(resources)
        elsewhere = frozenset() if self._config.admin_listen is None else ADMIN
        openai = await self._open_openai(resources, connections, self._gate(elsewhere))
        admin = await self._open_admin(resources, connections)
        grpc = await self._open_grpc(
            resources, connections, "--listen", self._config.listen, self._gate(elsewhere)
        )
        return Bound(grpc, metrics, openai, admin)

    def _gate(self, elsewhere: frozenset[str]) -> Gate:
        """The gate of a port that does not answer the methods ``elsewhere``."""
        return Gate(
            self._metrics,
            access=self.access,
            audit=self._audit,
            pace=self._pace,
            quotas=self._quotas,
            elsewhere=elsewhere,
        )

    @property
    def _http_tls(self) -> ssl.SSLContext | None:
        return None if self._certificates is None else self._certificates.http_context

    @property
    def opened(self) -> bool:
        """Whether calls may have arrived."""
        return bool(self._servers)

    def scrape(self, tenants: Tenants, resources: AsyncExitStack) -> None:
        """Let scrapes read the registries too, until ``resources`` is closed."""
        if self._scraping is None and self.gateway is None:
            return
        self._metrics.ask(tenants)
        resources.callback(self._pages.close)  # before the registries close
        if self._scraping is not None:
            resources.push_async_callback(self._scraping.stop)

    def answer_grpc(
        self,
        inference: InferenceService,
        adapters: AdapterService,
        about: ServerService,
        replication: ReplicationService | NoFollowers,
    ) -> None:
        """Answer gRPC calls with these services from now on."""
        self._services.answer_by(inference, adapters, about, replication)
        self._check_wire = inference.check_wire

    def stop_accepting(self) -> None:
        """Accept no new connections to the gateway."""
        if self.gateway is not None:
            self.gateway.stop_accepting()

    async def stop(self, grace_s: float) -> None:
        """End the remaining calls; answers are flushed within the grace."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        if self.gateway is not None:
            await self.gateway.stop()

    async def _open_metrics(self, resources: AsyncExitStack) -> Address | None:
        wanted = self._config.metrics_listen
        if wanted is None:
            return None
        hosts = self._hosts(wanted)
        scraping = ScrapeServer(self._pages, hosts, access=self.access, tls=self._http_tls)
        try:
            address = await scraping.start(wanted)
        except OSError as error:
            raise _cannot_listen(
                "--metrics-listen", wanted, error.strerror or str(error)
            ) from error
        self._scraping = scraping
        resources.push_async_callback(scraping.stop)
        return address

    def _hosts(self, address: Address) -> AllowedHosts:
        given = self._config.allowed_hosts
        return AllowedHosts(address, given, keyless=not self.access.asks)

    async def _open_admin(self, resources: AsyncExitStack, most: int) -> Address | None:
        wanted = self._config.admin_listen
        if wanted is None:
            return None
        return await self._open_grpc(
            resources, most, "--admin-listen", wanted, self._gate(frozenset())
        )

    async def _open_grpc(
        self,
        resources: AsyncExitStack,
        most: int,
        flag: str,
        wanted: Address,
        gate: Gate,
    ) -> Address:
        """Open a gRPC port."""
        capacity = self._config.max_running + self._config.max_queue
        connections = Connections(most, keyless=not self.access.asks)
        server = grpc.aio.server(
            interceptors=[
                CallInterceptor(
                    gate,
                    self._metrics,
                    self._calls,
                    self._receiving,
                    open_calls=self._open_calls,
                    connections=connections,
                    checks=dict.fromkeys(GENERATES, lambda request: self._check_wire(request)),
                )
            ],
            options=channel_options(
                reader_limit_s=self._config.reader_limit,
                connections=most,
                generations=capacity,
            ),
        )
        self._services.add_to(server)
        await self._health.add_to(server)
        enable_reflection([*SERVICES, "grpc.health.v1.Health"], server)
        try:
            _check_free(wanted)
            if self._certificates is None:
                port = server.add_insecure_port(str(wanted))
            else:
                credentials = grpc_credentials(self._certificates)
                port = server.add_secure_port(str(wanted), credentials)
        except OSError as error:
            raise _cannot_listen(flag, wanted, error.strerror or str(error)) from error
        except RuntimeError as error:
            raise _cannot_listen(flag, wanted, str(error)) from error
        await server.start()
        self._servers.append(server)
        resources.push_async_callback(server.stop, 0)
        resources.callback(asyncio.create_task(connections.watch(port)).cancel)
        return Address(wanted.host, port)

    async def _open_openai(
        self, resources: AsyncExitStack, most: int, gate: Gate
    ) -> Address | None:
        wanted = self._config.openai_listen
        if wanted is None:
            return None
        # Imported here, since its dependencies are an optional extra.
        from veneer_server.openai.gateway import Gateway
        from veneer_server.openai.http.cors import Cors

        gateway = Gateway(
            gate,
            calls=self._calls,
            metrics=self._metrics,
            hosts=self._hosts(wanted),
            reader_limit_s=self._config.reader_limit,
            max_connections=most,
            tls=self._http_tls,
            pages=self._pages,
            cors=Cors(self._config.cors_origin),
            local=LocalFolders(self._config.lora_root, self._config.max_adapter_bytes),
            unknown_fields=self._config.unknown_fields,
        )
        try:
            address = await gateway.start(wanted)
        except OSError as error:
            raise _cannot_listen(
                "--openai-listen", wanted, error.strerror or str(error)
            ) from error
        self.gateway = gateway
        resources.push_async_callback(gateway.stop)
        return address


def _tokens(config: ServerConfig) -> TokenCheck | None:
    if not config.jwt_issuer:
        return None
    # Imported here, since its libraries make each start longer.
    from veneer_server.access.tokens import TokenSettings, TokenVerifier

    return TokenVerifier(
        TokenSettings(
            issuer=config.jwt_issuer,
            audience=config.jwt_audience,
            keys=config.jwt_keys,
            tenant_claim=config.jwt_tenant_claim,
            roles_claim=config.jwt_roles_claim,
        )
    )


def _check_free(address: Address) -> None:
    """Raise OSError if the address cannot be bound: gRPC's own error says less, and gRPC also
    prints a line."""
    family, _, _, _, where = socket.getaddrinfo(address.host, address.port)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)


def _cannot_listen(flag: str, address: Address, why: str) -> CannotListen:
    return CannotListen(
        f"cannot listen on {address} ({why}): stop the program that uses it, or choose "
        f"another {flag}",
        metadata={"flag": flag, "address": str(address)},
    )
