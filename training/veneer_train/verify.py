"""Verifies that an adapter is whole, fits this base, and is as good as its manifest says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from hashlib import file_digest
from pathlib import Path
from typing import Any

from veneer_registry.adapter import BaseFingerprint, BaseSpec
from veneer_registry.base_names import known_names
from veneer_registry.errors import InvalidField
from veneer_registry.format import read_adapter
from veneer_registry.training_manifest import check_base

from veneer_train.config import QuantConfig
from veneer_train.manifest import fingerprint
from veneer_train.measure import data_options, manifest_of, measure, quant_of
from veneer_train.plan import read_shape

_CLOSE = 0.01
"""Nats per token by which threads and packed layers may change a mean over a file."""


def verify(
    adapter: Path,
    base: Path,
    *,
    data: Path | None = None,
    server: str | None = None,
) -> Iterator[str]:
    """Yield a line for each check that passes.

    Raises:
        AdapterInvalid: a server would not accept the folder.
        BaseModelMismatch: it was trained on another base.
        InvalidField: the loss differs from the manifest's.
    """
    quant = quant_of(adapter)
    here = fingerprint(base, quant)
    spec = _spec(base, here)
    manifest = read_adapter(adapter, spec)
    yield (
        f"whole: {manifest.parameters / 1e6:.2f} M parameters, rank up to {manifest.max_rank}, "
        f"{', '.join(manifest.targets)}"
    )
    if manifest.base_fingerprint is None:
        yield "its manifest does not name a base; its shapes fit this one"
    else:
        yield f"for this base: weights {here.weights[:12]}, tokenizer {here.tokenizer[:12]}"
    for warning in manifest.warnings:
        yield f"warning: {warning}"
    if server is not None:
        yield from _served(server, manifest.base_fingerprint)
    if data is not None:
        yield _measured(adapter, base, data, quant)


def _spec(base: Path, here: BaseFingerprint) -> BaseSpec:
    shape = read_shape(base)
    shapes: dict[Any, tuple[int, int]] = dict(shape.linears)
    names = known_names(shape.name, base)
    return BaseSpec(shape.name, shape.layers, shapes, here, names=names, folder=str(base))


def _served(server: str, trained: BaseFingerprint | None) -> Iterator[str]:
    from veneer_client import Client

    with Client(server) as client:
        served = client.info().base_model
    spec = BaseSpec(served.name, 0, {}, BaseFingerprint(**asdict(served.fingerprint)))
    for warning in check_base(trained, spec)[1]:
        yield f"warning: {warning}"
    yield f"{server} serves {served.name}, and would accept it"


def _measured(adapter: Path, base: Path, data: Path, quant: QuantConfig) -> str:
    """Measure the loss again. Raise InvalidField if it differs from the manifest's, or the
    manifest has none to compare with."""
    manifest = manifest_of(adapter)
    recorded = manifest.get("metrics", {}).get("val_loss_after")
    val, train = (manifest.get("data", {}).get(part) or {} for part in ("val", "train"))
    with data.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if recorded is None or val.get("sha256") != digest:
        raise InvalidField(
            f"the manifest has no figure for the present {data.name}; the adapter was measured "
            f"on {val.get('file', 'nothing')} ({str(val.get('sha256'))[:12]})",
            metadata={"field": "data"},
        )
    if train.get("sha256") == digest:
        raise InvalidField(
            f"it was measured on a held-out part of {data.name}, not on a file: set data.val "
            "in training to verify the figure later",
            metadata={"field": "data"},
        )
    options = data_options(adapter, data)
    *_, found = measure(base, adapter, data, options, reference=False, quant=quant)
    if abs(found.loss.loss - recorded) > _CLOSE:
        raise InvalidField(
            f"loss on {data.name} is {found.loss.loss:.4f}, but the manifest says "
            f"{recorded:.4f}: the base or the adapter has changed since",
            metadata={"field": "data"},
        )
    return (
        f"loss on {data.name} is {found.loss.loss:.4f}, as its manifest says ({recorded:.4f})"
    )
