"""Converts protobuf messages to frozen records and back, so that `serving` has no protobuf.

The records check the request fields that they are made from; see `serving.records`.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, Literal, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_registry.adapter import BaseClaim, Tier, check_name
from veneer_registry.errors import InvalidField, Unimplemented
from veneer_registry.records import UploadFile, UploadRequest
from veneer_registry.rows import AliasRow, HistoryRow
from veneer_registry.upload import check_labels

from veneer_server.adapters.fetching.uris import Uri, parse_uri
from veneer_server.replication.replicas import Wait
from veneer_server.replication.wire import wait_for
from veneer_server.serving.answer_room import MAX_ANSWER, AnswerForm, ScoreForm
from veneer_server.serving.checks import choice, invalid, refuse
from veneer_server.serving.records import (
    ChatMessages,
    FinishReason,
    GenerateCall,
    PromptText,
    PromptTokens,
    Provenance,
    Sampling,
)
from veneer_server.serving.self_test import SelfTestReport
from veneer_server.serving.tool_history import History, PastCall, check_calls, read_json
from veneer_server.serving.tool_use import (
    MAX_TOOL_BYTES,
    MAX_TOOLS,
    CallChoice,
    Tool,
    ToolUse,
    check_tool,
)
from veneer_server.serving.uploads import (
    MAX_LABELS,
    UploadChunk,
    UploadMessage,
    UploadOptions,
    check_file_count,
)
from veneer_server.text.replies import ReplyPart, ToolArguments, ToolCallBegun, joined
from veneer_server.text.turns import TemplateOptions, kwargs_of
from veneer_server.wire.messages import Constraint

# -------------------- convert tools
# Tools and their calls: protobuf to records and back.


def tool_use(request: inference_pb2.GenerateRequest) -> ToolUse | None:
    """The tools that the answer may or must use.

    Raises:
        InvalidField: the tools are invalid, too many, or contradict the choice.
    """
    choice = request.tool_choice
    named = choice.name if choice.WhichOneof("choice") == "name" else ""
    if choice.mode not in inference_pb2.ToolMode.values():
        refuse("tool_choice.mode", f"has the unknown value {choice.mode}: leave it unset")
    required = choice.mode == inference_pb2.TOOL_MODE_REQUIRED
    if not request.tools:
        if named or required:
            refuse("tool_choice", "needs tools: send them")
        return None
    if request.WhichOneof("input") != "messages":
        refuse("tools", "needs messages: the chat template shows tools to the model")
    if choice.mode == inference_pb2.TOOL_MODE_NONE:
        return None
    if len(request.tools) > MAX_TOOLS:  # before they are parsed
        refuse("tools", f"has {len(request.tools)} entries: send at most {MAX_TOOLS}")
    if sum(len(tool.parameters) for tool in request.tools) > MAX_TOOL_BYTES:
        refuse("tools", f"has more than {MAX_TOOL_BYTES} bytes: shorten descriptions")
    parallel = request.parallel_tool_calls or not request.HasField("parallel_tool_calls")
    how = CallChoice.NAMED if named else CallChoice.REQUIRED if required else CallChoice.AUTO
    tools = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(request.tools))
    return ToolUse(tools, how, named, parallel)


def _tool(tool: inference_pb2.Tool, field: str) -> Tool:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        try:
            parameters = read_json(tool.parameters)
        except ValueError as error:
            raise invalid(f"{field}.parameters", f"is not valid JSON: {error}") from error
        function["parameters"] = parameters
    if tool.strict:
        function["strict"] = True
    made = Tool(function)
    check_tool(made, field)
    return made


def messages(chat: Iterable[inference_pb2.ChatMessage]) -> tuple[Mapping[str, Any], ...]:
    """Convert messages to the form that a chat template takes. Raises InvalidField, see
    `History`."""
    history, made = History(), []
    for at, message in enumerate(chat):
        field = f"messages[{at}].tool_calls"
        check_calls(len(message.tool_calls), field)
        calls = [PastCall(call.id, call.name, call.arguments) for call in message.tool_calls]
        made.append(
            history.message(
                message.role,
                message.content,
                calls,
                call_id=message.tool_call_id,
                name=message.tool_name,
                reasoning=message.reasoning,
                field=field,
            )
        )
    return tuple(made)


def call_deltas(parts: Iterable[ReplyPart]) -> list[inference_pb2.ToolCallDelta]:
    """The pieces of calls among an answer's parts."""
    pieces = []
    for part in joined(parts):
        if isinstance(part, ToolCallBegun):
            pieces.append(
                inference_pb2.ToolCallDelta(index=part.index, id=part.id, name=part.name)
            )
        elif isinstance(part, ToolArguments):
            pieces.append(inference_pb2.ToolCallDelta(index=part.index, arguments=part.text))
    return pieces


def calls(parts: Sequence[ReplyPart]) -> list[inference_pb2.ToolCall]:
    """The calls of a complete answer."""
    begun = [part for part in parts if isinstance(part, ToolCallBegun)]
    texts: dict[int, list[str]] = {call.index: [] for call in begun}
    for part in parts:
        if isinstance(part, ToolArguments):
            texts[part.index].append(part.text)
    return [
        inference_pb2.ToolCall(id=call.id, name=call.name, arguments="".join(texts[call.index]))
        for call in begun
    ]


# ----------------------------------------------------------------------- requests


_SCORES: Final = ScoreForm(own=32, top=26)
"""A `TokenLogprob` without its text."""


def generate_call(
    request: inference_pb2.GenerateRequest, *, largest: int = MAX_ANSWER, instead: str = ""
) -> GenerateCall:
    """Convert a request.

    Args:
        largest, instead: see `AnswerForm`.

    Raises:
        InvalidField: a value is outside its range.
        Unimplemented: a field that is not supported yet is set.
    """
    if request.adapters:
        raise Unimplemented(
            "adapters (several at once) is not supported: name one adapter in `adapter`",
            metadata={"field": "adapters"},
        )
    stopping, output = request.stopping, request.output
    tools, constraint = tool_use(request), _constraint(request)
    if tools is not None and tools.forced:
        if constraint is not None:
            raise invalid("constraint", "conflicts with a forced call: send one of them")
        constraint = tools.constraint()
    return GenerateCall(
        adapter=request.adapter,
        input=_input(request, tools),
        sampling=_sampling(request.sampling),
        max_tokens=_optional(stopping, "max_tokens"),
        stops=tuple(stopping.stop),
        ignore_eos=stopping.ignore_eos,
        logprobs=output.logprobs,
        echo=output.echo,
        top_logprobs=output.top_logprobs,
        n=output.n if output.HasField("n") else 1,
        stop_token_ids=tuple(stopping.stop_token_ids),
        constraint=constraint,
        use_prefix_cache=_optional(request, "use_prefix_cache"),
        session_key=request.session_key,
        priority=request.priority,
        min_tokens=stopping.min_tokens,
        prompt_logprobs=_optional(output, "prompt_logprobs"),
        truncate_prompt=_optional(request, "truncate_prompt_tokens"),
        prediction=request.prediction,
        # Output of a given format holds no calls, unless it is one.
        tools=tools if constraint is None or (tools is not None and tools.forced) else None,
        form=AnswerForm(
            _SCORES,
            (_SCORES,),
            prompt_field="output.prompt_logprobs"
            if output.HasField("prompt_logprobs")
            else "output.echo",
            largest=largest,
            instead=instead,
        ),
    )


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _sampling(options: inference_pb2.SamplingOptions) -> Sampling:
    """The contract and the record use the same field names."""
    given = {field.name: value for field, value in options.ListFields()}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return Sampling(given)


def _constraint(request: inference_pb2.GenerateRequest) -> Constraint | None:
    if not request.HasField("constraint"):
        return None
    given = request.constraint
    match given.WhichOneof("kind"):
        case "json_schema":
            return Constraint("json_schema", given.json_schema)
        case "regex":
            return Constraint("regex", given.regex)
        case "choice":
            return choice(given.choice.texts)
        case "grammar":
            return Constraint("grammar", given.grammar)
    raise invalid(
        "constraint", "is empty: give json_schema, regex, choice or grammar, or leave it unset"
    )


def _input(
    request: inference_pb2.GenerateRequest, tools: ToolUse | None
) -> PromptText | ChatMessages | PromptTokens:
    match request.WhichOneof("input"):
        case "prompt":
            return PromptText(request.prompt)
        case "messages":
            return ChatMessages(
                messages(request.messages.messages),
                _template_options(request.template),
                () if tools is None else tools.tools,
            )
        case "token_ids":
            # Not copied: their number is first compared with the context length.
            return PromptTokens(request.token_ids.ids)
    raise invalid("input", "is missing: send prompt, messages or token_ids")


def _template_options(given: inference_pb2.TemplateOptions) -> TemplateOptions:
    return TemplateOptions.of(
        kwargs_of(given.kwargs) if given.kwargs else {},
        given.reasoning_effort or None,
        _optional(given, "add_generation_prompt"),
        given.continue_final_message,
    )


# ---------------------------------------------------------------------- responses

_TIERS: Final = {
    Tier.REMOTE: inference_pb2.TIER_REMOTE,
    Tier.DISK: inference_pb2.TIER_DISK,
    Tier.HOST: inference_pb2.TIER_HOST,
    Tier.DEVICE: inference_pb2.TIER_DEVICE,
}
_TIERS_BACK: Final = {value: key for key, value in _TIERS.items()}
_FINISH: Final = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "cancelled": inference_pb2.FINISH_REASON_CANCELLED,
    "tool_calls": inference_pb2.FINISH_REASON_TOOL_CALLS,
}


def tier_to_proto(tier: Tier | None) -> inference_pb2.Tier:
    """The protobuf value of a tier; TIER_UNSPECIFIED for None."""
    return inference_pb2.TIER_UNSPECIFIED if tier is None else _TIERS[tier]


def tier_from_proto(tier: inference_pb2.Tier, field: str) -> Tier | None:
    """The tier of a protobuf value; None for TIER_UNSPECIFIED.

    Raises:
        InvalidField: the contract does not name this value.
    """
    if tier == inference_pb2.TIER_UNSPECIFIED:
        return None
    known = _TIERS_BACK.get(tier)
    if known is None:
        refuse(field, f"has the unknown value {tier}: use TIER_HOST or TIER_DEVICE")
    return known


def finish_reason(reason: FinishReason) -> inference_pb2.FinishReason:
    """The protobuf value of a finish reason."""
    return _FINISH[reason]


def duration(seconds: float) -> Duration:
    """A duration of seconds; negative values become zero."""
    fraction, whole = math.modf(max(0.0, seconds))
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def unix_seconds(message: Timestamp, field: str) -> float:
    """Convert a timestamp to Unix seconds. Raises InvalidField if it is invalid."""
    try:
        return message.ToNanoseconds() / 1e9
    except ValueError as error:
        raise invalid(field, f"is not a valid time: {error}") from error


def timestamp(unix_s: float) -> Timestamp:
    """A timestamp of Unix seconds."""
    return Timestamp(seconds=int(unix_s), nanos=int(math.modf(unix_s)[0] * 1e9))


def provenance(record: Provenance) -> inference_pb2.Provenance:
    """The protobuf form of a provenance record."""
    return inference_pb2.Provenance(
        adapter=record.adapter,
        revision=record.revision,
        weights_digest=record.weights_digest,
        tier=tier_to_proto(record.tier),
        base_model=record.base_model,
        timings=inference_pb2.Timings(
            queue=duration(record.queue_s),
            adapter_load=duration(record.load_s),
            time_to_first_token=duration(record.first_token_s),
            total=duration(record.total_s),
        ),
    )


# -------------------- convert admin
# Builds admin messages from registry records, and parses admin requests.

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000

PAGE_BYTES: Final = 3 << 20
"""Most bytes of a page's entries, unless a single entry is larger: by default, gRPC clients
reject answers of more than 4 MiB."""

BATCH: Final = 100
"""Entries read at once. Not a whole page, as only a few large entries fit into a page."""

MAX_LABEL_FILTER: Final = 64
"""Most labels in a filter; no adapter has more."""

_FRAME: Final = 6
"""Most bytes of an entry's tag and length."""

EvictMode = Literal["drain", "fail_if_busy", "abort"]

_EVICT_MODES: Final[dict[int, EvictMode]] = {
    adapters_pb2.EVICT_MODE_UNSPECIFIED: "drain",
    adapters_pb2.EVICT_MODE_DRAIN: "drain",
    adapters_pb2.EVICT_MODE_FAIL_IF_BUSY: "fail_if_busy",
    adapters_pb2.EVICT_MODE_ABORT: "abort",
}


def evict_mode(value: int) -> EvictMode:
    """The mode of an eviction or deletion. Raises InvalidField for an unknown one."""
    mode = _EVICT_MODES.get(value)
    if mode is None:
        raise InvalidField(f"mode has the unknown value {value}", metadata={"field": "mode"})
    return mode


def page_size(asked: int) -> int:
    """Entries per page; 0 means the default. Raises InvalidField above `MAX_PAGE`."""
    if asked > MAX_PAGE:
        raise InvalidField(
            f"page_size is {asked}: ask for at most {MAX_PAGE}", metadata={"field": "page_size"}
        )
    return asked or DEFAULT_PAGE


def label_filter(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels to filter by. Raises InvalidField if they are more than any adapter has."""
    if len(labels) > MAX_LABEL_FILTER:
        raise InvalidField(
            f"labels has {len(labels)} entries: filter by at most {MAX_LABEL_FILTER}",
            metadata={"field": "labels"},
        )
    return dict(labels)


Entry = TypeVar("Entry", bound=Message)


class ListingPage(Generic[Entry]):
    """Entries of one answer, bounded in number and bytes.

    Attributes:
        entries: those that fit.
        place: position of the last entry, from which the next page's token is made.
    """

    def __init__(self, size: int | None, taken: int = 0) -> None:
        """Args:
        size: most entries; None for as many as fit.
        taken: bytes that the rest of the answer takes.
        """
        self.entries: list[Entry] = []
        self.place = ""
        self._size = size
        self._left = PAGE_BYTES - taken

    def add(self, entry: Entry, place: str = "") -> bool:
        """Add an entry and return True, or return False if it does not fit; that ends the
        page. The first entry always fits."""
        size = entry.ByteSize() + _FRAME
        if self.entries and (size > self._left or len(self.entries) == self._size):
            return False
        self.entries.append(entry)
        self._left -= size
        self.place = place
        return True

    @property
    def next_token(self) -> str:
        """Page token of the next page."""
        return encode_token(self.place)


def encode_token(place: str) -> str:
    """A page token for a position in a list."""
    return base64.urlsafe_b64encode(place.encode()).decode()


def decode_token(token: str, rpc: str) -> str:
    """The position that a page token stands for; "" for no token. Raises InvalidField."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError as error:  # not ASCII, not base64, or not UTF-8
        raise bad_token(rpc) from error


def bad_token(rpc: str) -> InvalidField:
    """The error for a page token that ``rpc`` did not issue."""
    return InvalidField(
        f"page_token was not issued by {rpc}: start without one",
        metadata={"field": "page_token"},
    )


def alias_targets(request: adapters_pb2.SetAliasRequest) -> list[tuple[str, int]]:
    """The requested targets of an alias: (revision, weight) pairs; empty for rollback and
    removal.

    Raises InvalidField unless exactly one change is requested.
    """
    asked = [
        bool(request.revision),
        bool(request.targets),
        request.rollback,
        request.remove,
    ]
    if sum(asked) != 1:
        raise InvalidField(
            "set one of revision, targets, rollback and remove", metadata={"field": "revision"}
        )
    if request.revision:
        return [(request.revision, 1)]
    return [(target.revision, target.weight) for target in request.targets]


def _targets(pairs: Sequence[tuple[str, int]]) -> list[adapters_pb2.AliasTarget]:
    return [adapters_pb2.AliasTarget(revision=r, weight=w) for r, w in pairs]


def alias_message(row: AliasRow) -> adapters_pb2.Alias:
    """The protobuf form of an alias."""
    return adapters_pb2.Alias(
        alias=f"{row.name}/{row.alias}",
        targets=_targets(row.targets),
        etag=str(row.generation),
        updated=timestamp(row.updated),
    )


def set_alias_response(
    row: AliasRow, before: Sequence[tuple[str, int]]
) -> adapters_pb2.SetAliasResponse:
    """The answer to SetAlias."""
    return adapters_pb2.SetAliasResponse(alias=alias_message(row), previous=_targets(before))


def history_entry(row: HistoryRow) -> adapters_pb2.HistoryEntry:
    """The protobuf form of a history entry."""
    return adapters_pb2.HistoryEntry(
        time=timestamp(row.time),
        event=row.event,
        revision=row.revision,
        name=row.name,
        actor=row.who.actor,
        peer=row.who.peer,
        detail=row.detail,
    )


def self_test_response(report: SelfTestReport) -> adapters_pb2.SelfTestResponse:
    """The answer to SelfTest."""
    return adapters_pb2.SelfTestResponse(
        passed=report.passed,
        adapters_mixed=report.adapters_mixed,
        note=report.note,
        results=[
            adapters_pb2.SelfTestResult(
                adapter=verdict.name,
                passed=verdict.passed,
                max_difference=verdict.max_difference,
                bound=verdict.bound,
                nearest_other=verdict.nearest_other,
                detail=verdict.detail,
            )
            for verdict in report.verdicts
        ],
    )


# -------------------- convert uploads
# Converts uploads and downloads.

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def upload_options(spec: adapters_pb2.UploadSpec) -> tuple[UploadOptions, Wait]:
    """The options in an upload's spec, and how many followers its answer waits for. Raises
    InvalidField."""
    check_file_count(len(spec.files))
    for file in spec.files:
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidField(
                f"the sha256 of {file.name[:80]!r} must be 64 hex digits in lower case",
                metadata={"field": "spec.files", "file": file.name[:80]},
            )
    if len(spec.labels) > MAX_LABELS:
        raise InvalidField(
            f"spec.labels has {len(spec.labels)} labels: give at most {MAX_LABELS}",
            metadata={"field": "spec.labels"},
        )
    if spec.vocabulary and not _SHA256.fullmatch(spec.vocabulary):
        raise InvalidField(
            "spec.vocabulary must be 64 hex digits in lower case, or empty",
            metadata={"field": "spec.vocabulary"},
        )
    if spec.validate_only and spec.activate:
        raise InvalidField(
            "spec.activate has no effect with spec.validate_only, which publishes nothing: set "
            "one of them",
            metadata={"field": "spec.activate"},
        )
    request = UploadRequest(
        name=spec.name,
        files=tuple(UploadFile(f.name, f.size, f.sha256) for f in spec.files),
        labels=dict(spec.labels),
        allow_replace=spec.allow_replace,
        etag=spec.etag,
        claim=BaseClaim(spec.same_base, spec.vocabulary),
    )
    options = UploadOptions(request, spec.validate_only, spec.activate, spec.resume)
    return options, wait_for(spec.wait, "spec.wait")


class UploadMessages:
    """The messages of an UploadAdapter call, in the form that `Uploads.receive` takes. More can
    be read after a message that is refused.

    Attributes:
        wait: how many followers the answer waits for; set by the first message.
    """

    def __init__(self, requests: AsyncIterable[adapters_pb2.UploadAdapterRequest]) -> None:
        self.wait = Wait()
        self._requests = aiter(requests)
        self._begun = False

    def __aiter__(self) -> UploadMessages:
        return self

    async def __anext__(self) -> UploadMessage | InvalidField:
        if not self._begun:
            self._begun = True
            return self._first(await anext(self._requests, None))
        request = await anext(self._requests)
        if request.WhichOneof("message") != "chunk":
            return InvalidField(
                "after its first message an upload may hold only `chunk`s",
                metadata={"field": "chunk"},
            )
        chunk = request.chunk
        return UploadChunk(chunk.file, chunk.offset, chunk.data)

    def _first(
        self, request: adapters_pb2.UploadAdapterRequest | None
    ) -> UploadOptions | InvalidField:
        if request is None or request.WhichOneof("message") != "spec":
            return InvalidField(
                "the first message of an upload must be `spec`", metadata={"field": "spec"}
            )
        try:
            options, self.wait = upload_options(request.spec)
        except InvalidField as error:
            return error
        return options


def upload_message(message: UploadMessage) -> adapters_pb2.UploadAdapterRequest:
    """Convert an upload's message to protobuf: the inverse of `UploadMessages`, without its
    ``wait``."""
    if isinstance(message, UploadChunk):
        chunk = adapters_pb2.UploadChunk(
            file=message.file, offset=message.offset, data=message.data
        )
        return adapters_pb2.UploadAdapterRequest(chunk=chunk)
    request = message.request
    spec = adapters_pb2.UploadSpec(
        name=request.name,
        files=[_file(file) for file in request.files],
        labels=request.labels,
        validate_only=message.validate_only,
        activate=message.activate,
        allow_replace=request.allow_replace,
        resume=message.resume,
        etag=request.etag,
        same_base=request.claim.same,
        vocabulary=request.claim.vocabulary,
    )
    return adapters_pb2.UploadAdapterRequest(spec=spec)


def registration(request: adapters_pb2.RegisterAdapterRequest) -> tuple[Uri, UploadOptions]:
    """The URI to fetch, and the options of the upload, without its files. Raises
    InvalidField."""
    check_name(request.name)
    check_labels(request.labels)
    if request.validate_only and request.activate:
        raise InvalidField(
            "activate has no effect with validate_only, which publishes nothing: set one of "
            "them",
            metadata={"field": "activate"},
        )
    uri = parse_uri(request.uri)
    wanted = UploadRequest(
        name=request.name,
        files=(),
        labels=dict(request.labels),
        allow_replace=request.allow_replace,
        etag=request.etag,
        claim=BaseClaim(request.same_base),
    )
    return uri, UploadOptions(wanted, request.validate_only, request.activate)


def download_start(adapter: adapters_pb2.Adapter, files: Iterable[UploadFile]) -> bytes:
    """A download's first message, serialised."""
    start = adapters_pb2.DownloadStart(adapter=adapter, files=map(_file, files))
    return adapters_pb2.DownloadAdapterResponse(start=start).SerializeToString()


def download_chunk(chunk: UploadChunk) -> bytes:
    """A later message of a download, serialised."""
    message = adapters_pb2.DownloadAdapterResponse()
    # The nested message is filled in place, which saves a copy.
    found = message.chunk
    found.file, found.offset, found.data = chunk.file, chunk.offset, chunk.data
    return message.SerializeToString()


def _file(file: UploadFile) -> adapters_pb2.UploadFile:
    return adapters_pb2.UploadFile(name=file.name, size=file.size, sha256=file.sha256)
