"""A base in a GGUF file, as the folder that every other part of the server reads.

The folder has the JSON files of a Hugging Face folder, made from the file's metadata, and
``model.gguf``, a link to the file, whose weights are read where they are. Only text is made:
no torch, no weights.

Facts about llama.cpp's files, from its ``convert_hf_to_gguf.py`` and ``llama-vocab.cpp``:

* For the architecture ``llama`` the rows of q and k are interleaved within each head (see
  `veneer_registry.gguf_adapter`); `HfTensor.heads` says which tensors that concerns.
* Llama 3's rotary scaling is stored as ``rope_freqs.weight``, by which frequencies are divided.
* A head that is not there is the embedding.
* ``tokenizer.ggml.pre`` names the regular expression by which text is split.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from veneer_registry.base_names import without_storage
from veneer_registry.errors import AdapterInvalid
from veneer_registry.gguf_header import (
    BASE_BOUNDS,
    BLOCK_TYPES,
    INTERLEAVED,
    PLAIN_TYPES,
    PROJECTION_TENSORS,
    GgufHeader,
    GgufTensor,
    read_gguf_header,
)

from veneer_server.models.config import projection_shapes
from veneer_server.models.stored_format import UnsupportedModel

ROPE_FREQS: Final = "rope_freqs.weight"

_READABLE: Final = (*PLAIN_TYPES, *BLOCK_TYPES)
_SOURCES: Final = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.repo_url",
)
"""Metadata that holds the address of the model that was converted."""
_ENDS: Final = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"}
)
"""Control tokens that end a turn whatever the metadata says, as in llama.cpp."""

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2: Final = rf"{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS: Final = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor in a GGUF file that stands for one of Hugging Face's.

    Attributes:
        heads: for rows that are interleaved within each of so many heads; 0: they are not.
    """

    stored: GgufTensor
    heads: int


@dataclass(frozen=True, slots=True)
class GgufBase:
    """A GGUF file that can be served.

    Attributes:
        tensors: by Hugging Face's names.
        rope_freqs: what rotary frequencies are divided by; None: 1.
        config: the content of ``config.json``.
    """

    header: GgufHeader
    tensors: Mapping[str, HfTensor]
    rope_freqs: GgufTensor | None
    config: Mapping[str, Any]


def open_gguf(path: Path) -> GgufBase:
    """Read a file's header; see `read_gguf`.

    Raises:
        UnsupportedModel: it cannot be read, or cannot be served.
    """
    try:
        with path.open("rb") as file:
            return read_gguf(file, path.name)
    except OSError as error:
        raise UnsupportedModel(
            f"{path} cannot be read: {error.strerror or error}; give --base a file that this "
            "user may read",
            metadata={"file": path.name},
        ) from error


def read_gguf(file: BinaryIO, name: str) -> GgufBase:
    """Read a file's header, and check that it can be served: family, types, names and shapes.

    Raises:
        UnsupportedModel: metadata ``file`` and, where it is one, ``key`` or ``tensor``.
    """
    try:
        header = read_gguf_header(file, name, BASE_BOUNDS)
    except AdapterInvalid as error:
        raise UnsupportedModel(error.message, metadata=dict(error.metadata)) from error
    return _Reader(header, name).read()


def folder_files(base: GgufBase, name: str) -> dict[str, bytes]:
    """Make the folder's JSON files and chat template, by name.

    Args:
        name: the file's name, for messages.

    Raises:
        UnsupportedModel: the tokenizer is not of a kind that is read.
    """
    facts = _Facts(base.header.facts, name)
    made = _tokenizer(facts)
    found = {
        "config.json": base.config,
        "generation_config.json": {"eos_token_id": made.ends},
        "tokenizer.json": made.description,
        "tokenizer_config.json": made.settings,
    }
    files = {
        each: json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "replace")
        for each, content in found.items()
    }
    template = facts.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode("utf-8", "replace")
    return files


class _Facts:
    """Metadata, with checks of types and bounds."""

    def __init__(self, facts: Mapping[str, Any], name: str) -> None:
        self._facts, self._name = facts, name

    def get(self, key: str) -> Any:
        return self._facts.get(key)

    def bad(self, why: str, key: str = "", tensor: str = "", **more: str) -> NoReturn:
        about = f": {key or tensor}" if key or tensor else ""
        metadata = {"file": self._name, **more}
        if key:
            metadata["key"] = key
        if tensor:
            metadata["tensor"] = tensor[:120]
        raise UnsupportedModel(f"{self._name}{about} {why}", metadata=metadata)

    def whole(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        found = self._facts.get(key, default)
        if isinstance(found, list):  # one for each layer, usually all the same
            found = found[0] if found and found == [found[0]] * len(found) else found
        if type(found) is not int or not 1 <= found <= most:
            self.bad(f"is {_shown(found)}; need a whole number from 1 to {most}", key)
        return found

    def real(self, key: str, default: float) -> float:
        found = self._facts.get(key, default)
        if type(found) not in (int, float) or not math.isfinite(found) or found <= 0:
            self.bad(f"is {_shown(found)}; need a number above 0", key)
        return float(f"{found:.7g}")  # stored in float32; the shortest number for it

    def texts(self, key: str) -> list[str]:
        found = self._facts.get(key)
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            self.bad("is missing or not a list of texts; convert the model again", key)
        return found

    def numbers(self, key: str, count: int) -> list[Any]:
        found = self._facts.get(key)
        if (
            not isinstance(found, list)
            or len(found) != count
            or not all(type(each) in (int, float) for each in found)
        ):
            self.bad(f"is not a list of {count} numbers; convert the model again", key)
        return found


def _shown(value: object) -> str:
    return repr(value)[:80]


class _Reader:
    """Turns one header into a `GgufBase`."""

    def __init__(self, header: GgufHeader, name: str) -> None:
        self._header, self._name = header, name
        self._facts = _Facts(header.facts, name)
        self._of = {tensor.name: tensor for tensor in header.tensors}
        self._used: set[str] = set()

    def read(self) -> GgufBase:
        facts = self._facts
        kind = facts.get("general.type")
        if kind not in (None, "model"):
            facts.bad(
                f"is {_shown(kind)}, not a model; an adapter is published with `veneer adapter "
                "convert` and `push`",
                "general.type",
            )
        if facts.get("split.count") not in (None, 0, 1):
            facts.bad(
                "is a part of a model in several files; join them: llama-gguf-split --merge "
                f"{self._name} WHOLE.gguf",
                "split.count",
            )
        architecture = facts.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in INTERLEAVED:
            facts.bad(
                f"is {_shown(architecture)}; served are {', '.join(INTERLEAVED)}: give another "
                "model",
                "general.architecture",
            )
        if len(self._of) < len(self._header.tensors):
            facts.bad("names a tensor twice; convert the model again")
        self._check_types()
        config = self._config(architecture)
        tensors = self._tensors(architecture, config)
        rope_freqs = self._of.get(ROPE_FREQS)
        if rope_freqs is not None:
            self._used.add(ROPE_FREQS)
            if rope_freqs.kind != "F32" or rope_freqs.shape != (config["head_dim"] // 2,):
                facts.bad("is not a float32 for each rotary frequency", tensor=ROPE_FREQS)
        strange = [name for name in self._of if name not in self._used]
        if strange:
            facts.bad(
                "is not a tensor of this architecture, or of a part of it that is not served",
                tensor=strange[0],
            )
        return GgufBase(self._header, tensors, rope_freqs, config)

    def _check_types(self) -> None:
        for tensor in self._header.tensors:
            if tensor.kind not in _READABLE:
                self._facts.bad(
                    f"has the type {tensor.kind}, which is not read. Convert the file, better "
                    "from one of 16 bits: llama-quantize --allow-requantize "
                    f"{self._name} {Path(self._name).stem}-Q4_K_M.gguf Q4_K_M",
                    tensor=tensor.name,
                    kind=tensor.kind,
                )

    def _config(self, architecture: str) -> dict[str, Any]:
        facts = self._facts

        def key(name: str) -> str:
            return f"{architecture}.{name}"

        hidden = facts.whole(key("embedding_length"))
        heads = facts.whole(key("attention.head_count"), most=1 << 16)
        kv_heads = facts.whole(key("attention.head_count_kv"), heads, most=heads)
        if heads % kv_heads:
            facts.bad(f"does not divide {heads} heads", key("attention.head_count_kv"))
        size = facts.whole(key("attention.key_length"), hidden // heads or None, most=1 << 16)
        if facts.whole(key("attention.value_length"), size) != size:
            facts.bad("differs from that of keys, which is not served", key("value_length"))
        rotated = facts.whole(key("rope.dimension_count"), size)
        if rotated != size or size % 2:
            facts.bad(
                f"is {rotated} of {size} dimensions: partial rotation is not served",
                key("rope.dimension_count"),
            )
        for name in ("expert_count", "attention.sliding_window"):
            if architecture != "llama" or name == "expert_count":
                found = facts.get(key(name))
                if found not in (None, 0, False):
                    facts.bad(f"is {_shown(found)}: such a model is not served", key(name))
        for name in ("logit_scale", "embedding_scale", "residual_scale", "attention.scale"):
            if facts.get(key(name)) not in (None, 0, 1):
                facts.bad("is set: such a model is not served", key(name))
        tokens = facts.texts("tokenizer.ggml.tokens")
        rows = self._shape("token_embd.weight", 2)[0]
        if not 1 <= len(tokens) <= rows:
            facts.bad(f"has {len(tokens)} items, the embedding {rows}", "tokenizer.ggml.tokens")
        return {
            "model_type": architecture,
            "architectures": [f"{architecture.capitalize()}ForCausalLM"],
            "_name_or_path": origin_of(facts.get, Path(self._name).stem),
            "vocab_size": rows,
            "hidden_size": hidden,
            "intermediate_size": facts.whole(key("feed_forward_length")),
            "num_hidden_layers": facts.whole(key("block_count"), most=4096),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": size,
            "rms_norm_eps": facts.real(key("attention.layer_norm_rms_epsilon"), 1e-5),
            "max_position_embeddings": facts.whole(key("context_length")),
            "rope_theta": facts.real(key("rope.freq_base"), 10000.0),
            "rope_scaling": self._scaling(architecture),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self._of,
            "attention_bias": "blk.0.attn_q.bias" in self._of,
            "sliding_window": None,
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
            "quantization_config": {"quant_method": "gguf"},
        }

    def _scaling(self, architecture: str) -> dict[str, Any] | None:
        facts, begin = self._facts, f"{architecture}.rope.scaling"
        kind = facts.get(f"{begin}.type")
        if kind in (None, "none"):
            if facts.get(f"{begin}.factor") not in (None, 0, 1):
                kind = "linear"
            else:
                return None
        if kind not in ("linear", "yarn"):
            facts.bad(f"is {_shown(kind)}; read are linear and yarn", f"{begin}.type")
        scaling: dict[str, Any] = {
            "rope_type": kind,
            "factor": facts.real(f"{begin}.factor", 1.0),
        }
        if facts.get(f"{begin}.original_context_length") is not None:
            original = facts.whole(f"{begin}.original_context_length")
            scaling["original_max_position_embeddings"] = original
        if kind == "yarn":
            for ours, theirs in (
                ("beta_fast", "yarn_beta_fast"),
                ("beta_slow", "yarn_beta_slow"),
            ):
                if facts.get(f"{begin}.{theirs}") is not None:
                    scaling[ours] = facts.real(f"{begin}.{theirs}", 1.0)
            if facts.get(f"{begin}.attn_factor") not in (None, 1):
                facts.bad("is set, which is not read", f"{begin}.attn_factor")
        return scaling

    def _shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        found = self._of.get(name)
        if found is None or len(found.shape) != dimensions:
            self._facts.bad("is missing, or has another shape; convert it again", tensor=name)
        return found.shape

    def _tensors(self, architecture: str, config: Mapping[str, Any]) -> Mapping[str, HfTensor]:
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        size, vocabulary = config["head_dim"], config["vocab_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        shapes = projection_shapes(hidden, inner, heads * size, kv_heads * size)
        turned = {"q_proj": heads, "k_proj": kv_heads} if INTERLEAVED[architecture] else {}
        found: dict[str, HfTensor] = {}

        def put(ours: str, theirs: str, shape: tuple[int, ...], of_heads: int = 0) -> None:
            tensor = self._of.get(theirs)
            if tensor is None:
                self._facts.bad("is missing; convert the model again", tensor=theirs)
            if tensor.shape != shape:
                self._facts.bad(
                    f"is {list(tensor.shape)}, its metadata says {list(shape)}", tensor=theirs
                )
            if len(shape) == 1 and tensor.kind not in PLAIN_TYPES:
                self._facts.bad(f"is a vector of type {tensor.kind}", tensor=theirs)
            self._used.add(theirs)
            found[ours] = HfTensor(tensor, of_heads)

        put("model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden))
        put("model.norm.weight", "output_norm.weight", (hidden,))
        if not config["tie_word_embeddings"]:
            put("lm_head.weight", "output.weight", (vocabulary, hidden))
        for layer in range(config["num_hidden_layers"]):
            ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
            put(f"{ours}.input_layernorm.weight", f"{theirs}.attn_norm.weight", (hidden,))
            put(
                f"{ours}.post_attention_layernorm.weight",
                f"{theirs}.ffn_norm.weight",
                (hidden,),
            )
            if architecture == "qwen3":
                for norm in "qk":
                    name = f"{ours}.self_attn.{norm}_norm.weight"
                    put(name, f"{theirs}.attn_{norm}_norm.weight", (size,))
            for projection, part in PROJECTION_TENSORS.items():
                block = "mlp" if part.startswith("ffn") else "self_attn"
                stem = f"{ours}.{block}.{projection}"
                of_heads = turned.get(projection, 0)
                shape = shapes[projection]
                put(f"{stem}.weight", f"{theirs}.{part}.weight", shape, of_heads)
                if f"{theirs}.{part}.bias" in self._of:
                    put(f"{stem}.bias", f"{theirs}.{part}.bias", shape[:1], of_heads)
        # llama.cpp's own table of rotary factors, in some files once more for each layer.
        self._used.update(name for name in self._of if name.endswith(".rope_freqs.weight"))
        return found


def origin_of(get: Callable[[str], Any], stem: str) -> str:
    """Return the name of the model that was quantized, by a file's metadata or its name.
    ``general.name`` comes last, since in many files it is that of a training run.
    ``general.base_model`` is not used: it is what that model was made from.

    Args:
        get: returns the metadata of a key, or None.
        stem: the file's name without ``.gguf``.
    """
    for key in _SOURCES:
        url = get(key)
        parts = url.rstrip("/").split("/")[-2:] if isinstance(url, str) else []
        if len(parts) == 2 and all(re.fullmatch(r"[\w.-]{1,100}", part) for part in parts):
            return "/".join(parts)
    if (named := without_storage(stem)) != stem:
        return named
    name = get("general.name")
    if not isinstance(name, str) or not name.strip():
        return stem
    found = re.sub(r"\s+", "-", name.strip())[:200]
    owner = get("general.organization")
    if isinstance(owner, str) and re.fullmatch(r"[\w.-]{1,100}", owner) and "/" not in found:
        return f"{owner}/{found}"
    return found


# ---------------------------------------------------------------------------- tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
"""Types of tokens in GGUF."""


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """Contents of ``tokenizer.json`` and ``tokenizer_config.json``, and the tokens that end a
    sequence."""

    description: Mapping[str, Any]
    settings: Mapping[str, Any]
    ends: Sequence[int]


def _tokenizer(facts: _Facts) -> _Tokenizer:
    tokens = facts.texts("tokenizer.ggml.tokens")
    kinds = [_NORMAL] * len(tokens)
    if facts.get("tokenizer.ggml.token_type") is not None:
        kinds = facts.numbers("tokenizer.ggml.token_type", len(tokens))
    model = facts.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        facts.bad(
            f"is {_shown(model)}; read are gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
            "tokenizer.ggml.model",
        )
    special: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        found = facts.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None:
            if type(found) is not int or not 0 <= found < len(tokens):
                facts.bad(f"is {_shown(found)}, no token", f"tokenizer.ggml.{key}_token_id")
            special[f"{name}_token"] = found
    if special.get("pad_token", special.get("eos_token")) == special.get("eos_token"):
        # Padding with the token that ends a turn would teach a model never to stop.
        special.pop("pad_token", None)
        if "unk_token" in special:
            special["pad_token"] = special["unk_token"]
    described = _byte_level(facts, tokens, kinds) if model == "gpt2" else None
    if described is None:
        described = _sentence_piece(facts, tokens, kinds, special)
    begin = facts.get("tokenizer.ggml.add_bos_token")
    if begin is None:
        begin = model == "llama" or facts.get("tokenizer.ggml.pre") in _WITH_BOS
    bos = special.get("bos_token") if begin else None
    described["post_processor"] = _template(tokens, bos)
    context = facts.get(f"{facts.get('general.architecture')}.context_length")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos is not None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context if type(context) is int else 1 << 20,
    }
    for name, number in special.items():
        settings[name] = tokens[number]
    ends = {special["eos_token"]} if "eos_token" in special else set()
    for key in ("eot", "eom"):
        found = facts.get(f"tokenizer.ggml.{key}_token_id")
        if type(found) is int and 0 <= found < len(tokens):
            ends.add(found)
    ends |= {
        number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if token in _ENDS and kind in (_CONTROL, _USER)
    }
    return _Tokenizer(described, settings, sorted(ends))


def _template(tokens: Sequence[str], bos: int | None) -> dict[str, Any]:
    def sequence(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    single, pair = [sequence("A", 0)], [sequence("A", 0), sequence("B", 1)]
    special = {}
    if bos is not None:
        token = tokens[bos]
        first = {"SpecialToken": {"id": token, "type_id": 0}}
        single, pair = [first, *single], [first, *pair]
        special[token] = {"id": token, "ids": [bos], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }


def _added(
    tokens: Sequence[str], kinds: Sequence[Any], *, unknown: bool
) -> list[dict[str, Any]]:
    """Return the tokens that are matched before text is split.

    Args:
        unknown: whether the token for unknown text is one of them.
    """
    special = {_CONTROL: True, _USER: False, **({_UNKNOWN: True} if unknown else {})}
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special[kind],
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in special and token
    ]


def _split(expression: str) -> list[dict[str, Any]]:
    return [
        {
            "type": "Split",
            "pattern": {"Regex": expression},
            "behavior": "Isolated",
            "invert": False,
        },
        _bytes_of(by_regex=False),
    ]


def _bytes_of(*, by_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": by_regex,
    }


_PRE: Final[Mapping[str, Sequence[Mapping[str, Any]]]] = {
    "gpt-2": [_bytes_of(by_regex=True)],
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r"), (_DIGITS, _bytes_of(by_regex=True))
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"),
        _split(_LLAMA3),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _split(_QWEN2)),
    "tekken": _split(_TEKKEN),
}
"""``tokenizer.ggml.pre`` -> how text is split."""
_NORMALIZED: Final = frozenset({"qwen2", "deepseek-r1-qwen"})
"""Those that normalize text (NFC) first."""
_WHOLE_FIRST: Final = frozenset(
    {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
)
"""Those that take a piece of text that is a token without merging."""
_WITH_BOS: Final = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})


def _byte_level(facts: _Facts, tokens: Sequence[str], kinds: Sequence[Any]) -> dict[str, Any]:
    pre = facts.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _PRE:
        facts.bad(
            f"is {_shown(pre)}, a way to split text that is not read ({', '.join(_PRE)} are): "
            "give the model's Hugging Face folder",
            "tokenizer.ggml.pre",
        )
    merges = [merge.split(" ") for merge in facts.texts("tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        facts.bad("has an item that is not two tokens", "tokenizer.ggml.merges")
    known = _vocabulary(tokens, kinds)
    have = set(known)
    if any(a not in have or b not in have or a + b not in have for a, b in merges):
        facts.bad("has a merge of tokens that do not exist", "tokenizer.ggml.merges")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, kinds, unknown=True),
        "normalizer": {"type": "NFC"} if pre in _NORMALIZED else None,
        "pre_tokenizer": _sequence(_PRE[pre]),
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": _bpe(known, merges, ignore_merges=pre in _WHOLE_FIRST),
    }


def _sequence(steps: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(steps) == 1:
        return steps[0]
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _vocabulary(tokens: Sequence[str], kinds: Sequence[Any]) -> dict[str, int]:
    """Return the tokens of the model itself. As publishers have it: special tokens at the end
    are added to the vocabulary, those at its beginning belong to it."""
    last = len(tokens)
    while last and kinds[last - 1] in (_CONTROL, _USER, _UNUSED):
        last -= 1
    return {
        token: number for number, token in enumerate(tokens[:last]) if kinds[number] != _UNUSED
    }


def _bpe(
    vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], **more: Any
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
        **more,
    }


def _sentence_piece(
    facts: _Facts, tokens: Sequence[str], kinds: Sequence[Any], special: Mapping[str, int]
) -> dict[str, Any]:
    scores = facts.numbers("tokenizer.ggml.scores", len(tokens))
    known = _vocabulary(tokens, kinds)
    longest = 64
    merges: list[tuple[float, str, str]] = []
    for token, number in known.items():
        if kinds[number] in (_CONTROL, _UNKNOWN, _BYTE) or len(token) > longest:
            continue
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        found = [pair for pair in splits if pair[0] in known and pair[1] in known]
        found.sort(key=lambda pair: (known[pair[0]], known[pair[1]]))
        merges += [(scores[number], left, right) for left, right in found]
    # The order of SentencePiece's own merges, which `transformers` restores in the same way.
    merges.sort(key=lambda each: (each[0], len(each[1]), len(each[2])), reverse=True)
    prefix = facts.get("tokenizer.ggml.add_space_prefix")
    steps: list[dict[str, Any]] = []
    if prefix is not False:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix is not False:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = special.get("unk_token")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, kinds, unknown=True),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            known,
            [[left, right] for _, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }
