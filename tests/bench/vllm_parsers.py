"""Record how vLLM's tool-call parsers parse the answers in `tool_outputs`.

    pip download --no-deps vllm==0.33.0
    python3 -m venv /tmp/parsers
    /tmp/parsers/bin/pip install openai ijson mistral_common partial_json_parser transformers
    /tmp/parsers/bin/python -m tests.bench.vllm_parsers vllm-0.33.0-*.whl

It writes `tests/unit/server/text/vllm_tool_calls.json`. The parsers are the wheel's own
modules; their imports from the rest of vLLM are replaced by stand-ins, so that neither torch
nor a GPU is needed. Each answer goes to the parser for whole answers, and to the parser for
streams, cut into tokens in `CUTS` ways.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import random
import re
import sys
import types
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from pydantic import BaseModel

from tests.unit.server.text.tool_outputs import FAMILIES, answers

CUTS: Final = 7
TARGET: Final = Path(__file__).parents[1] / "unit/server/text/vllm_tool_calls.json"
_MARKERS: Final = ("<|python_tag|>", "[TOOL_CALLS]", "<tool_call>", "</tool_call>")
_REAL: Final = re.compile(
    r"vllm\.(tool_parsers\.(utils|hermes_tool_parser|llama_tool_parser)"
    r"|parser\.mistral|parser\.engine\.(?!registered_adapters)\w+)"
)
"""Modules that are taken from the wheel."""
_PARSERS: Final = {
    "hermes": ("vllm.tool_parsers.hermes_tool_parser", "Hermes2ProToolParser"),
    "llama3_json": ("vllm.tool_parsers.llama_tool_parser", "Llama3JsonToolParser"),
    "mistral": ("vllm.parser.mistral", "MistralParser"),
    "mistral v11": ("vllm.parser.mistral", "MistralParser"),
}


# ------------------------------------------------------------ stand-ins for the rest of vLLM


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str = "id"
    type: str = "function"
    function: FunctionCall


class DeltaFunctionCall(BaseModel):
    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(BaseModel):
    id: str | None = None
    type: str | None = None
    index: int
    function: DeltaFunctionCall | None = None


class DeltaMessage(BaseModel):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[DeltaToolCall] = []


class ExtractedToolCallInformation(BaseModel):
    tools_called: bool
    tool_calls: list[ToolCall]
    content: str | None = None


class Parser:
    """Stand-in for the base class of both kinds of parsers."""

    reasoning_parser_cls = tool_parser_cls = None

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        self.model_tokenizer = tokenizer
        self.prev_tool_call_arr: list[Any] = []
        self.current_tool_id = -1
        self.current_tool_name_sent = False
        self.streamed_args_for_tool: list[str] = []

    @property
    def vocab(self) -> dict[str, int]:
        return dict(self.model_tokenizer.get_vocab())


class StreamState:
    """Stand-in for a parser's state of a stream."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)
        self.history_tool_call_cnt = 0


_STAND_INS: Final[dict[str, Any]] = {
    **{
        each.__name__: each
        for each in (FunctionCall, ToolCall, DeltaFunctionCall, DeltaToolCall, DeltaMessage)
    },
    "ExtractedToolCallInformation": ExtractedToolCallInformation,
    "Parser": Parser,
    "ToolParser": Parser,
    "StreamState": StreamState,
    "init_logger": logging.getLogger,
    "make_tool_call_id": lambda *_, **__: "id",
    "get_tool_call_id_type": lambda *_: "random",
    "is_mistral_tokenizer": lambda tokenizer: tokenizer.v11,
    "VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS": 5,
}


class _StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _STAND_INS.get(name) or type(name, (BaseModel,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, source: Path) -> None:
        self._source = source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != "vllm":
            return None
        if _REAL.fullmatch(name):
            file = str(self._source / f"{name.replace('.', '/')}.py")
            loader = importlib.machinery.SourceFileLoader(name, file)
            return importlib.machinery.ModuleSpec(name, loader, origin=file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@dataclass(frozen=True)
class Request:
    """Stand-in for a chat request whose model may choose a tool."""

    tool_choice: str = "auto"
    tools: tuple[int, ...] = (1,)
    include_reasoning: bool = False

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Tokenizer:
    """Stand-in tokenizer: markers are tokens, and any other piece becomes a token at its first
    use."""

    supports_grammar = False

    def __init__(self, v11: bool) -> None:
        self.v11 = v11
        self.version = 13 if v11 else 3
        self.tokenizer = self
        self._texts = [*_MARKERS, *(["[ARGS]"] if v11 else [])]
        self._vocab = {text: id_ for id_, text in enumerate(self._texts)}
        self.all_special_tokens = list(self._texts)
        self.all_special_ids = list(self._vocab.values())

    def get_vocab(self) -> dict[str, int]:
        return self._vocab

    def id_of(self, text: str) -> int:
        if text in self._vocab:
            return self._vocab[text]
        self._texts.append(text)
        return len(self._texts) - 1

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.id_of(text)]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self._texts[id_] for id_ in ids)


# ------------------------------------------------------------------------------ recording

Calls = list[list[str | None]]


def _whole(parser: Any, text: str) -> dict[str, Any]:
    extract = getattr(parser, "extract_tool_calls_from_content", None)
    try:
        found = (extract or parser.extract_tool_calls)(text, Request())
    except Exception as error:
        return {"error": type(error).__name__}
    calls = [[call.function.name, call.function.arguments] for call in found.tool_calls]
    return {"content": found.content or "", "calls": calls}


def _pieces(text: str, random_: random.Random) -> list[str]:
    """Split into tokens of one to four characters; a marker is one token."""
    found = []
    for part in re.split(f"({'|'.join(map(re.escape, _MARKERS))})", text):
        while part:
            end = len(part) if part in _MARKERS else random_.randrange(1, 5)
            found.append(part[:end])
            part = part[end:]
    return found


def _streamed(parser: Any, tokenizer: Tokenizer, pieces: Sequence[str]) -> Calls:
    calls: Calls = []

    def take(delta: DeltaMessage | None) -> None:
        for call in delta.tool_calls if delta else ():
            while call.index >= len(calls):
                calls.append([None, ""])
            if call.function is not None:
                calls[call.index][0] = call.function.name or calls[call.index][0]
                calls[call.index][1] = f"{calls[call.index][1]}{call.function.arguments or ''}"

    if hasattr(parser, "initialize_streaming"):
        config = importlib.import_module("vllm.parser.engine.parser_engine_config")
        parser.initialize_streaming(initial_state=config.ParserState.CONTENT)
    text, ids = "", list[int]()
    for piece in pieces:
        id_ = tokenizer.id_of(piece)
        before, text, ids = text, text + piece, [*ids, id_]
        take(
            parser.extract_tool_calls_streaming(
                before, text, piece, ids[:-1], ids, [id_], Request()
            )
        )
    if hasattr(parser, "finish_streaming"):
        take(parser.finish_streaming())
    return calls


def _row(family: str, kind: str, text: str) -> dict[str, Any]:
    module, name = _PARSERS[family]
    tokenizer = Tokenizer(v11=family == "mistral v11")

    def parser() -> Any:
        return getattr(importlib.import_module(module), name)(tokenizer)

    streams: list[Calls] = []
    for cut in range(CUTS):
        pieces = _pieces(text, random.Random(cut))
        if (calls := _streamed(parser(), tokenizer, pieces)) not in streams:
            streams.append(calls)
    return {"kind": kind, "text": text, **_whole(parser(), text), "streams": streams}


def main() -> None:
    logging.disable(logging.CRITICAL)
    with TemporaryDirectory() as unpacked, zipfile.ZipFile(sys.argv[1]) as wheel:
        wheel.extractall(
            unpacked,
            [
                each
                for each in wheel.namelist()
                if each.startswith(("vllm/parser/", "vllm/tool_"))
            ],
        )
        sys.meta_path.insert(0, _Finder(Path(unpacked)))
        found = {
            family: [_row(family, kind, text) for kind, text in answers(family)]
            for family in FAMILIES
        }
    lines = [
        f"{json.dumps(family)}: [\n"
        + ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        + "\n]"
        for family, rows in found.items()
    ]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
