"""The adapter format: reading and checking a PEFT adapter folder.

Everything is checked by our own code before any library sees a byte. Pickles are
never opened; ``base_model_name_or_path`` is never fetched. Each refusal names the
file, the tensor or key, and the fix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from veneer_registry.adapter import (
    NO_CLAIM,
    PROJECTIONS,
    AdapterManifest,
    BaseClaim,
    BaseSpec,
    LoraModule,
)
from veneer_registry.bundle_files import (
    TEMPLATE_FILE,
    FileSelection,
    open_file,
    read_small,
    select_files,
)
from veneer_registry.embeddings import check_embeddings, drop_embeddings, split_embeddings
from veneer_registry.lora_config import CONFIG_FILE, LoraSettings, parse_config
from veneer_registry.safetensors_header import SafetensorsHeader, TensorInfo
from veneer_registry.strict_json import refuse
from veneer_registry.tensor_names import module_path
from veneer_registry.training_manifest import (
    TRAINING_FILE,
    TrainingManifest,
    check_base,
    parse_training,
    plain_word,
)
from veneer_registry.values import SERVING_BYTES
from veneer_registry.weights import (
    WEIGHTS_FILE,
    check_numbers,
    digest_weights,
    find_modules,
    read_pieces,
    read_weights_header,
)

_SERVING_ANYWHERE: Final = "float32"
"""Serving dtype for checks without a base; the bound on magnitudes is the same."""


def read_adapter(
    folder: Path, base: BaseSpec | None, claim: BaseClaim = NO_CLAIM
) -> AdapterManifest:
    """Check an adapter folder and describe it.

    Args:
        folder: written by PEFT's ``save_pretrained``. Files outside the allow-list
            are not opened.
        base: the base that it must fit; None skips the checks of shapes, layers, embeddings
            and fingerprint against a base. See also `check_adapter`.
        claim: what its publisher says about its base.

    Raises:
        AdapterInvalid: metadata ``file`` and ``tensor`` or ``key``.
        BaseModelMismatch: its manifest or config names another base; the message shows both.
    """
    selection = select_files(folder)
    with _opened_weights(folder, base) as opened:
        return _read_rest(folder, base, claim, selection, opened, opened.digest(base))


def read_upload(
    folder: Path, base: BaseSpec | None, claim: BaseClaim = NO_CLAIM
) -> AdapterManifest:
    """Like `read_adapter`, for a folder that we own: embeddings that equal the base's are
    removed from its weights file."""
    manifest = read_adapter(folder, base, claim)
    drop_embeddings(folder)
    return manifest


def check_adapter(folder: Path) -> tuple[str, ...]:
    """Like `read_adapter` without a base, but compute no digest. Returns the warnings.

    Raises:
        AdapterInvalid: as `read_adapter`.
    """
    selection = select_files(folder)
    with _opened_weights(folder, None) as opened:
        check_numbers(read_pieces(opened.file), opened.header, _SERVING_ANYWHERE)
        return _read_rest(folder, None, NO_CLAIM, selection, opened, "").warnings


def _read_rest(
    folder: Path,
    base: BaseSpec | None,
    claim: BaseClaim,
    selection: FileSelection,
    opened: _Opened,
    digest: str,
) -> AdapterManifest:
    """Build the manifest from opened weights, their digest, and the folder's other files."""
    manifest = describe(digest, opened.header, opened.settings, opened.modules, base)
    names = {path.name for path in selection.files}
    warnings = list(manifest.warnings)
    training = TrainingManifest(None, {}, ())
    if TRAINING_FILE in names:
        training = parse_training(read_small(folder, TRAINING_FILE))
        warnings += training.warnings
    word = plain_word(training.fingerprint, manifest.base_name)
    if base is not None:
        word, more = check_base(training.fingerprint, base, manifest.base_name, claim)
        warnings += more
    # Last, since the embeddings of another base differ too.
    warnings += check_embeddings(read_pieces(opened.file), opened.embeddings, base)
    template = None
    if TEMPLATE_FILE in names:
        template = _template(read_small(folder, TEMPLATE_FILE))
    return dataclasses.replace(
        manifest,
        base_word=word,
        base_fingerprint=training.fingerprint,
        chat_template=template,
        training=training.facts,
        warnings=tuple(warnings),
    )


def check_fit(folder: Path, base: BaseSpec) -> None:
    """Check modules and shapes of stored weights against a base. Raises as `read_adapter`."""
    with _opened_weights(folder, base):
        pass


def weights_digest(folder: Path) -> str:
    """The weights digest of an adapter folder, checked as `read_adapter` does."""
    with _opened_weights(folder, None) as opened:
        return opened.digest(None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Opened:
    """The two weight files, with everything checked except the numbers.

    Attributes:
        header: without ``embeddings``.
    """

    file: io.BufferedReader
    header: SafetensorsHeader
    settings: LoraSettings
    modules: tuple[LoraModule, ...]
    embeddings: tuple[TensorInfo, ...]

    def digest(self, base: BaseSpec | None) -> str:
        """The weights digest; refuses bad numbers on the way."""
        serving = _SERVING_ANYWHERE if base is None else base.serving_dtype
        return digest_weights(read_pieces(self.file), self.header, self.modules, serving)


@contextlib.contextmanager
def _opened_weights(folder: Path, base: BaseSpec | None) -> Iterator[_Opened]:
    settings = parse_config(read_small(folder, CONFIG_FILE))
    with open_file(folder, WEIGHTS_FILE) as file:
        header, embeddings = split_embeddings(read_weights_header(file))
        modules = find_modules(header, settings, base)
        yield _Opened(file, header, settings, modules, embeddings)


def describe(
    digest: str,
    header: SafetensorsHeader,
    settings: LoraSettings,
    modules: tuple[LoraModule, ...],
    base: BaseSpec | None,
) -> AdapterManifest:
    """Manifest of an adapter from its two weight files.

    Args:
        base: its serving dtype gives the size in memory; None: bfloat16.
    """
    tensors = header.tensors.values()
    parameters = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    projections = {module.projection for module in modules}
    return AdapterManifest(
        weights_digest=digest,
        modules=modules,
        max_rank=max(module.rank for module in modules),
        targets=tuple(name for name in PROJECTIONS if name in projections),
        parameters=parameters,
        serving_bytes=parameters
        * SERVING_BYTES["bfloat16" if base is None else base.serving_dtype],
        file_dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        base_name=settings.base_name,
        warnings=settings.alpha_warnings(module_path(m.layer, m.projection) for m in modules),
    )


def _template(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(TEMPLATE_FILE, f"is not UTF-8 at byte {error.start}; save it as UTF-8")
    if not text.strip():
        refuse(TEMPLATE_FILE, "is empty; leave it out to use the base's template")
    return text
