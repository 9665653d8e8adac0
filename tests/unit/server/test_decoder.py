"""Our decoder against its oracle, transformers, on tiny random models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from veneer_registry.fingerprint import weights_fingerprint
from veneer_server.backends.torch.attention import KvCache
from veneer_server.backends.torch.decoder import Decoder
from veneer_server.models.config import UnsupportedModel, read_decoder_config
from veneer_server.models.linear import fuse
from veneer_server.models.loader import load_weights
from veneer_server.models.packed import PackedFourBit
from veneer_server.step.arrays import StepArrays

from tests.refused import refused

# Sizes that bitsandbytes can pack: rows % 32 == 0, columns % 64 == 0.
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

LENGTHS = (20, 4000, 50, 30, 70)

SHAPES = {
    "llama": LlamaConfig(**TINY),
    "llama-tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": LlamaConfig(**TINY, rope_parameters=LLAMA3),
    "llama-linear-rope": LlamaConfig(**TINY, rope_parameters=LINEAR),
    "llama-yarn-rope": LlamaConfig(**TINY, rope_parameters=YARN),
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "mistral-window": MistralConfig(**TINY, sliding_window=24),
    "qwen2": Qwen2Config(**TINY),
    "qwen2-window": Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**TINY),
}
BLOCK = 16


def save_random(config: Any, folder: Path, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # Norms and biases that are not 1 and 0, or a forgotten one goes unseen.
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def build(
    folder: Path, dtype: torch.dtype, quantization: Any = "none", num_blocks: int = 40
) -> Decoder:
    weights = load_weights(
        folder, quantization=quantization, dtype=dtype, device=torch.device("cpu")
    )
    config = weights.config
    cache = KvCache(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=BLOCK,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return Decoder(weights, cache, torch.float32)


def step(parts: list[tuple[list[int], int, list[int]]], block_size: int = BLOCK) -> StepArrays:
    """Rows of several sequences: (new tokens, start, blocks); all logits wanted."""
    tokens = [t for new, _, _ in parts for t in new]
    positions = [start + i for new, start, _ in parts for i in range(len(new))]
    slots = [
        blocks[(start + i) // block_size] * block_size + (start + i) % block_size
        for new, start, blocks in parts
        for i in range(len(new))
    ]
    width = max(len(blocks) for _, _, blocks in parts)
    table = np.zeros((len(parts), width), dtype=np.int64)
    for row, (_, _, blocks) in enumerate(parts):
        table[row, : len(blocks)] = blocks
    return StepArrays(
        tokens=np.array(tokens),
        positions=np.array(positions),
        slots=np.array(slots),
        row_starts=np.cumsum([0] + [len(new) for new, _, _ in parts]),
        contexts=np.array([start + len(new) for new, start, _ in parts]),
        block_tables=table,
        segments=(),
        logit_rows=np.arange(len(tokens)),
    )


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_logits_equal_transformers_for_prefill_chunks_and_decode(
    name: str, tmp_path: Path
) -> None:
    """Two sequences, mixed: whole prefill, chunked prefill, decode, scattered blocks."""
    oracle = save_random(SHAPES[name], tmp_path)
    decoder = build(tmp_path, torch.float32)
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(3, 320, (70,), generator=generator).tolist()
    second = torch.randint(3, 320, (45,), generator=generator).tolist()
    blocks_1, blocks_2 = [7, 3, 11, 1, 9], [2, 14, 5]
    got_1, got_2 = [], []
    out = decoder.execute(step([(first[:60], 0, blocks_1[:4]), (second[:20], 0, blocks_2[:2])]))
    got_1.append(out[:60])
    got_2.append(out[60:])
    out = decoder.execute(
        step([(first[60:61], 60, blocks_1[:4]), (second[20:40], 20, blocks_2)])
    )
    got_1.append(out[:1])
    got_2.append(out[1:])
    for i in range(5):
        out = decoder.execute(
            step(
                [
                    (first[61 + i : 62 + i], 61 + i, blocks_1),
                    (second[40 + i : 41 + i], 40 + i, blocks_2),
                ]
            )
        )
        got_1.append(out[:1])
        got_2.append(out[1:])
    with torch.no_grad():
        want_1 = oracle(torch.tensor([first[:66]])).logits[0]
        want_2 = oracle(torch.tensor([second])).logits[0]
    # float32 both; sums run in another order (fused qkv, paged attention).
    torch.testing.assert_close(torch.cat(got_1), want_1, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(got_2), want_2, atol=2e-5, rtol=1e-4)


def test_a_wrong_block_table_is_noticed(tmp_path: Path) -> None:
    """Negative control of the test above: another block gives other logits."""
    save_random(SHAPES["llama"], tmp_path)
    decoder = build(tmp_path, torch.float32)
    tokens = list(range(3, 40))
    decoder.execute(step([(tokens[:36], 0, [1, 2, 3])]))
    right = decoder.execute(step([(tokens[36:], 36, [1, 2, 3])]))
    wrong = decoder.execute(step([(tokens[36:], 36, [4, 2, 3])]))
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_fused_four_bit_linears_are_exact(quantization: str, tmp_path: Path) -> None:
    """Fusing q, k, v and gate, up must not change what bitsandbytes computes."""
    from transformers import BitsAndBytesConfig

    save_random(SHAPES["qwen2"], tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ).eval()
    for module in oracle.modules():
        # bitsandbytes' packed CPU product rounds to bfloat16; off for float32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    decoder = build(tmp_path, torch.float32, quantization)
    tokens = list(range(3, 33))
    with torch.no_grad():
        want = oracle(torch.tensor([tokens])).logits[0]
    got = decoder.execute(step([(tokens, 0, [1, 2])]))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_the_direct_call_gives_what_the_operator_gives() -> None:
    """Bit by bit, whatever the rows and however they lie."""
    import bitsandbytes as bnb

    torch.manual_seed(5)
    module = bnb.nn.Linear4bit(192, 160, bias=True, quant_type="nf4")
    linear = fuse([module.to("cpu").eval()], torch.bfloat16)
    if not isinstance(linear, PackedFourBit):
        pytest.skip("this CPU has no AVX512-BF16: nothing is packed")
    assert linear.calls_library
    for rows in (1, 2, 7, 33):
        wide = torch.randn(rows, 200).bfloat16()
        for x in (wide[:, :192].contiguous(), wide[:, 8:]):
            assert torch.equal(linear(x), module(x))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_many_rows_agree_with_the_weights_in_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded, whole and in slices of the weight, on a machine that would not."""
    import bitsandbytes as bnb
    from veneer_server.models import packed

    torch.manual_seed(6)
    module = bnb.nn.Linear4bit(192, 160, bias=True, quant_type=kind).to("cpu").eval()
    weights = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    monkeypatch.setattr(packed, "expanding_pays", lambda: True)
    monkeypatch.setattr("veneer_server.models.linear.expanding_pays", lambda: True)
    linear = fuse([module], torch.bfloat16)
    if not isinstance(linear, PackedFourBit):
        pytest.skip("this CPU has no AVX512-BF16: nothing is packed")
    for rows in (packed.MANY_ROWS - 1, packed.MANY_ROWS):
        # Numbers that bfloat16 holds, so that rounding them is no difference.
        x = torch.randn(rows, 192).bfloat16().float()
        want = torch.nn.functional.linear(x, weights.float(), module.bias.float())
        for slice_size in (packed.SLICE, 64 * 192):
            monkeypatch.setattr(packed, "SLICE", slice_size)
            got = linear(linear.rounded(x))
            assert got.dtype == (torch.float32 if rows == packed.MANY_ROWS else torch.bfloat16)
            # bfloat16 scales of the packed form: 2 ** -9 of each product.
            torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.02)


def test_blocks_that_straddle_rows_are_not_packed() -> None:
    """bitsandbytes would fail to; such a layer is served without."""
    import bitsandbytes as bnb

    torch.manual_seed(8)
    # Its own layers have blocks of 64; a folder that another tool quantized may not.
    module = bnb.nn.Linear4bit(192, 160, bias=False, quant_type="nf4")
    module.weight = bnb.nn.Params4bit(
        module.weight.data, requires_grad=False, quant_type="nf4", blocksize=128
    )
    module = module.to("cpu").eval()
    weights = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    x = torch.randn(3, 192).bfloat16()
    linear = fuse([module], torch.bfloat16)
    want = torch.nn.functional.linear(x.float(), weights.float())
    torch.testing.assert_close(linear(x).float(), want, atol=0.05, rtol=0.02)


def test_sequences_are_read_in_as_few_groups_as_pay() -> None:
    """Lengths far apart are apart where padding is dear, and together where it is not."""
    from veneer_server.backends.torch.attention import AttentionPlan

    batch = step([([5], length - 1, list(range(1, 2 + length // 16))) for length in LENGTHS])
    sizes = {}
    for heads in (2, 64):
        cache = KvCache(
            num_layers=1,
            num_blocks=80,
            block_size=16,
            kv_heads=heads,
            head_dim=32,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        plan = AttentionPlan.of(
            batch, cache=cache, windows=frozenset([None]), device=torch.device("cpu")
        )
        sizes[heads] = [len(group.bias[None]) for group in plan.decodes]
        assert sum(sizes[heads]) == len(LENGTHS)
    assert len(sizes[2]) == 2
    assert len(sizes[64]) > 2


def test_a_prequantized_folder_loads_as_it_is(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    save_random(SHAPES["llama"], tmp_path / "full")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "full",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            # A skipped module stays unquantized and is fused with quantized ones.
            llm_int8_skip_modules=["lm_head", "k_proj"],
        ),
    )
    quantized.save_pretrained(tmp_path / "four-bit")
    for module in quantized.eval().modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    decoder = build(tmp_path / "four-bit", torch.float32)
    tokens = list(range(3, 33))
    with torch.no_grad():
        want = quantized(torch.tensor([tokens])).logits[0]
    got = decoder.execute(step([(tokens, 0, [1, 2])]))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_a_stored_weight_that_is_shorter_than_its_state_says_is_refused(
    tmp_path: Path,
) -> None:
    """Its shape is JSON in the file. Native code would read what lies behind the weight."""
    from safetensors.torch import load_file, save_file
    from transformers import BitsAndBytesConfig

    save_random(SHAPES["llama"], tmp_path / "full")
    transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "full",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ).save_pretrained(tmp_path / "stored")
    file = tmp_path / "stored" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist()))
    state["shape"][0] *= 10
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    # An internal check: a ValueError without metadata.
    with pytest.raises(ValueError, match="size of a 4-bit weight does not match its state"):
        build(tmp_path / "stored", torch.float32)


def test_four_bit_weights_are_cached_and_the_cache_gives_the_same(tmp_path: Path) -> None:
    save_random(SHAPES["llama"], tmp_path / "base")
    outputs = []
    for _ in range(2):
        weights = load_weights(
            tmp_path / "base",
            quantization="nf4",
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            cache_dir=tmp_path / "cache",
            fingerprint=weights_fingerprint(tmp_path / "base"),
        )
        outputs.append(weights.layers[0].qkv(torch.ones(2, 128, dtype=torch.bfloat16)))
    (cached,) = (tmp_path / "cache" / "quantized").iterdir()
    assert (cached / "config.json").is_file()
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("change", "key", "supported"),
    [
        ({"model_type": "gpt2"}, "model_type", "qwen3"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type", "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
    ],
)
def test_an_unsupported_base_is_refused_with_what_is_supported(
    change: dict[str, Any], key: str, supported: str, tmp_path: Path
) -> None:
    import json

    raw = SHAPES["llama"].to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with refused(UnsupportedModel, key=key) as caught:
        read_decoder_config(tmp_path)
    assert supported in caught.value.metadata["supported"].split()


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "llama", "sliding_window": None},
        {"model_type": "mistral"},  # the default is a window
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 100},
        {"model_type": "qwen2", "sliding_window": 100},
        {"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": True},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 2},
        {"model_type": "qwen2", "num_hidden_layers": 30, "use_sliding_window": True},
    ],
)
def test_windows_are_those_of_transformers(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    layers = range(theirs.num_hidden_layers)
    wanted = [window if types is None or "full" not in types[i] else None for i in layers]
    ours = read_decoder_config(tmp_path)
    assert list(ours.windows) == wanted
    assert ours.window == (window if None not in wanted else None)
    assert ours.smallest_window == (window if any(wanted) else None)


@pytest.mark.parametrize("window", [0, -1, 1.5, "24", True])
def test_a_window_that_is_none_is_refused(window: Any, tmp_path: Path) -> None:
    raw = TINY | {"model_type": "mistral", "sliding_window": window}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with refused(UnsupportedModel, key="sliding_window"):
        read_decoder_config(tmp_path)


_TAKEN = """
import resource, sys
from pathlib import Path
import torch
from veneer_server.backends.torch.attention import KvCache

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()

dtype = getattr(torch, sys.argv[1])
before = resident()
blocks = (512 << 20) // (2 * 2 * 4 * 16 * 64 * dtype.itemsize)
shape = dict(num_layers=2, num_blocks=blocks, block_size=16, kv_heads=4, head_dim=64)
cache = KvCache(**shape, dtype=dtype, device=torch.device("cpu"))
print(sum(kept.nbytes for kept in (*cache.keys, *cache.values)), resident() - before)
"""


@pytest.mark.push
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cache_takes_memory_only_as_it_is_written_to(dtype: str) -> None:
    # In a process of its own, as an engine is: other tests leave free memory behind, which the
    # allocator would use again, and so have to write zeros to.
    command = [sys.executable, "-c", _TAKEN, dtype]
    nbytes, taken = map(int, subprocess.check_output(command, text=True).split())
    assert nbytes > 500 << 20
    assert taken < 128 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_keeps_what_is_written_to_it_until_it_is_cleared(dtype: torch.dtype) -> None:
    blocks = 64
    cache = KvCache(
        num_layers=2,
        num_blocks=blocks,
        block_size=16,
        kv_heads=4,
        head_dim=64,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    assert cache.keys[1].dtype is dtype
    assert not cache.keys[1][:, blocks - 1].any()
    cache.write(1, torch.tensor([35]), torch.ones(1, 4, 64), torch.ones(1, 4, 64))
    assert cache.keys[1][:, 2, 3].eq(1).all()
    cache.clear([2])
    assert not cache.keys[1][:, 2].any()
