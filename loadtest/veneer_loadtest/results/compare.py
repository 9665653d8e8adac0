"""The result of ``compare``."""

from __future__ import annotations

from typing import Any

import msgspec

from veneer_loadtest.results.facts import FORMAT


class SystemFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about one system: how it was started, its versions, its device."""

    command: str
    versions: dict[str, str]
    device: str


class ReferenceGate(msgspec.Struct, frozen=True, kw_only=True):
    """The gate of Veneer against PEFT, both with the same 4-bit weights.

    Attributes:
        tokens: teacher-forced tokens compared (prompts and answers).
        mean, p99, worst: absolute difference of log-probabilities, nats.
        mean_bound, p99_bound: the largest allowed ``mean`` and ``p99``.
        other_adapter_mean: mean absolute difference in PEFT between another adapter and
            the right one; None with one adapter.
        regret: how far the worst answer falls short of PEFT's likeliest tokens under
            its own adapter, nats per token; ``regret_bound``: the largest allowed.
        other_adapter_regret: the same under another adapter, on average; None with
            one adapter.
        answers: number of scored answers.
    """

    tokens: int
    mean: float
    p99: float
    worst: float
    mean_bound: float
    p99_bound: float
    other_adapter_mean: float | None
    regret: float
    regret_bound: float
    other_adapter_regret: float | None
    answers: int


class AnswersGate(msgspec.Struct, frozen=True, kw_only=True):
    """The gate of a peer with other weights (bfloat16, GGUF). Its log-probabilities cannot
    equal the reference's, so its answers must be clearly likelier, in PEFT, under their own
    adapters.

    Attributes:
        regret: nats per token by which answers fall short of PEFT's likeliest tokens under
            their own adapter, on average; ``other_regret``: under all others.
        own_best: how many of ``answers`` are likeliest under their own adapter.
    """

    answers: int
    own_best: int
    regret: float
    other_regret: float | None


class FigureRange(msgspec.Struct, frozen=True, kw_only=True):
    """Median and range of a figure over several rounds."""

    median: float
    low: float
    high: float


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles, in milliseconds."""

    p50: float
    p99: float


class RoundFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One round; rounds are in the order in which they ran."""

    wall_s: float
    tokens: int


class SystemFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one system at one level.

    Attributes:
        client_cpu_share: CPU time of the load generator / wall time.
    """

    tokens_per_s: FigureRange
    first_token_ms: Ends
    inter_token_ms: Ends
    client_cpu_share: float
    rounds: list[RoundFigures]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Veneer compared with a peer; above 1 Veneer is better. In a closed loop this is output
    tokens per second, Veneer / peer. In an open loop the request rate limits tokens, so this is
    the median time to first token, peer / Veneer.

    Attributes:
        ratio: ratio of the medians; ``low`` and ``high``: of pairs of successive rounds.
        ranges_overlap: if true, neither a win nor a loss may be claimed.
    """

    ratio: float
    low: float
    high: float
    ranges_overlap: bool


class CompareLevel(msgspec.Struct, frozen=True, kw_only=True):
    """All systems under one load; ``ratios`` by peer.

    Attributes:
        streams: number of streams of a closed loop; 0 for an open loop.
        rate: rate of an open loop, requests per second; 0 for a closed loop.
        disturbed: rounds that began while the machine was busy with something else.
    """

    streams: int
    rate: float = 0.0
    disturbed: int = 0
    systems: dict[str, SystemFigures]
    ratios: dict[str, Ratio]

    @property
    def title(self) -> str:
        """The load, for display."""
        if self.rate:
            return f"{self.rate:g} requests/s"
        return f"{self.streams} stream{'s' if self.streams != 1 else ''}"


class CompareResult(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="compare"):
    """The file that ``veneer-loadtest compare --json`` writes.

    Attributes:
        systems: by name; ``veneer`` is the first.
        gate: gate of Veneer; ``peer_gates``: gates of peers with other weights. Speed is
            measured only after all gates have passed.
        partial: whether the run was ended early; ``why`` gives the reason.
        summary: ``ratio_N`` for each number of streams (``ratio_Rrps`` for each rate), against
            the best peer; with several peers also ``ratio_N_PEER``.
    """

    format: int = FORMAT
    label: str = ""
    conditions: dict[str, Any]
    versions: dict[str, str]
    workload: dict[str, Any]
    systems: dict[str, SystemFacts]
    gate: ReferenceGate
    peer_gates: dict[str, AnswersGate]
    partial: bool
    why: str
    levels: list[CompareLevel]
    summary: dict[str, float]
