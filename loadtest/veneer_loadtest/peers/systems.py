"""The systems that ``compare`` runs, behind one interface."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
from veneer_client import AsyncClient

from veneer_loadtest.errors import PeerError, TargetFailed
from veneer_loadtest.load.plan import plan, prompt_ids
from veneer_loadtest.load.rounds import Round, send_round
from veneer_loadtest.load.spec import LoadSpec
from veneer_loadtest.load.targets import OpenAiSpec, TargetSpec, VeneerSpec
from veneer_loadtest.peers.gate import GateRequest
from veneer_loadtest.peers.http_peer import HttpPeer
from veneer_loadtest.peers.peft import PeftPeerProcess
from veneer_loadtest.peers.peft_messages import Generate
from veneer_loadtest.results import SystemFacts

_TIMEOUT_S: Final = 600.0


class System(ABC):
    """One system under load; idle between calls.

    Attributes:
        name: the system's name in results.
    """

    def __init__(self, name: str, facts: SystemFacts) -> None:
        self.name = name
        self.facts = facts

    @abstractmethod
    async def round(self, load: LoadSpec) -> Round:
        """Send a load and wait for its end.

        Raises:
            PeerError: a request failed.
        """


class _Server(System):
    """A server that gets its load from a separate process, as from its users."""

    def __init__(self, name: str, facts: SystemFacts, target: TargetSpec) -> None:
        super().__init__(name, facts)
        self._target = target

    async def round(self, load: LoadSpec) -> Round:
        """See `System.round`."""
        try:
            return await send_round(self.name, load, self._target)
        except TargetFailed as error:
            raise PeerError(str(error)) from error


class VeneerSystem(_Server):
    """Veneer, over gRPC."""

    def __init__(self, client: AsyncClient, facts: SystemFacts) -> None:
        super().__init__("veneer", facts, VeneerSpec(client.address))
        self.client = client


class HttpSystem(_Server):
    """A peer with an OpenAI-compatible endpoint."""

    def __init__(self, peer: HttpPeer, adapters: Sequence[str]) -> None:
        fields: dict[str, dict[str, Any]] = {
            name: peer.request_fields(name) for name in ("", *adapters)
        }
        super().__init__(
            peer.name,
            SystemFacts(command=peer.command, versions=peer.versions, device="cpu"),
            OpenAiSpec(url=peer.url, fields=fields),
        )
        self._peer = peer
        self._fields: Mapping[str, dict[str, Any]] = fields

    async def answers(
        self, requests: Sequence[GateRequest], tokens: int
    ) -> list[tuple[int, ...]]:
        """Send all requests at once; return greedy answers as token ids, for the gate.

        Raises:
            PeerError: the peer rejected a request, or returned no ids.
        """
        return await asyncio.gather(*(self._answer(request, tokens) for request in requests))

    async def _answer(self, request: GateRequest, tokens: int) -> tuple[int, ...]:
        native = self.name == "llama-server"
        body = {
            "prompt": request.prompt,
            "max_tokens": tokens,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            **({"return_tokens": True} if native else {"return_token_ids": True}),
            **self._fields[request.adapter],
        }
        if not native:
            del body["n_predict"]
        path = "/completion" if native else "/v1/completions"
        answer = await asyncio.to_thread(_post, f"{self._peer.url}{path}", body)
        ids = answer.get("tokens") if native else answer["choices"][0].get("token_ids")
        if not ids:
            raise PeerError(f"{self.name} returned no token ids: {answer}")
        return tuple(ids)


def _post(url: str, body: object) -> Any:
    request = urllib.request.Request(
        url, msgspec.json.encode(body), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # nosec B310
            return msgspec.json.decode(answer.read())
    except urllib.error.HTTPError as error:
        raise PeerError(f"{url} refused: {error.read()[:300]!r}") from error
    except OSError as error:
        raise PeerError(f"{url} does not answer: {error}") from error


class PeftSystem(System):
    """transformers + PEFT, which has no server: one padded batch."""

    def __init__(self, peer: PeftPeerProcess) -> None:
        facts = SystemFacts(
            command="python -m veneer_loadtest.peers.peft_process",
            versions=peer.ready.versions,
            device=peer.ready.device,
        )
        super().__init__("peft", facts)
        self._peer = peer

    async def round(self, load: LoadSpec) -> Round:
        """See `System.round`; ``first_token_s`` of every stream is the first step's time."""
        requests = list(plan(load))
        done = await self._peer.generate(
            Generate(
                prompts=[list(prompt_ids(load, request)) for request in requests],
                adapters=[request.adapter for request in requests],
                tokens=load.tokens.high,
            )
        )
        gaps = [after - before for before, after in pairwise(done.step_s)]
        return Round(
            wall_s=done.wall_s,
            tokens=sum(len(row) for row in done.rows),
            first_token_s=(done.step_s[0],) * len(requests),
            gaps_s=tuple(gaps) * len(requests),
            client_cpu_s=0.0,
        )
