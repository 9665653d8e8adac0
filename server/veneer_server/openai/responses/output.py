"""The items of a response's output, as they come into being: each change is an event.

Thinking is an item, text is one, and each call. They follow each other, so one is open at a
time. A whole response is made by the same code as a stream's events.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Final

from veneer_server.openai.answers import Json, TokenScore
from veneer_server.openai.http.long_json import Many
from veneer_server.text.replies.deltas import (
    Content,
    Delta,
    Reasoning,
    ToolArguments,
    ToolCallBegun,
)

__all__ = ["Event", "Output"]

Event = tuple[str, Json]
"""What follows ``response.`` in its type, and its members."""

_Shown = Callable[..., Many]
"""What is shown of tokens' log-probabilities; see `Output`."""

_OPEN: Final = "in_progress"


class _Item(ABC):
    """One item of the output.

    Attributes:
        status: ``in_progress``, ``completed`` or ``incomplete``.
    """

    prefix: ClassVar[str]

    def __init__(self, request_id: str, index: int) -> None:
        """Args: index: its place in the output."""
        self.status = _OPEN
        self._id = f"{self.prefix}_{request_id}_{index}"
        self._index = index
        self._texts: list[str] = []

    @property
    @abstractmethod
    def told(self) -> Json:
        """The item as it is now."""

    @abstractmethod
    def begin(self) -> Iterator[Event]:
        """It is added."""

    @abstractmethod
    def _done(self) -> Iterator[Event]:
        """Its text is complete."""

    def end(self, status: str) -> Iterator[Event]:
        """It is complete, or cut."""
        self.status = status
        yield from self._done()
        yield "output_item.done", {"output_index": self._index, "item": self.told}

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _added(self, **empty: object) -> Event:
        return "output_item.added", {
            "output_index": self._index,
            "item": {**self.told, **empty},
        }

    def _event(self, kind: str, **more: object) -> Event:
        return kind, {"item_id": self._id, "output_index": self._index, **more}

    def _of_part(self, kind: str, **more: object) -> Event:
        return self._event(kind, content_index=0, **more)


class _Message(_Item):
    prefix = "msg"

    def __init__(self, request_id: str, index: int, shown: _Shown) -> None:
        super().__init__(request_id, index)
        self._shown = shown
        self._scores: list[TokenScore] = []
        self._all: Many | None = None
        """Once it has ended: four events repeat them."""

    @property
    def told(self) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": self.status,
            "content": [self._part],
        }

    @property
    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": self._text,
            "annotations": [],
            "logprobs": self._all or self._shown(tuple(self._scores), keep=False),
        }

    def begin(self) -> Iterator[Event]:
        yield self._added(content=[])
        yield self._of_part("content_part.added", part=self._part)

    def more(self, text: str, scores: Sequence[TokenScore]) -> Event:
        self._texts.append(text)
        self._scores.extend(scores)
        shown = self._shown(scores, keep=False)
        return self._of_part("output_text.delta", delta=text, logprobs=shown)

    def _done(self) -> Iterator[Event]:
        self._all = self._shown(self._scores, keep=True)
        part = self._part
        yield self._of_part("output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._of_part("content_part.done", part=part)


class _Thinking(_Item):
    prefix = "rs"

    @property
    def told(self) -> Json:
        return {
            "id": self._id,
            "type": "reasoning",
            "summary": [],
            "content": [self._part],
            "encrypted_content": None,
            "status": self.status,
        }

    @property
    def _part(self) -> Json:
        return {"type": "reasoning_text", "text": self._text}

    def begin(self) -> Iterator[Event]:
        yield self._added(content=[])
        yield self._of_part("content_part.added", part=self._part)

    def more(self, text: str) -> Event:
        self._texts.append(text)
        return self._of_part("reasoning_text.delta", delta=text)

    def _done(self) -> Iterator[Event]:
        part = self._part
        yield self._of_part("reasoning_text.done", text=part["text"])
        yield self._of_part("content_part.done", part=part)


class _Call(_Item):
    prefix = "fc"

    def __init__(self, request_id: str, index: int, begun: ToolCallBegun) -> None:
        super().__init__(request_id, index)
        self._begun = begun

    @property
    def told(self) -> Json:
        return {
            "id": self._id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._begun.id,
            "name": self._begun.name,
            "arguments": self._text,
        }

    def begin(self) -> Iterator[Event]:
        yield self._added()

    def more(self, text: str) -> Event:
        self._texts.append(text)
        return self._event("function_call_arguments.delta", delta=text)

    def _done(self) -> Iterator[Event]:
        yield self._event(
            "function_call_arguments.done", name=self._begun.name, arguments=self._text
        )


class Output:
    """Takes what the model writes, and tells what changes.

    A token's score belongs to the text that it completes. Those of thinking and of calls are
    dropped: items of these kinds have no place for them.
    """

    def __init__(
        self, request_id: str, shown: _Shown, *, calls: bool, reasoning: bool = True
    ) -> None:
        """Args:
        shown: makes JSON of log-probabilities.
        calls: the model may call tools. Blanks before a call are then no text.
        reasoning: thinking is shown.
        """
        self._request_id = request_id
        self._shown = shown
        self._reasoning = reasoning
        self._may_call = calls
        self._items: list[_Item] = []
        self._scores: list[TokenScore] = []
        """Of tokens that have not completed any text yet."""
        self._blank: list[tuple[str, list[TokenScore]]] = []
        """Text that is dropped if a call follows."""

    @property
    def items(self) -> list[Json]:
        """The items as they are now."""
        return [item.told for item in self._items]

    def take(self, part: Delta, scores: Sequence[TokenScore] = ()) -> Iterator[Event]:
        """More of the answer.

        Args:
            scores: of the tokens that completed it.
        """
        scores, self._scores = [*self._scores, *scores], []
        match part:
            case Content(text=text):
                yield from self._say(text, scores)
            case Reasoning(text=text):
                if self._reasoning and text:
                    yield from self._think(text)
            case ToolCallBegun():
                self._blank = []
                yield from self._add(_Call(self._request_id, len(self._items), part))
            case ToolArguments(text=text):
                call = self._open
                assert isinstance(call, _Call), "arguments follow the call that they belong to"
                yield call.more(text)

    def keep(self, scores: Sequence[TokenScore]) -> None:
        """Scores of tokens that have not completed any text yet."""
        self._scores.extend(scores)

    def end(self, status: str) -> Iterator[Event]:
        """The answer has ended: its last item has this status. An answer of nothing is an empty
        text."""
        scores, self._scores = self._scores, []
        called = any(isinstance(item, _Call) for item in self._items)
        if self._blank and not called:
            yield from self._say_held()
        if not self._items:
            yield from self._add(_Message(self._request_id, 0, self._shown))
        last = self._items[-1]
        if scores and isinstance(last, _Message):
            yield last.more("", scores)
        yield from last.end(status)

    @property
    def _open(self) -> _Item | None:
        return self._items[-1] if self._items else None

    def _say(self, text: str, scores: list[TokenScore]) -> Iterator[Event]:
        message = self._open
        if not isinstance(message, _Message):
            if self._may_call and text.isspace():
                self._blank.append((text, scores))
                return
            yield from self._say_held()
            message = self._open
            if not isinstance(message, _Message):
                message = _Message(self._request_id, len(self._items), self._shown)
                yield from self._add(message)
        yield message.more(text, scores)

    def _say_held(self) -> Iterator[Event]:
        held, self._blank = self._blank, []
        if not held:
            return
        message = _Message(self._request_id, len(self._items), self._shown)
        yield from self._add(message)
        for text, scores in held:
            yield message.more(text, scores)

    def _think(self, text: str) -> Iterator[Event]:
        thinking = self._open
        if not isinstance(thinking, _Thinking):
            thinking = _Thinking(self._request_id, len(self._items))
            yield from self._add(thinking)
        yield thinking.more(text)

    def _add(self, item: _Item) -> Iterator[Event]:
        if (last := self._open) is not None:
            yield from last.end("completed")
        self._items.append(item)
        yield from item.begin()
