"""Which backend serves, and what is reported if the native one cannot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer_server.backends.native import chosen
from veneer_server.backends.native.library import Library
from veneer_server.backends.torch.decoder import Decoder
from veneer_server.engine.execution.backend_choice import BackendUnavailable, Chosen, choose
from veneer_server.wire.messages import EngineConfig

from tests import quantized_files
from tests.backends_ran import native_possible
from tests.kernels_once import forms_built
from tests.refused import refused
from tests.tiny_llama import make_tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tiny_llama(folder)
    return folder


def asked(base: Path, cache: Path, dtype: torch.dtype = torch.bfloat16, **own: Any) -> Chosen:
    config = EngineConfig(
        base_folder=str(base),
        cache_folder=str(cache),
        base_name="tiny",
        weights_fingerprint="",
        **{"quantization": "none", **own},
    )
    return choose(config, CPU, dtype, 8)


def test_without_a_compiler_torch_serves_and_says_why(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    found = asked(base, tmp_path, backend="auto")
    assert found.name == "torch"
    assert isinstance(found.backend, Decoder)
    assert "/nowhere/c++ cannot be run" in found.why_not_native
    # Why the kernels do not serve is words for the operator, here and below: the compiler's,
    # or those of `NativeUnavailable`, which has no more than words.
    with pytest.raises(BackendUnavailable, match=r"/nowhere/c\+\+"):
        asked(base, tmp_path, backend="native")


def test_what_a_compiler_says_is_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "c++ --no-such-option")
    with pytest.raises(BackendUnavailable, match="no-such-option"):
        asked(base, tmp_path, backend="native")
    assert list(tmp_path.rglob("*.so")) == []


def test_another_dtype_is_torch_s(base: Path, tmp_path: Path) -> None:
    found = asked(base, tmp_path, torch.float32, backend="auto")
    assert found.name == "torch"
    assert "bfloat16, not in float32" in found.why_not_native


def test_a_base_in_codes_is_torch_s(base: Path, tmp_path: Path) -> None:
    folder = quantized_files.write_folder(base, tmp_path / "awq", quantized_files.awq)
    found = asked(folder, tmp_path, backend="auto")
    assert found.name == "torch"
    assert "stored as awq" in found.why_not_native
    with pytest.raises(BackendUnavailable, match="stored as awq"):
        asked(folder, tmp_path, backend="native")
    with refused(BackendUnavailable):
        asked(folder, tmp_path, backend="auto", int8_activations=True)


@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
def test_only_the_backend_for_cuda_has_kernels_for_fp8(
    base: Path, tmp_path: Path, backend: str
) -> None:
    with refused(BackendUnavailable):
        asked(base, tmp_path, backend=backend, quantization="fp8")


@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
def test_only_the_backend_for_cuda_divides_a_base(
    base: Path, tmp_path: Path, backend: str
) -> None:
    with refused(BackendUnavailable):
        asked(base, tmp_path, backend=backend, tensor_parallel=2)


def test_who_asks_for_torch_gets_it(base: Path, tmp_path: Path) -> None:
    found = asked(base, tmp_path, backend="torch")
    assert (found.name, found.why_not_native) == ("torch", "--backend torch")
    assert not (tmp_path / "native").exists()


@pytest.mark.push
@pytest.mark.skipif(not native_possible(), reason="no AVX2 or no compiler")
def test_who_asks_for_avx2_gets_it(base: Path, cache_dir: Path) -> None:
    found = asked(base, cache_dir, backend="native", native_instructions="avx2")
    assert found.name == "native (avx2)"


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "torch", "quantization": "nf4"},
        {"backend": "auto", "quantization": "none"},
        {"backend": "native", "quantization": "none"},
    ],
)
def test_int8_activations_need_the_native_backend_and_weights_of_4_bits(
    base: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    with refused(BackendUnavailable):
        asked(base, tmp_path, int8_activations=True, **options)


def test_int8_activations_are_not_left_out_where_the_kernels_cannot_serve(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would serve other answers than were asked for."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with refused(BackendUnavailable):
        asked(base, tmp_path, backend="auto", quantization="nf4", int8_activations=True)


@pytest.mark.verify
def test_instructions_that_the_kernels_do_not_have_are_refused(
    base: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU with AVX2 at most, as the library compiled for it says."""
    if not native_possible():
        pytest.skip("no AVX2 or no compiler")
    monkeypatch.setattr(Library, "instructions", "avx2")
    with pytest.raises(BackendUnavailable, match=r"avx2.*--native-instructions"):
        asked(base, cache_dir, backend="native", native_instructions="avx512-bf16")
    found = asked(base, cache_dir, backend="auto", native_instructions="avx512-bf16")
    assert found.name == "torch"
    assert "supports at most avx2" in found.why_not_native


@pytest.mark.verify
@pytest.mark.skipif(not native_possible(), reason="no AVX2 or no compiler")
def test_prebuilt_kernels_serve_under_a_name_that_says_so(
    base: Path,
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that is damaged does not: torch serves, and says both reasons."""
    shutil.copytree(forms_built(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(chosen, "PREBUILT", tmp_path)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    found = asked(base, cache_dir, backend="native", native_instructions="avx2")
    assert found.name == "native (avx2, prebuilt)"
    for file in tmp_path.glob("*.so"):
        cut = file.read_bytes()[:-1]
        file.unlink()  # the loaded one stays whole
        file.write_bytes(cut)
        file.chmod(0o644)
    found = asked(base, cache_dir, backend="auto")
    assert found.name == "torch"
    assert "/nowhere/c++ cannot be run" in found.why_not_native
    assert "it is damaged" in found.why_not_native
