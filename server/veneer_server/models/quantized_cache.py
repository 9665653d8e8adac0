"""Cache of 4-bit weights, kept between starts as ordinary prequantized folders.

A folder is used only if it matches its manifest (`models.sealed`); otherwise one line is logged
and it is rebuilt. If a folder cannot be written, the only cost is time at the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from veneer_registry.disk import sync

from veneer_server.models.sealed import FolderDamaged, Sealed, seal
from veneer_server.system.disk import remove, staged

log = logging.getLogger(__name__)

_Weights = TypeVar("_Weights")


class QuantizedCache:
    """The cached folder for one base, quantization, dtype and version of the libraries.

    Args:
        source: the base's folder. The cache must match its config as well as the fingerprint
            of its weights, since settings such as rotary scaling are read from the cached
            config.
    """

    def __init__(
        self,
        cache_dir: Path,
        source: Path,
        *,
        fingerprint: str,
        quantization: str,
        dtype: torch.dtype,
    ) -> None:
        import bitsandbytes
        import transformers

        # Files written by another library version may not mean the same.
        version = f"bnb{bitsandbytes.__version__}-tf{transformers.__version__}"
        kind = f"{quantization}-{str(dtype).removeprefix('torch.')}"
        self.folder = cache_dir / "quantized" / f"{fingerprint[:32]}-{kind}-{version}"
        config = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
        self._made_from = f"weights {fingerprint}, config {config}"

    def load(
        self, read: Callable[[Path], Any], use: Callable[[Any], _Weights]
    ) -> _Weights | None:
        """Return ``use(read(folder))``; None if the folder is missing, or is damaged and has
        been removed.

        Both functions run while a thread hashes the folder, and their result is returned only
        if the hashes match. Errors of ``use`` are raised if the folder is intact.
        """
        if not os.path.lexists(self.folder):
            return None
        try:
            with Sealed(self.folder, self._made_from) as sealed, self._marked() as unfinished:
                if unfinished:
                    sealed.verify()
                try:
                    model = read(self.folder)
                except MemoryError:
                    raise
                except Exception as error:
                    sealed.verify()
                    raise FolderDamaged(f"it cannot be loaded: {error}") from error
                try:
                    return use(model)
                finally:
                    del model
                    sealed.verify()
        except FolderDamaged as damage:
            log.warning(
                "the cached 4-bit weights %s are damaged, rebuilding: %s",
                self.folder,
                damage,
            )
        with contextlib.suppress(OSError):  # in that case `keep` logs that it cannot write
            remove(self.folder)
        return None

    def keep(self, model: Any) -> None:
        """Write the folder. Call this before the first forward pass, which repacks 4-bit
        weights for the CPU."""
        parent = self.folder.parent
        try:
            with staged(parent, "quantize-") as scratch:
                made = scratch / "folder"
                model.save_pretrained(made)
                seal(made, self._made_from)
                # Another process may have finished first; its result is as good as ours.
                with contextlib.suppress(FileNotFoundError):
                    self.folder.rename(scratch / "before")
                made.rename(self.folder)
                sync(parent)
        # A full disk raises OSError or an error of safetensors, depending on where it happens.
        except Exception as error:
            log.warning(
                "the 4-bit weights cannot be saved in %s; every start will quantize them "
                "again: %s",
                parent,
                error,
            )

    @contextlib.contextmanager
    def _marked(self) -> Iterator[bool]:
        """Mark the folder while it is being loaded; yield whether it was already marked.

        A leftover mark means that an earlier load ended its process: the disk could not read a
        page, or no check caught bad weights. Such a folder is verified before it is loaded, not
        at the same time; so is a folder that cannot be marked.
        """
        mark = self.folder.with_name(f"{self.folder.name}.loading")
        try:
            mark.touch(exist_ok=False)
            unfinished = False
        except OSError:
            unfinished = True
        try:
            yield unfinished
        finally:
            with contextlib.suppress(OSError):
                mark.unlink()
