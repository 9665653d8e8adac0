"""Computes a base model's `BaseFingerprint` from its files.

Training writes it into an adapter's manifest, and the server compares it with the fingerprint
of its own base. Files are hashed, never live modules: a quantized or repacked module in
memory no longer has the bytes that identify the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import struct
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Final

from veneer_registry.adapter import BaseFingerprint
from veneer_registry.errors import AdapterInvalid, InvalidField
from veneer_registry.gguf_header import BASE_BOUNDS, read_gguf_header
from veneer_registry.replacing import replace_file
from veneer_registry.safetensors_header import CHECKPOINT_LIMITS, TensorInfo, read_header
from veneer_registry.strict_json import canonical_json

_log = logging.getLogger(__name__)

TOKENIZER_FILE: Final = "tokenizer.json"

GGUF_FILE: Final = "model.gguf"
"""Link to the weights in the folder of a base that is a GGUF file."""
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_TAG: Final = b"veneer.base.v1\0"
_CHUNK: Final = 1 << 20


def fingerprint_base(
    folder: Path,
    *,
    quantization: Mapping[str, object] | None = None,
    cache_dir: Path | None = None,
    hashed: Callable[[int, int], None] = lambda done, total: None,
) -> BaseFingerprint:
    """Fingerprint a Hugging Face folder.

    Args:
        folder: holds ``*.safetensors`` and tokenizer files.
        quantization: the config that the base is quantized with, or None.
        cache_dir: where to cache the weights digest between runs, since hashing
            reads every byte (about 1 GB/s); None hashes each time. The cache key covers
            path, size, time and header of each file.
        hashed: if the weights have to be hashed, called with the bytes done and the total.

    Returns parts as in `BaseFingerprint`; "" for a missing tokenizer or template, and for no
    quantization.

    Raises:
        InvalidField: (metadata ``field`` = ``base``) no safetensors, or broken ones.
    """
    shards = weight_files(folder)
    quantized = "" if quantization is None else _sha256(canonical_json(dict(quantization)))
    return BaseFingerprint(
        weights=_cached_weights(shards, cache_dir, hashed),
        tokenizer=_tokenizer(folder),
        quantization=quantized,
        template=_template(folder),
    )


def vocabulary_digest(tokenizer: bytes) -> str:
    """SHA-256 of the tokens and merges in a ``tokenizer.json``, or "" if it has none.

    Unlike `BaseFingerprint.tokenizer` it stays the same when a trainer saves a tokenizer
    again: it does not cover added tokens, padding and truncation.
    """
    try:
        model = json.loads(tokenizer)["model"]
        # "a b" by older versions of tokenizers, ["a", "b"] by newer ones.
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
        return _sha256(canonical_json([model["vocab"], merges]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def weights_fingerprint(folder: Path) -> str:
    """`BaseFingerprint.weights` of the folder's current content; reads every byte.

    Raises:
        InvalidField: (metadata ``field`` = ``base``) no safetensors, or broken ones.
    """
    return _hash_weights(weight_files(folder))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bad_base(message: str, **metadata: str) -> InvalidField:
    return InvalidField(message, metadata={"field": "base", **metadata})


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load: the single file, else those in the index,
    else all ``*.safetensors``. For a base that is a GGUF file, return that file.

    Raises:
        InvalidField: (metadata ``field`` = ``base``) no safetensors, or a broken index.
    """
    if (link := folder / GGUF_FILE).is_symlink() or link.is_file():
        if not link.is_file():
            raise _bad_base(
                f"{folder} links to a GGUF file that is gone; give --base the file's new place",
                file=GGUF_FILE,
                cause="missing",
            )
        return [link]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_bytes())
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_base(
                f"{folder / _INDEX} is damaged; download it again",
                file=_INDEX,
                cause="damaged",
            ) from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise _bad_base(
                    f"{_INDEX} names {name!r}, which is not in the folder",
                    file=_INDEX,
                    cause="outside",
                )
            if not (folder / name).is_file():
                raise _bad_base(
                    f"{folder} does not contain {name}; download the base model again",
                    file=name,
                    cause="missing",
                )
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise _bad_base(
            f"{folder} contains no *.safetensors; give a Hugging Face model folder",
            file="*.safetensors",
            cause="missing",
        )
    return found


def _cached_weights(
    shards: list[Path], cache_dir: Path | None, hashed: Callable[[int, int], None]
) -> str:
    if cache_dir is None:
        return _hash_weights(shards, hashed)
    key = _cache_key(shards)
    entry = cache_dir / "fingerprints" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(entry.read_bytes())
        if found == _entry(key, found["weights"]):
            return str(found["weights"])
    if entry.exists():
        _log.warning(
            "%s is damaged or from an older version: hashing the base's weights again", entry
        )
    digest = _hash_weights(shards, hashed)
    with contextlib.suppress(OSError):  # without it the next start hashes again
        entry.parent.mkdir(parents=True, exist_ok=True)
        replace_file(entry, canonical_json(_entry(key, digest)))
    return digest


def _entry(key: str, digest: str) -> dict[str, str]:
    """Return the cache entry for a digest. It has a checksum, since a flipped bit would turn
    the digest into one of another base."""
    return {"weights": digest, "check": _sha256(f"{key} {digest}".encode())}


def _cache_key(shards: list[Path]) -> str:
    """Return the cache key. It covers path and header as well as size and time: some images set
    all times to zero, and two fine-tunes of one base have files of the same size."""
    digest = hashlib.sha256()
    for path in shards:
        status = path.stat()
        with path.open("rb") as file:
            prefix = file.read(8)
            length = min(int.from_bytes(prefix, "little"), CHECKPOINT_LIMITS.header_bytes)
            header = _sha256(file.read(length))
        if path.suffix == ".gguf":  # its header has no length; its first part has all metadata
            with path.open("rb") as file:
                header = _sha256(file.read(_CHUNK))
        facts = [str(path.resolve()), status.st_size, status.st_mtime_ns, header]
        digest.update(canonical_json(facts) + b"\n")
    return digest.hexdigest()


def _hash_weights(
    shards: list[Path], hashed: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """SHA-256 over sorted (name, dtype, shape, bytes) of all tensors of all files."""
    with contextlib.ExitStack() as stack:
        tensors: dict[str, tuple[TensorInfo, BufferedReader]] = {}
        for path in shards:
            file = stack.enter_context(path.open("rb"))
            for name, tensor in _tensors_of(file, path).items():
                if name in tensors:
                    raise _bad_base(
                        f"tensor {name!r} is in two files; keep one of them",
                        tensor=name,
                        cause="two_files",
                    )
                tensors[name] = (tensor, file)
        digest = hashlib.sha256(_TAG)
        buffer = memoryview(bytearray(_CHUNK))
        done, total = 0, sum(tensor.end - tensor.begin for tensor, _ in tensors.values())
        for name in sorted(tensors):
            tensor, file = tensors[name]
            described = canonical_json([name, tensor.dtype, list(tensor.shape)])
            digest.update(struct.pack(">QQ", len(described), tensor.end - tensor.begin))
            digest.update(described)
            file.seek(tensor.begin)
            hashed(done, total)
            left = tensor.end - tensor.begin
            done += left
            while left:
                count = file.readinto(buffer[: min(left, _CHUNK)])
                if not count:
                    raise _bad_base(
                        f"tensor {name!r} is cut off; download the base again",
                        tensor=name,
                        cause="cut_off",
                    )
                digest.update(buffer[:count])
                left -= count
        hashed(done, total)
        return digest.hexdigest()


def _tensors_of(file: BufferedReader, path: Path) -> Mapping[str, TensorInfo]:
    try:
        if path.suffix != ".gguf":
            return read_header(file, path.name, CHECKPOINT_LIMITS).tensors
        header = read_gguf_header(file, path.name, BASE_BOUNDS)
    except AdapterInvalid as error:
        raise _bad_base(
            f"the base model is damaged: {error}", file=path.name, cause="damaged"
        ) from error
    return {
        each.name: TensorInfo(
            each.name, each.kind, each.shape, each.begin, each.begin + each.size
        )
        for each in header.tensors
    }


def _tokenizer(folder: Path) -> str:
    path = folder / TOKENIZER_FILE
    if path.is_file():
        try:
            return _sha256(canonical_json(json.loads(path.read_bytes())))
        except (ValueError, RecursionError) as error:
            raise _bad_base(
                f"{path} is not JSON; download the base model again",
                file=path.name,
                cause="json",
            ) from error
    path = folder / "tokenizer.model"
    return _sha256(path.read_bytes()) if path.is_file() else ""


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _sha256(path.read_bytes())
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ""
    try:
        template = json.loads(path.read_bytes()).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise _bad_base(
            f"{path} is not a JSON object; download the base again",
            file=path.name,
            cause="json",
        ) from error
    if template is None:
        return ""
    # Old configs may have a list of named templates.
    text = template.encode() if isinstance(template, str) else canonical_json(template)
    return _sha256(text)
