"""How long each operation takes, fitted to a real server by ``veneer-sim fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from veneer_server.step.plan import StepPlan

from veneer_loadtest.errors import BadOption

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The cost of each operation, in seconds unless its name says otherwise. The defaults
    roughly fit one core with the bundled base; fit the costs before believing a figure.

    Attributes:
        cpu: name of the processor on which they were fitted; "" for the defaults.
        how: the command that fitted them, and notes on the measurement.
        front_s: from the caller to the engine's queue, for a request: network, tokenizing.
        back_s: from the engine to the caller.
        step_s: fixed cost of a step.
        row_s: cost per sequence that decodes in a step.
        prompt_token_s: cost per prompt token in a step.
        attention_s: cost per token computed in a step and token of context before it.
        adapter_s: cost per adapter in a step.
        load_s, load_byte_s: fixed cost of a load from disk into memory, and cost per byte.
        busy_rate: speed of a load while the engine runs steps, as a fraction of its speed
            while the engine is idle.
        busy_slowdown: fraction by which a step takes longer while a load is under way.
        fetch_s, fetch_byte_s: fixed cost of a fetch from the registry, and cost per byte.
        registry_byte_s: cost per byte that the registry sends, over all replicas.
        notify_s: cost per follower that the registry notifies of a change.
        follow_s: from the registry's message until the follower has applied a change.
        reconnect_s: until a follower is connected again after a partition or a loss.
        detect_s: until the ingress notices that a replica is lost.
        base_parameters: number of parameters of the base. Tokens of an adapter that is large
            beside it count for several, as the server counts them (`token_work`); 0 counts all
            tokens alike. The default is the bundled base's.
        noise: equally likely factors: the measured times of steps and loads, divided by their
            costs. They are large on a machine that others use too. Without any, each operation
            takes exactly its cost.
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
    base_parameters: Annotated[int, msgspec.Meta(ge=0)] = 134_515_008
    noise: tuple[_Positive, ...] = ()

    def of_step(self, plan: StepPlan) -> float:
        """Return the seconds that a step takes while no load runs."""
        seconds, adapters = self.step_s, set()
        for planned in plan.sequences:
            count = len(planned.tokens)
            each = self.prompt_token_s if count > 1 else self.row_s
            seconds += count * each * planned.work
            seconds += count * planned.start * self.attention_s
            adapters.add(planned.digest)
        adapters.discard(None)
        return seconds + len(adapters) * self.adapter_s

    def of_load(self, size: int) -> float:
        """Return the seconds that a load of ``size`` bytes takes while no step runs."""
        return self.load_s + size * self.load_byte_s


def read_costs(path: Path | None) -> Costs:
    """Read costs from a file that `write_costs` wrote; without a file, return the defaults.

    Raises:
        BadOption: the file cannot be read, or is not a file of costs.
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
    """Write the costs as a small JSON file."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")
