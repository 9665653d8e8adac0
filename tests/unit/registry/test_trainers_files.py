"""Adapters as trainers save them: names of tensors, regular expressions in patterns, and whole
embeddings that PEFT adds by itself. PEFT writes the files, and says what they mean."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from veneer_registry.adapter import BaseFingerprint, BaseSpec
from veneer_registry.bundle_files import select_files
from veneer_registry.embeddings import drop_embeddings
from veneer_registry.errors import AdapterInvalid
from veneer_registry.format import check_adapter, read_adapter, read_upload
from veneer_registry.lora_config import CONFIG_FILE, MAX_EXPRESSIONS, parse_config
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import open_stored
from veneer_registry.tensor_names import module_path
from veneer_registry.weights import WEIGHTS_FILE

from tests.refused import refused
from tests.unit.registry.kit import (
    SHAPES,
    announce,
    bundle_files,
    make_adapter,
    make_tensors,
    push,
)
from tests.unit.registry.test_peft_agreement import LAYERS, make_model, save

BASE = BaseSpec(
    "tiny", LAYERS, SHAPES, BaseFingerprint("a" * 64, "b" * 64), names=("someone/some-model",)
)
EMBEDDING = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"
ALL = list(SHAPES)
PATHS = [module_path(layer, projection) for layer in range(12) for projection in SHAPES]


# ------------------------------------------------------------------ names of tensors


def rewrite(folder: Path, change: Callable[[str], str]) -> Path:
    """Save the weights under other names."""
    path = folder / WEIGHTS_FILE
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)
    return folder


VARIANTS: Mapping[str, Callable[[str], str]] = {
    "adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".my-sql_2.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "both": lambda name: name[len("base_model.model.") : -len("weight")] + "default.weight",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_name_tensors_has_one_digest(variant: str, tmp_path: Path) -> None:
    save(tmp_path, r=4, target_modules=ALL)
    plain = read_adapter(tmp_path, BASE)
    with open_stored(tmp_path, plain.weights_digest) as (_, tensors):
        before = [bytes(view.a.data) + bytes(view.b.data) for view in tensors]
    other = read_adapter(rewrite(tmp_path, VARIANTS[variant]), BASE)
    assert other == plain
    with open_stored(tmp_path, plain.weights_digest) as (manifest, tensors):
        assert manifest.modules == plain.modules
        assert [bytes(view.a.data) + bytes(view.b.data) for view in tensors] == before


def test_what_a_model_s_own_state_is_called(tmp_path: Path) -> None:
    """`torch.save` of ``model.state_dict()`` and trainers with their own saving keep the name
    of the adapter, which PEFT's ``save_pretrained`` takes out."""
    model = save(tmp_path, r=4, target_modules=["q_proj", "down_proj"])
    plain = read_adapter(tmp_path, BASE)
    own = {name: t for name, t in model.state_dict().items() if "lora_" in name}
    assert all(".default.weight" in name for name in own)
    save_file({name: t.contiguous() for name, t in own.items()}, tmp_path / WEIGHTS_FILE)
    assert read_adapter(tmp_path, BASE).weights_digest == plain.weights_digest


@pytest.mark.parametrize(
    "change",
    [
        lambda name: VARIANTS["adapter's name"](name) if "q_proj" in name else name,
        lambda name: VARIANTS["no prefix"](name) if "lora_B" in name else name,
        lambda name: name.replace(".weight", ".a.weight" if "lora_A" in name else ".b.weight"),
    ],
)
def test_mixed_names_are_refused(change: Callable[[str], str], tmp_path: Path) -> None:
    save(tmp_path, r=4, target_modules=["q_proj", "k_proj"])
    with refused(AdapterInvalid, cause="mixed_names", file=WEIGHTS_FILE):
        read_adapter(rewrite(tmp_path, change), BASE)
    with refused(AdapterInvalid, cause="mixed_names"):
        check_adapter(tmp_path)


def test_one_matrix_twice_is_refused(tmp_path: Path) -> None:
    save(tmp_path, r=4, target_modules=["q_proj"])
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    again = {VARIANTS["adapter's name"](n): t.clone() for n, t in tensors.items()}
    save_file({**tensors, **again}, tmp_path / WEIGHTS_FILE)
    with refused(AdapterInvalid, cause="mixed_names"):
        read_adapter(tmp_path, BASE)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.a.b.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A..weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.%s.weight" % ("x" * 65),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.../x.weight",
        "model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path, r=4, target_modules=["q_proj"])
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(tmp_path, lambda each: name if each == first else each)
    with refused(AdapterInvalid, file=WEIGHTS_FILE):
        read_adapter(tmp_path, BASE)


# ------------------------------------------------- regular expressions in patterns

EXPRESSIONS = [
    r".*\.self_attn\.(q|v)_proj",
    r"layers\.(0|2)\..*q_proj",
    r"^model\.layers\.[0-9]\.mlp.*",
    r"(gate|up)_proj",
    r"model.layers.\d+.self_attn.q_proj",
    r"layers\.1[0-1]?\.self_attn\.k_proj$",
    r"q_proj|k_proj",
    r"a)|(model.layers.3.mlp.up_proj",
    r"[^.]*_proj",
    r"layers\.(?:[02468]|10)\..*",
    r"\w+\.layers\.1\.\S+",
    r".+",
    r"proj",
    r"model\.layers\.[3-5]",
]


def peft_matches(key: str) -> list[str]:
    """Modules that PEFT finds a key for."""
    from peft.utils.other import get_pattern_key

    return [path for path in PATHS if get_pattern_key([key], path) == key]


@pytest.mark.parametrize("key", EXPRESSIONS)
def test_an_expression_matches_what_peft_matches(key: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {key: 2}}
    settings = parse_config(json.dumps(config).encode())
    theirs = peft_matches(key)
    if not theirs:
        with refused(AdapterInvalid, key=key):
            settings.ranks(PATHS)
        return
    ranks = settings.ranks(PATHS)
    assert [path for path in PATHS if ranks[path] == 2] == theirs


def test_the_first_key_that_matches_counts(tmp_path: Path) -> None:
    """PEFT trains and loads it; what counts is what it makes of the saved file."""
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {r".*\.self_attn\.(q|k)_proj": 2, "k_proj": 3, r"mlp\.(up|down).*": 6},
        "alpha_pattern": {r"layers\.[12]\..*proj": 5, "layers.0.mlp.up_proj": 7},
    }
    model = save(tmp_path, **options)
    manifest = read_adapter(tmp_path, BASE)
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    ours = {module_path(m.layer, m.projection): (m.rank, m.scaling) for m in manifest.modules}
    assert ours == theirs
    assert len({rank for rank, _ in ours.values()}) == 3
    # A loader reads the stored files anew.
    with open_stored(tmp_path, manifest.weights_digest) as (stored, _):
        assert stored.modules == manifest.modules


@pytest.mark.parametrize(
    "key", [r"(?=x)q_proj", r"(q)\1_proj", "[q_proj", "q_proj(", r"(?<!x)q_proj", r"q\Z", "*"]
)
def test_what_re2_does_not_read_is_refused(key: str, tmp_path: Path) -> None:
    with refused(AdapterInvalid, key=key, file=CONFIG_FILE) as caught:
        read_adapter(make_adapter(tmp_path, {"alpha_pattern": {key: 4}}), None)
    assert "layers.0.self_attn.q_proj" in caught.value.message


@pytest.mark.parametrize(
    "key",
    [
        r".{,99}q_proj",
        r"q{,1}_proj",
        r"[[:alpha:]]_proj",
        r"[^[:digit:]]_proj",
        r"\pL_proj",
        r"[\PN]_proj",
        r"\C_proj",
        r"\Q.q_proj",
        r"(?U)q.*",
        r"(?i-U:q.*)",
    ],
)
def test_what_re2_reads_otherwise_is_refused(key: str, tmp_path: Path) -> None:
    """RE2 reads each, but as something else than the `re` that PEFT uses, which gave silently
    another scaling, or not as PEFT, which cannot read it."""
    tensors = make_tensors(projections=["q_proj"])
    folder = make_adapter(tmp_path, {"alpha_pattern": {key: 4}}, tensors)
    with refused(AdapterInvalid, key=key, file=CONFIG_FILE) as caught:
        read_adapter(folder, None)
    assert "reads differently" in caught.value.message


@pytest.mark.parametrize(
    "key",
    [
        "(([a-z.]*)*)*!",
        "(a+)+" * 8 + "$",
        "(.*.*.*.*.*.*.*.*)*!",
        "(a{1000}){1000}",
        "((a|b|c|[0-9]){1,90}x?){1,90}",
        "x*" * 400,
        "(" * 400,
        "q" * 999 + "*",
        "q*" * 600,
        "\x00*\ud800".encode("utf-8", "replace").decode(),
    ],
)
def test_a_hostile_expression_is_refused_at_once(key: str, tmp_path: Path) -> None:
    """Backtracking would take minutes; the test's time limit would end it."""
    with refused(AdapterInvalid, key=key[:120]):
        read_adapter(make_adapter(tmp_path, {"alpha_pattern": {key: 4}}), None)


def test_the_number_of_expressions_is_limited(tmp_path: Path) -> None:
    def keys(count: int) -> dict[str, int]:
        return {f"q_(proj|x{number})": 4 for number in range(count)}

    most = make_adapter(tmp_path / "a", {"alpha_pattern": keys(MAX_EXPRESSIONS)})
    read_adapter(most, None)
    more = make_adapter(tmp_path / "b", {"alpha_pattern": keys(MAX_EXPRESSIONS + 1)})
    with refused(AdapterInvalid, key="alpha_pattern"):
        read_adapter(more, None)


def test_an_expression_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with refused(AdapterInvalid, key="(x|y)_proj"):
        read_adapter(make_adapter(tmp_path, {"rank_pattern": {"(x|y)_proj": 4}}), None)


# ------------------------------------------------------------- whole embeddings


def saved_with_embeddings(
    folder: Path, base: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    """A base's folder, and an adapter that PEFT saved with the embeddings of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = make_model()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(base)
    model.to(dtype)
    wrapped = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder, save_embedding_layers=True)
    return wrapped


def with_base(base: Path) -> BaseSpec:
    return replace(BASE, folder=str(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_unchanged_embeddings_are_left_out(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    saved_with_embeddings(tmp_path / "a", tmp_path / "base", tied=tied, dtype=dtype)
    saved = load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert EMBEDDING in saved, "PEFT saved it"
    local = check_adapter(tmp_path / "a")
    assert any("embed_tokens" in warning for warning in local)
    manifest = read_upload(tmp_path / "a", with_base(tmp_path / "base"))
    assert any("unchanged" in warning for warning in manifest.warnings)
    left = load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert left.keys() == {name for name in saved if "lora_" in name}
    assert all(torch.equal(left[name], saved[name]) for name in left)
    # As if they had never been saved.
    again = read_adapter(tmp_path / "a", with_base(tmp_path / "base"))
    assert again.weights_digest == manifest.weights_digest
    assert (again.parameters, again.serving_bytes) == (
        manifest.parameters,
        manifest.serving_bytes,
    )
    assert not any("embed" in warning for warning in again.warnings)


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    tensors[name] = edit(tensors[name].clone()).contiguous()
    save_file(tensors, path)


def nudged(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[row, 3] += 0.5
        return tensor

    return edit


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("row", [0, 17, 63])
def test_trained_embeddings_are_refused(name: str, row: int, tmp_path: Path) -> None:
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    change(tmp_path / "a", name, nudged(row))
    before = (tmp_path / "a" / WEIGHTS_FILE).read_bytes()
    with refused(AdapterInvalid, tensor=name, cause="embedding") as caught:
        read_upload(tmp_path / "a", with_base(tmp_path / "base"))
    assert f"token {row}" in caught.value.message
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == before


def test_not_a_number_is_a_difference(tmp_path: Path) -> None:
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    change(tmp_path / "a", HEAD, lambda t: t.index_fill(0, torch.tensor([5]), float("nan")))
    with refused(AdapterInvalid, tensor=HEAD, cause="embedding"):
        read_upload(tmp_path / "a", with_base(tmp_path / "base"))


def test_a_base_that_is_gone_is_no_business_of_the_caller(tmp_path: Path) -> None:
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    gone = tmp_path / "gone"
    with refused(AdapterInvalid, cause="embedding") as caught:
        read_upload(tmp_path / "a", with_base(gone))
    assert str(gone) not in f"{caught.value.message} {caught.value.metadata}"


def test_added_tokens_are_refused_and_missing_padding_is_not(tmp_path: Path) -> None:
    """PEFT saves embeddings whose vocabulary was resized: down to the tokenizer's tokens, or
    up for new ones."""
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    base = with_base(tmp_path / "base")
    change(tmp_path / "a", EMBEDDING, lambda t: torch.cat([t, t[:1]]))
    with refused(AdapterInvalid, tensor=EMBEDDING, cause="added_tokens"):
        read_upload(tmp_path / "a", base)
    for name in (EMBEDDING, HEAD):
        change(tmp_path / "a", name, lambda t: t[:60])
    assert any("unchanged" in w for w in read_upload(tmp_path / "a", base).warnings)


def test_an_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    change(tmp_path / "a", EMBEDDING, lambda t: t[:, :16])
    with refused(AdapterInvalid, tensor=EMBEDDING, cause="embedding"):
        read_upload(tmp_path / "a", with_base(tmp_path / "base"))


def test_without_the_base_s_own_nothing_is_taken_on_trust(tmp_path: Path) -> None:
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    with refused(AdapterInvalid, cause="embedding"):
        read_adapter(tmp_path / "a", BASE)
    # A base whose embedding is stored in 8 bits.
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)
    save_file(tensors, path)
    with refused(AdapterInvalid, cause="embedding"):
        read_adapter(tmp_path / "a", with_base(tmp_path / "base"))


def test_many_pieces_are_compared(tmp_path: Path) -> None:
    """More than the megabyte that is read at once, and an edit in the last row alone."""
    random = np.random.default_rng(0)
    large = torch.tensor(random.standard_normal((20_000, 32)), dtype=torch.bfloat16)
    (tmp_path / "base").mkdir()
    save_file({"model.embed_tokens.weight": large}, tmp_path / "base" / "model.safetensors")
    make_adapter(tmp_path / "a")
    path = tmp_path / "a" / WEIGHTS_FILE
    for row, fails in ((None, False), (19_999, True)):
        tensors = load_file(make_adapter(tmp_path / "a") / WEIGHTS_FILE)
        tensors[EMBEDDING] = large.float() if row is None else nudged(row)(large.float())
        save_file(tensors, path)
        if fails:
            with refused(AdapterInvalid, cause="embedding", tensor=EMBEDDING):
                read_adapter(tmp_path / "a", with_base(tmp_path / "base"))
        else:
            read_adapter(tmp_path / "a", with_base(tmp_path / "base"))


def test_a_link_into_the_store_is_not_written_to(tmp_path: Path) -> None:
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    stored = tmp_path / "stored"
    stored.hardlink_to(tmp_path / "a" / WEIGHTS_FILE)
    before = stored.read_bytes()
    drop_embeddings(tmp_path / "a")
    assert stored.read_bytes() == before
    assert (tmp_path / "a" / WEIGHTS_FILE).stat().st_size < len(before)
    assert sorted(path.name for path in select_files(tmp_path / "a").files) == sorted(
        path.name for path in (tmp_path / "a").iterdir()
    ), "no draft is left"


def test_what_is_stored_has_no_embeddings(tmp_path: Path) -> None:
    """It can be read, downloaded and pushed again like any other."""
    saved_with_embeddings(tmp_path / "a", tmp_path / "base")
    base = with_base(tmp_path / "base")
    with Registry.open(tmp_path / "data", base) as registry:
        first = push(registry, "sql", tmp_path / "a")
        assert any("unchanged" in warning for warning in first.warnings)
        record = first.record
        weights = tmp_path / "data/store/weights" / record.ref.weights_digest / WEIGHTS_FILE
        assert EMBEDDING not in load_file(weights)
        # The README, too, which PEFT writes.
        files = [p for p in select_files(tmp_path / "a").files if p.name != WEIGHTS_FILE]
        assert record.bytes == weights.stat().st_size + sum(p.stat().st_size for p in files)
        assert not push(registry, "sql", tmp_path / "a").published
        # The same without embeddings is the same adapter, and need not be sent.
        drop_embeddings(tmp_path / "a")
        assert registry.stores(announce("other", bundle_files(tmp_path / "a")))
        assert not push(registry, "sql", tmp_path / "a").published
    with Registry.open(tmp_path / "data", base) as registry, registry.acquire("sql") as lease:
        assert lease.ref == record.ref
