"""A library for ARM whose functions are called from here and run in QEMU.

`RemoteLibrary` is a `Library`, so the tests of the native kernels take it as it is. Packed
weights and KV caches lie in memory that this process and the one in QEMU (`driver.cpp`) share
at one address. What else a call reads is copied there, with the pointers in it changed, and
what it writes is copied back.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from ctypes import c_int32
from pathlib import Path
from typing import Any, Final

import torch
from veneer_server.backends.native.library import (
    SIGNATURES,
    STORED,
    Layer,
    Library,
    Linear,
    LoraAdapter,
    LoraGroup,
    Model,
    SampleRow,
    Segment,
    Step,
)
from veneer_server.backends.native.structs import Field, mismatch

from tests.arm.memory import BASE, BYTES, SharedMemory
from tests.arm.tools import command

_GROUPS: Final = 4  # of projections


class RemoteLibrary(Library):
    """A library for ARM in a process of its own.

    Args:
        driver: `driver.cpp`, compiled for ARM.
        cpu: as QEMU names it.
    """

    def __init__(self, driver: Path, file: Path, cpu: str) -> None:
        self._memory: Any = SharedMemory()
        words = driver, file, str(self._memory.fd), hex(BASE), str(BYTES)
        self._process = subprocess.Popen(
            command(cpu, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._memory.fd],
            bufsize=0,
        )
        self.functions: Any = _Functions(self._process, self._memory)
        rows = self.functions.fields()
        if differs := mismatch((Field * (len(rows) + 1))(*rows)):
            raise AssertionError(f"structs on ARM: {differs}")
        assert self.functions.veneer_permit() == 1

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        status = self._process.wait(60)
        self._memory.close()
        assert status == 0, status


def _behind(reference: Any) -> Any:
    """What was passed to `ctypes.byref`."""
    return reference._obj  # private: there is no other way to it


class _Functions:
    """The functions of ``cpp/library.cpp``, with the arguments that `Library` passes."""

    def __init__(self, process: subprocess.Popen[bytes], memory: SharedMemory) -> None:
        self._process = process
        self._memory = memory
        self._models: dict[int, Model] = {}

    def _call(self, name: str, *arguments: int) -> int:
        result, _ = SIGNATURES[name]
        padded = (*arguments, *(8 - len(arguments)) * (0,))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(struct.pack("=32s8q", name.encode(), *padded))
        answer = self._process.stdout.read(8)
        if len(answer) < 8:
            raise AssertionError(f"{name} ended the process: status {self._process.wait(60)}")
        # Of a 32-bit result the upper half is undefined.
        return int.from_bytes(
            answer[:4] if result is c_int32 else answer, "little", signed=True
        )

    def fields(self) -> list[Any]:
        """The rows of `veneer_fields`."""
        at = self._memory.reserve(1 << 16)
        self._call("veneer_fields", at)
        lines = ctypes.string_at(at).decode().splitlines()
        found = []
        for line in lines:
            of, name, offset, size = line.split()
            found.append(
                Field(of.encode(), name.replace("-", "").encode(), int(offset), int(size))
            )
        return found

    def veneer_instructions(self) -> bytes:
        at = self._memory.reserve(64)
        self._call("veneer_instructions", at)
        return ctypes.string_at(at)

    def veneer_permit(self) -> int:
        return self._call("veneer_permit")

    def veneer_packed_bytes(self, kind: int, outputs: int, inputs: int) -> int:
        return self._call("veneer_packed_bytes", kind, outputs, inputs)

    def veneer_layout(self) -> int:
        return self._call("veneer_layout")

    def veneer_quantize(
        self,
        weights: int,
        stored: int,
        blocks: int,
        bounds: int,
        book: int,
        codes: int,
        scales: int,
        threads: int,
    ) -> int:
        with self._memory as memory:
            size = blocks * 64 * (4 if stored == STORED[torch.float32] else 2)
            given = memory.put(weights, size), memory.put(bounds, 15 * 4), memory.put(book, 16)
            to = memory.reserve(blocks * 32), memory.reserve(blocks * 4)
            status = self._call(
                "veneer_quantize", given[0], stored, blocks, given[1], given[2], *to, threads
            )
            ctypes.memmove(codes, to[0], blocks * 32)
            ctypes.memmove(scales, to[1], blocks * 4)
            return status

    def veneer_pack_four_bit(
        self, codes: int, scales: int, outputs: int, inputs: int, to: int, threads: int
    ) -> int:
        with self._memory as memory:
            codes = memory.put(codes, outputs * inputs // 2)
            scales = memory.put(scales, outputs * inputs // 64 * 4)
            call = "veneer_pack_four_bit"
            return self._call(call, codes, scales, outputs, inputs, to, threads)

    def veneer_pack_eight_bit(
        self, weights: int, outputs: int, inputs: int, to: int, threads: int
    ) -> int:
        with self._memory as memory:
            weights = memory.put(weights, outputs * inputs * 2)
            return self._call("veneer_pack_eight_bit", weights, outputs, inputs, to, threads)

    def veneer_pack_bf16(
        self, weights: int, outputs: int, inputs: int, to: int, threads: int
    ) -> int:
        with self._memory as memory:
            weights = memory.put(weights, outputs * inputs * 2)
            return self._call("veneer_pack_bf16", weights, outputs, inputs, to, threads)

    def veneer_multiply(self, linear: Any, x: int, rows: int, y: int) -> None:
        with self._memory as memory:
            given: Linear = _behind(linear)
            at = memory.place(self._linear(given))
            to = memory.reserve(rows * given.outputs * 4)
            x = memory.put(x, rows * given.inputs * 2)
            self._call("veneer_multiply", at, x, rows, to)
            ctypes.memmove(y, to, rows * given.outputs * 4)

    def veneer_create(self, model: Any, threads: int, engine: Any) -> int:
        given: Model = _behind(model)
        handle = _behind(engine)
        copy = Model.from_buffer_copy(given)
        layers = (Layer * given.layer_count)()
        put = self._memory.put
        for index in range(given.layer_count):
            layers[index] = layer = Layer.from_buffer_copy(given.layers[index])
            for number, linear in enumerate(layer.linears):
                layers[index].linears[number] = self._linear(linear)
            layers[index].input_norm = put(layer.input_norm, given.hidden * 4)
            layers[index].post_norm = put(layer.post_norm, given.hidden * 4)
            layers[index].query_norm = put(layer.query_norm, given.dim * 4)
            layers[index].key_norm = put(layer.key_norm, given.dim * 4)
        copy.layers = ctypes.cast(self._memory.place(layers), ctypes.POINTER(Layer))
        copy.embedding = put(given.embedding, given.vocab * given.hidden * 2)
        copy.final_norm = put(given.final_norm, given.hidden * 4)
        copy.inv_freq = put(given.inv_freq, given.dim // 2 * 4)
        copy.head = self._linear(given.head)
        to = self._memory.reserve(8)
        status = self._call("veneer_create", self._memory.place(copy), threads, to)
        handle.value = ctypes.c_int64.from_address(to).value
        self._models[handle.value] = given
        return status

    def veneer_destroy(self, engine: int) -> None:
        if self._process.poll() is None:  # a finalizer may be called after `close`
            self._call("veneer_destroy", engine)

    def veneer_step(self, engine: int, step: Any) -> int:
        with self._memory as memory:
            given: Step = _behind(step)
            copy = Step.from_buffer_copy(given)
            for name, count in {
                "tokens": given.rows,
                "positions": given.rows,
                "slots": given.rows,
                "row_starts": given.sequences + 1,
                "contexts": given.sequences,
                "block_tables": given.sequences * given.table_width,
                "logit_rows": given.logit_count,
            }.items():
                setattr(copy, name, memory.put(getattr(given, name), count * 8))
            segments = (Segment * given.segment_count)()
            for index in range(given.segment_count):
                segments[index] = given.segments[index]
                adapter = self._adapter(self._models[engine], given.segments[index].adapter[0])
                segments[index].adapter = ctypes.cast(adapter, ctypes.POINTER(LoraAdapter))
            copy.segments = ctypes.cast(memory.place(segments), ctypes.POINTER(Segment))
            sizes = {
                "logits": given.logit_count * self._models[engine].vocab * 4,
                "finite": given.logit_count,
            }
            for name, size in sizes.items():
                setattr(copy, name, memory.put(getattr(given, name), size))
            status = self._call("veneer_step", engine, memory.place(copy))
            for name, size in sizes.items():
                ctypes.memmove(getattr(given, name), getattr(copy, name), size)
            return status

    def veneer_sample(self, engine: int | None, rows: Any, count: int, vocab: int) -> int:
        with self._memory as memory:
            copies = (SampleRow * count).from_buffer_copy(rows)
            for row in copies:
                row.logits = memory.put(row.logits, vocab * 4)
            at = memory.place(copies)
            status = self._call("veneer_sample", engine or 0, at, count, vocab)
            for row, done in zip(rows, (SampleRow * count).from_address(at), strict=True):
                row.token = done.token
            return status

    def veneer_log_sums(
        self, engine: int | None, logits: int, rows: int, vocab: int, to: int
    ) -> int:
        with self._memory as memory:
            at, sums = memory.put(logits, rows * vocab * 4), memory.reserve(rows * 4)
            status = self._call("veneer_log_sums", engine or 0, at, rows, vocab, sums)
            ctypes.memmove(to, sums, rows * 4)
            return status

    def _linear(self, linear: Linear) -> Linear:
        copy = Linear.from_buffer_copy(linear)
        copy.bias = self._memory.put(linear.bias, linear.outputs * 4)
        return copy

    def _adapter(self, model: Model, adapter: LoraAdapter) -> int:
        size = 4 if adapter.is_float else 2
        queries, keys = model.heads * model.dim, model.kv_heads * model.dim
        inputs = (model.hidden, queries, model.hidden, model.intermediate)
        outputs = (
            (queries, keys, keys),
            (model.hidden,),
            (model.intermediate, model.intermediate),
            (model.hidden,),
        )
        groups = (LoraGroup * (model.layer_count * _GROUPS))()
        for index in range(len(groups)):
            groups[index] = given = LoraGroup.from_buffer_copy(adapter.groups[index])
            kind = index % _GROUPS
            groups[index].a = self._memory.put(given.a, inputs[kind] * given.ranks * size)
            for member, width in zip(groups[index].members, outputs[kind], strict=False):
                member.b = self._memory.put(member.b, member.rank * width * size)
        copy = LoraAdapter.from_buffer_copy(adapter)
        copy.groups = ctypes.cast(self._memory.place(groups), ctypes.POINTER(LoraGroup))
        return self._memory.place(copy)
