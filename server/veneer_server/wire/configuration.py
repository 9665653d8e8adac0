"""The configuration of the engine process."""

from __future__ import annotations

from typing import Literal

from veneer_server.wire.base import Message


class ConstraintLimits(Message, frozen=True):
    """Resource limits of one constraint, and of all of them. Times are CPU time, sizes bytes.

    Attributes:
        workers: maximum number of constraints that are compiled at once.
        compile_seconds, memory: for compiling one; ``memory`` also for following it.
        mask_seconds: for each computation of the tokens that may come next.
        fuel: the same in the library's own units (`step_lexer_fuel`).
        matcher_memory: for all sequences of the process that follows them; the process for slow
            ones has half of it, but at least ``memory``.
        number_digits: maximum digits in a row of a JSON number, if the schema allows that few;
            0: no limit.
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
        cache_folder: folder for quantized and packed bases.
        base_name: logical name, for messages.
        log_format: format of the engine's lines on standard error, see `logs`.
        weights_fingerprint: `BaseFingerprint.weights`, the key of bases in ``cache_folder``.
        device: ``cpu`` or ``cuda``; ``auto``, which the front resolves, is CUDA if there is
            any.
        quantization: ``nf4`` and ``fp4`` are bitsandbytes with double quantization; ``fp8``
            needs the backend for CUDA; the others are formats in which a base is stored, see
            `models.stored_format`.
        dtype: data type of activations, KV cache and adapters.
        backend: values other than ``auto`` require that backend, see
            `engine.execution.backend_choice`.
        native_instructions: instruction set of the native kernels; ``auto`` is the CPU's best.
        int8_activations: round the inputs of the base's linears to 8 bits; needs the native
            backend and 4-bit weights.
        threads: threads of a step; 0 chooses, see `system.placement`.
        tensor_parallel: number of GPUs that the base is divided among; budgets are for each.
            More than 1 needs the backend for CUDA.
        max_batch_tokens: maximum number of tokens computed in one step.
        max_prefill_tokens: maximum number of prompt tokens in a step that also decodes.
        max_prefill_seconds: maximum time by which they may extend such a step; 0: no limit,
            None: by the time of a step (`StepCost.prefill_beside_decode_s`).
        max_running: maximum number of sequences running at once.
        block_size: tokens in a KV block.
        kv_cache_bytes, host_adapter_bytes, device_adapter_bytes: budgets.
        load_workers: threads that read and convert adapters.
        prefix_cache: keep the K and V of prefixes and share them.
        exact: make results independent of the rest of the batch. Disables the prefix cache if
            the backend's results depend on it, see `engine.execution.exact`.
        speculation: draft tokens and verify them in one step, see
            `engine.scheduling.speculation`. ``on`` requires the native backend, ``auto`` uses
            speculation if it is there.
        constraints: limits of constrained output.
    """

    base_folder: str
    cache_folder: str
    base_name: str
    weights_fingerprint: str
    log_format: Literal["console", "json"] = "console"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal[
        "nf4", "fp4", "fp8", "none", "gguf", "gptq", "awq", "int-packed", "mxfp4"
    ] = "nf4"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    backend: Literal["auto", "native", "torch", "cuda"] = "auto"
    native_instructions: Literal[
        "auto",
        "amx-bf16",
        "avx512-bf16",
        "avx512-vnni",
        "avx512",
        "avx2-vnni",
        "avx2",
        "neon-bf16",
        "neon",
    ] = "auto"
    int8_activations: bool = False
    threads: int = 0
    tensor_parallel: int = 1
    max_batch_tokens: int = 512
    max_prefill_tokens: int = 128
    max_prefill_seconds: float | None = None
    max_running: int = 64
    block_size: int = 16
    kv_cache_bytes: int = 1 << 30
    host_adapter_bytes: int = 2 << 30
    device_adapter_bytes: int = 1 << 30
    load_workers: int = 1
    prefix_cache: bool = True
    exact: bool = False
    speculation: Literal["off", "on", "auto"] = "off"
    constraints: ConstraintLimits = ConstraintLimits()
