"""A checkpoint's ``config.json`` as a frozen record. No torch here.

The front process uses it to check adapters and prompts before the engine has
loaded anything; the engine uses it to build the decoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from veneer_registry.adapter import Projection
from veneer_registry.errors import InvalidField
from veneer_registry.fingerprint import weight_files

from veneer_server.models.stored_format import StoredFormat, StoredWeights, read_stored
from veneer_server.models.stored_format import UnsupportedModel as UnsupportedModel

SUPPORTED: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> architecture that `veneer_server.backends.torch.decoder` runs."""

Quantization = StoredFormat | Literal["fp8", "none"]
"""How the base's linears are served: quantized at load, or as they are stored."""

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

SUPPORTED_ROPE: Final = get_args(RopeKind)

_NEEDED: Final[Mapping[RopeKind, Mapping[str, float]]] = {
    "default": {},
    "linear": {"factor": 1},
    "dynamic": {"factor": 1},
    "llama3": {"factor": 1, "low_freq_factor": 0, "high_freq_factor": 0},
    "yarn": {"factor": 1},
}
"""Numbers that each kind of rotary scaling must have, and the smallest value of each."""

_OPTIONAL: Final = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


_OLDER: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which older versions of AutoGPTQ and AutoAWQ store ``quantization_config``."""
_POSITIONS: Final = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
"""model_type -> ``max_position_embeddings`` of a config without it, as in transformers."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shapes and options of a decoder-only model.

    Attributes:
        architecture: the transformers class, the decoder's oracle in tests.
        context_length: most tokens of prompt and completion together, as promised by the
            rotary scaling.
        rope: kind of the rotary scaling; transformers computes its frequencies.
        eos_token_ids: any of these ends a sequence.
        windows: for each layer, the sliding window in tokens, or None for full.
        qk_norm: whether each query and key head has an RMSNorm (Qwen3).
        tied_head: whether the head's weight is the embedding.
        quantization: format of a folder that is stored quantized, otherwise None.
        stored: the same with its settings.
        stored_bytes: bytes of the weight files of such a folder, if its format is none of
            bitsandbytes'; otherwise 0.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    context_length: int
    eos_token_ids: tuple[int, ...]
    windows: tuple[int | None, ...]
    qk_norm: bool
    tied_head: bool
    quantization: StoredFormat | None
    rope: RopeKind = "default"
    stored: StoredWeights | None = None
    stored_bytes: int = 0

    @property
    def window(self) -> int | None:
        """Most tokens that any layer attends to, including the current one; None if a layer
        attends to all."""
        found = [window for window in self.windows if window is not None]
        return max(found) if found and len(found) == len(self.windows) else None

    @property
    def smallest_window(self) -> int | None:
        """Fewest tokens that any layer attends to; None if all layers attend to all."""
        return min((window for window in self.windows if window is not None), default=None)

    @property
    def shapes(self) -> Mapping[Projection, tuple[int, int]]:
        """Projection -> (out_features, in_features)."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return projection_shapes(self.hidden_size, self.intermediate_size, query, kv)


def projection_shapes(
    hidden: int, inner: int, query: int, kv: int
) -> Mapping[Projection, tuple[int, int]]:
    """Return each projection's (out_features, in_features).

    Args:
        inner: width between gate, up and down.
        query, kv: widths of all heads together.
    """
    return {
        "q_proj": (query, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"{path} cannot be read as JSON: {error}", metadata={"file": path.name}
        ) from error
    if not isinstance(loaded, dict):
        raise UnsupportedModel(f"{path} must hold a JSON object", metadata={"file": path.name})
    return loaded


def _token_ids(raw: Any) -> tuple[int, ...]:
    """Parse one token id, a list of ids, or null: all three occur in published configs."""
    if raw is None:
        return ()
    return tuple(int(token) for token in raw) if isinstance(raw, list) else (int(raw),)


def _windows(raw: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    # Defaults of transformers' classes.
    window = raw.get("sliding_window", None if model_type == "llama" else 4096)
    if window is None or (model_type.startswith("qwen") and not raw.get("use_sliding_window")):
        return (None,) * layers
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise UnsupportedModel(
            f"sliding_window in config.json is {window!r}: it must be a number of tokens, or "
            "null for none",
            metadata={"key": "sliding_window"},
        )
    types = raw.get("layer_types")
    if types is None and model_type.startswith("qwen"):
        full = raw.get("max_window_layers", 28)
        types = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if types is None:
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types)


def _rope(raw: Mapping[str, Any], positions: int) -> tuple[RopeKind, int]:
    """Return the kind of a config's rotary scaling, and the context length in tokens.

    transformers computes the frequencies (`modeling_rope_utils`); configs on which it would
    fail are refused here. The context length is:

    * YaRN: ``factor`` times the context before scaling. Configs that turn YaRN on often leave
      ``max_position_embeddings`` as it was.
    * Llama 3: ``max_position_embeddings``, which already is the scaled context.
    * linear: ``factor`` times the context before scaling if the config states that context,
      otherwise ``max_position_embeddings``, which is scaled in some published configs and not
      in others: we must not promise more than the model was trained for.
    * dynamic: ``max_position_embeddings``. Up to that length nothing is scaled. Beyond it,
      each frequency would depend on the sequence's length, and cached keys would be wrong.

    Args:
        raw: content of ``config.json``.
        positions: its ``max_position_embeddings``, or the default.

    Raises:
        UnsupportedModel: the kind or a setting is not supported; metadata has the supported
            kinds, or the key of the setting.
    """
    # The order of precedence is that of transformers.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise _wrong("rope_scaling", f"is {rope!r}: it must be a JSON object")
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise _wrong(
            "rope_parameters",
            f"differs between layers ({', '.join(map(str, nested))}), which is not supported: "
            "all layers must use the same scaling",
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedModel(
            f"rotary scaling {kind!r} is not supported; supported are "
            + ", ".join(SUPPORTED_ROPE),
            metadata={"key": "rope_type", "supported": " ".join(SUPPORTED_ROPE)},
        )
    if kind == "default":
        return kind, positions
    part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise _wrong("partial_rotary_factor", f"is {part!r}: partial rotation is not supported")
    _check_numbers(kind, rope)
    given = raw.get("original_max_position_embeddings")
    if given is None:
        given = rope.get("original_max_position_embeddings")
    original = positions if given is None else given
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise _wrong(
            "original_max_position_embeddings", f"is {original!r}: give a number of tokens"
        )
    scales = kind == "yarn" or (kind == "linear" and given is not None)
    # For YaRN without a factor, transformers takes the ratio of the two contexts.
    if not scales or rope["factor"] is None:
        return kind, positions
    return kind, int(rope["factor"] * original)


def _check_numbers(kind: RopeKind, rope: Mapping[str, Any]) -> None:
    for key, least in _NEEDED[kind].items():
        if key not in rope:
            raise _wrong(key, f"is missing: rotary scaling {kind!r} needs it")
        if not (kind == "yarn" and rope[key] is None):
            _check_number(key, rope[key], least)
    for key in _OPTIONAL:
        if rope.get(key) is not None:
            _check_number(key, rope[key], 0)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise _wrong("high_freq_factor", "must be larger than low_freq_factor")


def _check_number(key: str, value: Any, least: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
        raise _wrong(key, f"is {value!r}: it must be a number of at least {least}")


def _wrong(key: str, problem: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"rotary scaling in config.json: {key} {problem}", metadata={"key": key}
    )


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Read ``config.json`` (and ``generation_config.json`` for the end tokens).

    Raises:
        UnsupportedModel: the decoder cannot run the model; the message says what is supported.
    """
    raw = _read_json(folder / "config.json")
    if not raw:
        raise UnsupportedModel(
            f"{folder} has no config.json: give a Hugging Face model folder, a hub name, "
            "or 'smollm2-135m'",
            metadata={"file": "config.json"},
        )
    for name, method in _OLDER.items():
        if raw.get("quantization_config") is None and (own := _read_json(folder / name)):
            raw["quantization_config"] = {"quant_method": method} | own
    model_type = str(raw.get("model_type"))
    if model_type not in SUPPORTED:
        raise UnsupportedModel(
            f"model type {model_type!r} is not supported; supported are "
            + ", ".join(f"{k} ({v})" for k, v in SUPPORTED.items()),
            metadata={"key": "model_type", "supported": " ".join(SUPPORTED)},
        )
    positions = raw.get("max_position_embeddings", _POSITIONS[model_type])
    rope, context_length = _rope(raw, int(positions))
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(
            f"activation {raw['hidden_act']!r} is not supported; supported is silu (SwiGLU)",
            metadata={"key": "hidden_act", "supported": "silu"},
        )
    layers = int(raw["num_hidden_layers"])
    heads = int(raw["num_attention_heads"])
    stored = read_stored(raw)
    generation = _read_json(folder / "generation_config.json")
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    return DecoderConfig(
        architecture=SUPPORTED[model_type],
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        context_length=context_length,
        eos_token_ids=_token_ids(eos),
        windows=_windows(raw, model_type, layers),
        qk_norm=model_type == "qwen3",
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        quantization=None if stored is None else stored.format,
        rope=rope,
        stored=stored,
        stored_bytes=_weight_bytes(folder) if stored is not None and stored.is_codes else 0,
    )


def _weight_bytes(folder: Path) -> int:
    """Return the size of the weight files; 0 if they are missing, which loading will report."""
    try:
        return sum(path.stat().st_size for path in weight_files(folder))
    except (InvalidField, OSError):
        return 0
