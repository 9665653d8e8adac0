"""How a base's files store its weights, if they are quantized: ``quantization_config`` of its
``config.json``, read strictly. No torch here: the front reads it too.

A setting that would change the numbers, and that is not read here, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from veneer_registry.errors import VeneerError

StoredFormat = Literal["nf4", "fp4", "gguf", "gptq", "awq", "int-packed", "mxfp4"]
"""``nf4``, ``fp4``: bitsandbytes'; ``int-packed``, ``mxfp4``: compressed-tensors'."""

GROUPS: Final = (16, 32, 64, 128, 256, 512, 1024)
_IGNORED: Final = frozenset(
    {
        "act_group_aware",
        "backend",
        "batch_size",
        "bits",
        "block_name_to_quantize",
        "cache_block_outputs",
        "checkpoint_format",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "desc_act",
        "disable_exllama",
        "do_fuse",
        "dynamic",
        "exllama_config",
        "format",
        "fuse_max_seq_len",
        "group_size",
        "inference_only",
        "is_marlin_format",
        "lm_head",
        "max_input_length",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "modules_to_fuse",
        "modules_to_not_convert",
        "mse",
        "offload",
        "pack_dtype",
        "pad_token_id",
        "parallel_packing",
        "q_group_size",
        "quant_method",
        "quantizer",
        "static_groups",
        "sym",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
        "version",
        "w_bit",
        "zero_point",
    }
)
"""Keys of GPTQ and AWQ that do not change the numbers, or that are read below."""


class UnsupportedModel(VeneerError):
    """The base model is not one that can be served."""

    code = "FAILED_PRECONDITION"
    reason = "UNSUPPORTED_MODEL"


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """How quantized linears are stored.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; None: all inputs of an output.
        added: what is added to a stored zero point (1 in GPTQ's first form).
    """

    format: StoredFormat
    bits: int = 4
    group: int | None = None
    added: int = 0

    @property
    def is_codes(self) -> bool:
        """Whether weights are read as `models.quantized.QuantizedMatrix`: all formats but those
        of bitsandbytes, which it reads itself."""
        return self.format not in ("nf4", "fp4")


def read_stored(raw: Mapping[str, Any]) -> StoredWeights | None:
    """Read ``quantization_config`` of a parsed ``config.json``; None if there is none.

    Raises:
        UnsupportedModel: metadata ``key`` says which setting is not supported.
    """
    settings = raw.get("quantization_config", raw.get("compression_config"))
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        _refuse("quantization_config", "must be a JSON object")
    method = settings.get("quant_method")
    read = _READ.get(method) if isinstance(method, str) else None
    if read is None:
        _refuse(
            "quant_method",
            f"is {_shown(method)}; read are bitsandbytes (4 bits), gptq, awq and "
            "compressed-tensors: give an unquantized folder, or convert the model to GGUF",
        )
    return read(settings)


def _refuse(key: str, why: str) -> NoReturn:
    raise UnsupportedModel(
        f"quantization_config in config.json: {key} {why}",
        metadata={"key": key, "file": "config.json"},
    )


def _shown(value: object) -> str:
    return repr(value)[:80]


def _bitsandbytes(settings: Mapping[str, Any]) -> StoredWeights:
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if not settings.get("load_in_4bit") or kind not in ("nf4", "fp4"):
        _refuse("load_in_4bit", "is not set to nf4 or fp4: 8-bit bitsandbytes is not read")
    return StoredWeights("nf4" if kind == "nf4" else "fp4")


def _group(settings: Mapping[str, Any], key: str = "group_size") -> int | None:
    size = settings.get(key, 128)
    if size in (-1, None):
        return None
    if type(size) is not int or size not in GROUPS:
        _refuse(key, f"is {_shown(size)}; read are -1 and {', '.join(map(str, GROUPS))}")
    return size


def _bits(settings: Mapping[str, Any], key: str, supported: tuple[int, ...]) -> int:
    bits = settings.get(key)
    if type(bits) is not int or bits not in supported:
        read = " and ".join(map(str, supported))
        _refuse(
            key, f"is {_shown(bits)}; read are {read}: quantize the model again with {read}"
        )
    return bits


def _check_keys(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key not in _IGNORED and value not in (None, False, "", [], {}):
            _refuse(
                str(key)[:80], f"is {_shown(value)}, which is not known: it may change numbers"
            )
    if settings.get("is_marlin_format"):
        _refuse("is_marlin_format", "is set: Marlin's layout is not read; give the GPTQ folder")
    if settings.get("dynamic"):
        _refuse("dynamic", "gives modules settings of their own, which is not read")
    if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        _refuse("pack_dtype", f"is {_shown(settings['pack_dtype'])}; read is int32")


def _gptq(settings: Mapping[str, Any]) -> StoredWeights:
    _check_keys(settings)
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        _refuse("checkpoint_format", f"is {_shown(form)}; read are gptq and gptq_v2")
    bits = _bits(settings, "bits", (4, 8))
    return StoredWeights("gptq", bits, _group(settings), added=1 if form == "gptq" else 0)


def _awq(settings: Mapping[str, Any]) -> StoredWeights:
    _check_keys(settings)
    form = settings.get("version") or settings.get("format") or "gemm"
    if not isinstance(form, str) or form.lower() != "gemm":
        _refuse("version", f"is {_shown(form)}; read is gemm, which AutoAWQ writes by default")
    older = "w_bit" in settings and "bits" not in settings
    bits = _bits(settings, "w_bit" if older else "bits", (4,))
    return StoredWeights(
        "awq", bits, _group(settings, "q_group_size" if older else "group_size")
    )


def _compressed_tensors(settings: Mapping[str, Any]) -> StoredWeights:
    if settings.get("kv_cache_scheme"):
        _refuse("kv_cache_scheme", "is set: a quantized KV cache is not served; remove the key")
    sparsity = settings.get("sparsity_config")
    if (
        sparsity
        and isinstance(sparsity, Mapping)
        and sparsity.get("format", "dense") != "dense"
    ):
        _refuse("sparsity_config", "is set: sparse weights are not read")
    if settings.get("transform_config"):
        _refuse("transform_config", "is set: transforms (rotations) are not read")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse("config_groups", "is missing or not an object")
    found = {_scheme(str(settings.get("format")), group) for group in groups.values()}
    if len(found) > 1:
        _refuse("config_groups", "has several schemes; one for all linears is read")
    return found.pop()


def _scheme(form: str, group: Any) -> StoredWeights:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        _refuse("config_groups", "has a group without weights; 4- and 8-bit weights are read")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            _refuse(key, "is set: quantized activations are not served")
    form = str(group.get("format") or form)
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if form == "mxfp4-pack-quantized":
        if (kind, weights.get("num_bits"), weights.get("group_size")) != ("float", 4, 32):
            _refuse("weights", "are not MXFP4: type float, num_bits 4, group_size 32")
        return StoredWeights("mxfp4", 4, 32)
    if form != "pack-quantized" or kind != "int":
        _refuse(
            "format",
            f"is {_shown(form)} with {_shown(kind)} weights; read are pack-quantized with int "
            "weights, and mxfp4-pack-quantized",
        )
    bits = _bits(weights, "num_bits", (4, 8))
    if strategy == "channel":
        return StoredWeights("int-packed", bits, None)
    if strategy != "group":
        _refuse("strategy", f"is {_shown(strategy)}; read are group and channel")
    return StoredWeights("int-packed", bits, _group(weights))


_READ: Final[Mapping[str, Callable[[Mapping[str, Any]], StoredWeights]]] = {
    "bitsandbytes": _bitsandbytes,
    "gguf": lambda _: StoredWeights("gguf"),
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
"""``quant_method`` -> the function that reads its settings."""
