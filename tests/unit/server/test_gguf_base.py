"""A base in a GGUF file: what is read, what is refused, and that it computes what its original
does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from veneer_registry.errors import InvalidField, VeneerError
from veneer_registry.fingerprint import fingerprint_base
from veneer_registry.gguf_header import BLOCK_TYPES
from veneer_registry.strict_json import canonical_json
from veneer_server.models.checkpoint.reader import Checkpoint
from veneer_server.models.config import UnsupportedModel, read_decoder_config
from veneer_server.models.gguf_base import folder_files, open_gguf, origin_of, read_gguf
from veneer_server.models.reference import references
from veneer_server.models.source import BaseDamaged, BaseUnavailable, gguf_folder, resolve_base
from veneer_server.models.source_weights import SourceWeights

from tests.quantized_files import Kind, shuffled_gptq, write_base, write_folder, write_tiny
from tests.refused import refused
from tests.unit.server.test_decoder import LLAMA3, TINY, build, save_random, step

SHAPES = {
    "llama": LlamaConfig(**TINY),
    "llama-tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**TINY, attention_bias=True),
    "llama-llama3-rope": LlamaConfig(**TINY, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY),
}


@pytest.fixture(scope="module")
def real(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real base's first layer as Q4_0, with its tokenizer."""
    out = tmp_path_factory.mktemp("gguf") / "SmolLM2 135M.Q4_0.gguf"
    return write_base(base_folder, out, lambda name: Kind.Q4_0, layers=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file, to be damaged."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(**(TINY | {"num_hidden_layers": 1, "hidden_size": 64, "head_dim": 32}))
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    model = save_random(config, folder / "hf")
    return write_tiny(model, folder / "tiny.gguf", Kind.Q4_0).read_bytes()


# ------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("name", SHAPES)
def test_a_gguf_file_computes_what_its_original_does(name: str, tmp_path: Path) -> None:
    """Matrices in float32, so that names, order of rows and frequencies are all that differs;
    what is left is the order of sums."""
    model = save_random(SHAPES[name], tmp_path / "hf")
    file = write_tiny(model, tmp_path / f"{name}.gguf")
    decoder = build(gguf_folder(file, tmp_path / "cache").path, torch.float32)
    tokens = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        meant = model(torch.tensor([tokens])).logits[0]
    ours = decoder.execute(step([(tokens, 0, [1, 2, 3])]))
    assert torch.allclose(ours, meant, atol=1e-4, rtol=1e-4)


def test_weights_stay_in_codes(tmp_path: Path) -> None:
    model = save_random(SHAPES["llama"], tmp_path / "hf")
    file = write_tiny(model, tmp_path / "a.gguf", Kind.Q8_0)
    folder = gguf_folder(file, tmp_path / "cache").path
    weights = build(folder, torch.float32).weights
    stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    tables = 1024 * (2 + 4 * 3)  # of 256 numbers each, which only count in a base this small
    assert weights.nbytes <= 1.1 * stored + tables
    assert weights.parameters == sum(each.numel() for each in model.parameters())
    head = weights.coded_head
    assert head is not None
    written = next(t for t in gguf.GGUFReader(file).tensors if t.name == "output.weight")
    meant = torch.from_numpy(gguf.dequantize(written.data, written.tensor_type))
    assert torch.equal(head.weight.dequantize(), meant)


# ------------------------------------------------------------------------- what is read


def test_config_and_tokenizer_are_those_of_the_original(
    real: Path, base_folder: Path, tmp_path: Path
) -> None:
    made = resolve_base(str(real), tmp_path)
    assert made.name == "SmolLM2 135M.Q4_0"
    ours, theirs = read_decoder_config(made.path), read_decoder_config(base_folder)
    assert ours.quantization == "gguf"
    assert ours.stored_bytes == real.stat().st_size
    for field in (
        *("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_heads"),
        *("num_kv_heads", "head_dim", "context_length", "window", "rope", "tied_head"),
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-7)  # float32's
    assert set(theirs.eos_token_ids) <= set(ours.eos_token_ids)
    read = {name: (made.path / name).read_bytes() for name in ("tokenizer.json",)}
    original = json.loads((base_folder / "tokenizer.json").read_bytes())
    assert canonical_json(json.loads(read["tokenizer.json"])) == canonical_json(original)
    prints = fingerprint_base(made.path), fingerprint_base(base_folder)
    assert prints[0].tokenizer == prints[1].tokenizer
    assert prints[0].template == prints[1].template
    assert prints[0].weights != prints[1].weights


@pytest.mark.parametrize(
    ("facts", "stem", "origin"),
    [
        ({"general.name": "Mix1 Ep2"}, "SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
        ({"general.name": "Llama 3.2 1B"}, "model", "Llama-3.2-1B"),
        ({"general.name": "Llama 1B", "general.organization": "org"}, "x", "org/Llama-1B"),
        ({"general.repo_url": "https://host/org/Model/"}, "x-Q8_0", "org/Model"),
        ({"general.source.repo_url": "../../etc; rm"}, "Model-Q8_0", "Model"),
        ({"general.name": 7}, "model", "model"),
    ],
)
def test_the_origin_is_what_metadata_or_the_file_s_name_declares(
    facts: dict[str, Any], stem: str, origin: str
) -> None:
    assert origin_of(facts.get, stem) == origin


def facts_of(pre: str, tokens: list[str], kinds: list[int], **more: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [],
    } | more


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "It's 12345  go", ["It", "'s", " ", "123", "45", " ", " go"]),
        ("qwen2", "It's 123  go", ["It", "'s", " ", "1", "2", "3", " ", " go"]),
        ("smollm", "a 12b", ["a", " ", "1", "2", "b"]),
        ("gpt-2", "a 12b", ["a", " 12", "b"]),
        ("tekken", "aB12 go", ["a", "B", "1", "2", " go"]),
    ],
)
def test_text_is_split_as_the_file_says(
    pre: str, text: str, pieces: list[str], tiny: bytes
) -> None:
    base = read_gguf(io.BytesIO(tiny), "a.gguf")
    base.header.facts["tokenizer.ggml.pre"] = pre  # type: ignore[index]
    found = Tokenizer.from_str(folder_files(base, "a.gguf")["tokenizer.json"].decode())
    split = found.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in split] == pieces


def test_a_sentencepiece_tokenizer_merges_by_score(tiny: bytes) -> None:
    base = read_gguf(io.BytesIO(tiny), "a.gguf")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-100.0] * 4 + [-3.0, -2.0, -4.0, -5.0]
    base.header.facts.update(  # type: ignore[attr-defined]
        facts_of("default", [*tokens, *pieces], kinds)
        | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    )
    files = folder_files(base, "a.gguf")
    found = Tokenizer.from_str(files["tokenizer.json"].decode())
    # "bc" has the better score, so it is merged before "ab"; é falls back to its bytes.
    assert found.encode("abc é").tokens == [
        *("<s>", "▁a", "bc", "▁", "<0xC3>", "<0xA9>"),
    ]
    assert found.decode(found.encode("abc é").ids) == "abc é"


def test_the_folder_is_made_once_and_mended(real: Path, tmp_path: Path) -> None:
    folder = gguf_folder(real, tmp_path).path
    before = (folder / "tokenizer.json").stat().st_ino
    assert gguf_folder(real, tmp_path).path == folder
    assert (folder / "tokenizer.json").stat().st_ino == before
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[:100])
    (folder / "strange.json").write_text("{}")
    assert gguf_folder(real, tmp_path).path == folder
    assert (folder / "tokenizer.json").read_bytes() == whole
    assert not (folder / "strange.json").exists()


def test_a_file_that_is_gone_is_said_to_be(tiny: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(tiny)
    folder = gguf_folder(file, tmp_path / "cache").path
    file.unlink()
    with pytest.raises(VeneerError) as caught:
        fingerprint_base(folder)
    assert caught.value.metadata["cause"] == "missing"
    with refused(BaseUnavailable):
        resolve_base(str(file), tmp_path / "cache")


def test_the_fingerprint_covers_every_bit_of_the_weights(tiny: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(tiny)
    folder, cache = gguf_folder(file, tmp_path / "cache").path, tmp_path / "fingerprints"
    before = fingerprint_base(folder, cache_dir=cache).weights
    damaged = bytearray(tiny)
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    os.utime(file, ns=(1, 1))
    assert fingerprint_base(folder, cache_dir=cache).weights != before
    file.write_bytes(tiny)
    assert fingerprint_base(folder, cache_dir=cache).weights == before


# ------------------------------------------------------------------------- what is refused


def rewritten(tiny: bytes, folder: Path, **change: Any) -> Path:
    """The file with other metadata (``a__b`` for ``a.b``; None removes a key)."""
    source, out = folder / "source.gguf", folder / "changed.gguf"
    source.write_bytes(tiny)
    reader = gguf.GGUFReader(source)
    changes = {name.replace("__", "."): value for name, value in change.items()}
    writer = gguf.GGUFWriter(out, changes.pop("general.architecture", "llama"))
    for name, each in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changes:
            continue
        inner = each.types[-1] if each.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, each.contents(), each.types[0], inner)
    for name, value in changes.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        data = tensor.data if kind in (Kind.F32,) else tensor.data.view("uint8")
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"general__architecture": "gemma3"}, "general.architecture"),
        ({"general__type": "adapter"}, "general.type"),
        ({"split__count": 3}, "split.count"),
        ({"llama__block_count": None}, "llama.block_count"),
        ({"llama__block_count": 10**6}, "llama.block_count"),
        ({"llama__attention__head_count_kv": 7}, "llama.attention.head_count_kv"),
        ({"llama__rope__dimension_count": 16}, "llama.rope.dimension_count"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type"),
        ({"llama__expert_count": 8}, "llama.expert_count"),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model"),
        ({"tokenizer__ggml__pre": "glm4"}, "tokenizer.ggml.pre"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer__ggml__merges": "x"}, "tokenizer.ggml.merges"),
    ],
)
def test_metadata_that_is_not_served_is_refused_by_its_key(
    change: dict[str, Any], key: str, tiny: bytes, tmp_path: Path
) -> None:
    file = rewritten(tiny, tmp_path, **change)
    with refused(UnsupportedModel, key=key):
        folder_files(open_gguf(file), file.name)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.IQ4_XS])
def test_other_types_are_refused_with_the_command_that_converts(
    kind: Kind, tmp_path: Path
) -> None:
    shapes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    shapes["num_hidden_layers"] = 1
    model = save_random(LlamaConfig(**(TINY | shapes)), tmp_path / "hf")
    file = write_tiny(model, tmp_path / "a.gguf", kind)
    if kind.name in BLOCK_TYPES:
        assert open_gguf(file).config["vocab_size"] == TINY["vocab_size"]
        return
    with refused(UnsupportedModel, kind=kind.name) as caught:
        open_gguf(file)
    assert "llama-quantize --allow-requantize a.gguf" in caught.value.message


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(
    tiny: bytes, tmp_path: Path
) -> None:
    file = rewritten(tiny, tmp_path, llama__feed_forward_length=64)
    with refused(UnsupportedModel, tensor="blk.0.ffn_gate.weight"):
        open_gguf(file)
    file = rewritten(tiny, tmp_path, llama__block_count=2)
    with refused(UnsupportedModel, tensor="blk.1.attn_norm.weight"):
        open_gguf(file)


MUTANTS = 2000


def mutated(source: random.Random, data: bytes, header: int) -> bytes:
    """One to four changes, most of them in the header."""
    found = bytearray(data)
    for _ in range(source.randint(1, 4)):
        within = header if source.random() < 0.9 else len(found)
        if len(found) < 16:
            break
        at = source.randrange(min(within, len(found) - 8))
        match source.randrange(6):
            case 0:
                found[at] ^= 1 << source.randrange(8)
            case 1:  # a length or a count
                number = source.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 1 << 40])
                found[at : at + 8] = struct.pack("<Q", number)
            case 2:
                found[at : at + 4] = struct.pack("<I", source.choice([0, 8, 9, 12, 99, 2**31]))
            case 3:
                del found[at : at + source.randint(1, 64)]
            case 4:
                found[at:at] = source.randbytes(source.randint(1, 64))
            case 5:
                del found[at:]
    return bytes(found)


def test_mutated_files_are_read_or_clearly_refused(tiny: bytes, tmp_path: Path) -> None:
    """As an operator might have downloaded them. Some of what is accepted is loaded. Memory
    stays near the file's size, whatever lengths the file claims."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    source = random.Random(seed)
    reader = read_gguf(io.BytesIO(tiny), "a.gguf")
    header = min(tensor.begin for tensor in reader.header.tensors)
    fates: dict[str, int] = {}
    tracemalloc.start()
    for number in range(MUTANTS):
        data = mutated(source, tiny, header)
        try:
            base = read_gguf(io.BytesIO(data), "a.gguf")
            folder_files(base, "a.gguf")
        except UnsupportedModel as error:
            fate = "refused" if error.metadata.get("file") == "a.gguf" else "unclear"
        else:
            fate = "read"
            if number % 10 == 0:
                (tmp_path / f"{number}.gguf").write_bytes(data)
                loaded(tmp_path / f"{number}.gguf", tmp_path / "cache")
        fates[fate] = fates.get(fate, 0) + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(fates, f"{peak >> 10} KiB")
    assert peak < 20 * len(tiny) + (8 << 20)
    assert "unclear" not in fates
    assert fates["refused"] > MUTANTS / 4
    assert fates["read"] > MUTANTS / 50


def loaded(file: Path, cache: Path) -> None:
    """Load what can be loaded; anything else than our own errors fails the test."""
    with contextlib.suppress(UnsupportedModel, BaseDamaged, InvalidField):
        folder = gguf_folder(file, cache).path
        with Checkpoint(folder) as checkpoint:
            config = checkpoint.config
            for layer in range(config.num_layers):
                for projection, shape in config.shapes.items():
                    name = checkpoint.matrix(layer, projection).name
                    if checkpoint.quantized(name, shape) is None:
                        checkpoint.read(name, shape)


# ------------------------------------------------------------------------- other readers


@pytest.mark.parametrize("form", ["gguf", "gptq"])
def test_the_self_test_s_reference_reads_such_a_base(form: str, tmp_path: Path) -> None:
    model = save_random(SHAPES["llama-biased"], tmp_path / "hf")
    if form == "gguf":
        file = write_tiny(model, tmp_path / "a.gguf", Kind.Q8_0)
        folder = gguf_folder(file, tmp_path / "cache").path
    else:
        # desc_act: the loader gathers inputs, the reference puts weights in their order.
        folder = write_folder(tmp_path / "hf", tmp_path / "gptq", shuffled_gptq)
    decoder = build(folder, torch.float32)
    tokens = list(range(5, 45))
    logits = decoder.execute(step([(tokens, 0, [1, 2, 3])]))[:-1]
    ours = torch.log_softmax(logits, 1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1))
    with SourceWeights(folder, "none", torch.float32) as source:
        for weights in (decoder.weights, source):
            (found,) = references(weights, tokens, [None])
            # float32 on both sides: what is left is the order of sums.
            assert torch.allclose(torch.tensor(found), ours.squeeze(1), atol=1e-4)


def test_settings_in_files_of_their_own_are_read(tmp_path: Path) -> None:
    save_random(SHAPES["llama"], tmp_path / "hf")
    for name, settings, quantization in (
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": True}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq"),
    ):
        path = tmp_path / "hf" / name
        path.write_text(json.dumps(settings))
        found = read_decoder_config(tmp_path / "hf")
        assert found.quantization == quantization
        assert found.stored is not None
        assert found.stored.group == 32
        path.unlink()
