"""The scenario to simulate: a frozen record, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from veneer_loadtest.errors import BadOption

Routing = Literal["adapter", "random", "round-robin", "least-loaded"]
ROUTINGS: Final[tuple[Routing, ...]] = get_args(Routing)


@dataclass(frozen=True, slots=True)
class Lose:
    """Replica number ``replica`` is lost with all its running requests. It is back ``back_s``
    later (0: never), with its disk but nothing in memory."""

    at_s: float
    replica: int
    back_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Drain:
    """Replica number ``replica`` takes no new requests from then on."""

    at_s: float
    replica: int


@dataclass(frozen=True, slots=True)
class Partition:
    """The registry cannot be reached for ``seconds``."""

    at_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Publish:
    """Adapter number ``adapter`` gets a new revision; 0 is the most popular adapter."""

    at_s: float
    adapter: int


Happening = Lose | Drain | Partition | Publish


@dataclass(frozen=True, slots=True)
class Scenario:
    """A cluster and its load.

    Attributes:
        in_memory: number of adapters that fit into a replica's memory.
        on_disk: number of adapters that fit into a replica's disk cache, fetched from the
            registry on first use; 0: all are on its disk from the start.
        adapter_bytes: size of each adapter.
        zipf: exponent of the adapters' popularity.
        rate: requests per second in all, on average.
        burst_share: share of the requests that arrive in bursts of single tenants.
        burst: number of requests in a burst, and its length in seconds.
        tenants: adapter i belongs to tenant i modulo this.
        prompt_tokens, answer_tokens: mean lengths; lengths are uniform from half to one and a
            half times the mean.
        session_share: share of the requests that belong to a session; prompts of a session
            share a prefix.
        warm: share of the requests at the start that figures leave out.
        report_s: seconds between a replica's reports to the router.
        kv_tokens: size of a replica's KV cache, in tokens.
    """

    replicas: int = 2
    adapters: int = 64
    in_memory: int = 16
    on_disk: int = 0
    adapter_bytes: int = 9_768_960
    zipf: float = 1.0
    requests: int = 2000
    rate: float = 10.0
    burst_share: float = 0.0
    burst: tuple[int, float] = (100, 5.0)
    tenants: int = 8
    prompt_tokens: int = 48
    answer_tokens: int = 16
    session_share: float = 0.0
    warm: float = 0.1
    report_s: float = 1.0
    kv_tokens: int = 16_384
    seed: int = 1
    happenings: tuple[Happening, ...] = ()

    def __post_init__(self) -> None:
        """Check the scenario; raises `BadOption`."""
        for name in (
            "replicas",
            "adapters",
            "in_memory",
            "adapter_bytes",
            "requests",
            "rate",
            "tenants",
            "prompt_tokens",
            "answer_tokens",
            "report_s",
        ):
            if getattr(self, name) <= 0:
                raise _bad(name, "must be more than 0")
        for name in ("burst_share", "session_share", "warm"):
            if not 0 <= getattr(self, name) < 1:
                raise _bad(name, "must be at least 0 and less than 1")
        if self.on_disk and self.on_disk < self.in_memory:
            raise _bad("on_disk", "must be 0, or at least as many as fit into memory")
        longest = 1.5 * (self.prompt_tokens + self.answer_tokens) + 2
        if longest > min(self.kv_tokens, 2048):
            raise _bad("prompt_tokens", f"such requests take up to {longest:.0f} tokens")
        for happening in self.happenings:
            match happening:
                case Lose(replica=number) | Drain(replica=number):
                    if not 0 <= number < self.replicas:
                        raise _bad("replica", f"{number}: they are 0 to {self.replicas - 1}")
                case Publish(adapter=number):
                    if not 0 <= number < self.adapters:
                        raise _bad("adapter", f"{number}: they are 0 to {self.adapters - 1}")


def _bad(name: str, why: str) -> BadOption:
    return BadOption(f"--{name.replace('_', '-')} {why}", metadata={"field": name})
