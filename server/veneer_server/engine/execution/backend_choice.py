"""Chooses the backend that executes steps: the native kernels if they can, torch otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from veneer_registry.errors import VeneerError
from veneer_registry.extras import install_extra

from veneer_server.adapters.memory import Placer
from veneer_server.backends.native.chosen import find_library
from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.decoder import NativeDecoder, check
from veneer_server.backends.native.library import FOUR_BIT, Library
from veneer_server.backends.native.linear import NativeLinear, int8_gain
from veneer_server.backends.native.packed.base import load_packed
from veneer_server.backends.torch.attention import KvCache
from veneer_server.backends.torch.decoder import Decoder
from veneer_server.engine.execution.faster import settle
from veneer_server.engine.execution.sampler import TorchDraws
from veneer_server.models.config import DecoderConfig, read_decoder_config
from veneer_server.models.loader import DecoderWeights, load_weights
from veneer_server.models.source import BaseDamaged, bundled_folder, import_bundled
from veneer_server.progress import stage
from veneer_server.step.ahead import AheadBackend
from veneer_server.step.arrays import Backend
from veneer_server.step.choice import Draws
from veneer_server.system.placement import Placement, place
from veneer_server.wire.messages import EngineConfig

log = logging.getLogger(__name__)

_Base = TypeVar("_Base")


class BackendUnavailable(VeneerError):
    """The requested backend cannot serve here."""

    code = "FAILED_PRECONDITION"
    reason = "BACKEND_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A backend over the loaded base.

    Attributes:
        name: ``native (avx512-bf16)`` or ``native (avx2)``, with ``, int8 activations`` inside
            if inputs are rounded to 8 bits, and ``, prebuilt`` if the kernels came with the
            wheel; ``torch``; or ``cuda``.
        why_not_native: why it is not the native backend; empty if it is.
        int8_gain: what ``--int8-activations`` would gain, in words; empty if little or if it
            does not apply.
        lora_dtype: dtype of resident adapters.
        placement: how many threads a step has, and where they run.
        invariant: whether a row's numbers are bit-identical whatever else is in the batch.
        draws: samples tokens from the backend's logits.
        placer: makes DEVICE copies of adapters; None if any memory of the device will do.
        ahead: the same backend, if it accepts a step before the previous one's tokens are read.
        paired: whether its adapters are stored in pairs, see `Layout`.
    """

    backend: Backend
    weights: DecoderWeights
    lora_dtype: torch.dtype
    name: str
    why_not_native: str = ""
    int8_gain: str = ""
    draws: Draws = field(default_factory=TorchDraws)
    placement: Placement = field(default_factory=lambda: Placement(1, ""))
    invariant: bool = False
    placer: Placer | None = None
    ahead: AheadBackend | None = None
    paired: bool = False


def choose(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_blocks: int,
    placement: Placement | None = None,
) -> Chosen:
    """Load the base for the best backend that `EngineConfig.backend` allows.

    Args:
        placement: placement of a step's threads; if None, it follows from
            `EngineConfig.threads`.

    Raises:
        BackendUnavailable: the config requires a backend that cannot serve here.
        UnsupportedModel: no backend can run the base.
    """
    if config.int8_activations:
        _check_int8(config)
    placement = placement or place(config.threads)
    why = "--backend torch"
    if config.backend == "cuda":
        return replace(_cuda(config, device, dtype, num_blocks), placement=placement)
    if config.tensor_parallel > 1:
        raise BackendUnavailable(
            f"--tensor-parallel {config.tensor_parallel} needs --backend cuda: other backends "
            "run the whole base in one process"
        )
    if config.quantization == "fp8":
        raise BackendUnavailable(
            "--quantization fp8 needs --backend cuda: other backends have no kernels for it"
        )
    if config.backend != "torch":
        try:
            chosen = _native(config, device, dtype, num_blocks, placement)
            log.info("using the %s backend", chosen.name)
            return chosen
        except NativeUnavailable as reason:
            if config.backend == "native":
                raise BackendUnavailable(
                    f"--backend native cannot serve here: {reason}; use --backend auto"
                ) from reason
            if config.int8_activations:
                raise BackendUnavailable(
                    "--int8-activations needs the native backend, which cannot serve here: "
                    f"{reason}; remove --int8-activations, or use --device cpu if the base is "
                    "on a GPU"
                ) from reason
            why = str(reason)
    if config.backend == "auto" and device.type == "cpu":
        log.warning("using the torch backend, which is slower: %s", why)
    return replace(_torch(config, device, dtype, num_blocks, why), placement=placement)


def _check_int8(config: EngineConfig) -> None:
    """Raise BackendUnavailable if the backend or the weights do not allow 8-bit inputs."""
    if config.backend not in ("auto", "native"):
        raise BackendUnavailable(
            f"--int8-activations needs --backend native or auto, not {config.backend}"
        )
    # A base that is stored in 4 bits is served as stored.
    stored = read_decoder_config(Path(config.base_folder)).quantization
    served = stored or config.quantization
    if served not in ("nf4", "fp4"):
        raise BackendUnavailable(
            f"--int8-activations needs 4-bit weights: --quantization nf4 or fp4, not {served}"
        )


def _repaired(config: EngineConfig, load: Callable[[], _Base]) -> _Base:
    """Return the result of ``load``. If a bundled base turns out to be damaged, import it again
    and retry."""
    try:
        return load()
    except BaseDamaged as damage:
        cache = Path(config.cache_folder)
        if Path(config.base_folder) != bundled_folder(cache):
            raise
        log.warning("%s", damage)
        import_bundled(cache, lambda doing: log.info("base: %s", doing), anew=True)
        return load()


def _native(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_blocks: int,
    placement: Placement,
) -> Chosen:
    if device.type != "cpu":
        raise NativeUnavailable(f"it is for CPUs, and the base is on {device.type}")
    if dtype != torch.bfloat16:
        raise NativeUnavailable(
            f"it computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
        )
    check(read_decoder_config(Path(config.base_folder)), config.block_size)
    library, made = _library(config)

    base = _repaired(
        config,
        lambda: load_packed(
            library,
            Path(config.base_folder),
            quantization=config.quantization,
            cache_dir=Path(config.cache_folder),
            fingerprint=config.weights_fingerprint,
            threads=placement.threads,
        ),
    )
    decoder = NativeDecoder(
        library,
        base.weights,
        num_blocks=num_blocks,
        block_size=config.block_size,
        threads=placement.threads,
        bound=placement.bound,
        packed_head=base.head,
        int8_activations=config.int8_activations,
    )
    if placement.others:
        with stage("measuring threads"):
            placement = settle(decoder, placement, config.block_size)
    # Torch has little left to do: a second torch thread would cost more than it gains,
    # and spin on a core that a thread of the step could use.
    torch.set_num_threads(1)
    int8 = ", int8 activations" if config.int8_activations else ""
    four_bit = all(
        isinstance(layer.down, NativeLinear) and layer.down.struct.kind == FOUR_BIT
        for layer in base.weights.layers
    )
    name = f"native ({library.instructions}{int8}{made})"
    return Chosen(
        decoder,
        base.weights,
        torch.bfloat16,
        name,
        int8_gain="" if int8 or not four_bit else int8_gain(library),
        draws=decoder.draws,
        placement=placement,
        invariant=True,
        paired=True,
    )


def _cuda(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, num_blocks: int
) -> Chosen:
    """Load the base for the CUDA backend, which ``auto`` never chooses: see docs/gpu.md.

    Raises:
        BackendUnavailable: the CUDA backend cannot serve here.
    """
    try:
        # Imported here: triton takes 77 MB in a process that imports it.
        from veneer_server.backends.cuda.chosen import CudaUnavailable, build
    except ImportError as error:
        raise BackendUnavailable(
            f"--backend cuda needs triton ({error}): {install_extra('cuda')}"
        ) from error
    try:
        decoder, draws = build(
            config, device, dtype, num_blocks, lambda f: _repaired(config, f)
        )
    except CudaUnavailable as reason:
        raise BackendUnavailable(
            f"--backend cuda cannot serve here: {reason}; use --backend auto"
        ) from reason
    return Chosen(
        decoder,
        decoder.weights,
        torch.bfloat16,
        "cuda",
        "--backend cuda",
        draws=draws,
        invariant=config.exact,
        placer=decoder.adapters,
        ahead=decoder,
    )


def _library(config: EngineConfig) -> tuple[Library, str]:
    """Return the kernels for the configured instructions, and a suffix for the backend's
    name."""
    wanted = config.native_instructions
    cache = Path(config.cache_folder)
    found = find_library(cache, wanted)
    library = Library(found.file)
    if wanted not in ("auto", library.instructions):
        raise NativeUnavailable(
            f"this CPU supports at most {library.instructions}, not --native-instructions "
            f"{wanted}"
        )
    if found.why_prebuilt:
        log.info("using prebuilt kernels: %s", found.why_prebuilt)
    return library, ", prebuilt" if found.why_prebuilt else ""


def _torch(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, num_blocks: int, why: str
) -> Chosen:
    weights = _repaired(
        config,
        lambda: load_weights(
            Path(config.base_folder),
            quantization=config.quantization,
            dtype=dtype,
            device=device,
            cache_dir=Path(config.cache_folder),
            fingerprint=config.weights_fingerprint,
        ),
    )
    model: DecoderConfig = weights.config
    cache = KvCache(
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        block_size=config.block_size,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
        device=device,
    )
    # See `Decoder`: on a CPU, small GEMMs are fast in float32.
    lora_dtype = torch.float32 if device.type == "cpu" else dtype
    return Chosen(Decoder(weights, cache, lora_dtype), weights, lora_dtype, "torch", why)
