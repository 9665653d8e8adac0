"""Ollama's API, for programs made for it: chats, prompts, and lists of models.

Streams are lines of JSON, and errors are ``{"error": message}``; see `openai.errors`. Nothing
here changes models: Ollama's paths for that are among those not served in `openai.routes`.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field, field_validator
from starlette.routing import Route
from veneer_registry.errors import AdapterNotFound
from veneer_registry.records import AdapterRecord

from veneer_server import __version__
from veneer_server.access.caller import Caller
from veneer_server.openai.choices import SCORES_AT_ONCE, Answer, Json, Piece, Tally, scores_of
from veneer_server.openai.core import ServingCore
from veneer_server.openai.extensions import Fields, is_neutral
from veneer_server.openai.fields import (
    IGNORED,
    RequestFields,
    parse_fields,
    with_fractions,
)
from veneer_server.openai.generate import GenerateEndpoint, GenerateJob
from veneer_server.openai.http.asgi import LINES, Reply, caller_of
from veneer_server.openai.http.body import Many
from veneer_server.openai.json_endpoint import Answering, JsonEndpoint, LongAnswer, in_pieces
from veneer_server.openai.models import (
    ListForm,
    all_models,
    base_model,
    named_model,
    rfc3339,
)
from veneer_server.openai.requests import (
    ANY_OBJECT,
    CHAT_SCORES,
    adapter_named,
    constrained,
    json_constraint,
    sampling_of,
    stops_of,
)
from veneer_server.openai.tools import ROLES, Form, past_call, use_of
from veneer_server.serving.answer_room import AnswerForm
from veneer_server.serving.checks import MAX_MESSAGES, invalid
from veneer_server.serving.generation import Generation
from veneer_server.serving.records import ChatMessages, GenerateCall, PromptText
from veneer_server.serving.tenants import Tenant
from veneer_server.serving.tool_history import History, check_calls, read_json
from veneer_server.serving.tool_use import ToolUse
from veneer_server.text.replies import (
    Content,
    Reasoning,
    ToolArguments,
    ToolCallBegun,
    joined,
)
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.text.turns import TemplateOptions
from veneer_server.wire.messages import Constraint

VERSION: Final = "0.32.0"
"""The version of Ollama whose API this follows. Clients compare it: VS Code's Copilot wants at
least 0.6.4."""

NEVER: Final = "2300-01-01T00:00:00Z"
"""The reported time at which a model leaves memory: models do not expire."""

NO_EFFECT: Final = frozenset(
    {
        "draft_num_predict",
        "embedding_only",
        "f16_kv",
        "logits_all",
        "low_vram",
        "main_gpu",
        "mirostat_eta",
        "mirostat_tau",
        "num_batch",
        "num_ctx",
        "num_gpu",
        "num_keep",
        "num_thread",
        "numa",
        "use_mlock",
        "use_mmap",
        "vocab_only",
    }
)
"""Options about how Ollama computes, which do not affect the text of an answer here."""

OTHER_NAMES: Final = {"repeat_penalty": "repetition_penalty"}
"""Ollama's names of options, and ours where they differ."""

REFUSED: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "mirostat": ((0,), "use top_p"),
    "penalize_newline": ((True,), "repeat_penalty is for all tokens"),
    "repeat_last_n": ((-1,), "repeat_penalty is for all tokens of prompt and answer"),
    "tfs_z": ((1, 1.0), "use top_p"),
    "typical_p": ((1, 1.0), "use top_p"),
}
"""Options that would change the answer: the values that have no effect, and the alternative."""

_UINT32: Final = (1 << 32) - 1
_Stop = Annotated[list[str], Field(fail_fast=True)]
_Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
_Model = Annotated[str, Field(min_length=1, max_length=512)]

_NANO: Final = 1_000_000_000


# --------------------------------------------------------------------------- requests


@with_fractions
class Options(RequestFields):
    """``options``: the sampling options, with our names for the fractions.

    Attributes:
        num_predict: most tokens of the answer; below 1: as many as the context has left.
        seed: -1: a different one for each request.
    """

    top_k: Annotated[int, Field(ge=-1, le=_UINT32)] | None = None
    seed: Annotated[int, Field(ge=-1, le=(1 << 64) - 1)] | None = None
    num_predict: Annotated[int, Field(ge=-2, le=_UINT32)] | None = None
    stop: str | _Stop = Field(default_factory=list)


class OllamaMessage(Fields):
    """A message of a chat. Attributes: tool_name: the tool whose result the message is."""

    role: str
    content: str = ""
    thinking: str = ""
    tool_calls: _Objects = Field(default_factory=list)
    tool_name: Annotated[str, Field(max_length=256)] = ""
    tool_call_id: Annotated[str, Field(max_length=256)] = ""


class OllamaFields(RequestFields):
    """Fields of both ``/api/chat`` and ``/api/generate``.

    Attributes:
        format: ``json``, or a schema that the answer must match.
        keep_alive: no effect: adapters leave memory when others need it.
        truncate, shift: only false is supported.
    """

    model: _Model
    stream: bool = True
    format: str | dict[str, Any] = ""
    options: Options = Options()
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: Any = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_UINT32)] = 0
    truncate: bool = False
    shift: bool = False

    @field_validator("options", mode="before")
    @classmethod
    def _served(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        kept = {}
        for called, value in given.items():
            if value is None or called in NO_EFFECT:
                continue
            name = OTHER_NAMES.get(str(called), str(called))
            if name not in Options.model_fields:
                neutral, instead = REFUSED.get(name, ((), ""))
                if instead and value in neutral:
                    continue
                raise ValueError(f"{name[:60]} is not supported: {instead or _near(name)}")
            kept[name] = value
        return kept


class OllamaChatFields(OllamaFields):
    """``POST /api/chat``. Without messages, nothing is generated."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True, max_length=MAX_MESSAGES)] = (
        Field(default_factory=list)
    )
    tools: _Objects = Field(default_factory=list)


class OllamaGenerateFields(OllamaFields):
    """``POST /api/generate``. Without a prompt, nothing is generated.

    Attributes:
        raw: whether to tokenize the prompt as it is, instead of making it a user's message.
    """

    prompt: str = ""
    system: str = ""
    raw: bool = False


class ShowFields(RequestFields):
    """``POST /api/show``. Attributes: name: the older name of ``model``."""

    model: _Model | None = None
    name: _Model | None = None
    verbose: bool = False


_REFUSED_FIELDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(IGNORED, "leave it out"),
    **dict.fromkeys(
        ("max_completion_tokens", "max_new_tokens", "max_tokens", "n_predict"),
        "send options.num_predict",
    ),
    **dict.fromkeys(("reasoning", "reasoning_effort"), "send think"),
    **dict.fromkeys(("guided_json", "json_schema", "response_format"), "send format"),
    "context": "send the conversation to /api/chat",
    "images": "only text is served",
    "suffix": "put it into the prompt",
    "template": "publish the template with the adapter",
}

FieldsT = TypeVar("FieldsT", bound=OllamaFields)


def _check_names(body: object) -> None:
    """Raise InvalidField for fields of other APIs, and for Ollama's that are not supported."""
    if isinstance(body, dict):
        for name, instead in _REFUSED_FIELDS.items():
            if not is_neutral(body.get(name)):
                raise invalid(name, f"is not supported: {instead}")


def _parse(kind: type[FieldsT], body: object, core: ServingCore) -> FieldsT:
    _check_names(body)
    if isinstance(body, dict):
        for name, value in body.items():
            if value is not None and OTHER_NAMES.get(name, name) in Options.model_fields:
                raise invalid(name, "is one of the options: send it in options")
    fields = parse_fields(kind, body)
    for name in ("truncate", "shift"):
        if getattr(fields, name):
            raise invalid(name, "must be false: what does not fit is refused, not cut")
    _check_tag(fields.model, core.base.name)
    return fields


def _check_tag(model: str, base: str) -> None:
    """Raise AdapterNotFound for a name with an Ollama tag, such as ``llama3:8b``: such a name
    is valid for Ollama, but no model has it."""
    if ":" in adapter_named(model, base):
        shown = model if len(model) <= 80 else f"{model[:80]}..."
        raise AdapterNotFound(
            f"there is no model {shown!r}, and no tag but latest: see `ListAdapters` for what "
            "there is"
        )


def _near(name: str) -> str:
    known = (*Options.model_fields, *OTHER_NAMES, *NO_EFFECT)
    near = difflib.get_close_matches(name, known, n=1) if len(name) <= 60 else []
    return f"did you mean {near[0]!r}?" if near else "leave it out"


# ------------------------------------------------------------------------------ calls


def _call(
    fields: OllamaFields,
    input_: ChatMessages | PromptText,
    base: str,
    use: ToolUse | None = None,
) -> GenerateCall:
    """The call for a chat or a prompt. Raises InvalidField. Args: use: the tools, if any."""
    if fields.top_logprobs and not fields.logprobs:
        raise invalid("top_logprobs", "needs logprobs: set it to true")
    options = fields.options
    most, seed = options.num_predict, options.seed
    own = {"seed": None if seed == -1 else seed}
    return GenerateCall(
        adapter=adapter_named(fields.model, base),
        input=input_,
        sampling=sampling_of({**dict(options), **own}),
        max_tokens=most if most is not None and most > 0 else None,
        open_ended=True,
        clamped=True,
        stops=stops_of(options.stop),
        logprobs=fields.logprobs,
        top_logprobs=fields.top_logprobs,
        form=AnswerForm(CHAT_SCORES),
        **constrained(use, _format(fields), {}),
    )


def _format(fields: OllamaFields) -> dict[str, Constraint]:
    """The constraint on the answer, by field."""
    if isinstance(fields.format, dict):
        return json_constraint(fields.format, "format")
    if fields.format not in ("", "json"):
        raise invalid("format", "must be json, or a JSON schema")
    return {"format": ANY_OBJECT} if fields.format else {}


def _template_options(fields: OllamaFields) -> TemplateOptions:
    think = fields.think
    effort = "none" if think is False else think if isinstance(think, str) else None
    variables = {"enable_thinking": True} if think is True else {}
    return TemplateOptions.of(variables, effort, None, False)


def _messages(given: Sequence[OllamaMessage]) -> tuple[Mapping[str, Any], ...]:
    """Convert messages to the form that a chat template takes. Raises InvalidField."""
    history, calls, made = History(), _Calls(), []
    for at, message in enumerate(given):
        field, role = f"messages[{at}].tool_calls", message.role.lower()
        role = ROLES.get(role, role)
        check_calls(len(message.tool_calls), field)
        call_id = message.tool_call_id
        if role == "tool":
            call_id = calls.answered(call_id, message.tool_name)
        made.append(
            history.message(
                role,
                message.content,
                [past_call(calls.made(at, call), field) for call in message.tool_calls],
                call_id=call_id,
                name=message.tool_name if role == "tool" else "",
                reasoning=message.thinking,
                field=field,
            )
        )
    return tuple(made)


class _Calls:
    """Gives ids to calls and results that lack one. A result belongs to the first call of its
    tool that has no result yet, or else to the first such call of any tool."""

    def __init__(self) -> None:
        self._open: dict[str, None] = {}
        """Ids of the calls without a result, in order."""
        self._of_tool: dict[str, deque[str]] = {}

    def made(self, at: int, call: Json) -> Json:
        """Return a call of message ``at`` with an id."""
        function, given = call.get("function"), call.get("id")
        name = function.get("name") if isinstance(function, dict) else None
        # Nine characters, as Mistral's templates want them.
        call_id = given if isinstance(given, str) and given else f"c{at:04}{len(self._open):04}"
        self._open[call_id] = None
        if isinstance(name, str):
            self._of_tool.setdefault(name, deque()).append(call_id)
        return {**call, "id": call_id}

    def answered(self, call_id: str, tool: str) -> str:
        """Return the id of the call to which a result belongs; empty if there is no call."""
        named = self._of_tool.get(tool, deque())
        while not call_id and named:
            if (first := named.popleft()) in self._open:
                call_id = first
        call_id = call_id or next(iter(self._open), "")
        self._open.pop(call_id, None)
        return call_id


# ---------------------------------------------------------------------------- answers


@dataclass(slots=True)
class Said:
    """A part of an answer."""

    text: str = ""
    thinking: str = ""
    calls: list[Json] = field(default_factory=list)

    @property
    def members(self) -> Json:
        """A message's members besides its text."""
        thinking = {"thinking": self.thinking} if self.thinking else {}
        return thinking | ({"tool_calls": self.calls} if self.calls else {})


class OllamaAnswer(Answer):
    """Builds an object, or lines with its parts and a last line with the counts."""

    framing = LINES

    def __init__(self, model: str, tokenizer: TextTokenizer, *, scored: bool) -> None:
        """Args: model: the caller's name for it."""
        self._model = model
        self._tokenizer = tokenizer
        self._scored = scored
        self._tally = Tally()
        self._call: ToolCallBegun | None = None
        """The call whose arguments are being written."""
        self._calls = 0
        self._arguments: list[str] = []
        self._all: list[Said] = []
        self._scores: list[Any] = []
        self._last: Json = {}

    @abstractmethod
    def said(self, part: Said) -> Json:
        """An answer's members with its text, thinking and calls."""

    def add(self, piece: Piece) -> None:
        """See `Answer.add`."""
        self._all.extend(self._parts(piece))
        if self._scored:
            self._scores.extend(scores_of(piece.delta))

    def whole(self) -> Json:
        """See `Answer.whole`."""
        part = Said(
            "".join(part.text for part in self._all),
            "".join(part.thinking for part in self._all),
            [call for part in self._all for call in part.calls],
        )
        return {**self._head(), **self.said(part), **self._logprobs(self._scores), **self._last}

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Answer.chunks`."""
        scores = scores_of(piece.delta) if self._scored else []
        parts = list(self._parts(piece)) or ([Said()] if scores else [])
        lines = [{**self._head(), **self.said(part), "done": False} for part in parts]
        if lines:
            lines[0] |= self._logprobs(scores)
        if self._last:
            lines.append({**self._head(), **self.said(Said()), **self._last})
        return lines

    def last_chunk(self) -> None:
        """None: the last piece's line has the counts."""

    def loaded(self) -> Json:
        """The answer to a request without messages or prompt: Ollama then loads the model."""
        return {**self._head(), **self.said(Said()), "done": True, "done_reason": "load"}

    def _head(self) -> Json:
        return {"model": self._model, "created_at": datetime.now(UTC).isoformat()}

    def _parts(self, piece: Piece) -> Iterator[Said]:
        self._tally.take(piece)
        delta = piece.delta
        for part in joined(delta.parts) if delta.parts else [Content(delta.text)]:
            match part:
                case ToolArguments(text=text):
                    self._arguments.append(text)
                    continue
                case Content(text) if text:
                    made = Said(text)
                case Reasoning(text) if text:
                    made = Said(thinking=text)
                case ToolCallBegun():
                    yield from self._ended_call()
                    self._call = part
                    continue
                case _:
                    continue
            yield from self._ended_call()
            yield made
        if delta.finish is not None:
            yield from self._ended_call()
            self._last = self._counts(piece.generation, delta.finish)

    def _ended_call(self) -> Iterator[Said]:
        """Yield the call whose arguments have just ended, if any. Arguments that were cut off
        are dropped: the field can hold only an object."""
        if self._call is None:
            return
        try:
            arguments = read_json("".join(self._arguments))
        except ValueError:
            arguments = None
        function = {
            "index": self._calls,
            "name": self._call.name,
            "arguments": arguments if isinstance(arguments, dict) else {},
        }
        call = {"id": self._call.id, "function": function}
        self._calls += 1
        self._call, self._arguments = None, []
        yield Said(calls=[call])

    def _counts(self, generation: Generation, finish: str) -> Json:
        """Durations are in nanoseconds."""
        took, counts = generation.provenance, self._tally.counts
        first = took.first_token_s - took.queue_s - took.load_s
        return {
            "done": True,
            "done_reason": "length" if finish == "length" else "stop",
            "total_duration": int(took.total_s * _NANO),
            "load_duration": int(took.load_s * _NANO),
            "prompt_eval_count": counts.prompt,
            "prompt_eval_duration": max(0, int(first * _NANO)),
            "eval_count": counts.completion,
            "eval_duration": int((took.total_s - took.first_token_s) * _NANO),
        }

    def _logprobs(self, scores: Sequence[Any]) -> Json:
        if not scores:
            return {}

        def made() -> Iterator[Json]:
            for token in scores:
                tops = [self._entry(*top) for top in token.tops]
                yield {**self._entry(token.id, token.logprob), "top_logprobs": tops}

        return {"logprobs": Many(len(scores), made, at_once=SCORES_AT_ONCE)}

    def _entry(self, token: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token)
        label = self._tokenizer.token_label(token)
        return {"token": label, "logprob": logprob, "bytes": list(data) if data else None}


class OllamaMessageAnswer(OllamaAnswer):
    """Builds answers of ``/api/chat``."""

    def said(self, part: Said) -> Json:
        """See `OllamaAnswer.said`."""
        message = {"role": "assistant", "content": part.text, **part.members}
        return {"message": message}


class OllamaTextAnswer(OllamaAnswer):
    """Builds answers of ``/api/generate``."""

    def said(self, part: Said) -> Json:
        """See `OllamaAnswer.said`."""
        return {"response": part.text, **part.members}


# -------------------------------------------------------------------------- endpoints


class OllamaChatEndpoint(GenerateEndpoint):
    """``POST /api/chat``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        fields = _parse(OllamaChatFields, body, self._core)
        if not fields.messages:
            return Answering(partial(_load, self._core, self._answer_to(fields), caller))
        return self._answering(self._job(fields), caller)

    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        return self._job(_parse(OllamaChatFields, body, self._core))

    def _job(self, fields: OllamaChatFields) -> GenerateJob:
        use = use_of(fields.tools, None, Form.NESTED, parallel=True)
        shown = () if use is None else use.tools
        chat = ChatMessages(_messages(fields.messages), _template_options(fields), shown)
        call = _call(fields, chat, self._core.base.name, use)
        return GenerateJob([call], self._answer_to(fields), fields.stream)

    def _answer_to(self, fields: OllamaFields) -> OllamaAnswer:
        tokenizer = self._core.generator.prompts.tokenizer
        return OllamaMessageAnswer(fields.model, tokenizer, scored=fields.logprobs)


class OllamaGenerateEndpoint(GenerateEndpoint):
    """``POST /api/generate``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        fields = _parse(OllamaGenerateFields, body, self._core)
        if not fields.prompt:
            return Answering(partial(_load, self._core, self._answer_to(fields), caller))
        return self._answering(self._job(fields), caller)

    def _parse(self, body: object, caller: Caller) -> GenerateJob:
        return self._job(_parse(OllamaGenerateFields, body, self._core))

    def _job(self, fields: OllamaGenerateFields) -> GenerateJob:
        call = _call(fields, self._input(fields), self._core.base.name)
        return GenerateJob([call], self._answer_to(fields), fields.stream)

    def _input(self, fields: OllamaGenerateFields) -> ChatMessages | PromptText:
        if fields.raw:
            if fields.system:
                raise invalid("system", "conflicts with raw: put it into the prompt")
            self._core.generator.check_text(fields.prompt.encode())
            return PromptText(fields.prompt)
        said = [("system", fields.system)] if fields.system else []
        return ChatMessages(
            tuple(
                {"role": role, "content": text}
                for role, text in (*said, ("user", fields.prompt))
            ),
            _template_options(fields),
        )

    def _answer_to(self, fields: OllamaFields) -> OllamaAnswer:
        tokenizer = self._core.generator.prompts.tokenizer
        return OllamaTextAnswer(fields.model, tokenizer, scored=fields.logprobs)


async def _load(core: ServingCore, answer: OllamaAnswer, caller: Caller, reply: Reply) -> None:
    """Answer a request without messages or prompt. The base is always loaded, an adapter with
    the first request that generates."""
    loaded = answer.loaded()
    await named_model(core, caller, loaded["model"])
    await reply.json(200, loaded, {})


class ShowEndpoint(JsonEndpoint):
    """``POST /api/show``."""

    def _check(self, body: object, caller: Caller) -> Answering:
        if isinstance(body, dict):  # dropped: in Ollama, these override the model's own
            body = {k: v for k, v in body.items() if k not in ("system", "template", "options")}
            _check_names(body)
        fields = parse_fields(ShowFields, body)
        name = fields.model or fields.name
        if name is None:
            raise invalid("model", "is missing: send it")
        _check_tag(name, self._core.base.name)
        return Answering(partial(self._show, name, caller))

    async def _show(self, name: str, caller: Caller, reply: Reply) -> None:
        core = self._core
        model, record = await named_model(core, caller, name)
        template = None if record is None else record.manifest.chat_template
        details, info = _details(core, record), core.engine.info
        family = details["family"]
        facts = {
            "general.architecture": family,
            "general.basename": core.base.name,
            "general.parameter_count": info.parameters,
            f"{family}.context_length": model["max_model_len"],
            f"{family}.vocab_size": info.vocab_size,
        }
        if record is not None:
            facts |= {"veneer.revision": model["revision"], "veneer.rank": model["rank"]}
        answer = {
            "modelfile": f"# Served by Veneer.\nFROM {core.base.name}\n",
            "parameters": "",
            "template": core.generator.prompts.template(template),
            "details": details,
            "model_info": facts,
            "capabilities": _capabilities(core, record),
            "modified_at": rfc3339(model["created"]),
        }
        await reply.json(200, answer, {})


def ollama_routes(core: ServingCore) -> list[Route]:
    """The routes of Ollama's API, and of ``/``, where its clients check whether a server is
    running."""

    async def running(request: Request) -> Response:
        return PlainTextResponse("Veneer is running")

    async def version(request: Request) -> Response:
        return JSONResponse({"version": VERSION, "veneer": __version__})

    async def tags(request: Request) -> Response:
        form = ListForm(
            b'{"models":[', lambda first, last: b"]}", lambda *each: _tag(core, *each)
        )
        return await all_models(core, caller_of(request.scope), form)

    async def in_memory(request: Request) -> Response:
        with core.calls.running():
            home = await core.tenants.current(caller_of(request.scope))
            resident = home.engine.resident()
            body = await asyncio.to_thread(_in_memory, core, home, resident)
        kind = {"content-type": "application/json"}
        return LongAnswer(in_pieces(body), core.reader_limit_s, kind)

    return [
        Route("/", running, methods=["GET"]),
        Route("/api/chat", OllamaChatEndpoint(core), methods=["POST"]),
        Route("/api/generate", OllamaGenerateEndpoint(core), methods=["POST"]),
        Route("/api/show", ShowEndpoint(core), methods=["POST"]),
        Route("/api/tags", tags, methods=["GET"]),
        Route("/api/ps", in_memory, methods=["GET"]),
        Route("/api/version", version, methods=["GET"]),
    ]


def _tag(core: ServingCore, model: Json, record: AdapterRecord | None) -> Json:
    """A model of the list. Its name has a tag, as clients append one to what they look for."""
    name = f"{model['id']}:latest"
    return {
        "name": name,
        "model": name,
        "modified_at": rfc3339(model["created"]),
        "size": core.engine.info.weights_bytes if record is None else record.bytes,
        "digest": core.base.fingerprint.weights if record is None else record.ref.revision,
        "details": _details(core, record),
        "capabilities": _capabilities(core, record),
    }


def _in_memory(core: ServingCore, home: Tenant, resident: Sequence[str]) -> bytes:
    """The base and the tenant's adapters in memory, as JSON. Args: resident: weights digests of
    those adapters."""

    def shown(tag: Json, size: int) -> bytes:
        del tag["modified_at"], tag["capabilities"]
        vram = size if core.engine.info.device.startswith("cuda") else 0
        more = {"expires_at": NEVER, "size_vram": vram}
        length = {"context_length": core.engine.info.longest_sequence}
        return json.dumps({**tag, "size": size, **more, **length}).encode()

    base = base_model(core)
    models = [shown(_tag(core, base, None), core.engine.info.weights_bytes)]
    for digest in resident:
        # If revisions of a name have the same weights, show the current one, else the latest.
        held = sorted(home.registry.holding(digest), key=lambda it: (it.current, it.created))
        for name, record in {each.ref.name: each for each in held}.items():
            shown_as = name if record.current else record.ref.short
            model = {"id": shown_as, "created": record.created}
            models.append(shown(_tag(core, model, record), record.manifest.serving_bytes))
    return b'{"models":[' + b",".join(models) + b"]}"


def _details(core: ServingCore, record: AdapterRecord | None) -> Json:
    info, level = core.engine.info, core.engine.quantization
    family = info.architecture.removesuffix("ForCausalLM").lower()
    return {
        "parent_model": "" if record is None else core.base.name,
        "format": "gguf" if level == "gguf" else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": _size(info.parameters),
        "quantization_level": core.base.serving_dtype if level == "none" else level.upper(),
        "context_length": info.longest_sequence,
    }


def _size(parameters: int) -> str:
    for unit, one in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= one:
            return f"{parameters / one:.1f}{unit}"
    return str(parameters)


def _capabilities(core: ServingCore, record: AdapterRecord | None) -> list[str]:
    template = None if record is None else record.manifest.chat_template
    found = ["completion"]
    if core.generator.reads_calls(template):
        found.append("tools")
    if core.generator.prompts.thinks(template):
        found.append("thinking")
    return found
