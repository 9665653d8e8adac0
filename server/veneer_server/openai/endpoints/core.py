"""The parts that gRPC and HTTP share, as the gateway's endpoints see them."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer_registry.adapter import BaseSpec

from veneer_server.access.audit import Audit
from veneer_server.engine_client.client import EngineClient
from veneer_server.openai.http.asgi import Bodies
from veneer_server.queues.refusal_pace import Pace
from veneer_server.quotas.rates import Quotas
from veneer_server.serving.calls import Calls
from veneer_server.serving.generator import Generator
from veneer_server.serving.local_folders import LocalFolders
from veneer_server.serving.tenants.tenants import Tenants
from veneer_server.serving.transfer.loading import Loading, LoadingHere
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.pages import Pages

__all__ = ["Core", "Loaded"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parts that exist once the base is known; no call needs them earlier.

    Attributes:
        loading: publishes what lies in a folder.
    """

    generator: Generator
    tenants: Tenants
    engine: EngineClient
    base: BaseSpec
    loading: Loading = field(default_factory=LoadingHere)


@dataclass(slots=True)
class Core:
    """The parts that gRPC and HTTP share.

    Attributes:
        reader_limit_s: longest wait for a client to send or read a piece.
        started: when the server started, in Unix seconds.
        pages: of metrics.
        local: folders of this machine from which adapters may be loaded.
        loaded: set before `Calls` lets calls through.
    """

    calls: Calls
    metrics: Metrics
    bodies: Bodies
    pace: Pace
    reader_limit_s: float
    started: int
    pages: Pages
    local: LocalFolders = field(default_factory=LocalFolders)
    audit: Audit = field(default_factory=lambda: Audit(None))
    quotas: Quotas = field(default_factory=Quotas)
    loaded: Loaded | None = None

    @property
    def _there(self) -> Loaded:
        assert self.loaded is not None, "no call gets this far while the server is loading"
        return self.loaded

    @property
    def generator(self) -> Generator:
        return self._there.generator

    @property
    def tenants(self) -> Tenants:
        return self._there.tenants

    @property
    def loading(self) -> Loading:
        return self._there.loading

    @property
    def engine(self) -> EngineClient:
        return self._there.engine

    @property
    def base(self) -> BaseSpec:
        return self._there.base
