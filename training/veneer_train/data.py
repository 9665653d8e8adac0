"""Turns JSONL into tokens and labels, with errors that name the file and the line.

A line has one of two forms: ``{"messages": [{"role", "content"}, ...]}``, rendered with the
chat template, or ``{"prompt": text, "completion": text}``, tokenised verbatim and ended with
the end-of-sequence token. Either may have a ``check``, which says how to score an answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn

from veneer_registry.errors import InvalidField, TemplateFailed
from veneer_registry.strict_json import show

from veneer_train.checks import validate
from veneer_train.config import DataConfig
from veneer_train.template import render, render_prompt, with_generation_marks

IGNORE: Final = -100
"""The label that the loss ignores."""

PAD: Final = 0
"""Padding, which is masked by length. Never the end-of-sequence token: a model that learns to
ignore that token never stops."""

_SHOWN: Final = 120
"""Most characters of a line that an error quotes."""

_ROLES: Final = frozenset({"system", "user", "assistant"})


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt for a model, and how to score its answer.

    Attributes:
        prompt_ids: tokens up to the start of the answer.
        expected: the sample's own answer.
        check: see `veneer_train.checks`.
    """

    prompt_ids: tuple[int, ...]
    expected: str
    check: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One tokenised line. ``labels[i]`` is ``input_ids[i]`` or `IGNORE`."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    line: int
    task: Task | None = None

    @property
    def learned(self) -> int:
        """Number of tokens that count in the loss. The first token is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class DataSet:
    """The samples of one file, or of a part of it.

    Attributes:
        file: base name only: a manifest must not reveal where data is stored.
        sha256: digest of the whole file's bytes.
        dropped: lines left out because they are longer than ``max_len``.
        truncated: lines cut to ``max_len``.
    """

    samples: tuple[TrainingSample, ...]
    file: str
    sha256: str
    dropped: int = 0
    truncated: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def learned(self) -> int:
        return sum(sample.learned for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Split:
    """Samples that a run trains on, and those it is measured on (None: not measured)."""

    train: DataSet
    val: DataSet | None


def _fail(path: Path, line: int, message: str, cause: str, /, **metadata: str) -> NoReturn:
    raise InvalidField(
        f"{path.name}, line {line}: {message}",
        metadata={"file": path.name, "line": str(line), "cause": cause, **metadata},
    )


def _lines(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line. Accepts Windows line endings and a byte order mark."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        _fail(
            path,
            raw[: error.start].count(b"\n") + 1,
            "is not UTF-8; save it as UTF-8",
            "not_utf8",
        )
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _object(path, number, line)
        if not isinstance(value, dict):
            wanted = "must be an object with 'messages', or 'prompt' and 'completion'"
            _fail(path, number, wanted, "not_object")
        yield number, value


def _object(path: Path, number: int, line: str) -> Any:
    try:
        value = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_number)
        if "\\u" in line:  # only an escape can write what UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        _fail(path, number, f"is not JSON ({error.msg}, column {error.colno})", "not_json")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        _fail(
            path,
            number,
            f"contains half of a surrogate pair (\\u{half:04x}), which is not text: write the "
            "whole character, or remove it",
            "surrogate",
        )
    except RecursionError:
        _fail(path, number, "is nested too deeply", "nested")
    except ValueError as error:  # from the two hooks, and for numbers with thousands of digits
        _fail(path, number, f"is not JSON ({show(str(error))})", "not_json")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice: keep one")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _messages(path: Path, line: int, value: dict[str, Any]) -> list[dict[str, str]]:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        _fail(path, line, "'messages' must be a non-empty list of {role, content}", "messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            _fail(
                path,
                line,
                f"a message must have only 'role' and 'content'; got {show(message)}",
                "message_keys",
            )
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in _ROLES:
            _fail(
                path,
                line,
                f"role {show(role)} is not one of {', '.join(sorted(_ROLES))}",
                "role",
            )
        if not isinstance(content, str):
            _fail(path, line, f"'content' must be text; got {show(content)}", "content")
        if role == "assistant" and not content.strip():
            _fail(
                path,
                line,
                f"message {number} (the assistant's) is empty, which would teach the model to "
                "answer nothing: write an answer, or remove the line",
                "answer_empty",
                message=str(number),
            )
    return messages


def _check(path: Path, line: int, value: object, expected: str) -> Mapping[str, Any]:
    try:
        return validate(value, expected)
    except InvalidField as error:
        _fail(path, line, error.message, "check")


class _Tokenise:
    """Turns one line's value into (token ids, labels, task)."""

    def __init__(self, tokenizer: Any, config: DataConfig, template: str) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._template = template

    def __call__(
        self, path: Path, line: int, value: dict[str, Any]
    ) -> tuple[list[int], list[int], Task | None]:
        kind = self._config.format
        if kind != "prompt" and "messages" in value:
            messages = _messages(path, line, value)
            return *self._chat(path, line, messages), self._chat_task(path, line, value)
        if kind != "messages" and {"prompt", "completion"} <= set(value):
            prompt, told = value["prompt"], value["completion"]
            coded = self._raw(path, line, prompt, told)
            task = None
            if "check" in value:
                asked = tuple(self._tokenizer(prompt)["input_ids"])
                task = Task(asked, told, _check(path, line, value["check"], told))
            return *coded, task
        wanted = {
            "auto": "'messages', or 'prompt' and 'completion'",
            "messages": "'messages'",
            "prompt": "'prompt' and 'completion'",
        }[kind]
        told = ", ".join(sorted(value))[:_SHOWN]
        _fail(path, line, f"has no {wanted}; it has {told or 'nothing'}", "keys")

    def _chat_task(self, path: Path, line: int, value: dict[str, Any]) -> Task | None:
        if "check" not in value:
            return None
        *asked, last = value["messages"]
        if last["role"] != "assistant" or not asked:
            _fail(
                path, line, "a line with 'check' must end with the assistant's answer", "check"
            )
        check = _check(path, line, value["check"], last["content"])
        text = render_prompt(self._template, asked, self._tokenizer.special_tokens_map)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return Task(tuple(ids), last["content"], check)

    def _chat(
        self, path: Path, line: int, messages: list[dict[str, str]]
    ) -> tuple[list[int], list[int]]:
        everything = self._config.loss_on == "all"
        if not self._template:
            _fail(
                path,
                line,
                "this base has no chat template; give one as data.template",
                "no_template",
            )
        marked = self._template if everything else with_generation_marks(self._template)
        try:
            rendered = render(
                self._template, marked, messages, self._tokenizer.special_tokens_map
            )
        except TemplateFailed as error:
            _fail(path, line, error.message, "template")
        coded = self._tokenizer(
            rendered.text, add_special_tokens=False, return_offsets_mapping=True
        )
        ids: list[int] = coded["input_ids"]
        if everything:
            return ids, list(ids)
        spans = rendered.spans
        # A token that straddles a boundary is not wholly the assistant's: do not learn it.
        labels = [
            token if any(a <= start and end <= b and start < end for a, b in spans) else IGNORE
            for token, (start, end) in zip(ids, coded["offset_mapping"], strict=True)
        ]
        return ids, labels

    def _raw(
        self, path: Path, line: int, prompt: object, completion: object
    ) -> tuple[list[int], list[int]]:
        if not isinstance(prompt, str) or not isinstance(completion, str):
            wanted = "'prompt' and 'completion' must be text; use 'messages' for chats"
            _fail(path, line, wanted, "text")
        if not completion.strip():
            _fail(
                path,
                line,
                "the completion is empty, which would teach the model to answer nothing: write "
                "one, or remove the line",
                "completion_empty",
            )
        # Tokenised separately, as in serving: no token spans prompt and completion.
        asked: list[int] = self._tokenizer(prompt)["input_ids"]
        told: list[int] = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        told = [*told, self._tokenizer.eos_token_id]
        masked = asked if self._config.loss_on == "all" else [IGNORE] * len(asked)
        return asked + told, masked + told


def _load(
    path: Path,
    config: DataConfig,
    tokenise: Callable[[Path, int, dict[str, Any]], tuple[list[int], list[int], Task | None]],
) -> DataSet:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidField(
            f"cannot read the data file {path}: {error.strerror}; "
            "'veneer-train data chat --out DIR' builds an example",
            metadata={"file": path.name, "cause": "unreadable"},
        ) from error
    samples: list[TrainingSample] = []
    dropped = truncated = 0
    for line, value in _lines(path, raw):
        ids, labels, task = tokenise(path, line, value)
        whole = len(ids)
        if whole > config.max_len:
            if config.on_truncated == "drop":
                dropped += 1
                continue
            if config.on_truncated == "error":
                _fail(
                    path,
                    line,
                    f"has {whole} tokens, data.max_len is {config.max_len}: raise it, shorten "
                    "the sample, or set data.on_truncated to drop or truncate",
                    "too_long",
                )
            ids, labels = ids[: config.max_len], labels[: config.max_len]
            truncated += 1
        sample = TrainingSample(tuple(ids), tuple(labels), line, task)
        if not sample.learned:
            cut = whole > config.max_len
            _fail(
                path,
                line,
                f"nothing to learn, all labels are {'truncated away' if cut else 'masked'}: it "
                "needs a non-empty assistant message (or completion) within data.max_len",
                "all_truncated" if cut else "all_masked",
            )
        samples.append(sample)
    if not samples:
        raise InvalidField(
            f"{path.name} has no samples (dropped as too long: {dropped})",
            metadata={"file": path.name, "cause": "no_sample", "dropped": str(dropped)},
        )
    return DataSet(tuple(samples), path.name, sha256(raw).hexdigest(), dropped, truncated)


def load_file(path: Path, config: DataConfig, tokenizer: Any, template: str) -> DataSet:
    """Read and tokenise one file; see `load_split`."""
    return _load(path, config, _Tokenise(tokenizer, config, template))


def load_split(config: DataConfig, tokenizer: Any, template: str, seed: int) -> Split:
    """Read, tokenise and split the data.

    Args:
        config: which files to read, and how.
        tokenizer: a fast transformers tokenizer of the base.
        template: the chat template that the adapter will be served with; "" if none.
        seed: selects the held-out samples if there is no file for them.

    Raises:
        InvalidField: a line that is malformed, too long or has nothing to learn
            (metadata ``file`` and ``line``).
        TemplateFailed: the template cannot mark what the assistant wrote.
    """
    tokenise = _Tokenise(tokenizer, config, template)
    whole = _load(Path(config.train), config, tokenise)
    if config.val is not None:
        return Split(whole, _load(Path(config.val), config, tokenise))
    if config.val_fraction == 0:
        return Split(whole, None)
    count = max(1, round(len(whole.samples) * config.val_fraction))
    if count >= len(whole.samples):
        raise InvalidField(
            f"{whole.file} has {len(whole.samples)} samples, too few to hold out {count}: add "
            "some, name a data.val file, or set data.val_fraction: 0",
            metadata={"file": whole.file, "cause": "too_few"},
        )
    order = list(whole.samples)
    random.Random(seed).shuffle(order)  # nosec B311 # not for secrets

    def part(samples: Sequence[TrainingSample]) -> DataSet:
        return DataSet(tuple(samples), whole.file, whole.sha256, whole.dropped, whole.truncated)

    return Split(part(order[count:]), part(order[:count]))
