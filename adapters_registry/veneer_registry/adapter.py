"""Plain frozen records that name and describe adapters and their base model.

Nothing here reads a file or imports torch: these records cross every boundary
of the project (registry, engine wire, rpc, training, client).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

from veneer_registry.errors import InvalidField

Projection = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]

PROJECTIONS: Final[tuple[Projection, ...]] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The linear projections of a decoder layer that an adapter may target."""

SHORT_REVISION: Final = 12
"""Hex digits of a revision's short form."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """Return ``name`` if it is a legal adapter name, else raise `InvalidField`.

    Names are data, never paths: no slash, no ``..`` component can occur because
    the store builds paths from digests it computed itself.
    """
    if not _NAME.fullmatch(name):
        raise InvalidField(
            f"adapter name {name!r} is not allowed: use 1 to 63 of a-z, 0-9, '.', '_' "
            "and '-', starting with a letter or digit",
            metadata={"field": "name"},
        )
    return name


class Tier(Enum):
    """Where an adapter's bytes are, ordered from far to near."""

    REMOTE = "remote"
    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable revision of a named adapter.

    Attributes:
        name: the registered name.
        revision: SHA-256 (64 hex digits) of the bundle; responses report it.
        weights_digest: SHA-256 (64 hex digits) of the tensors and of the config that
            changes the result; resident weights are keyed by it.
    """

    name: str
    revision: str
    weights_digest: str

    @property
    def short(self) -> str:
        """``name@`` and the first 12 digits of the revision."""
        return f"{self.name}@{self.revision[:SHORT_REVISION]}"


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    """Identity of a base model, from its files. Each part is 64 hex digits or "".

    Attributes:
        weights: SHA-256 over sorted (tensor name, dtype, shape, bytes on disk)
            of the source checkpoint. Must match to serve.
        tokenizer: SHA-256 of the tokenizer's files. Must match to serve.
        quantization: SHA-256 of the canonical quantization config; a difference warns.
        template: SHA-256 of the chat template; a difference warns.
    """

    weights: str
    tokenizer: str
    quantization: str = ""
    template: str = ""


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model that adapters are checked against.

    Attributes:
        name: logical name of the base model, for messages.
        num_layers: decoder layers; adapters index them from 0.
        shapes: projection -> (out_features, in_features), the same in each layer.
        fingerprint: identity of the checkpoint and tokenizer.
        serving_dtype: dtype that adapter tensors are served in.
        names: other names that an adapter's config may use for this base: its hub name,
            its folder, names that the operator allows (`base_names`).
        vocabulary: `fingerprint.vocabulary_digest` of its folder.
        folder: the checkpoint's folder, for comparing an adapter's embeddings; "" if there is
            none.
        origin: if the base is stored quantized, the name of the model that was quantized, whose
            weights are near the base's (`base_names.declared_origin`); otherwise "".
        require_same_weights: refuse adapters that were trained on the origin.
    """

    name: str
    num_layers: int
    shapes: Mapping[Projection, tuple[int, int]]
    fingerprint: BaseFingerprint
    serving_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    names: tuple[str, ...] = ()
    vocabulary: str = ""
    folder: str = ""
    origin: str = ""
    require_same_weights: bool = False


@dataclass(frozen=True, slots=True)
class BaseClaim:
    """The publisher's statement about an adapter's base, in addition to the adapter's files.

    Attributes:
        same: the base that its config names is the served one, by another name.
        vocabulary: `fingerprint.vocabulary_digest` of the tokenizer beside the adapter, or "".
    """

    same: bool = False
    vocabulary: str = ""


NO_CLAIM: Final = BaseClaim()
"""The publisher says nothing about the base."""


BaseWord = Literal["", "fingerprint", "name", "rule", "publisher", "none"]
"""The evidence that an adapter was trained on the served base: ``fingerprint``, in its training
manifest; ``name``, the base's name in its config; ``rule``, a name in its config that means the
same base by a built-in rule (`base_names.is_copy`), or the model that the base was quantized
from; ``publisher``, who says so (`BaseClaim.same`); ``none``, only its shapes fit. "" if this
was not checked."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted projection: y += scaling * (x @ A.T) @ B.T.

    Attributes:
        layer: decoder layer, from 0.
        projection: which linear of the layer.
        rank: rows of A ([rank, in_features]) and columns of B ([out_features, rank]).
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        a_key, b_key: the tensors' names in ``adapter_model.safetensors``.
    """

    layer: int
    projection: Projection
    rank: int
    scaling: float
    a_key: str
    b_key: str


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """The description of a validated adapter folder, derived from its content, never declared.

    Attributes:
        weights_digest: see `AdapterRef`.
        modules: every adapted projection, sorted by (layer, projection order).
        max_rank: largest rank of any module.
        targets: adapted projections, in `PROJECTIONS` order.
        parameters: number of LoRA parameters.
        serving_bytes: bytes of A and B in the base's serving dtype, which is the memory
            that a resident adapter takes.
        file_dtype: dtype of the tensors in the file ("mixed" if several).
        base_name: ``base_model_name_or_path`` as written; compared with the base's names,
            never fetched.
        base_word: the evidence that it was trained on the served base; without a served base,
            the evidence in its files (`plain_word`).
        base_fingerprint: the base it was trained on, if its manifest says so.
        chat_template: template shipped with the adapter, or None.
        training: flat facts from ``training_manifest.json`` (metrics, origin).
        warnings: sentences to show the uploader.
    """

    weights_digest: str
    modules: tuple[LoraModule, ...]
    max_rank: int
    targets: tuple[Projection, ...]
    parameters: int
    serving_bytes: int
    file_dtype: str
    base_name: str
    base_word: BaseWord = ""
    base_fingerprint: BaseFingerprint | None = None
    chat_template: str | None = None
    training: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
