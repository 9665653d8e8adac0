"""The packed base: the numbers of the way through transformers and bitsandbytes, and a file
that is used only if it is what was written."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from veneer_registry.fingerprint import weights_fingerprint
from veneer_server.backends.native import library
from veneer_server.backends.native import linear as native_linear
from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.library import EIGHT_BIT, Library
from veneer_server.backends.native.linear import NativeLinear, pack_dense
from veneer_server.backends.native.packed import base as packed_base
from veneer_server.backends.native.packed import file as packed_file
from veneer_server.backends.native.packed.base import PackedBase, load_packed
from veneer_server.models.loader import load_weights
from veneer_server.models.source import BaseDamaged
from veneer_server.progress import SINK, StartPart

from tests.backends_ran import skip_or_fail
from tests.kernels_once import kernels_built, kernels_folder
from tests.refused import refused
from tests.unit.server.test_decoder import SHAPES, save_random

SEED = 43
CHUNK = 1 << 16
"""So that a small base has several."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """One form: all give the same packed bits (test_packing.py)."""
    try:
        return Library(kernels_built(tmp_path_factory))
    except NativeUnavailable as reason:
        skip_or_fail(reason)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "CHUNK", CHUNK)


@pytest.fixture(params=["huge pages", "mapped"])
def _both_ways(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A system with huge pages, and one without."""
    told = tmp_path / "enabled"
    told.write_text("always [madvise] never" if "huge" in request.param else "[never]")
    monkeypatch.setattr(packed_base, "THP", told)


def numbers(base: PackedBase) -> list[bytes]:
    """Everything that is served, as bytes."""
    weights = base.weights
    found = [
        weights.embedding.view(torch.uint8).numpy().tobytes(),
        weights.final_norm.numpy().tobytes(),
        weights.inv_freq.numpy().tobytes(),
        repr((weights.rotary_scale, weights.parameters, weights.nbytes)).encode(),
    ]
    for layer in weights.layers:
        for norm in (layer.input_norm, layer.post_norm, layer.query_norm, layer.key_norm):
            found.append(b"" if norm is None else norm.numpy().tobytes())
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert isinstance(linear, NativeLinear)
            found += of_linear(linear)
    return found + of_linear(base.head)


def of_linear(linear: NativeLinear) -> list[bytes]:
    first = type(linear.struct).outputs.offset  # what comes before are addresses
    bias = linear._bias  # private: what the kernels add
    return [
        linear.packed.numpy().tobytes(),
        bytes(linear.struct)[first:],
        b"" if bias is None else bias.numpy().tobytes(),
    ]


def by_transformers(library: Library, folder: Path, quantization: Any) -> PackedBase:
    """The oracle: transformers reads the folder, and bitsandbytes quantizes it."""
    weights = load_weights(
        folder,
        quantization=quantization,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        fuse=lambda modules, _: native_linear.fuse(library, modules, torch.bfloat16),
    )
    head = pack_dense(library, EIGHT_BIT, weights.head)
    nbytes = weights.nbytes + head.nbytes
    if not weights.config.tied_head:
        nbytes -= weights.head.nbytes
    return PackedBase(replace(weights, nbytes=nbytes), head)


class Bench:
    """A random base and a cache; loads it as an engine does."""

    def __init__(self, library: Library, folder: Path, shape: str = "llama") -> None:
        self.library = library
        self.base, self.cache = folder / "base", folder / "cache"
        save_random(SHAPES[shape], self.base)
        self.fingerprint = weights_fingerprint(self.base)
        self.right = numbers(self.load(folder / "other cache"))

    def load(self, cache: Path | None = None, quantization: Any = "nf4") -> PackedBase:
        return load_packed(
            self.library,
            self.base,
            quantization=quantization,
            cache_dir=cache or self.cache,
            fingerprint=self.fingerprint,
            threads=2,
        )

    def served(self) -> bool:
        """What is served now is right."""
        return numbers(self.load()) == self.right

    @property
    def file(self) -> Path:
        (found,) = (self.cache / "packed").iterdir()
        return found


@pytest.fixture
def bench(kernels: Library, tmp_path: Path) -> Bench:
    return Bench(kernels, tmp_path)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings since the last call."""
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


# ------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("shape", ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3"])
def test_a_packed_base_is_what_transformers_and_bitsandbytes_give(
    kernels: Library, tmp_path: Path, shape: str, quantization: str
) -> None:
    """Bit for bit, when it is made and when it is read."""
    bench = Bench(kernels, tmp_path, shape)
    want = numbers(by_transformers(kernels, bench.base, quantization))
    made = numbers(bench.load(quantization=quantization))
    assert made == want
    assert numbers(bench.load(quantization=quantization)) == made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_of_sixteen_bits_too(
    kernels: Library, tmp_path: Path, dtype: torch.dtype
) -> None:
    bench = Bench(kernels, tmp_path)
    save_random(SHAPES["llama"], bench.base).to(dtype).save_pretrained(bench.base)
    bench.fingerprint = weights_fingerprint(bench.base)
    want = numbers(by_transformers(kernels, bench.base, "nf4"))
    assert numbers(bench.load()) == want


def test_a_checkpoint_in_several_files_too(bench: Bench) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bench.base)
    (bench.base / "model.safetensors").unlink()
    model.save_pretrained(bench.base, max_shard_size="200KB")
    assert len(list(bench.base.glob("*.safetensors"))) > 2
    assert bench.served()


@pytest.mark.parametrize("nested", [True, False])
def test_a_base_that_is_stored_in_four_bits_is_packed_as_it_is(
    kernels: Library, tmp_path: Path, nested: bool
) -> None:
    bench = Bench(kernels, tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(
        bench.base,
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
        ),
    ).save_pretrained(tmp_path / "stored")
    bench.base = tmp_path / "stored"
    bench.fingerprint = weights_fingerprint(bench.base)
    want = numbers(by_transformers(kernels, bench.base, "none"))
    made = numbers(bench.load(quantization="none"))
    assert made == want
    assert numbers(bench.load(quantization="none")) == made


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_a_base_that_lacks_a_tensor_is_named(bench: Bench, change: str) -> None:
    """transformers would serve random numbers in its place."""
    file = bench.base / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :64].contiguous()
    if change == "missing":
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    bench.fingerprint = weights_fingerprint(bench.base)
    with refused(BaseDamaged, cause="unreadable") as caught:
        bench.load()
    assert name in caught.value.message


# ---------------------------------------------------------------------------- the file


def flip(file: Path, place: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 4]))


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "x").write_text("x")


def become_a_link(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


def become_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half of it": lambda f: os.truncate(f, f.stat().st_size // 2),
    "all but a byte": lambda f: os.truncate(f, f.stat().st_size - 1),
    "a byte more": lambda f: f.write_bytes(f.read_bytes() + b"\0"),
    "a byte before": lambda f: f.write_bytes(b"\0" + f.read_bytes()),
    "empty": lambda f: f.write_bytes(b""),
    "zeros": lambda f: f.write_bytes(bytes(f.stat().st_size)),
    "a hole": lambda f: f.write_bytes(bytes(4096) + f.read_bytes()[4096:]),
    "the first bit": lambda f: flip(f, 0),
    "the footer": lambda f: flip(f, f.stat().st_size - 20),
    "the record": lambda f: flip(f, f.stat().st_size - 200),
    "a folder": become_a_folder,
    "a link": become_a_link,
    "a pipe": become_a_pipe,
    "writable by all": lambda f: f.chmod(0o666),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(
    bench: Bench, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, told in one line, and whole at the next start."""
    assert bench.served()
    told(caplog)
    DAMAGE[damage](bench.file)
    assert bench.served()
    (line,) = told(caplog)
    assert str(bench.file) in line
    assert bench.served()
    assert told(caplog) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_read(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    assert bench.served()
    os.chown(bench.file, 12345, -1)
    assert bench.served()
    (line,) = told(caplog)
    assert "12345" in line
    os.chown(bench.file.parent, 12345, -1)
    for _ in range(2):  # it stays another's: nothing is read or written there
        assert bench.served()
        assert len(told(caplog)) == 2


def test_a_place_where_others_could_write_is_emptied(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    assert bench.served()
    bench.file.parent.chmod(0o777)
    flip(bench.file, 100)
    assert bench.served()
    assert len(told(caplog)) == 1
    assert bench.file.parent.stat().st_mode & 0o777 == 0o700
    assert bench.served()
    assert told(caplog) == []


@pytest.mark.push
@pytest.mark.usefixtures("_both_ways")
def test_a_flipped_bit_anywhere_is_never_served(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    print("seed", SEED)
    chance = random.Random(SEED)
    assert bench.served()
    told(caplog)
    for number in range(25):
        flip(bench.file, chance.randrange(bench.file.stat().st_size))
        assert bench.served()
        assert len(told(caplog)) == 1, number


def test_the_file_of_another_base_is_not_read(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole, and under the right name."""
    assert bench.served()
    name, right = bench.file.name, bench.file.read_bytes()
    save_random(SHAPES["llama"], bench.base, seed=7)
    old, bench.fingerprint = bench.fingerprint, weights_fingerprint(bench.base)
    bench.right = numbers(bench.load(bench.cache / "more"))
    other = bench.fingerprint[:32] + name[32:]
    (bench.cache / "packed" / name).unlink()
    (bench.cache / "packed" / other).write_bytes(right)
    (bench.cache / "packed" / other).chmod(0o644)
    told(caplog)
    assert old != bench.fingerprint
    assert bench.served()
    assert len(told(caplog)) == 1


def test_a_base_without_a_fingerprint_is_not_kept(bench: Bench) -> None:
    bench.fingerprint = ""
    assert bench.served()
    assert not bench.cache.exists()


def test_a_changed_config_is_not_hidden_by_the_file(bench: Bench) -> None:
    """Weights, and so their fingerprint, stay."""
    assert bench.served()
    text = (bench.base / "config.json").read_text("utf-8")
    changed = text.replace("10000.0", "1234.0")
    assert changed != text
    (bench.base / "config.json").write_text(changed, "utf-8")
    before, bench.right = bench.right, numbers(bench.load(bench.cache / "more"))
    assert before != bench.right
    assert bench.served()


@pytest.mark.usefixtures("_both_ways")
def test_the_second_load_reads_nothing_of_the_base(bench: Bench) -> None:
    assert bench.served()
    (bench.base / "model.safetensors").unlink()
    assert bench.served()


def test_without_huge_pages_processes_share_the_pages_of_the_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what one of them writes to its weights reaches neither the file nor another."""
    monkeypatch.setattr(packed_base, "THP", tmp_path / "no such file")
    assert bench.served()
    base = bench.load()
    maps = Path("/proc/self/maps").read_text("utf-8")
    assert str(bench.file) in maps
    first = base.weights.layers[0].qkv
    assert isinstance(first, NativeLinear)
    first.packed.zero_()
    assert bench.served()


def test_a_load_writes_nothing(bench: Bench) -> None:
    """So a cache that cannot be written is enough."""
    assert bench.served()

    def seen() -> list[tuple[str, int]]:
        return [
            (str(path), path.stat().st_mtime_ns) for path in sorted(bench.cache.rglob("*"))
        ] + [(".", bench.cache.stat().st_mtime_ns)]

    before = seen()
    assert bench.served()
    assert seen() == before


def test_a_cache_that_cannot_be_written_costs_time_only(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a file here, which stops root too."""
    bench.cache.touch()
    for _ in range(2):
        assert bench.served()
        (line,) = told(caplog)
        assert "cannot be saved" in line


def test_a_load_without_enough_memory_leaves_the_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAKE: the system refuses the mapping."""
    assert bench.served()

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(library.mmap, "mmap", refuse)
        # private: what a library has allocated already serves small bases
        patch.setattr(bench.library, "_memory", library._HugePages())
        with pytest.raises(MemoryError):
            bench.load()
    assert bench.file.is_file()
    assert bench.served()


# A start in a process of its own. {} is what goes wrong.
PROCESS = """
import os, resource, signal, sys
from pathlib import Path
from veneer_server.backends.native.compiler import build
from veneer_server.backends.native.library import Library
from veneer_server.backends.native.packed import file
from veneer_server.backends.native.packed.base import load_packed
folder, native, fingerprint, file.CHUNK = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
{}
load_packed(
    Library(build(Path(native))),
    folder / "base",
    quantization="nf4",
    cache_dir=folder / "cache",
    fingerprint=fingerprint,
    threads=2,
)
"""


@pytest.fixture
def process(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(wrong: str) -> subprocess.Popen[str]:
        native = kernels_folder(tmp_path_factory)
        arguments = [str(bench.base.parent), str(native), bench.fingerprint, str(CHUNK)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS.format(wrong), *arguments],
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()
        assert each.stderr is not None
        each.stderr.close()


@pytest.mark.push
def test_a_full_disk_costs_time_only(
    bench: Bench, process: Callable[[str], subprocess.Popen[str]]
) -> None:
    """A real limit on the size of files, in the middle of this one."""
    done = process(
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    )
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    assert errors.count("cannot be saved") == 1
    assert list((bench.cache / "packed").iterdir()) == []


@pytest.mark.push
def test_what_a_killed_start_left_is_removed(
    bench: Bench, process: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Killed when everything but the name is written."""
    done = process("file.os.fsync = lambda fd: os.kill(os.getpid(), 9)\n")
    done.communicate()
    assert done.returncode == -9
    (left,) = (bench.cache / "packed").iterdir()
    assert left.is_dir()
    os.utime(left, (0, 0))
    assert bench.served()
    assert bench.file.is_file()
    assert bench.served()


@pytest.mark.push
def test_two_servers_that_start_at_once_do_not_clash(
    bench: Bench,
    process: Callable[[str], subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both make the file; whichever is later replaces that of the other."""
    both = [process("") for _ in range(2)]
    for each in both:
        _, errors = each.communicate()
        assert each.returncode == 0, errors
        assert "WARNING" not in errors
        assert "packed weights" not in errors
    told(caplog)
    assert bench.file.is_file()  # and nothing beside it
    assert bench.served()
    assert told(caplog) == []


def test_files_of_other_versions_go_unless_a_server_has_them_open(
    bench: Bench,
) -> None:
    """Those of other bases, and of other quantizations, stay."""
    name = Path(f"{bench.fingerprint[:32]}-nf4-layout0-bnb0-tf0.packed")
    packed = bench.cache / "packed"
    packed.mkdir(parents=True, mode=0o700)
    strange = [packed / f"{'0' * 32}-nf4-layout0-bnb0-tf0.packed"]
    strange.append(packed / name.name.replace("nf4", "fp4"))
    legacy = bench.cache / "quantized" / f"{bench.fingerprint[:32]}-nf4-bfloat16-bnb0-tf0"
    legacy.mkdir(parents=True)
    for each in (packed / name, *strange):
        each.write_bytes(b"old")
    with (packed / name).open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        assert bench.served()
        assert (packed / name).exists()
    assert not legacy.exists()
    kept = [each for each in packed.glob("*.packed") if each not in (packed / name, *strange)]
    kept[0].unlink()
    assert bench.served()
    assert not (packed / name).exists()
    assert all(each.exists() for each in strange)


def test_a_base_that_lost_a_bit_is_neither_served_nor_kept(bench: Bench) -> None:
    """The fingerprint is that of an earlier start, since size and time are as they were."""
    file = bench.base / "model.safetensors"
    flip(file, file.stat().st_size - 1000)
    with refused(BaseDamaged, cause="digest"):
        bench.load()
    assert list((bench.cache / "packed").iterdir()) == []


def test_progress_is_told_layer_by_layer_and_chunk_by_chunk(bench: Bench) -> None:
    seen: list[StartPart] = []
    token = SINK.set(seen.append)
    try:
        bench.load()
        bench.load()
    finally:
        SINK.reset(token)
    layers = [part.done for part in seen if part.name == "quantizing the base"]
    assert sorted(set(layers)) == list(range(SHAPES["llama"].num_hidden_layers + 1))
    chunks = [part.done for part in seen if part.name == "reading the packed weights"]
    assert len(set(chunks)) > 3
    assert chunks == sorted(chunks)
    ended = {part.name for part in seen if part.state == "done"}
    assert ended == {part.name for part in seen}
