"""The result of ``compare``."""

from __future__ import annotations

from typing import Any

import msgspec

from veneer_loadtest.results.facts import FORMAT


class SystemFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One of the systems: how it was started, its versions, its device."""

    command: str
    versions: dict[str, str]
    device: str


class ReferenceGate(msgspec.Struct, frozen=True, kw_only=True):
    """Veneer against PEFT, both with the same 4-bit weights: what was measured and allowed.

    Attributes:
        tokens: teacher-forced tokens compared (prompts and answers).
        mean, p99, worst: absolute difference of log-probabilities, nats.
        mean_bound, p99_bound: what is allowed.
        other_adapter_mean: mean absolute difference that another adapter makes in
            PEFT; None with one adapter.
        regret: how far the worst answer falls short of PEFT's likeliest tokens under
            its own adapter, nats per token; ``regret_bound`` is what is allowed.
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
    """A peer with other weights (bfloat16, GGUF), whose log-probabilities cannot equal the
    reference's: its answers must be clearly likelier, in PEFT, under their own adapters.

    Attributes:
        regret: nats per token by which answers fall short of PEFT's likeliest tokens under
            their own adapter, on average; ``other_regret``: under all others.
        own_best: answers that are likeliest under their own adapter, of ``answers``.
    """

    answers: int
    own_best: int
    regret: float
    other_regret: float | None


class FigureRange(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of several rounds."""

    median: float
    low: float
    high: float


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds."""

    p50: float
    p99: float


class RoundFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One round; rounds are in the order in which they ran."""

    wall_s: float
    tokens: int


class SystemFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One system at one level.

    Attributes:
        client_cpu_share: CPU time of the load generator / wall time.
    """

    tokens_per_s: FigureRange
    first_token_ms: Ends
    inter_token_ms: Ends
    client_cpu_share: float
    rounds: list[RoundFigures]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Veneer against a peer; above 1 Veneer is better. In a closed loop output tokens per
    second, Veneer / peer; in an open loop, where the request rate limits tokens, the median
    first token, peer / Veneer.

    Attributes:
        ratio: of the medians; ``low`` and ``high``: of pairs of successive rounds.
        ranges_overlap: if so, neither a win nor a loss may be claimed.
    """

    ratio: float
    low: float
    high: float
    ranges_overlap: bool


class CompareLevel(msgspec.Struct, frozen=True, kw_only=True):
    """All systems under one load; ``ratios`` by peer.

    Attributes:
        streams: of a closed loop; 0 in an open one.
        rate: of an open loop, requests per second; 0 in a closed one.
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
        gate: of Veneer; ``peer_gates``: of peers with other weights. Speed is measured only
            after they have passed.
        partial: the run was ended early; ``why`` says by what.
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
