"""Row 6: single bit flips in stored adapters on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import AdapterCorrupt
from veneer_registry.format import weights_digest
from veneer_registry.registry import Registry
from veneer_server.adapters.loaders import HostCopy
from veneer_server.wire.messages import AdapterSource

from tests.torture.crafted import CONFIG, WEIGHTS
from tests.torture.loading import load_here
from tests.torture.row import Control, Outcome, Scale
from tests.unit.registry.kit import BASE, SHAPES, make_adapter, make_tensors, push

ROW = 6
TITLE = "bits that flip at rest"
BAR = (
    "each flip that changes what is served is DATA_LOSS at load; then quarantined until it is "
    "pushed again; neighbours are unaffected"
)

HARMLESS = frozenset(
    {
        # Keys that the registry ignores (`lora_config`) and that the adapters here have, and
        # keys whose value follows from the tensors' names.
        "lora_dropout",
        "inference_mode",
        "target_modules",
        "peft_version",
        "task_type",
        "base_model_name_or_path",
    }
)
"""Keys of the config that a flip may change undetected, since answers do not depend on them."""

Load = Callable[[AdapterRef, Path], HostCopy]


@dataclasses.dataclass(frozen=True, slots=True)
class Flip:
    """Bit ``bit`` of byte ``at`` of a file of adapter ``name``."""

    name: str
    file: str
    at: int
    bit: int


def load_copy(ref: AdapterRef, folder: Path) -> HostCopy:
    """Load a copy as a loader process does."""
    source = AdapterSource(
        weights_digest=ref.weights_digest, folder=str(folder), parameters=0, name=ref.name
    )
    return load_here(source, SHAPES, BASE.num_layers)


def same(one: HostCopy, other: HostCopy) -> bool:
    """Return whether both have bit-identical numbers in the same places and equal scalings."""
    return one.layout == other.layout and torch.equal(
        one.run.view(torch.int32), other.run.view(torch.int32)
    )


def publish_all(registry: Registry, work: Path) -> dict[str, AdapterRef]:
    """Publish one adapter of each dtype, with everything that a config may contain."""
    found = {}
    for seed, dtype in enumerate(("F32", "F16", "BF16")):
        config = {
            "r": 4,
            "use_rslora": True,
            "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 12.5},
            "rank_pattern": {"v_proj": 4},
            "lora_dropout": 0.05,
            "inference_mode": True,
            "base_model_name_or_path": "someone/base",
            "target_modules": ["q_proj", "v_proj"],
            "peft_version": "0.21.0",
            "bias": "none",
            "init_lora_weights": True,
        }
        name = dtype.lower()
        folder = make_adapter(work / name, config, make_tensors(dtype=dtype, seed=seed))
        found[name] = push(registry, name, folder).record.ref
    return found


def random_flip(files: dict[tuple[str, str], bytes], rng: random.Random) -> Flip:
    """Make a random flip: equally likely in the config, the header or the tensors."""
    name = rng.choice(sorted({name for name, _ in files}))
    data = files[name, WEIGHTS]
    header = 8 + int.from_bytes(data[:8], "little")
    match rng.randrange(3):
        case 0:
            file, at = CONFIG, rng.randrange(len(files[name, CONFIG]))
        case 1:
            file, at = WEIGHTS, rng.randrange(header)
        case _:
            file, at = WEIGHTS, rng.randrange(header, len(data))
    return Flip(name, file, at, rng.randrange(8))


def uncounted(file: str, before: bytes, after: bytes) -> str:
    """Return the part that differs if it is irrelevant; "" if a relevant part differs.

    This uses no code of the registry: both texts are parsed and compared.
    """
    if file == WEIGHTS:
        length = int.from_bytes(before[:8], "little")
        before, after = before[8 : 8 + length], after[8 : 8 + length]
    with contextlib.suppress(ValueError):
        old, new = json.loads(before), json.loads(after)
        changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
        if file == WEIGHTS:
            return "__metadata__ of the weights" if changed == {"__metadata__"} else ""
        if changed <= HARMLESS:
            return f"{', '.join(sorted(changed)) or 'white space'} of the config"
        # A key may turn into another key. Then the old value must mean "not used", and the new
        # key must be harmless or have such a value too.
        spelled = {key for key in changed if key not in HARMLESS}
        if all(_means_unused(key, old, new) for key in spelled):
            return "a key of the config that holds its default"
    return ""


DEFAULTS: dict[str, Any] = {"bias": "none", "init_lora_weights": True, "task_type": "CAUSAL_LM"}


def _means_unused(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    gone = key in old and (old[key] in (None, False, "") or old[key] == DEFAULTS.get(key))
    return gone or (key not in old and new[key] in (None, False, "", [], {}))


def after_loss(registry: Registry, ref: AdapterRef, neighbour: str, folder: Path) -> str:
    """Check the quarantine: the revision is refused, its neighbour is not, and a push ends the
    quarantine."""
    if registry.quarantine(ref.weights_digest, "a flipped bit") != (ref,):
        return "the registry did not know it"
    with contextlib.suppress(AdapterCorrupt):
        registry.acquire(ref.name)
        return "still given out after quarantine"
    registry.acquire(neighbour).release()
    push(registry, ref.name, folder)
    with registry.acquire(ref.name) as lease:
        load_copy(lease.record.ref, registry.weights_folder(ref))
    return ""


def flip_all(
    registry: Registry, work: Path, count: int, rng: random.Random, load: Load
) -> Outcome:
    """Flip, load, judge and restore ``count`` times. Each detected damage is quarantined."""
    refs = publish_all(registry, work)
    folders = {name: registry.weights_folder(ref) for name, ref in refs.items()}
    files = {
        (name, file): (folder / file).read_bytes()
        for name, folder in folders.items()
        for file in (CONFIG, WEIGHTS)
    }
    good = {name: load(ref, folders[name]) for name, ref in refs.items()}
    failures: list[str] = []
    answers: Counter[str] = Counter()
    for _ in range(count):
        flip = random_flip(files, rng)
        before = files[flip.name, flip.file]
        after = bytearray(before)
        after[flip.at] ^= 1 << flip.bit
        path = folders[flip.name] / flip.file
        path.write_bytes(after)
        ref = refs[flip.name]
        neighbour = rng.choice([name for name in refs if name != flip.name])
        lost = False
        try:
            copy = load(ref, folders[flip.name])
            part = uncounted(flip.file, before, bytes(after))
            answers[f"no change: {part}"] += 1
            if not same(copy, good[flip.name]):
                failures.append(f"{flip}: other numbers were loaded")
            elif not part:
                failures.append(f"{flip}: loaded, in a part that should count")
        except AdapterCorrupt as error:
            answers[error.code] += 1
            lost = True
            if not error.metadata.get("why"):
                failures.append(f"{flip}: refused without a reason")
        except Exception as error:
            failures.append(f"{flip}: {type(error).__name__}: {error}")
        try:
            if not same(load(refs[neighbour], folders[neighbour]), good[neighbour]):
                failures.append(f"{flip}: {neighbour} changed")
        except Exception as error:
            failures.append(f"{flip}: {neighbour} cannot be loaded: {error}")
        if lost:
            wrong = after_loss(registry, ref, neighbour, work / flip.name)
            failures += [f"{flip}: {wrong}"] if wrong else []
        else:
            path.write_bytes(before)
    losses = answers.pop("DATA_LOSS", 0)
    parts = tuple(f"{what} x{number}" for what, number in answers.most_common())
    figure = (
        f"{count} flips: {losses} DATA_LOSS, {sum(answers.values())} in parts that do not "
        f"count, {len(failures)} violations"
    )
    return Outcome(figure, BAR, tuple(failures), parts)


def torture(scale: Scale, count: int, load: Load) -> Outcome:
    with Registry.open(scale.work / "data", BASE) as registry:
        return flip_all(registry, scale.work, count, scale.random("flips"), load)


def run(scale: Scale) -> Outcome:
    """Make 1,000 flips, or 150."""
    return torture(scale, scale.pick(150, 1000), load_copy)


def controls(scale: Scale) -> Iterator[Control]:
    """Plant a load that trusts files of the right size."""
    sizes: dict[str, list[int]] = {}

    def by_size(ref: AdapterRef, folder: Path) -> HostCopy:
        found = [(folder / file).stat().st_size for file in (CONFIG, WEIGHTS)]
        if sizes.setdefault(ref.name, found) != found:
            raise AdapterCorrupt("another size", metadata={"why": "another size"})
        return load_copy(
            dataclasses.replace(ref, weights_digest=weights_digest(folder)), folder
        )

    yield Control.of("only sizes are compared", torture(scale, 40, by_size))
