"""The CUDA backend: executes whole steps (`StepArrays`) with our kernels, in static memory.

A step that only decodes is one graph, captured for its bucket by `prepare` or, failing that,
when the bucket is first used. A step with prefill is enqueued operation by operation. Neither
waits for the device: `execute` returns once a step is enqueued, and `finite` waits for it.

The residual stream and the norms' sums are float32, as in the torch backend; everything in
between is bfloat16. LoRA's sums are float32 and are added to the linear's bfloat16 output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.backends.cuda.buckets import LaunchBucket, Sizes
from veneer_server.backends.cuda.device import Device, Graph
from veneer_server.backends.cuda.forward import Forward
from veneer_server.backends.cuda.inputs import Filled, LaunchShape, StaticInputs
from veneer_server.backends.cuda.memory.adapters import Adapters
from veneer_server.backends.cuda.memory.arena import Arena
from veneer_server.backends.cuda.memory.fencing import DeviceStream
from veneer_server.backends.cuda.memory.timeline import DeviceTimeline
from veneer_server.backends.cuda.sampled import SampledRows
from veneer_server.backends.parallel.peers import Member
from veneer_server.models.loader import DecoderWeights
from veneer_server.step.ahead import Sampled, Submitted
from veneer_server.step.arrays import StepArrays
from veneer_server.step.choice import TokenChoice
from veneer_server.step.layout import MEMBERS
from veneer_server.wire.messages import SamplingParams

MOST_RANK: Final = 256
"""The largest rank of an adapter's matrices."""
SLOTS: Final = 1024
"""Most adapters in device memory."""


_NONE: Final[NDArray[np.int64]] = np.zeros(0, dtype=np.int64)
_TABLES: Final[NDArray[np.int64]] = np.zeros((0, 1), dtype=np.int64)
_EMPTY: Final = StepArrays(
    _NONE, _NONE, _NONE, np.zeros(1, dtype=np.int64), _NONE, _TABLES, (), _NONE
)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The arguments of `CudaDecoder.submit`, apart from the step."""

    choices: Sequence[TokenChoice]
    tops: Sequence[int]
    carried: Sequence[int]
    handed: Sequence[int]
    scored: Sequence[int]


class CudaDecoder:
    """Implements `AheadBackend` over weights whose linears are all `CudaLinear`.

    Args:
        blocks: number of blocks of the KV cache, block 0 included.
        adapter_bytes: bytes of device memory for adapters.
        exact: whether a row's results are bit-identical whatever shares its step.
        graphs: whether steps that only decode are captured as graphs; results are the same.
        member: this process's place among the others, if ``weights`` are a part of a base. All
            processes get the same steps and adapters, and compute the same logits.

    Attributes:
        adapters: the adapters in device memory.
        weights: the base's weights.
        last_logits: the logits of the last step.
    """

    def __init__(
        self,
        device: Device,
        weights: DecoderWeights,
        sizes: Sizes,
        *,
        blocks: int,
        block_size: int,
        adapter_bytes: int,
        exact: bool,
        graphs: bool = True,
        slots: int = SLOTS,
        most_rank: int = MOST_RANK,
        chunk_bytes: int = 2 << 20,
        member: Member | None = None,
    ) -> None:
        config = weights.config
        self.weights = weights
        self._device = device
        self._timeline = DeviceTimeline(device)
        self._arena = Arena(
            device,
            config,
            blocks=blocks,
            block_size=block_size,
            adapter_bytes=adapter_bytes,
            chunk_bytes=chunk_bytes,
        )
        ranks = tuple(len(members) * most_rank for members in MEMBERS.values())
        self.adapters = Adapters(
            device,
            self._timeline,
            self._arena,
            config,
            slots=slots,
            most_ranks=ranks,
            member=member,
        )
        self._inputs = StaticInputs(device, sizes, block_size, exact=exact)
        self._forward = Forward(
            device,
            weights,
            self._arena,
            self.adapters.places,
            rows=self._inputs.rows,
            decodes=self._inputs.sequences,
            positions=sizes.context,
            most_ranks=ranks,
            exact=exact,
            peers=None if member is None else member.peers,
        )
        self._captures = graphs
        self._graphs: dict[LaunchBucket, Graph] = {}
        self._sums = device.empty(self._inputs.rows, dtype=torch.float32)
        self._sampling = SampledRows(
            device, self._inputs.rows, sizes.sequences, config.vocab_size
        )
        self.last_logits = self._forward.logits
        self._told = device.pinned(self._inputs.rows, dtype=torch.float32)

    def prepare(self) -> int:
        """Compile all kernels and capture all graphs before the first step, so that no request
        waits for it. Runs on rows that no sequence uses. Returns the number of graphs."""
        for shape in chain(self._inputs.mixed(), self._inputs.decoding()):
            turn = ("inputs", self._inputs.turn())
            self._timeline.until_free(turn)
            with self._timeline.operation(DeviceStream.STEPS, [turn]):
                filled = self._inputs.fill(_EMPTY, _NONE, _TABLES, [], shape)
                self._run(filled, shape, self._forward.logits[: shape.logits])
                first = self._forward.logits[:1]
                self._sampling.sample(turn[1], first, [TokenChoice(SamplingParams(), 0)], [1])
        self._timeline.until_free(turn)
        return len(self._graphs)

    def execute(self, step: StepArrays) -> torch.Tensor:
        """See `Backend.execute`. The logits are in device memory, perhaps not computed yet."""
        self._enqueue(step, None)
        return self.last_logits

    def submit(
        self,
        step: StepArrays,
        choices: Sequence[TokenChoice],
        tops: Sequence[int],
        carried: Sequence[int] = (),
        handed: Sequence[int] = (),
        scored: Sequence[int] = (),
    ) -> Submitted:
        """See `AheadBackend.submit`."""
        assert len(choices) == len(step.logit_rows)
        self._enqueue(step, _Wanted(choices, tops, carried, handed, scored))
        return Submitted(self._inputs.current, tuple(tops), len(handed))

    def read(self, submitted: Submitted) -> Sampled:
        """See `AheadBackend.read`."""
        self._timeline.until_free(("inputs", submitted.turn))
        return self._sampling.read(submitted)

    def _enqueue(self, step: StepArrays, sampled: _Wanted | None) -> None:
        wanted = len(step.logit_rows)
        turn = ("inputs", self._inputs.turn())
        self._timeline.until_free(turn)  # the step before the last used this set
        with self._timeline.lock:
            segments = [(s.begin, s.end, self.adapters.slot(s.table)) for s in step.segments]
            slots, tables, regions = self._arena.map(step)
            for segment in step.segments:
                regions += self.adapters.chunks(segment.table)
            shape = self._inputs.shape(step, segments)
            with self._timeline.operation(DeviceStream.STEPS, [*regions, turn]):
                filled = self._inputs.fill(step, slots, tables, segments, shape)
                logits = self._forward.logits
                if shape.logits > len(logits):
                    logits = self._device.empty(
                        shape.logits, logits.shape[1], dtype=torch.float32
                    )
                if sampled is not None and sampled.carried:
                    self._sampling.carry(turn[1], sampled.carried, filled.tokens)
                self._run(filled, shape, logits[: shape.logits])
                if sampled is not None:
                    mine = sampled.choices, sampled.tops, sampled.scored
                    self._sampling.sample(turn[1], logits[:wanted], *mine)
                    self._sampling.hand(turn[1], logits, sampled.handed)
                self._device.call(
                    self._told[:wanted].copy_, self._sums[:wanted], non_blocking=True
                )
        self.last_logits = logits[:wanted]

    def finite(self, logits: torch.Tensor) -> list[bool]:
        """See `Backend.finite`: waits for the step."""
        turn = ("inputs", self._inputs.current)
        self._timeline.until_free(turn)
        found: list[bool] = self._told[: len(logits)].isfinite().tolist()
        return found

    def clear(self, blocks: list[int]) -> None:
        """See `Backend.clear`."""
        with self._timeline.operation(DeviceStream.STEPS, self._arena.chunks_of(blocks)):
            self._arena.clear(blocks)

    def _run(self, filled: Filled, shape: LaunchShape, logits: torch.Tensor) -> None:
        def operations() -> None:
            self._forward.enqueue(filled, shape, logits)
            # A sum is finite only if every term is.
            sums = self._sums[: len(logits)]
            self._device.call(torch.sum, logits, dim=1, out=sums)

        if not shape.graph:
            operations()
            return
        graph = self._graphs.get(shape.bucket)
        if graph is not None:
            graph.replay()
            return
        # Run once uncaptured: kernels are compiled when they are first launched.
        operations()
        if self._captures:
            self._graphs[shape.bucket] = self._device.capture(operations)
