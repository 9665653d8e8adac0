"""The scenario to simulate: a frozen record, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.trace import TraceLine
from veneer_loadtest.simulation.costs import Costs

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
class Slo:
    """What a service promises; None is no promise.

    Attributes:
        ttft_s, itl_s: the 99th percentile of TTFT and of the time between tokens.
        refused: maximum share of the requests that get no answer.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    refused: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaKind:
    """Replicas on one kind of machine.

    Attributes:
        replicas: their number at the start.
        price: what one costs per hour, in any currency; 0 if that does not matter.
        costs: how long its steps and loads take; None: the run's costs.
        in_memory, kv_tokens: as in `Scenario`, and by default the scenario's.
    """

    name: str = "replica"
    replicas: int = 1
    price: float = 0.0
    costs: Costs | None = None
    in_memory: int | None = None
    kv_tokens: int | None = None


ScalingPolicy = Literal["ray", "hpa"]
SCALING: Final[tuple[ScalingPolicy, ...]] = get_args(ScalingPolicy)


@dataclass(frozen=True, slots=True)
class Scaling:
    """The number of replicas follows the load; the scenario's number is the minimum.

    Attributes:
        policy: see `scaling`.
        most: maximum number of replicas.
        cold_start_s: seconds from the decision until a new replica takes requests: its machine
            starts, the base is loaded, the first steps are run. It has no adapter then, in
            memory or in its disk cache.
        slo: a request breaks it if its own first token or one of its tokens is later than
            this, or if it gets no answer.
    """

    policy: ScalingPolicy
    most: int
    cold_start_s: float = 60.0
    slo: Slo = Slo()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A cluster and its load.

    Attributes:
        in_memory: number of adapters of average size that fit into a replica's memory.
        on_disk: number of adapters of average size that fit into a replica's disk cache,
            fetched from the registry on first use; 0: all are on its disk from the start.
        adapter_bytes: size of each adapter, unless there are `ranks`.
        ranks: (rank, weight): the share of the adapters with this rank is its weight over the
            sum of all weights. Such an adapter's size is its rank times `rank_bytes`.
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
        context_length: maximum tokens of a request, prompt and answer.
        max_queue: most requests that wait at a replica; it refuses others.
        kinds: kinds of replicas, instead of `replicas` and `price`.
        price: what a replica costs per hour.
        trace: requests to replay, in order of time, instead of those that the other
            attributes describe. Those without an adapter ask for the base; if no request has
            an adapter, adapters are drawn by `zipf`.
        speed: the trace's times are divided by this.
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
    context_length: int = 2048
    max_queue: int = 256
    seed: int = 1
    happenings: tuple[Happening, ...] = ()
    ranks: tuple[tuple[int, float], ...] = ()
    rank_bytes: int = 610_560
    kinds: tuple[ReplicaKind, ...] = ()
    price: float = 0.0
    scaling: Scaling | None = None
    trace: tuple[TraceLine, ...] = ()
    speed: float = 1.0

    @property
    def fleet(self) -> tuple[ReplicaKind, ...]:
        """The kinds of replicas."""
        return self.kinds or (ReplicaKind(replicas=self.replicas, price=self.price),)

    @property
    def count(self) -> int:
        """Number of requests."""
        return len(self.trace) or self.requests

    def __post_init__(self) -> None:
        """Check the scenario; raises `BadOption`."""
        for name in (
            "replicas",
            "adapters",
            "in_memory",
            "adapter_bytes",
            "rank_bytes",
            "requests",
            "rate",
            "speed",
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
        for name in ("max_queue", "price"):
            if getattr(self, name) < 0:
                raise _bad(name, "must be at least 0")
        if self.on_disk and self.on_disk < self.in_memory:
            raise _bad("on_disk", "must be 0, or at least as many as fit into memory")
        self._check_fleet()
        self._check_lengths()
        replicas = sum(kind.replicas for kind in self.fleet)
        for happening in self.happenings:
            match happening:
                case Lose(replica=number) | Drain(replica=number):
                    if not 0 <= number < replicas:
                        raise _bad("replica", f"{number}: they are 0 to {replicas - 1}")
                case Publish(adapter=number):
                    if not 0 <= number < self.adapters:
                        raise _bad("adapter", f"{number}: they are 0 to {self.adapters - 1}")

    def _check_fleet(self) -> None:
        if any(rank < 1 or not weight > 0 for rank, weight in self.ranks):
            raise _bad("ranks", "must be ranks of 1 or more, with weights of more than 0")
        names = [kind.name for kind in self.fleet]
        if len({*names}) < len(names):
            raise _bad("kind", "must have another name than the other kinds")
        for kind in self.fleet:
            if kind.replicas < 1 or kind.price < 0:
                raise _bad(
                    "kind", f"{kind.name}: give 1 replica or more, and a price of 0 or more"
                )
        if self.scaling is None:
            return
        if len(self.fleet) > 1:
            raise _bad("autoscale", "adds replicas of one kind: give one --kind")
        if self.scaling.most < self.fleet[0].replicas:
            raise _bad("most", f"must be at least {self.fleet[0].replicas}, the minimum")
        if self.scaling.cold_start_s < 0:
            raise _bad("cold_start", "must be at least 0 seconds")

    def _check_lengths(self) -> None:
        smallest = min(kind.kv_tokens or self.kv_tokens for kind in self.fleet)
        most = min(smallest, self.context_length)
        if not self.trace:
            longest = 1.5 * (self.prompt_tokens + self.answer_tokens) + 2
            if longest > most:
                raise _bad(
                    "prompt_tokens",
                    f"such requests take up to {longest:.0f} tokens: give fewer, or "
                    f"--context-length and --kv-tokens of {longest:.0f} or more",
                )
            return
        if any(line.prompt for line in self.trace):
            raise _bad(
                "trace",
                "has a request with `prompt`, a text: give `prompt_tokens`, their number",
            )
        line = max(self.trace, key=lambda line: line.prompt_tokens + line.tokens)
        if (whole := line.prompt_tokens + line.tokens + 2) > most:
            raise _bad(
                "trace",
                f"has a request of {line.prompt_tokens} prompt tokens and {line.tokens} new "
                f"ones: give --context-length and --kv-tokens of {whole} or more",
            )


def _bad(name: str, why: str) -> BadOption:
    return BadOption(f"--{name.replace('_', '-')} {why}", metadata={"field": name})
