"""The self-test's reference against transformers and PEFT, on tiny random models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from veneer_registry.errors import AdapterCorrupt
from veneer_server.models import linear, packed
from veneer_server.models.linear import SideBySide, fuse
from veneer_server.models.loader import DecoderWeights, load_weights
from veneer_server.models.packed import PackedFourBit
from veneer_server.models.reference import BaseWeights, references
from veneer_server.models.source_weights import SourceWeights
from veneer_server.wire.messages import AdapterSource

from tests.engine_harness import source
from tests.peft_adapters import make_adapters
from tests.peft_adapters import reference_logprobs as peft_logprobs
from tests.refused import refused
from tests.unit.server.test_decoder import SHAPES, save_random

# float32 on both sides: what is left is the order of sums over three layers.
TOLERANCE = 2e-5
SEED = 3


def reference_logprobs(
    weights: BaseWeights, tokens: list[int], adapter: AdapterSource | None
) -> list[float]:
    """`references` of one adapter, or of the base alone.

    Raises:
        AdapterCorrupt: the adapter's files do not have their digest any more.
    """
    (found,) = references(weights, tokens, [adapter])
    if isinstance(found, AdapterCorrupt):
        raise found
    return found


def load(folder: Path, quantization: Any = "none", dtype: Any = torch.float32) -> Any:
    return load_weights(
        folder, quantization=quantization, dtype=dtype, device=torch.device("cpu")
    )


def prompt(length: int) -> list[int]:
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, 320, (length,), generator=generator).tolist()


def farthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_it_is_what_peft_says_for_every_kind_of_base(name: str, tmp_path: Path) -> None:
    """Biases, qk-norm, windows (24 tokens, the prompt has 70), rotary scalings, tied
    head; the base and three adapters that differ in targets, ranks and scaling."""
    model = save_random(SHAPES[name], tmp_path / "base")
    made = make_adapters(model, tmp_path / "adapters", scale=0.1, seed=SEED)
    folders = {name: made[name] for name in ("patterns", "rslora", "some-layers")}
    tokens = prompt(70)
    expected = peft_logprobs(model, folders, [tokens])
    weights = load(tmp_path / "base")
    apart = []
    for adapter, (wanted,) in expected.items():
        given = source(folders[adapter]) if adapter else None
        got = reference_logprobs(weights, tokens, given)
        assert farthest(got, wanted) < TOLERANCE, adapter
        apart.append(got)
    # Negative control: the adapters change the numbers by far more than that.
    assert all(farthest(apart[0], other) > 100 * TOLERANCE for other in apart[1:])


def test_an_option_that_is_overlooked_is_noticed(tmp_path: Path) -> None:
    """Negative control of the test above: a window, a norm's epsilon, the rotary
    frequencies, a query norm and a bias each count for more than the tolerance."""
    tokens = prompt(70)
    for name in ("mistral-window", "qwen3", "llama-biased"):
        save_random(SHAPES[name], tmp_path / name)
    window, normed, biased = (
        load(tmp_path / n) for n in ("mistral-window", "qwen3", "llama-biased")
    )

    def config(weights: DecoderWeights, **change: Any) -> DecoderWeights:
        return replace(weights, config=replace(weights.config, **change))

    def layers(weights: DecoderWeights, **change: Any) -> DecoderWeights:
        return replace(weights, layers=tuple(replace(w, **change) for w in weights.layers))

    unbiased = linear.Dense(biased.layers[0].output.weight, None)
    for right, wrong in (
        (window, config(window, windows=(None,) * 3)),
        (window, config(window, rms_norm_eps=1e-3)),
        (window, replace(window, inv_freq=window.inv_freq * 1.01)),
        (normed, layers(normed, query_norm=None)),
        (
            biased,
            replace(
                biased, layers=(replace(biased.layers[0], output=unbiased), *biased.layers[1:])
            ),
        ),
    ):
        got = reference_logprobs(wrong, tokens, None)
        assert farthest(got, reference_logprobs(right, tokens, None)) > 100 * TOLERANCE


def test_a_prompt_of_one_token_has_no_log_probability(tmp_path: Path) -> None:
    save_random(SHAPES["llama"], tmp_path)
    assert reference_logprobs(load(tmp_path), [5], None) == []


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_weights_are_expanded_as_bitsandbytes_does(kind: str, tmp_path: Path) -> None:
    """Activations in float32 on both sides, so the bound stays that of float32."""
    save_random(SHAPES["qwen2"], tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ).eval()
    for module in oracle.modules():
        # bitsandbytes' packed CPU product rounds to bfloat16; off for float32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokens = prompt(40)
    (wanted,) = peft_logprobs(oracle, {}, [tokens])[None]
    got = reference_logprobs(load(tmp_path, kind), tokens, None)
    assert farthest(got, wanted) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_slices_of_a_weight_are_the_weight(
    dtype: torch.dtype, blocksize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in slices, packed for AVX512-BF16 or not, where blocks straddle rows,
    and beside an unquantized linear; nothing may be lost or change its place."""
    import bitsandbytes as bnb

    torch.manual_seed(SEED)
    made = bnb.nn.Linear4bit(192, 160, bias=True, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(
        made.weight.data, requires_grad=False, quant_type="nf4", blocksize=blocksize
    )
    made = made.to("cpu").eval()
    dense = torch.nn.Linear(192, 96, bias=False)
    state = made.weight.quant_state
    wanted = bnb.functional.dequantize_4bit(made.weight.data, state).float()
    bias = made.bias.float()
    both = fuse([made, dense], dtype)
    assert isinstance(both, SideBySide)
    four_bit = both.parts[0]
    # Packing rounds the scale of a block, and with it its numbers, to bfloat16.
    tolerance = 2**-8 if isinstance(four_bit, PackedFourBit) else 1e-6
    for size in (packed.SLICE, 64 * 192):
        monkeypatch.setattr(packed, "SLICE", size)
        rows, biases = zip(*four_bit.expanded(), strict=True)
        torch.testing.assert_close(torch.cat(rows), wanted, rtol=tolerance, atol=0)
        torch.testing.assert_close(torch.cat(biases), bias, rtol=2**-8, atol=0)
        last, none = list(both.expanded())[-1]
        assert none is None
        assert torch.equal(last, dense.weight.data[-len(last) :].to(dtype).float())
    assert len(rows) == 1 if blocksize == 128 else len(rows) == 3


def test_a_bfloat16_server_packs_and_the_reference_reads_what_it_packed(
    tmp_path: Path,
) -> None:
    """Against the same 4-bit weights that nobody packed. The bound is that of rounding
    weights to bfloat16 (2 ** -9 each), not that of computing in it."""
    save_random(SHAPES["qwen3"], tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        ),
    ).save_pretrained(tmp_path / "stored")
    tokens = prompt(40)
    weights: DecoderWeights = load(tmp_path / "stored", dtype=torch.bfloat16)
    if not isinstance(weights.layers[0].qkv, PackedFourBit):
        pytest.skip("this CPU has no AVX512-BF16: nothing is packed")
    plain: DecoderWeights = load(tmp_path / "stored")
    got, wanted = (reference_logprobs(w, tokens, None) for w in (weights, plain))
    print(f"farthest {farthest(got, wanted):.4f}")
    assert farthest(got, wanted) < 0.02


def test_an_adapter_in_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    """Each dtype that a file may have, against PEFT with the same file."""
    from safetensors.torch import load_file, save_file

    model = save_random(SHAPES["llama"], tmp_path / "base")
    made = make_adapters(model, tmp_path / "adapters", scale=0.1, seed=SEED)["rank-16"]
    weights, tokens = load(tmp_path / "base"), prompt(20)
    for dtype in (torch.bfloat16, torch.float16):
        file = made / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
        ((wanted,),) = [peft_logprobs(model, {"a": made}, [tokens])["a"]]
        got = reference_logprobs(weights, tokens, source(made))
        assert farthest(got, wanted) < TOLERANCE


def test_files_that_lost_their_digest_give_no_reference(tmp_path: Path) -> None:
    model = save_random(SHAPES["llama"], tmp_path / "base")
    folder = make_adapters(model, tmp_path / "adapters", seed=SEED)["rank-4"]
    weights, adapter = load(tmp_path / "base"), source(folder)
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with refused(AdapterCorrupt, cause="digest"):
        reference_logprobs(weights, prompt(8), adapter)
    # And a scaling in the config that is not the one of the digest.
    shutil.copytree(folder, tmp_path / "scaled")
    data[-100] ^= 1
    (tmp_path / "scaled" / "adapter_model.safetensors").write_bytes(data)
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "scaled" / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 9})
    )
    scaled = msgspec.structs.replace(adapter, folder=str(tmp_path / "scaled"))
    with pytest.raises(AdapterCorrupt):
        reference_logprobs(weights, prompt(8), scaled)


def test_the_reference_does_not_use_the_products_that_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that ran through the serving path would prove nothing."""
    save_random(SHAPES["llama"], tmp_path)
    weights = load(tmp_path)

    def forbidden(*args: Any) -> Any:
        raise AssertionError("the serving path's product was called")

    monkeypatch.setattr(linear.Dense, "__call__", forbidden)
    assert len(reference_logprobs(weights, prompt(8), None)) == 7


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_the_files_of_a_base_give_what_was_loaded_of_it(
    name: str, quantization: Any, tmp_path: Path
) -> None:
    """Quantized anew, of several files, and with whatever a config may ask for."""
    model = save_random(SHAPES[name], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = prompt(70)
    loaded = reference_logprobs(load(tmp_path, quantization), tokens, None)
    with SourceWeights(tmp_path, quantization, torch.float32) as weights:
        assert farthest(reference_logprobs(weights, tokens, None), loaded) < TOLERANCE


def test_the_files_of_a_base_that_is_stored_in_four_bits(tmp_path: Path) -> None:
    """One of its linears is not."""
    save_random(SHAPES["llama"], tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head", "k_proj"],
        ),
    ).save_pretrained(tmp_path / "stored")
    tokens = prompt(40)
    loaded = reference_logprobs(load(tmp_path / "stored", "nf4"), tokens, None)
    with SourceWeights(tmp_path / "stored", "nf4", torch.float32) as weights:
        assert farthest(reference_logprobs(weights, tokens, None), loaded) < TOLERANCE


def test_adapters_in_one_pass_are_as_in_passes_of_their_own(tmp_path: Path) -> None:
    """And one whose files are damaged spoils no other."""
    model = save_random(SHAPES["qwen3"], tmp_path / "base")
    made = make_adapters(model, tmp_path / "adapters", scale=0.1, seed=SEED)
    folders = [made[name] for name in ("patterns", "rslora", "some-layers")]
    adapters = [None, *map(source, folders)]
    weights, tokens = load(tmp_path / "base"), prompt(40)
    alone = [reference_logprobs(weights, tokens, adapter) for adapter in adapters]
    file = folders[1] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    together = references(weights, tokens, adapters)
    assert isinstance(together[2], AdapterCorrupt)
    for index in (0, 1, 3):
        found = together[index]
        assert not isinstance(found, AdapterCorrupt)
        assert farthest(found, alone[index]) < TOLERANCE
