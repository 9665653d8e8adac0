"""The definition of a load, from command-line options and as data for worker processes.

All randomness depends only on ``seed`` and the request's number, so one worker or eight send
the same load.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from veneer_loadtest.errors import BadOption


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """Closed loop: each of ``streams`` sends its next request when its last one has ended."""

    streams: int


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Open loop: requests arrive at their own times, however slow the server is.

    Attributes:
        rate: mean requests a second.
        cv: coefficient of variation (standard deviation / mean) of the time between two
            arrivals, which is Gamma distributed: 1 is a Poisson process, 0 a metronome,
            4 comes in bursts.
    """

    rate: float
    cv: float = 1.0


class Traced(msgspec.Struct, frozen=True, tag="trace"):
    """Requests from a trace file (see `trace`), with their times divided by ``speed``."""

    path: str
    speed: float = 1.0


Arrivals = Closed | Open | Traced

PopularityKind = Literal["identical", "uniform", "zipf", "powerlaw", "distinct", "roundrobin"]


class AdapterMix(msgspec.Struct, frozen=True):
    """How each request's adapter is chosen.

    - ``identical``: always the first one
    - ``uniform``: each equally likely
    - ``zipf:S``: the k-th with probability proportional to 1 / k^S
    - ``powerlaw:A``: the adapter at floor(n * U^(1/A)) of n, U uniform, as in S-LoRA's
      benchmark; 1 is uniform, below 1 the first adapters are used more often
    - ``distinct``: each once per cycle, every cycle in a new random order
    - ``roundrobin``: in order, again and again (the worst case for an LRU cache that is
      too small)
    """

    kind: PopularityKind = "uniform"
    parameter: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}:{self.parameter:g}" if self.kind in _DEFAULTS else self.kind


_DEFAULTS: Final[dict[str, float]] = {"zipf": 1.0, "powerlaw": 0.5}
_PLAIN: Final = ("identical", "uniform", "distinct", "roundrobin")


class Lengths(msgspec.Struct, frozen=True):
    """Distribution of a number of tokens: uniform between ``low`` and ``high``, both
    included; or, if ``mean`` is set, log-normal with that mean and coefficient of variation
    ``cv``, clipped to ``low``..``high``."""

    low: int
    high: int
    mean: float = 0.0
    cv: float = 0.0

    def __str__(self) -> str:
        if self.mean:
            return f"lognormal:{self.mean:g}:{self.cv:g}:{self.high}"
        return f"{self.low}..{self.high}" if self.low < self.high else str(self.low)


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One load.

    Attributes:
        adapters: names in order of popularity; ``""`` is the base model.
        duration_s: no request is begun after it, or after ``requests``, whichever comes
            first. 0: no limit (for a trace: its end).
        warmup_s: requests due before this time are sent but not measured.
        requests: maximum number of requests; 0: no limit.
        cancel_share: share of the requests, 0 to 1, whose caller cancels. It does so after
            0 to all but one of the tokens, each number equally likely.
        text: prompts are words, not token ids.
        vocab: size of the base's vocabulary, from which token ids are sampled.
        ignore_eos: answers continue after an end of sequence, so that all have the requested
            length. OpenAI's own API does not support it.
    """

    adapters: tuple[str, ...]
    arrivals: Arrivals
    popularity: AdapterMix
    prompt_tokens: Lengths
    tokens: Lengths
    duration_s: float
    warmup_s: float
    requests: int
    cancel_share: float
    seed: int
    vocab: int
    text: bool = False
    ignore_eos: bool = True


def parse_arrivals(
    *, rate: float | None, streams: int | None, arrivals: str, trace: str | None, speed: float
) -> Arrivals:
    """Parse the arrivals from ``--rate``/``--arrivals``, ``--streams`` or ``--trace``.

    Raises:
        BadOption: none or several of these are given, or a value is invalid.
    """
    if (rate is not None) + (streams is not None) + (trace is not None) != 1:
        raise BadOption(
            "give one of --rate R (open loop, requests a second), --streams N (closed loop) "
            "and --trace FILE",
            metadata={"one_of": "--rate --streams --trace"},
        )
    if streams is not None:
        if streams < 1:
            raise BadOption(
                f"--streams {streams}: give 1 or more", metadata={"field": "--streams"}
            )
        return Closed(streams)
    if trace is not None:
        if not (speed > 0 and math.isfinite(speed)):
            raise BadOption(
                f"--speed {speed:g}: give a number above 0; 2 is twice as fast",
                metadata={"field": "--speed"},
            )
        return Traced(trace, speed)
    assert rate is not None
    if not (rate > 0 and math.isfinite(rate)):
        raise BadOption(
            f"--rate {rate:g}: give requests a second, above 0", metadata={"field": "--rate"}
        )
    return Open(rate, _cv(arrivals))


def _cv(arrivals: str) -> float:
    kind, _, parameter = arrivals.partition(":")
    if kind in ("poisson", "constant") and not parameter:
        return 1.0 if kind == "poisson" else 0.0
    value = _number(parameter)
    if kind == "gamma" and value is not None and value >= 0:
        return value
    raise BadOption(
        f"--arrivals {arrivals!r}: give poisson, constant, or gamma:CV with the coefficient "
        "of variation, such as gamma:4",
        metadata={"field": "--arrivals"},
    )


def parse_popularity(text: str) -> AdapterMix:
    """Parse ``uniform``, ``zipf:1.2`` ...: see `AdapterMix`.

    Raises:
        BadOption: anything else.
    """
    kind, colon, parameter = text.partition(":")
    if kind in _PLAIN and not colon:
        return AdapterMix(kind)  # type: ignore[arg-type]
    if kind in _DEFAULTS:
        value = _number(parameter) if colon else _DEFAULTS[kind]
        if value is not None and value > 0:
            return AdapterMix(kind, value)  # type: ignore[arg-type]
    raise BadOption(
        f"--popularity {text!r}: give identical, uniform, zipf:S, powerlaw:A (S and A above "
        "0), distinct or roundrobin",
        metadata={"field": "--popularity"},
    )


def parse_lengths(option: str, text: str) -> Lengths:
    """Parse ``64``, ``16..64`` or ``lognormal:MEAN:CV:MAX``.

    Raises:
        BadOption: anything else; names ``option``.
    """
    if text.startswith("lognormal:"):
        numbers = [_number(part) for part in text.split(":")[1:]]
        if len(numbers) == 3 and all(n is not None and n > 0 for n in numbers):
            mean, cv, high = (float(n) for n in numbers if n is not None)
            if mean <= high == int(high):
                return Lengths(1, int(high), mean, cv)
    else:
        low, dots, high_text = text.partition("..")
        if low.isdecimal() and (not dots or high_text.isdecimal()):
            ends = int(low), int(high_text or low)
            if 1 <= ends[0] <= ends[1]:
                return Lengths(*ends)
    raise BadOption(
        f"{option} {text!r}: give tokens as 64, as a range such as 16..64, or as "
        "lognormal:MEAN:CV:MAX, such as lognormal:200:1:1000",
        metadata={"field": option},
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
