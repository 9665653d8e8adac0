from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer_registry.errors import InvalidField
from veneer_train.batches import collate
from veneer_train.config import DataConfig
from veneer_train.data import IGNORE, PAD, TrainingSample, load_split

from tests.refused import refused

Jsonl = Callable[..., Path]


def chat(ask: str, say: str) -> dict[str, list[dict[str, str]]]:
    return {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    }


def load(path: Path, tokenizer: Any, **settings: Any) -> tuple[TrainingSample, ...]:
    config = DataConfig(train=str(path), val_fraction=0.0, **settings)
    return load_split(config, tokenizer, tokenizer.chat_template, 0).train.samples


def learned_text(sample: TrainingSample, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in sample.labels if label != IGNORE]))


def test_only_what_the_assistant_says_is_learned(jsonl: Jsonl, tokenizer: Any) -> None:
    rows = [
        chat("Hi", "Ho"),
        {"messages": [*chat("a", "é😀")["messages"], *chat("<|im_end|>", "\n b")["messages"]]},
    ]
    first, second = load(jsonl(*rows), tokenizer)
    for sample, row in zip((first, second), rows, strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(list(sample.input_ids)) == text
        assert all(
            label in (IGNORE, token)
            for label, token in zip(sample.labels, sample.input_ids, strict=True)
        )
    assert learned_text(first, tokenizer) == "Ho<|im_end|>"
    assert learned_text(second, tokenizer) == "é😀<|im_end|>\n b<|im_end|>"
    # The first learned token is predicted from "<|im_start|>assistant\n", all of it masked.
    start = next(i for i, label in enumerate(first.labels) if label != IGNORE)
    assert tokenizer.decode(list(first.input_ids[:start])).endswith("<|im_start|>assistant\n")
    assert [second.line, first.line] == [2, 1]


def test_loss_on_all_learns_every_token(jsonl: Jsonl, tokenizer: Any) -> None:
    (sample,) = load(jsonl(chat("Hi", "Ho")), tokenizer, loss_on="all")
    assert sample.labels == sample.input_ids


def test_prompt_and_completion_are_taken_as_they_stand(jsonl: Jsonl, tokenizer: Any) -> None:
    (sample,) = load(jsonl({"prompt": "2+2=", "completion": "4"}), tokenizer)
    assert tokenizer.decode(list(sample.input_ids)) == "2+2=4<|im_end|>"
    assert learned_text(sample, tokenizer) == "4<|im_end|>"
    assert sample.learned == 2


def test_padding_is_token_0_masked_by_length_and_the_end_is_learned(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    long, short = (
        TrainingSample((5, 6, 7, eos), (IGNORE, 6, 7, eos), 1),
        TrainingSample((5, eos), (5, eos), 2),
    )
    batch = collate([long, short])
    assert PAD == 0 != eos
    assert batch["input_ids"].tolist() == [[5, 6, 7, eos], [5, eos, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORE, 6, 7, eos],
        [5, eos, IGNORE, IGNORE],
    ]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


GOOD = chat("Hi", "Ho")


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ("{not json", "not_json"),
        ("[1]", "not_object"),
        ({"text": "x"}, "keys"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "message_keys"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"prompt": "x", "completion": None}, "text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "all_masked"),
        (chat("Hi", "x" * 200), "too_long"),
        (chat("Hi", "\ud83d"), "surrogate"),
        ({"prompt": "\udc00", "completion": "x"}, "surrogate"),
        ({"\ud83d": 1, **chat("Hi", "Ho")}, "surrogate"),
        (chat("Hi", ""), "answer_empty"),
        (chat("Hi", " \n\t "), "answer_empty"),
        ({"messages": chat("a", "")["messages"] + chat("b", "c")["messages"]}, "answer_empty"),
        ({"prompt": "x", "completion": ""}, "completion_empty"),
        ({"prompt": "x", "completion": " "}, "completion_empty"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content"),
        ({"prompt": 1, "completion": "x"}, "text"),
        ('{"prompt": "x", "completion": "y", "prompt": "z"}', "not_json"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', "not_json"),
        ('{"prompt": NaN, "completion": "y"}', "not_json"),
        ('{"prompt": "a\0b", "completion": "y"}', "not_json"),
        ("\0\0\0\0", "not_json"),
        ("[" * 100_000, "nested"),
        ('{"prompt": "x", "n": ' + "9" * 5000 + "}", "not_json"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_a_bad_line_is_named(jsonl: Jsonl, tokenizer: Any, bad: object, cause: str) -> None:
    # A blank line counts as a line and is otherwise ignored.
    path = jsonl(GOOD, "", bad, GOOD, name="chats.jsonl")
    with refused(InvalidField, file="chats.jsonl", line=3, cause=cause) as caught:
        load(path, tokenizer, max_len=128)
    assert caught.value.message.startswith("chats.jsonl, line 3: ")
    assert len(caught.value.message) < 500, "a line may be long"
    caught.value.message.encode("utf-8")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_nothing_is_learned_from_an_empty_answer(
    loss_on: str, jsonl: Jsonl, tokenizer: Any
) -> None:
    with refused(InvalidField, cause="answer_empty", message=2):
        load(jsonl(chat("Hi", "")), tokenizer, loss_on=loss_on)


def test_empty_questions_and_system_messages_are_fine(jsonl: Jsonl, tokenizer: Any) -> None:
    turns = [{"role": "system", "content": ""}, *chat("", "Ho")["messages"]]
    (sample, other) = load(
        jsonl({"messages": turns}, {"prompt": "", "completion": "Ho"}), tokenizer
    )
    assert learned_text(sample, tokenizer) == "Ho<|im_end|>"
    assert learned_text(other, tokenizer).startswith("Ho")


def test_files_of_other_editors(tmp_path: Path, tokenizer: Any) -> None:
    """A byte order mark, Windows' line ends, no line end at the end, whole surrogate pairs."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(chat("Hi", answer)) for answer in ("one", "\U0001f600")]
    assert "\\ud83d\\ude00" in lines[1]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    first, second = load(path, tokenizer)
    assert learned_text(first, tokenizer) == "one<|im_end|>"
    assert learned_text(second, tokenizer) == "\U0001f600<|im_end|>"


def test_another_encoding_is_named_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(chat("Hi", "Ho")) + "\n"
    path.write_bytes(good.encode() + json.dumps(chat("Hi", "\xe9")).encode()[:-20] + b"\xe9\n")
    with refused(InvalidField, line=2, cause="not_utf8"):
        load(path, tokenizer)
    path.write_bytes(good.encode("utf-16"))
    with refused(InvalidField, line=1, cause="not_utf8"):
        load(path, tokenizer)


def test_labels_truncated_away_are_an_error_with_the_line(jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl(GOOD, chat("x" * 200, "Ho"))
    with refused(InvalidField, line=2, cause="all_truncated"):
        load(path, tokenizer, max_len=128, on_truncated="truncate")


def test_long_samples_can_be_dropped_or_cut_and_are_counted(
    jsonl: Jsonl, tokenizer: Any
) -> None:
    path = jsonl(GOOD, chat("Hi", "x" * 200))
    for policy, kept, counts in (("drop", 1, (1, 0)), ("truncate", 2, (0, 1))):
        config = DataConfig(train=str(path), val_fraction=0, max_len=128, on_truncated=policy)  # type: ignore[arg-type]
        data = load_split(config, tokenizer, tokenizer.chat_template, 0).train
        assert (len(data.samples), (data.dropped, data.truncated)) == (kept, counts)
        assert max(len(sample.input_ids) for sample in data.samples) <= 128
    with refused(InvalidField, cause="no_sample", dropped=2):
        load(path, tokenizer, max_len=8, on_truncated="drop")


def test_format_can_be_required(jsonl: Jsonl, tokenizer: Any) -> None:
    with refused(InvalidField, line=1, cause="keys"):
        load(jsonl(GOOD), tokenizer, format="prompt")
    with refused(InvalidField, line=1, cause="keys"):
        load(jsonl({"prompt": "a", "completion": "b"}), tokenizer, format="messages")


def test_split_is_a_seeded_partition(chats: Path, tokenizer: Any) -> None:
    def split(seed: int) -> tuple[list[int], list[int]]:
        config = DataConfig(train=str(chats), val_fraction=0.25)
        parts = load_split(config, tokenizer, tokenizer.chat_template, seed)
        assert parts.val is not None
        assert parts.train.sha256 == hashlib.sha256(chats.read_bytes()).hexdigest()
        return [s.line for s in parts.train.samples], [s.line for s in parts.val.samples]

    train, val = split(1)
    assert len(val) == 3
    assert sorted(train + val) == list(range(1, 13))
    assert split(1) == (train, val)
    assert split(2) != (train, val)


def test_a_val_file_is_used_whole(chats: Path, jsonl: Jsonl, tokenizer: Any) -> None:
    val = jsonl(GOOD, name="val.jsonl")
    config = DataConfig(train=str(chats), val=str(val))
    parts = load_split(config, tokenizer, tokenizer.chat_template, 0)
    assert parts.val is not None
    assert (len(parts.train.samples), len(parts.val.samples)) == (12, 1)
    assert parts.val.file == "val.jsonl"


def test_too_few_samples_to_hold_one_out(jsonl: Jsonl, tokenizer: Any) -> None:
    config = DataConfig(train=str(jsonl(GOOD)))
    with refused(InvalidField, cause="too_few"):
        load_split(config, tokenizer, tokenizer.chat_template, 0)


def test_a_missing_file_and_bad_bytes_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with refused(InvalidField, file="none.jsonl", cause="unreadable"):
        load(tmp_path / "none.jsonl", tokenizer)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}\n')
    with refused(InvalidField, line=2, cause="not_utf8"):
        load(path, tokenizer)


def test_a_base_without_a_template_says_so(chats: Path, tokenizer: Any) -> None:
    config = DataConfig(train=str(chats), val_fraction=0)
    with refused(InvalidField, line=1, cause="no_template"):
        load_split(config, tokenizer, "", 0)
