"""Make a data folder with very many registered adapters, for `tests.bench.registered`."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
from veneer_registry.adapter import PROJECTIONS, AdapterManifest, LoraModule
from veneer_registry.bundle import Bundle
from veneer_registry.catalog import Catalog
from veneer_registry.format import weights_digest
from veneer_registry.manifest_json import manifest_to_json
from veneer_registry.recovery import base_identity
from veneer_registry.rows import AliasRow, RevisionRow
from veneer_registry.store import Store
from veneer_registry.tensor_names import tensor_keys

from tests.adapter_files import write_adapter
from tests.unit.registry.kit import BASE, SHAPES

LAYERS = 30
"""Layers of the manifests in the catalog: 210 modules, as in SmolLM2-135M."""
TEAMS = 1000


def name_of(number: int) -> str:
    return f"team-{number % TEAMS:03}-adapter-{number // TEAMS:05}"


def make_folder(data_dir: Path, count: int) -> None:
    """Make a data folder with ``count`` names."""
    manifest = _manifest_text()
    store = Store(data_dir / "store")
    catalog = Catalog(data_dir / "catalog.sqlite")
    base = base_identity(BASE)
    with (
        mock.patch("veneer_registry.store.sync"),  # for speed: it need not survive a crash
        catalog.change(time=1.0) as change,
    ):
        for number in range(count):
            staged = store.new_staging()
            _write_tiny(staged, number)
            bundle = Bundle(weights_digest(staged), {})
            store.commit(staged, bundle)
            store.drop_staging(staged)
            name = name_of(number)
            row = RevisionRow(
                name=name,
                revision=bundle.revision,
                weights=bundle.weights,
                base=base,
                manifest=manifest.replace("W" * 64, bundle.weights),
                created=float(number),
                labels=_labels(number, count),
                bytes=400,
            )
            change.publish(row)
            change.note("published", name, row.revision)
            if number % 10 == 0:
                targets = ((row.revision, 1),)
                change.set_alias(AliasRow(name, "prod", targets, (), change.number, 1.0))
    catalog.close()


def _labels(number: int, count: int) -> dict[str, str]:
    """Return an adapter's labels: half have stage=dev; ten, spread out, have rare=yes."""
    labels = {"team": f"{number % TEAMS:03}", "stage": "dev" if number % 2 else "prod"}
    return labels | ({"rare": "yes"} if number % max(1, count // 10) == 7 else {})


def _write_tiny(folder: Path, number: int) -> None:
    random_bits = np.random.default_rng(number).integers(0, 0x3F80, 64, dtype=np.uint16)
    a_key, b_key = tensor_keys(0, "q_proj")
    out_features, in_features = SHAPES["q_proj"]
    tensors = {
        a_key: random_bits[:in_features].reshape(1, in_features),
        b_key: random_bits[-out_features:].reshape(out_features, 1),
    }
    write_adapter(folder, {"r": 1, "lora_alpha": 1}, tensors)


def _manifest_text() -> str:
    modules = tuple(
        LoraModule(layer, projection, 16, 2.0, *tensor_keys(layer, projection))
        for layer in range(LAYERS)
        for projection in PROJECTIONS
    )
    return manifest_to_json(
        AdapterManifest("W" * 64, modules, 16, PROJECTIONS, 1, 2, "BF16", "smollm2-135m")
    )
