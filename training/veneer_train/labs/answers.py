"""Counts right answers of a base and of the example adapters, on tasks that no training saw.

::

    python -m veneer_train.labs.answers

It starts a server on the bundled base, publishes the three example adapters, asks each task
once of the base and once of its adapter (temperature 0), and judges every answer by
`veneer_train.checks`: SQL is executed on SQLite, code is run against tests in a sandbox. It
prints what was counted. ``--only sql`` asks one adapter's tasks, ``--first 12`` the first 12 of
each set, and ``--show`` prints every answer with its verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml
from veneer_client import AsyncClient, Chat, VeneerError
from veneer_client.cli.example import examples_folder
from veneer_client.local import LocalServer

from veneer_train.checks import Score, passes
from veneer_train.recipes import chat, code, lines_of, sql
from veneer_train.sandbox import DESCRIPTION

_SEED: Final = 0
"""Seed of the example adapters' data; see their ``training_manifest.json``."""
_AT_ONCE: Final = 16
_TELL_S: Final = 4.0


class NotHeldOut(Exception):
    """The tasks are not the ones that were held out from the adapter's training."""


@dataclass(frozen=True, slots=True)
class ChatTask:
    """A prompt, how its answer is judged, and the sample's own answer.

    Attributes:
        checks: checks that the answer must pass, all of them.
    """

    prompt: Chat
    checks: tuple[Mapping[str, Any], ...]
    expected: str

    @property
    def text(self) -> str:
        """The last message of the prompt."""
        return self.prompt.messages[-1].content

    def right(self, answer: str) -> bool:
        """Whether the answer passes. Raises Unimplemented if it is code, and this machine has
        no sandbox."""
        return all(passes(check, answer, self.expected) for check in self.checks)


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks of one kind.

    Attributes:
        adapter: name of the adapter that is asked beside the base.
        counted: which answers are counted, in words.
        about: how many tasks there are and why no training saw them, in words.
        max_tokens: most tokens of an answer.
        form: whether only the answer's form is judged, not whether it is right.
        hint: instruction that only the base gets after the prompt; the adapter learned it in
            training.
    """

    adapter: str
    counted: str
    about: str
    tasks: tuple[ChatTask, ...]
    max_tokens: int
    form: bool = False
    hint: str = ""

    def first(self, count: int) -> TaskSet:
        """Only the first tasks."""
        kept = self.tasks[:count]
        return replace(self, tasks=kept, about=f"the first {len(kept)} of {self.about}")


@dataclass(slots=True)
class AnswerPairs:
    """The base's and the adapter's answers to a set, in the order of its tasks."""

    base: list[str] = field(default_factory=list)
    adapter: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------- the sets


def task_sets(adapters: Path) -> tuple[TaskSet, ...]:
    """The sets, for the example adapters in a folder.

    Raises:
        NotHeldOut: an adapter was trained with other data than its recipe makes.
    """
    return (sql_tasks(adapters), code_tasks(), *code_form(adapters), chat_form(adapters))


def sql_tasks(adapters: Path) -> TaskSet:
    """Questions about schemas that are not in the training data."""
    held_out = sql.held_out(_SEED)
    _verify(adapters / "sql", held_out)
    return TaskSet(
        adapter="sql",
        counted="run on SQLite over two sets of rows, returns the same rows as the sample's "
        "statement",
        about=f"{len(held_out)} questions held out from training with their schemas",
        tasks=tuple(map(_task, held_out)),
        max_tokens=96,
        hint="Answer with one SQLite statement and nothing else.",
    )


def code_tasks() -> TaskSet:
    """Functions with tests."""
    text = (
        resources.files("veneer_train.recipes").joinpath("code_tasks.yaml").read_text("utf-8")
    )
    tasks = tuple(
        ChatTask(
            Chat.user(f"Write a Python function {each['signature']}: {each['does']}"),
            ({"python": {"tests": each["tests"]}},),
            each["answer"],
        )
        for each in yaml.safe_load(text)
    )
    return TaskSet(
        adapter="code",
        counted="its code passes the task's tests in the sandbox",
        about=f"{len(tasks)} small functions, written for this test and not in any training "
        f"data",
        tasks=tasks,
        max_tokens=256,
    )


def code_form(adapters: Path) -> tuple[TaskSet, ...]:
    """The held-out part of the adapter's data; empty if this Python's standard library differs
    from the one in training."""
    _, held_out = code.build(_SEED)
    try:
        _verify(adapters / "code", held_out)
    except NotHeldOut:
        return ()
    return (
        TaskSet(
            adapter="code",
            counted="form: only Python that runs and defines the function; not tested",
            about=f"{len(held_out)} functions held out from training",
            tasks=tuple(map(_task, held_out)),
            max_tokens=256,
            form=True,
        ),
    )


def chat_form(adapters: Path) -> TaskSet:
    """Questions on topics that are not in the training data, each once."""
    _, held_out = chat.build(_SEED)
    _verify(adapters / "chat", held_out)
    tasks = {task.prompt: task for task in map(_task, held_out)}
    return TaskSet(
        adapter="chat",
        counted="form: the persona's greeting, a text, the persona's sign-off, nothing else",
        about=f"{len(tasks)} questions held out from training with their topics",
        tasks=tuple(tasks.values()),
        max_tokens=128,
        form=True,
    )


def _task(sample: Mapping[str, Any]) -> ChatTask:
    *before, answer = sample["messages"]
    check = sample["check"]
    checks = (check,) if "sql" not in check else (check, _rows_twice(check))
    return ChatTask(Chat.of(before), checks, answer["content"])


def _rows_twice(check: Mapping[str, Any]) -> Mapping[str, Any]:
    """The check with each row once more, under another id: with only one set of rows,
    ``SELECT 1`` would be right for every count that happens to be one."""
    setup = check["sql"]["setup"]
    again = re.sub(r"^(INSERT INTO \w+ VALUES \(\d+)", r"\g<1>000", setup, flags=re.MULTILINE)
    rows = [line for line in again.splitlines() if line.startswith("INSERT")]
    return {"sql": {"setup": "\n".join([setup, *rows])}}


def _verify(adapter: Path, held_out: Sequence[Mapping[str, Any]]) -> None:
    """Raise NotHeldOut unless the adapter's manifest says that training measured on these
    samples and did not train on them."""
    data = json.loads((adapter / "training_manifest.json").read_text("utf-8"))["data"]
    digest = hashlib.sha256(lines_of(held_out).encode()).hexdigest()
    if digest != data["val"]["sha256"] or digest == data["train"]["sha256"]:
        raise NotHeldOut(f"{adapter.name} was trained on data that differs from its recipe's")


# -------------------------------------------------------------------------- the answers


def prompt_for(asked: TaskSet, task: ChatTask, adapter: str) -> Chat:
    """The prompt for the adapter, or for the base (""), which also gets the hint."""
    if adapter or not asked.hint:
        return task.prompt
    *before, last = task.prompt.messages
    return Chat((*before, replace(last, content=f"{last.content}\n\n{asked.hint}")))


async def ask_all(
    client: AsyncClient, asked: TaskSet, answered: Callable[[], object] = lambda: None
) -> AnswerPairs:
    """Ask each task of the base and of the adapter.

    Args:
        answered: called after each answer.
    """
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(task: ChatTask, adapter: str) -> str:
        async with places:
            answer = await client.generate(
                prompt_for(asked, task, adapter),
                adapter=adapter,
                temperature=0.0,
                max_tokens=asked.max_tokens,
            )
        answered()
        return answer.text

    both = [(task, adapter) for task in asked.tasks for adapter in ("", asked.adapter)]
    texts = await asyncio.gather(*(one(*each) for each in both))
    return AnswerPairs(list(texts[::2]), list(texts[1::2]))


def verdicts(asked: TaskSet, answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right. Raises Unimplemented if this machine has no sandbox for
    code."""
    return [task.right(text) for task, text in zip(asked.tasks, answers, strict=True)]


# ------------------------------------------------------------------------- the command


@asynccontextmanager
async def telling(what: str, total: int) -> AsyncIterator[Callable[[], None]]:
    """Print every few seconds how many of ``total`` answers are done; yields a function to call
    for each."""
    done = 0

    def one() -> None:
        nonlocal done
        done += 1

    async def tell() -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            print(f"  {what}: {done} of {total} answers", file=sys.stderr, flush=True)

    teller = asyncio.create_task(tell())
    try:
        yield one
    finally:
        teller.cancel()


async def _count(address: str, sets: Sequence[TaskSet], adapters: Path, show: bool) -> None:
    async with AsyncClient(address) as client:
        for name in {each.adapter for each in sets}:
            await client.push(adapters / name, name)
        for asked in sets:
            total = 2 * len(asked.tasks)
            async with telling(asked.adapter, total) as one:
                answers = await ask_all(client, asked, one)
            judged = [
                await asyncio.to_thread(verdicts, asked, texts)
                for texts in (answers.base, answers.adapter)
            ]
            print(f"{asked.adapter}: {asked.about}.\n  Counted: {asked.counted}.")
            if asked.hint:
                print(f"  The base alone is also told: {asked.hint}")
            for who, found in zip(("base", asked.adapter), judged, strict=True):
                score = Score(sum(found), len(found))
                print(
                    f"  {who:5} {score.right:3} of {score.asked} ({score.share:.0%}; "
                    f"95 % interval {score.low:.0%} to {score.high:.0%})",
                    flush=True,
                )
            if show:
                _show(asked, answers, judged)


def _show(asked: TaskSet, answers: AnswerPairs, judged: Sequence[Sequence[bool]]) -> None:
    for place, task in enumerate(asked.tasks):
        print(f"\n  {task.text}")
        for who, texts, found in (
            ("base", answers.base, judged[0]),
            (asked.adapter, answers.adapter, judged[1]),
        ):
            print(
                f"    {who}, {'counted' if found[place] else 'not counted'}: {texts[place]!r}"
            )
    print()


def main() -> None:
    """Ask, judge, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=("sql", "code", "chat"), help="run only this adapter's tasks"
    )
    parser.add_argument("--first", type=int, metavar="N", help="run only N tasks of each set")
    parser.add_argument("--show", action="store_true", help="print each answer and its verdict")
    given = parser.parse_args()
    adapters = examples_folder()
    print("making the tasks, starting a server ...", file=sys.stderr, flush=True)
    sets = [s for s in task_sets(adapters) if given.only in (None, s.adapter)]
    if given.first is not None:
        sets = [each.first(given.first) for each in sets]
    with LocalServer() as server:
        print("The bundled base: a toy of 135 M parameters, in 4 bits. Temperature 0.")
        print(f"Sandbox for code: {DESCRIPTION}\n")
        asyncio.run(_count(server.address, sets, adapters, given.show))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server stops, too
    try:
        main()
    except (VeneerError, NotHeldOut) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped: nothing was saved; run the same command to start over"
        ) from None
