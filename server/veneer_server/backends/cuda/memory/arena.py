"""The device memory that KV blocks and adapters share, as one tensor.

A unit is E = kv_heads * block_size * head_dim numbers: a block's K or V of one layer. A page is
the memory of a KV block: its K and V of all layers.

Layouts:
    numbers    [chunks, pages, layers, 2, E] bfloat16; 2: K, then V
    keys       one view per layer: ``numbers`` from that layer's K in the first page on, as
               [units, kv_heads, block_size, head_dim]. So to the kernels a block's number is
               the unit at which its page begins, and all layers share one block table.
    values     the same, from the layer's V on

Adapters use whole units too; each of their matrices is contiguous.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.backends.cuda.device import Device
from veneer_server.backends.cuda.memory.chunks import ChunkPool, KvPages
from veneer_server.models.config import DecoderConfig
from veneer_server.step.arrays import StepArrays

CHUNK_BYTES: Final = 2 << 20
SPARE: Final = 8
"""There is one spare chunk for every 8 chunks of adapters: since pieces of adapters begin at
units, they take more memory than their bytes."""


class Arena:
    """The shared device memory, and the map from KV blocks to pages.

    Args:
        blocks: number of blocks of the KV cache, block 0 included. All of them can be mapped,
            whatever adapters take.
        adapter_bytes: bytes of room for adapters.

    Attributes:
        unit: number of elements of a unit.
        numbers: the whole memory, flat.
        keys, values: views for each layer.
        pool: tracks the owner of each chunk.
    """

    def __init__(
        self,
        device: Device,
        config: DecoderConfig,
        *,
        blocks: int,
        block_size: int,
        adapter_bytes: int,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
        self._device = device
        self._block_size = block_size
        self.unit = heads * block_size * dim
        self._page = 2 * layers
        """Units of a page."""
        self._pages = max(1, chunk_bytes // (2 * self.unit * self._page))
        units = self._pages * self._page
        promised = -(-blocks // self._pages)
        adapters = -(-adapter_bytes // (2 * self.unit * units))
        chunks = promised + adapters + -(-adapters // SPARE) + 1
        self.pool = ChunkPool(chunks, units, promised)
        self._kv = KvPages(self.pool, self._pages)
        self._units: NDArray[np.int64] = np.zeros(blocks, dtype=np.int64)
        """The unit in which each mapped block's page begins."""
        self._mapped: NDArray[np.bool_] = np.zeros(blocks, dtype=np.bool_)
        total = chunks * units
        self.numbers = device.empty(total * self.unit, dtype=torch.bfloat16)

        def of(first: int) -> torch.Tensor:
            shape = (total - first, heads, block_size, dim)
            return self.numbers[first * self.unit :].view(shape)

        self.keys = [of(2 * layer) for layer in range(layers)]
        self.values = [of(2 * layer + 1) for layer in range(layers)]

    def map(self, step: StepArrays) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """Return a step's slots and block tables with the kernels' block numbers, and the
        chunks of all its blocks. A block that the step writes to gets a page if it has none."""
        written = step.slots // self._block_size
        for block in np.unique(written[~self._mapped[written]]).tolist():
            place = self._kv.map(block)
            assert place is not None, "KV blocks beyond what was promised"
            self._units[block] = place * self._page
            self._mapped[block] = True
        slots = self._units[written] * self._block_size + step.slots % self._block_size
        tables = self._units[step.block_tables]
        chunks = np.unique(tables) // (self._page * self._pages)
        return slots, tables, chunks.tolist()

    def chunks_of(self, blocks: list[int]) -> list[int]:
        """Return the chunks of these blocks. Blocks without a page are skipped."""
        units = self._units[[block for block in blocks if self._mapped[block]]]
        found: list[int] = np.unique(units // (self._page * self._pages)).tolist()
        return found

    def clear(self, blocks: list[int]) -> None:
        """Enqueue the zeroing of these blocks.

        No result depends on it, since no kernel reads a place of a block before a step of the
        same sequence has written to it. It only fulfils the contract of `Backend.clear`.
        """
        for block in blocks:
            if self._mapped[block]:
                first = int(self._units[block])
                page = self.numbers[first * self.unit : (first + self._page) * self.unit]
                self._device.call(torch.Tensor.zero_, page)

    def release(self, blocks: list[int]) -> None:
        """Unmap blocks whose contents are no longer needed. Their chunks may go to adapters, as
        far as `ChunkPool.promised` allows."""
        self._kv.unmap(blocks)
        self._mapped[blocks] = False
