"""What the engine process is started with."""

from __future__ import annotations

from typing import Literal

from veneer_server.wire.base import Message


class ConstraintLimits(Message, frozen=True):
    """Resource limits of one constraint, and of all of them. Times are CPU time, sizes bytes.

    Attributes:
        workers: constraints that are compiled at once.
        compile_seconds, memory: for compiling one; ``memory`` also for following it.
        mask_seconds: for finding the tokens that may come next, each time.
        fuel: the same in the library's own units (`step_lexer_fuel`).
        matcher_memory: of the process that follows sequences, for all of them together; the
            process for slow ones has half of it.
        number_digits: most digits in a row of a number in JSON, if the schema allows fewer as
            well; 0 is off.
    """

    workers: int = 2
    compile_seconds: float = 0.5
    memory: int = 16 << 20
    mask_seconds: float = 0.1
    fuel: int = 50_000
    matcher_memory: int = 48 << 20
    number_digits: int = 20


class EngineConfig(Message, frozen=True):
    """Everything the engine process needs, fixed at its start.

    Attributes:
        base_folder: local Hugging Face folder of the base model.
        cache_folder: where quantized and packed bases are kept.
        base_name: logical name, for messages.
        log_format: of the engine's lines on standard error, see `logs`.
        weights_fingerprint: `BaseFingerprint.weights`; keys what is kept there.
        device: ``cpu`` or ``cuda``; ``auto``, which the front resolves, is CUDA if there is
        any.
        quantization: ``nf4`` and ``fp4`` are bitsandbytes with double quantization; ``fp8``
            needs the backend for CUDA.
        dtype: of activations, KV cache and adapters.
        backend: all but ``auto`` require that one, see
            `engine.execution.backend_choice`.
        native_instructions: of the native kernels; ``auto`` is the best set the CPU has.
        int8_activations: round the inputs of the base's linears to 8 bits; needs the native
            backend and 4-bit weights.
        threads: of a step; 0 chooses, see `system.placement`.
        tensor_parallel: cards that the base is divided among; budgets are for each. More than 1
            needs the backend for CUDA.
        max_batch_tokens: most tokens computed in one step.
        max_prefill_tokens: most prompt tokens in a step that also decodes.
        max_prefill_seconds: by which they may extend such a step; 0: no limit of its own.
        max_running: most sequences running at once.
        block_size: tokens a KV block holds.
        kv_cache_bytes, host_adapter_bytes, device_adapter_bytes: budgets.
        load_workers: threads that read and convert adapters.
        prefix_cache: keep the K and V of prefixes and share them.
        exact: results do not depend on the rest of the batch. Disables the prefix cache if
            the backend's results do, see `engine.execution.exact`.
        constraints: limits of constrained output.
    """

    base_folder: str
    cache_folder: str
    base_name: str
    weights_fingerprint: str
    log_format: Literal["console", "json"] = "console"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal["nf4", "fp4", "fp8", "none"] = "nf4"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "native", "torch", "cuda"] = "auto"
    native_instructions: Literal[
        "auto", "amx-bf16", "avx512-bf16", "avx2", "neon-bf16", "neon"
    ] = "auto"
    int8_activations: bool = False
    threads: int = 0
    tensor_parallel: int = 1
    max_batch_tokens: int = 512
    max_prefill_tokens: int = 128
    max_prefill_seconds: float = 0.2
    max_running: int = 64
    block_size: int = 16
    kv_cache_bytes: int = 1 << 30
    host_adapter_bytes: int = 2 << 30
    device_adapter_bytes: int = 1 << 30
    load_workers: int = 1
    prefix_cache: bool = True
    exact: bool = False
    constraints: ConstraintLimits = ConstraintLimits()
