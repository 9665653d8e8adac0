"""What takes how long: fitted to a real server by ``veneer-sim fit``, and kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from veneer_server.step.plan import StepPlan

from veneer_loadtest.errors import BadOption

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds, unless named otherwise. The defaults are about those of one core with the
    bundled base; fit them before believing a figure.

    Attributes:
        cpu: name of the processor that they were fitted on; "" for the defaults.
        how: the command, and what to know of the measurement.
        front_s: of a request, from the caller to the engine's queue: network, tokenizing.
        back_s: from the engine to the caller.
        step_s: of a step, whatever it computes.
        row_s: for each sequence that decodes in it.
        prompt_token_s: for each prompt token in it.
        attention_s: for each token of context of its sequences that decode.
        adapter_s: for each adapter in it.
        load_s, load_byte_s: of a load from disk into memory, and for each byte.
        busy_rate: how fast a load proceeds beside steps, of its speed while the engine is idle.
        busy_slowdown: by how much a step takes longer while a load is under way.
        fetch_s, fetch_byte_s: of a fetch from the registry, and for each byte.
        registry_byte_s: for each byte that the registry sends to anybody.
        notify_s: for each follower that the registry tells of a change.
        follow_s: from the registry to a follower, and until that has applied a change.
        reconnect_s: until a follower is back after a partition.
        detect_s: until the ingress notices that a replica is lost.
        noise: what steps and loads took where these were fitted, over what the costs say:
            equally likely factors. A machine that others use too has large ones; without any,
            everything takes exactly what it costs.
    """

    cpu: str = ""
    how: str = ""
    front_s: _Seconds = 3e-3
    back_s: _Seconds = 1e-3
    step_s: _Positive = 6e-3
    row_s: _Seconds = 1.2e-3
    prompt_token_s: _Seconds = 0.25e-3
    attention_s: _Seconds = 0.5e-6
    adapter_s: _Seconds = 0.5e-3
    load_s: _Seconds = 8e-3
    load_byte_s: _Seconds = 3e-9
    busy_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.3
    busy_slowdown: _Seconds = 0.1
    fetch_s: _Seconds = 5e-3
    fetch_byte_s: _Seconds = 8e-9
    registry_byte_s: _Seconds = 0.8e-9
    notify_s: _Seconds = 50e-6
    follow_s: _Seconds = 20e-3
    reconnect_s: _Seconds = 1.0
    detect_s: _Seconds = 1.0
    noise: tuple[_Positive, ...] = ()

    def of_step(self, plan: StepPlan) -> float:
        """Of a step, with no load beside it."""
        seconds, adapters = self.step_s, set()
        for planned in plan.sequences:
            count = len(planned.tokens)
            if count > 1:
                seconds += count * self.prompt_token_s
            else:
                seconds += self.row_s
            seconds += count * planned.start * self.attention_s
            adapters.add(planned.digest)
        adapters.discard(None)
        return seconds + len(adapters) * self.adapter_s

    def of_load(self, size: int) -> float:
        """Of a load of so many bytes, with no step beside it."""
        return self.load_s + size * self.load_byte_s


def read_costs(path: Path | None) -> Costs:
    """From a file that `write_costs` wrote; the defaults without one.

    Raises:
        BadOption: it cannot be read, or is none.
    """
    if path is None:
        return Costs()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Costs)
    except (OSError, msgspec.MsgspecError) as error:
        raise BadOption(
            f"--costs {path}: {error}; `veneer-sim fit` writes such a file",
            metadata={"field": "costs"},
        ) from error


def write_costs(path: Path, costs: Costs) -> None:
    """A small JSON file."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")
