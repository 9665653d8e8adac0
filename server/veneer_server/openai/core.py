"""The parts that gRPC and HTTP share, as the gateway's endpoints see them."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer_registry.adapter import BaseSpec

from veneer_server.engine_client.client import EngineClient
from veneer_server.openai.extensions import Unknown
from veneer_server.openai.http.asgi import Bodies
from veneer_server.openai.response_store import StoredResponses
from veneer_server.serving.gate import Gate
from veneer_server.serving.generation import Calls
from veneer_server.serving.generator import Generator
from veneer_server.serving.local_folders import LocalFolders
from veneer_server.serving.registering import FolderPublishing, PublishingHere
from veneer_server.serving.tenants import Tenants
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.pages import Pages


@dataclass(frozen=True, slots=True)
class ServingParts:
    """The parts that exist once the base is known; no call needs them earlier.

    Attributes:
        loading: publishes adapters from folders.
        responses: the store of responses; None if responses are not stored.
    """

    generator: Generator
    tenants: Tenants
    engine: EngineClient
    base: BaseSpec
    loading: FolderPublishing = field(default_factory=PublishingHere)
    responses: StoredResponses | None = None


@dataclass(slots=True)
class ServingCore:
    """The parts that gRPC and HTTP share.

    Attributes:
        reader_limit_s: longest wait for a client to send or read a piece.
        started: when the server started, in Unix seconds.
        pages: makes the pages of metrics.
        local: folders of this machine from which adapters may be loaded.
        unknown_fields: how to treat unknown fields of requests.
        loaded: set before `Calls` lets calls through.
    """

    gate: Gate
    calls: Calls
    metrics: Metrics
    bodies: Bodies
    reader_limit_s: float
    started: int
    pages: Pages
    local: LocalFolders = field(default_factory=LocalFolders)
    unknown_fields: Unknown = "warn"
    loaded: ServingParts | None = None

    @property
    def _there(self) -> ServingParts:
        assert self.loaded is not None, "no call gets this far while the server is loading"
        return self.loaded

    @property
    def generator(self) -> Generator:
        return self._there.generator

    @property
    def tenants(self) -> Tenants:
        return self._there.tenants

    @property
    def loading(self) -> FolderPublishing:
        return self._there.loading

    @property
    def responses(self) -> StoredResponses | None:
        return self._there.responses

    @property
    def engine(self) -> EngineClient:
        return self._there.engine

    @property
    def base(self) -> BaseSpec:
        return self._there.base
