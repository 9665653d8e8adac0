"""Computations of `App.startup` before it starts anything: base identity, memory, engine."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from veneer_registry.adapter import BaseFingerprint, BaseSpec
from veneer_registry.fingerprint import TOKENIZER_FILE, fingerprint_base, vocabulary_digest

from veneer_server.backends.parallel.sharding import Shard
from veneer_server.config import ConfigInvalid, ServerConfig
from veneer_server.engine_client.no_engine import refuse_engine_work
from veneer_server.logs import get_logger
from veneer_server.models.config import DecoderConfig
from veneer_server.models.source import BaseFolder
from veneer_server.progress import stage
from veneer_server.sizing.memory_plan import (
    BLOCK_TOKENS,
    KvCachePlan,
    MemoryPlan,
    plan_memory,
    plan_registry,
)
from veneer_server.system.gpu import choose_gpu
from veneer_server.system.machine import find_gpu, host_memory
from veneer_server.wire.messages import ConstraintLimits, EngineConfig

_log = get_logger(__name__)


def memory_for(decoder: DecoderConfig, config: ServerConfig) -> MemoryPlan:
    """Make the memory plan and log it. May take seconds (with a GPU). Without an engine, a
    server needs no memory for a base.

    Raises:
        MemoryTooSmall: the configuration does not fit this machine.
        UnsupportedModel: the base cannot be divided among this number of GPUs.
    """
    if config.role == "registry":
        pool = plan_registry(host_memory())
        return MemoryPlan((pool,), KvCachePlan(0, 0, decoder.context_length, 1), 0)
    # A folder that is stored in 4 bits is served as it is.
    served = decoder.quantization or config.quantization
    if config.int8_activations and served not in ("nf4", "fp4"):
        raise ConfigInvalid(
            "--int8-activations needs weights of 4 bits: --quantization nf4 or fp4, not "
            f"{served}",
            metadata={"key": "int8_activations"},
        )
    host = host_memory()
    decoder = Shard(0, config.tensor_parallel).config(decoder)  # one GPU's part
    choice = choose_gpu(config.device)
    if choice.why_not:
        _log.warning(
            "serving from the CPU because the GPU kernels failed their self-test; --device "
            "cuda serves from the GPU anyway",
            why=choice.why_not,
        )
    plan = plan_memory(decoder, config, host, choice.gpu)
    _log.info("memory", plan=str(plan))
    if plan.kv_cache.short:
        _log.warning(
            "little memory is free, so the KV cache is small: for a larger one, lower the "
            "adapter budgets or set --kv-cache-bytes",
            kv_cache=str(plan.kv_cache),
        )
    taken = next(pool.total for pool in plan.pools if pool.name == "host")
    if taken > host.available:
        _log.warning(
            "other programs use memory that this server may need later",
            planned_mib=taken >> 20,
            available_mib=host.available >> 20,
        )
    return plan


def replan(
    decoder: DecoderConfig, config: ServerConfig, plan: MemoryPlan, host: int, device: int
) -> MemoryPlan:
    """The plan with other adapter budgets; the KV cache stays as it is.

    Raises:
        MemoryTooSmall: the budgets do not fit this machine.
        FailedPrecondition: this server has no engine.
    """
    if config.role == "registry":
        refuse_engine_work()
    changed = replace(
        config,
        host_cache_bytes=host,
        device_adapter_bytes=device,
        kv_cache_bytes=plan.kv_cache_bytes,
    )
    gpu = find_gpu(config.device) if _on_gpu(plan) else None
    part = Shard(0, config.tensor_parallel).config(decoder)
    return plan_memory(part, changed, host_memory(), gpu)


def _on_gpu(plan: MemoryPlan) -> bool:
    return any(pool.name == "device" for pool in plan.pools)


def fingerprint_of(folder: Path, config: ServerConfig) -> BaseFingerprint:
    """Fingerprint of the base as it will be served; hashes its weights unless cached."""
    quantization: dict[str, object] | None = None
    if config.quantization == "fp8":
        quantization = {"format": "e4m3", "scales": "powers of two, by output"}
    elif config.quantization not in ("nf4", "fp4", "none"):
        quantization = {"stored": config.quantization}
    elif config.quantization != "none":
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.quantization,
            "bnb_4bit_use_double_quant": True,
        }
    with stage("hashing the base", unit="bytes") as hashing:
        return fingerprint_base(
            folder,
            quantization=quantization,
            cache_dir=config.cache_dir,
            hashed=hashing.update,
        )


def engine_config(
    config: ServerConfig, folder: BaseFolder, base: BaseSpec, memory: MemoryPlan
) -> EngineConfig:
    """The engine process's configuration: the server's settings of the same names, and
    computed values."""
    planned = replace(config, kv_cache_bytes=memory.kv_cache_bytes)
    settings = asdict(planned)
    if config.device == "auto":
        # The device that the memory was planned for: an existing GPU may have failed its
        # self-test.
        settings["device"] = "cuda" if _on_gpu(memory) else "cpu"
    return EngineConfig(
        **{name: settings[name] for name in EngineConfig.__struct_fields__ if name in settings},
        base_folder=str(folder.path),
        cache_folder=str(config.cache_dir),
        base_name=base.name,
        weights_fingerprint=base.fingerprint.weights,
        block_size=BLOCK_TOKENS,
        host_adapter_bytes=config.host_cache_bytes,
        constraints=ConstraintLimits(
            workers=config.constraint_workers,
            compile_seconds=config.constraint_seconds,
            memory=config.constraint_memory,
            mask_seconds=config.constraint_mask_seconds,
            fuel=config.constraint_fuel,
            matcher_memory=config.constraint_matcher_memory,
            number_digits=config.constraint_number_digits,
        ),
    )


def vocabulary_of(folder: Path) -> str:
    """`vocabulary_digest` of the base's tokenizer, or "" if it has no `TOKENIZER_FILE`."""
    try:
        return vocabulary_digest((folder / TOKENIZER_FILE).read_bytes())
    except OSError:
        return ""
