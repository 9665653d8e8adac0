"""An adapter whose config names another base is refused; naming none is a warning."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from veneer_registry.adapter import NO_CLAIM, BaseClaim, BaseFingerprint
from veneer_registry.base_names import (
    declared_origin,
    is_copy,
    is_named,
    known_names,
    says_its_origin,
)
from veneer_registry.errors import AdapterInvalid, BaseModelMismatch
from veneer_registry.fingerprint import vocabulary_digest
from veneer_registry.format import read_adapter
from veneer_registry.registry import Registry
from veneer_registry.training_manifest import TRAINING_FILE

from tests.refused import refused
from tests.unit.registry.kit import BASE, make_adapter, push

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (HUB, HUB),
        (HUB.upper(), HUB),
        (f" {HUB}/ ", HUB),
        ("SmolLM2-135M-Instruct", HUB),
        ("smollm2_135m_instruct", HUB),
        ("/home/a/models/SmolLM2-135M-Instruct/", HUB),
        ("./SmolLM2-135M-Instruct", HUB),
        ("C:\\models\\SmolLM2-135M-Instruct", HUB),
        (
            f"/root/.cache/huggingface/hub/models--{HUB.replace('/', '--')}/snapshots/12fd25f",
            HUB,
        ),
        (HUB, "smollm2-135m-instruct"),
        (HUB, f"/srv/hub/models--{HUB.replace('/', '--')}/snapshots/12fd25f"),
    ],
)
def test_names_of_one_base(name: str, known: str) -> None:
    assert is_named(name, ["something else", known])


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.2-1B",
        "HuggingFaceTB/SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "someone/SmolLM2-135M-Instruct",
        "/models/SmolLM2-135M-Instruct/checkpoint-500",
        "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/12fd25f",
        "/",
        "SmolLM2-135M-Instruct-GGUF",
    ],
)
def test_names_of_other_bases(name: str) -> None:
    assert not is_named(name, [HUB])


def test_what_a_base_is_known_by(tmp_path: Path) -> None:
    folder = tmp_path / "my-base"
    folder.mkdir()
    (tmp_path / "latest").symlink_to(folder)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": HUB}))
    assert known_names("latest", tmp_path / "latest", "extra/name") == (
        "latest",
        "my-base",
        HUB,
        "extra/name",
    )
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "/home/anna/secret/base"}))
    assert known_names("x", folder) == ("x", "my-base", "base")
    (folder / "config.json").write_text("[]")
    assert HUB in known_names("smollm2-135m", folder)


def named(folder: Path, name: object) -> Path:
    return make_adapter(folder, {"base_model_name_or_path": name})


def test_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMismatch) as caught:
        read_adapter(named(tmp_path, "meta-llama/Llama-3.2-1B"), BASE)
    facts = caught.value.metadata
    assert (facts["base"], facts["adapter_base"]) == ("tiny", "meta-llama/Llama-3.2-1B")
    assert "someone/base" in facts["base_names"]
    assert "--allow-base-name meta-llama/Llama-3.2-1B" in caught.value.message


@pytest.mark.parametrize("name", ["tiny", "someone/base", "/models/tiny"])
def test_a_name_of_the_base_is_accepted_without_a_warning(tmp_path: Path, name: str) -> None:
    assert read_adapter(named(tmp_path, name), BASE).warnings == ()


@pytest.mark.parametrize("name", ["", " ", None])
def test_no_name_is_accepted_with_a_warning(tmp_path: Path, name: object) -> None:
    (warning,) = read_adapter(named(tmp_path, name), BASE).warnings
    assert "does not record its base" in warning


def test_an_allowed_name_is_accepted(tmp_path: Path) -> None:
    base = replace(BASE, names=("meta-llama/Llama-3.2-1B",))
    assert read_adapter(named(tmp_path, "meta-llama/llama-3.2-1b"), base).warnings == ()


def test_a_fingerprint_decides_over_the_name(tmp_path: Path) -> None:
    folder = named(tmp_path, "meta-llama/Llama-3.2-1B")
    (folder / TRAINING_FILE).write_text(
        json.dumps({"base_fingerprint": asdict(BASE.fingerprint)})
    )
    assert read_adapter(folder, BASE).base_name == "meta-llama/Llama-3.2-1B"
    other = asdict(BaseFingerprint("9" * 64, "8" * 64))
    folder = named(tmp_path, "tiny")
    (folder / TRAINING_FILE).write_text(json.dumps({"base_fingerprint": other}))
    with pytest.raises(BaseModelMismatch) as caught:
        read_adapter(folder, BASE)
    assert "adapter_weights" in caught.value.metadata


def test_a_strangers_name_is_shown_safely(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMismatch) as caught:
        read_adapter(named(tmp_path, "x'; rm -rf /\n" * 100), BASE)
    assert len(caught.value.message) < 800
    assert "\n" not in caught.value.message


LLAMA = "meta-llama/Llama-3.2-1B-Instruct"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("unsloth/Llama-3.2-1B-Instruct", LLAMA),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", LLAMA),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", LLAMA),
        ("unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit", LLAMA),
        ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "meta-llama/Llama-3.1-8B"),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
        ("NousResearch/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/mistral-7b-instruct-v0.3-bnb-4bit", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("mlx-community/Llama-3.2-1B-Instruct-4bit", LLAMA),
        ("/models/Llama-3.2-1B-Instruct-bnb-4bit", LLAMA),
        (LLAMA, "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"),
    ],
)
def test_copies_of_a_base(name: str, known: str) -> None:
    assert is_copy(name, ["something else", known])
    assert not is_named(name, [known])


@pytest.mark.parametrize(
    ("name", "known"),
    [
        # Of the same shapes and with the same tokenizer, but other weights.
        ("unsloth/Llama-3.1-8B-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct"),
        ("unsloth/Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Qwen2.5-7B-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct"),
        ("unsloth/Qwen2.5-Coder-7B-bnb-4bit", "Qwen/Qwen2.5-7B"),
        ("unsloth/mistral-7b-v0.3-bnb-4bit", "mistralai/Mistral-7B-v0.1"),
        ("unsloth/Llama-3.2-3B-Instruct", LLAMA),
        ("x/Llama-3.2-1B-Instruct-abliterated-bnb-4bit", LLAMA),
        ("x/Llama-3.2-1B-Instruct-4bit", LLAMA),
        ("unsloth/Llama-3.2-1B-Instruct-4bit", LLAMA),
        ("mlx-community/Llama-3.2-1B-4bit", LLAMA),
        ("unsloth/-bnb-4bit", "-bnb-4bit"),
        ("unsloth/DeepSeek-R1-Distill-Llama-8B", "meta-llama/Llama-3.1-8B"),
        ("/", "/"),
    ],
)
def test_another_base_is_no_copy(name: str, known: str) -> None:
    assert not is_copy(name, [known])


def test_a_bundled_base_is_not_the_model_of_its_short_name(tmp_path: Path) -> None:
    """SmolLM2-135M has the same shapes and tokenizer as SmolLM2-135M-Instruct."""
    names = known_names("smollm2-135m", tmp_path / "smollm2-135m")
    for name in ("HuggingFaceTB/SmolLM2-135M", "unsloth/SmolLM2-135M-bnb-4bit"):
        assert not is_named(name, names)
        assert not is_copy(name, names)
    assert is_named("smollm2-135m", names)
    assert is_named(HUB, names)
    assert is_copy("unsloth/SmolLM2-135M-Instruct-bnb-4bit", names)


def test_a_folder_called_as_a_model_is_not_everybody_s_model(tmp_path: Path) -> None:
    """The name of the folder is known besides the hub name, and says nothing of the owner."""
    folder = tmp_path / "Llama-3.2-1B-Instruct"
    names = known_names("Llama-3.2-1B-Instruct", folder, LLAMA)
    assert not is_named("evil/Llama-3.2-1B-Instruct", names)
    assert is_copy("evil/Llama-3.2-1B-Instruct", names)
    for name in (LLAMA, "Llama-3.2-1B-Instruct", "/models/Llama-3.2-1B-Instruct"):
        assert is_named(name, names)
    # Where no owner is known, or that of another model, there is nothing to compare.
    for alone in (["Llama-3.2-1B-Instruct"], ["Llama-3.2-1B-Instruct", "someone/other"]):
        assert is_named(LLAMA, alone)


def test_whose_names_say_what_was_copied() -> None:
    assert all(map(says_its_origin, ("unsloth/x", "mlx-community/x", "/models/x", "x")))
    assert not says_its_origin("someone/x")
    assert not says_its_origin("someone/unsloth")


TOKENS = replace(BASE, vocabulary="1" * 64)
UNSLOTH, STRANGER = "unsloth/base-bnb-4bit", "stranger/base"


@pytest.mark.parametrize(
    ("name", "claim", "word"),
    [
        ("tiny", NO_CLAIM, "name"),
        ("tiny", BaseClaim(same=True), "name"),
        (None, NO_CLAIM, "none"),
        (UNSLOTH, NO_CLAIM, "rule"),
        (UNSLOTH, BaseClaim(vocabulary="1" * 64), "rule"),
        (STRANGER, BaseClaim(vocabulary="1" * 64), "rule"),
        (STRANGER, BaseClaim(same=True, vocabulary="1" * 64), "rule"),
        (STRANGER, BaseClaim(same=True), "publisher"),
        (UNSLOTH, BaseClaim(same=True, vocabulary="2" * 64), "publisher"),
        ("any/name", BaseClaim(same=True), "publisher"),
    ],
)
def test_whose_word_is_taken(
    name: str | None, claim: BaseClaim, word: str, tmp_path: Path
) -> None:
    manifest = read_adapter(named(tmp_path, name), TOKENS, claim)
    assert manifest.base_word == word
    # Only a base that is called by its own name is taken without saying so.
    assert len(manifest.warnings) == (word != "name")
    if word in ("rule", "publisher"):
        assert str(name) in manifest.warnings[0]


@pytest.mark.parametrize(
    ("name", "claim", "fix"),
    [
        (STRANGER, NO_CLAIM, "tokenizer.json"),
        (STRANGER, BaseClaim(vocabulary="2" * 64), "tokenizer"),
        (UNSLOTH, BaseClaim(vocabulary="2" * 64), "tokenizer"),
        ("unsloth/base-Instruct-bnb-4bit", NO_CLAIM, "same_base"),
        ("unsloth/base-Instruct-bnb-4bit", BaseClaim(vocabulary="1" * 64), "same_base"),
    ],
)
def test_a_name_that_is_not_believed(
    name: str, claim: BaseClaim, fix: str, tmp_path: Path
) -> None:
    with refused(BaseModelMismatch, adapter_base=name) as caught:
        read_adapter(named(tmp_path, name), TOKENS, claim)
    assert fix in caught.value.message
    assert "same_base" in caught.value.message


def test_a_copy_of_other_shapes_is_refused(tmp_path: Path) -> None:
    other = replace(BASE, shapes={**BASE.shapes, "q_proj": (64, 32)})
    with refused(AdapterInvalid):
        read_adapter(named(tmp_path, UNSLOTH), other)
    with refused(AdapterInvalid):
        read_adapter(named(tmp_path, UNSLOTH), other, BaseClaim(same=True))


def test_no_word_counts_against_a_fingerprint(tmp_path: Path) -> None:
    folder = named(tmp_path, UNSLOTH)
    other = asdict(BaseFingerprint("9" * 64, "8" * 64))
    (folder / TRAINING_FILE).write_text(json.dumps({"base_fingerprint": other}))
    with refused(BaseModelMismatch):
        read_adapter(folder, BASE, BaseClaim(same=True))
    own = asdict(BASE.fingerprint)
    (folder / TRAINING_FILE).write_text(json.dumps({"base_fingerprint": own}))
    assert read_adapter(folder, BASE).base_word == "fingerprint"


def test_the_registry_records_whose_word_it_took(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "data", BASE) as registry:
        push(registry, "a", named(tmp_path / "a", UNSLOTH))
        with refused(BaseModelMismatch):
            push(registry, "b", named(tmp_path / "b", "any/name"))
        push(registry, "b", named(tmp_path / "b", "any/name"), claim=BaseClaim(same=True))
    with Registry.open(tmp_path / "data", BASE) as registry:
        found = {name: registry.get(name).manifest.base_word for name in ("a", "b")}
        assert found == {"a": "rule", "b": "publisher"}
        (entry,) = registry.history("b")
        assert "publisher says" in entry.detail


def test_what_a_vocabulary_is() -> None:
    def tokenizer(**more: object) -> bytes:
        model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
        return json.dumps({"model": {**model, **more}, "added_tokens": []}).encode()

    plain = vocabulary_digest(tokenizer())
    assert plain == vocabulary_digest(tokenizer(merges=[["a", "b"]], dropout=None))
    padded = json.loads(tokenizer()) | {"padding": {"pad_id": 3}, "truncation": {}}
    padded["added_tokens"] = [{"id": 3, "content": "<pad>"}]
    assert plain == vocabulary_digest(json.dumps(padded).encode())
    assert plain != vocabulary_digest(tokenizer(vocab={"a": 1, "b": 0, "ab": 2}))
    assert plain != vocabulary_digest(tokenizer(merges=[]))
    for broken in (b"", b"[]", b"{}", b'{"model": 1}', b"[" * 100_000, b"\xff"):
        assert vocabulary_digest(broken) == ""


# --------------------------------------------------- a base that was quantized by others

QUANTIZED = replace(
    BASE,
    name="SmolLM2-135M-Instruct-Q4_K_M",
    names=("SmolLM2-135M-Instruct-Q4_K_M", HUB),
    fingerprint=replace(BASE.fingerprint, weights="7" * 64),
    vocabulary="5" * 64,
    origin=HUB,
)
STRICT = replace(QUANTIZED, require_same_weights=True)


@pytest.mark.parametrize(
    ("name", "files", "origin"),
    [
        ("SmolLM2-135M-Instruct-Q4_K_M", {}, "SmolLM2-135M-Instruct"),
        ("smollm2-135m-instruct.Q8_0", {}, "smollm2-135m-instruct"),
        ("TheBloke/Llama-2-7B-GPTQ", {}, "TheBloke/Llama-2-7B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", {}, "Qwen/Qwen2.5-7B-Instruct"),
        ("RedHatAI/Llama-3.1-8B-quantized.w4a16", {}, "RedHatAI/Llama-3.1-8B"),
        ("a/Model-UD-Q4_K_XL", {}, "a/Model"),
        ("a/Model-Q4", {}, "a/Model-Q4"),
        ("/srv/models/Model-AWQ", {}, "Model"),
        ("x", {"config.json": json.dumps({"_name_or_path": "org/Model-AWQ"})}, "org/Model"),
        ("x", {"README.md": "---\nbase_model: org/Model\n---\n"}, "org/Model"),
        ("x", {"README.md": "---\nbase_model:\n- org/Model\n---\n"}, "org/Model"),
        ("x-AWQ", {"README.md": "base_model: org/Model\n"}, "x"),
        ("x-AWQ", {"config.json": "["}, "x"),
    ],
)
def test_the_origin_of_a_quantized_base_is_what_its_files_declare(
    name: str, files: dict[str, str], origin: str, tmp_path: Path
) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    assert declared_origin(name, tmp_path) == origin


def trained_on(folder: Path, **parts: str) -> Path:
    """An adapter whose training manifest has the original's fingerprint, but for ``parts``."""
    printed = replace(BASE.fingerprint, **parts)
    (folder / TRAINING_FILE).write_text(json.dumps({"base_fingerprint": asdict(printed)}))
    return folder


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("named", [HUB, "smollm2-135m"])
def test_an_adapter_of_the_original_is_accepted_with_a_warning_that_names_both(
    recorded: bool, named: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a", {"base_model_name_or_path": named})
    if recorded:
        trained_on(folder)
    manifest = read_adapter(folder, QUANTIZED)
    assert manifest.base_word == "rule"
    (warning,) = [each for each in manifest.warnings if QUANTIZED.name in each]
    assert HUB in warning
    with refused(BaseModelMismatch, cause="same_weights", origin=HUB, base=STRICT.name):
        read_adapter(folder, STRICT)


def test_an_adapter_of_this_very_base_needs_no_warning(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"base_model_name_or_path": QUANTIZED.name})
    for base in (QUANTIZED, STRICT):
        assert read_adapter(folder, base).base_word == "name"
    trained_on(folder, weights=QUANTIZED.fingerprint.weights)
    for base in (QUANTIZED, STRICT):
        manifest = read_adapter(folder, base)
        assert manifest.base_word == "fingerprint"
        assert not [each for each in manifest.warnings if HUB in each]


def test_an_adapter_of_another_model_is_still_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"base_model_name_or_path": "org/Another"})
    with refused(BaseModelMismatch, adapter_base="org/Another"):
        read_adapter(folder, QUANTIZED)
    trained_on(folder)
    with refused(BaseModelMismatch, adapter_weights=BASE.fingerprint.weights):
        read_adapter(folder, QUANTIZED)


def test_another_tokenizer_is_refused_unless_its_tokens_are_the_base_s(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"base_model_name_or_path": HUB})
    other = BaseClaim(vocabulary="6" * 64)
    with refused(BaseModelMismatch):
        read_adapter(folder, QUANTIZED, other)
    trained_on(folder, tokenizer="8" * 64)
    for claim in (NO_CLAIM, other):
        with refused(BaseModelMismatch, adapter_tokenizer="8" * 64):
            read_adapter(folder, QUANTIZED, claim)
    same = BaseClaim(vocabulary=QUANTIZED.vocabulary)
    assert read_adapter(folder, QUANTIZED, same).base_word == "rule"
