"""Bases that others quantized, with adapters on top, against PEFT on the dequantized base.

The real base's first layers, quantized by llama.cpp's own code or as GPTQ, AWQ and
compressed-tensors define it. The reference has the numbers of the package ``gguf``, or of the
formats' formulas. Long forms let transformers read the GGUF file instead, which also undoes
llama.cpp's order of the rows of q and k by code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GgufConfig
from veneer_proto.v1.server_pb2 import GetServerInfoRequest
from veneer_server.models.source import gguf_folder
from veneer_server.wire.messages import EngineConfig
from veneer_train.llama_cpp.tensors import read_architecture

from tests import quantized_files
from tests.adapter_files import write_adapter
from tests.engine_harness import engine, source
from tests.integration.test_llama_cpp import PROMPTS, llama_cpp, top_of
from tests.peft_adapters import make_adapters, reference_logprobs
from tests.quantized_files import Floats, Kind, Written
from tests.server_harness import running_server
from tests.unit.server.test_decoder import build, step

pytestmark = [pytest.mark.push, pytest.mark.real_base]

LAYERS = 2
BOUND = 1e-4
"""Nats. float32 on both sides: what is left is the order of sums."""


def mixture(name: str) -> Kind:
    """The types of a Q4_K_M file, and two more: every kind of block in one file."""
    if "attn_output" in name:
        return Kind.IQ4_NL
    return Kind.Q4_1 if "ffn_up" in name else quantized_files.q4_k_m(name)


def as_stored(base: Path, meant: Callable[[str, Floats], Floats]) -> Any:
    """The base as transformers' model, with the numbers that are stored for each weight.

    Args:
        meant: called with a weight's name and numbers.
    """
    model = AutoModelForCausalLM.from_pretrained(
        base, num_hidden_layers=LAYERS, dtype=torch.float32
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data = torch.from_numpy(meant(name, parameter.detach().numpy()))
    return model


def parity(folder: Path, cache: Path, work: Path, reference: Any) -> None:
    """Compare the engine with PEFT over ``reference``: base and two adapters in one batch."""
    chosen = ("all-linear", "attention")
    adapters = make_adapters(reference, work / "adapters", only=chosen)
    prompt = [19556, 28, 392, 416, 722, 504, 3575, 282, 4649, 314, 1, 4093, 198]
    expected = reference_logprobs(reference, adapters, [prompt])
    config = EngineConfig(
        base_folder=str(folder),
        cache_folder=str(cache),
        base_name="quantized",
        weights_fingerprint="",
        device="cpu",
        dtype="float32",
        kv_cache_bytes=16 << 20,
    )
    with engine(config) as harness:
        assert harness.info.backend == "torch"
        names = (None, *adapters)
        sources = {name: source(path) for name, path in adapters.items()}
        answers = harness.run(
            [
                {
                    "prompt": prompt,
                    "adapter": sources[name] if name else None,
                    "prompt_logprobs": True,
                }
                for name in names
            ]
        )
    for name, answer in zip(names, answers, strict=True):
        meant = np.array(expected[name][0])
        assert np.abs(np.array(answer.prompt_logprobs) - meant).max() < BOUND, name
        if name is not None:  # the adapter matters
            assert np.abs(meant - np.array(expected[None][0])).max() > 0.01, name


def test_a_gguf_file_with_adapters_equals_peft(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    file = quantized_files.write_base(
        base_folder, tmp_path / "base.gguf", mixture, layers=LAYERS
    )
    architecture = read_architecture(base_folder)

    def meant(name: str, weight: Floats) -> Floats:
        # Rows are quantized one by one, so their order in the file does not matter.
        kind = quantized_files.fitting(mixture(architecture.gguf_name(name)), weight)
        return gguf.dequantize(quantized_files.quantized(weight, kind), kind)

    folder = gguf_folder(file, tmp_path / "cache").path
    parity(folder, cache_dir, tmp_path, as_stored(base_folder, meant))


@pytest.mark.verify
@pytest.mark.parametrize(
    "kind_of",
    [mixture, lambda name: Kind.Q8_0, lambda name: Kind.MXFP4],
    ids=["mixture", "Q8_0", "MXFP4"],
)
def test_a_gguf_file_is_what_transformers_reads_from_it(
    kind_of: Callable[[str], Kind], base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    file = quantized_files.write_base(
        base_folder, tmp_path / "base.gguf", kind_of, layers=LAYERS
    )
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    folder = gguf_folder(file, tmp_path / "cache").path
    parity(folder, cache_dir, tmp_path, reference)


@pytest.mark.verify
@pytest.mark.parametrize(
    "form",
    [
        quantized_files.shuffled_gptq,
        quantized_files.awq,
        partial(quantized_files.compressed, symmetric=False, group=32),
        quantized_files.mxfp4,
    ],
    ids=["gptq-desc-act", "awq", "compressed-tensors", "mxfp4"],
)
def test_a_folder_in_codes_with_adapters_equals_peft(
    form: Callable[[Floats], Written], base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    folder = quantized_files.write_folder(base_folder, tmp_path / "hf", form, layers=LAYERS)

    def meant(name: str, weight: Floats) -> Floats:
        return form(weight).weight if "_proj" in name else weight

    parity(folder, cache_dir, tmp_path, as_stored(base_folder, meant))


@pytest.mark.verify
@pytest.mark.parametrize("kind_of", [quantized_files.q4_k_m, lambda name: Kind.Q4_0])
def test_a_gguf_file_answers_as_in_llama_cpp(
    kind_of: Callable[[str], Kind], base_folder: Path, tmp_path: Path
) -> None:
    """The whole base. llama.cpp tokenizes by itself, and rounds activations to 8 bits before
    each product, which is most of the difference: a wrong scale would give whole nats."""
    file = quantized_files.write_base(base_folder, tmp_path / "base.gguf", kind_of)
    folder = gguf_folder(file, tmp_path / "cache").path
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    decoder = build(folder, torch.float32)
    with llama_cpp(file, None) as server:
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            logits = decoder.execute(step([(ids, 0, [1, 2, 3, 4])]))[-1]
            logs = torch.log_softmax(logits, dim=-1)
            told = top_of(server, prompt)
            worst = max(abs(value - float(logs[token])) for token, value in told.items())
            print(f"{worst:.3f} nats")
            assert worst < 0.75  # measured: 0.45
            assert max(told, key=told.__getitem__) in logs.topk(2).indices


# ------------------------------------------------------------------------- the whole server

ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def q4(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    return quantized_files.write_base(
        base_folder,
        folder / "SmolLM2-135M-Instruct-Q4_0.gguf",
        lambda name: Kind.Q4_0,
        layers=LAYERS,
    )


def stored_bytes(file: Path) -> int:
    return file.stat().st_size


def adapter(folder: Path, named: str) -> Path:
    """A strong adapter of all query projections, whose config names a base."""
    random = np.random.default_rng(1)
    tensors: dict[str, Floats] = {}
    for layer in range(LAYERS):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for side, shape in (("A", (4, 576)), ("B", (576, 4))):
            numbers = random.standard_normal(shape).astype(np.float32)
            tensors[f"{stem}.lora_{side}.weight"] = numbers * 0.2
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    write_adapter(folder, config | {"base_model_name_or_path": named}, tensors)
    return folder


async def test_a_gguf_file_is_served_with_adapters_of_its_original(
    q4: Path, cache_dir: Path, tmp_path: Path
) -> None:
    flags = ("--base", str(q4), "--backend", "torch", "--kv-cache-bytes", "32MiB")
    async with running_server(tmp_path / "data", cache_dir, *flags) as server:
        info = await server.about.GetServerInfo(GetServerInfoRequest())
        assert (info.base_model.name, info.base_model.quantization) == (q4.stem, "gguf")
        assert info.base_model.bytes <= 1.1 * stored_bytes(q4)
        pushed = await server.push(adapter(tmp_path / "a", ORIGINAL), "styled")
        (warning,) = [each for each in pushed.warnings if q4.stem in each]
        assert ORIGINAL in warning
        asked = {"prompt": "The capital of France is", "output": {"prompt_logprobs": 1}}
        answers = [await server.generate(**asked, adapter=name) for name in ("", "styled", "")]
        base, styled, again = (
            [each.logprob for each in answer.prompt_logprobs] for answer in answers
        )
        assert base == pytest.approx(again, abs=1e-2)  # bfloat16; other rows may differ
        assert max(abs(a - b) for a, b in zip(base, styled, strict=True)) > 0.1


@pytest.mark.verify
async def test_the_weights_of_the_training_can_be_required(
    q4: Path, cache_dir: Path, tmp_path: Path
) -> None:
    flags = (
        *("--base", str(q4), "--backend", "torch", "--kv-cache-bytes", "32MiB"),
        "--require-same-weights",
    )
    async with running_server(tmp_path / "data", cache_dir, *flags) as server:
        other = server.push(adapter(tmp_path / "a", ORIGINAL), "other")
        refusal = await server.refused(other)
        assert refusal.reason == "BASE_MODEL_MISMATCH"
        assert refusal.metadata["cause"] == "same_weights"
        await server.push(adapter(tmp_path / "b", q4.stem), "own")
