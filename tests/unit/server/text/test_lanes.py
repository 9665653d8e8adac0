"""Tokenizing does not block others: neither other threads nor short texts behind long ones."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from veneer_registry.errors import ContextTooLong
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.text.bound import LONG_TEXT, LONG_THREADS, Lanes
from veneer_server.text.prompts import Prompts, Room
from veneer_server.text.tokenizer import TextTokenizer

ROOM = Room(vocab_size=49152, tokens=8191)


@pytest.fixture
async def prompts(base_folder: Path) -> AsyncIterator[Prompts]:
    made = Prompts(base_folder)
    yield made
    await made.close()


@pytest.fixture
async def lanes() -> AsyncIterator[Lanes]:
    made = Lanes()
    yield made
    made.close()


def test_other_threads_run_while_a_text_is_tokenized(base_folder: Path) -> None:
    tokenizer = TextTokenizer.from_folder(base_folder)
    text = "some words, and some more of them. " * 8000
    ran, ended = 0, threading.Event()

    def tick() -> None:
        nonlocal ran
        while not ended.wait(0.0005):
            ran += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = ran
    ids = tokenizer.encode(text, add_special_tokens=False)
    during = ran - before
    ended.set()
    ticker.join()
    assert len(ids) > 60_000
    assert during >= 5, "with the lock held, it runs once at most"


def test_the_library_uses_no_threads_of_its_own() -> None:
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


async def test_short_texts_do_not_wait_for_long_ones(lanes: Lanes) -> None:
    gate = threading.Event()
    long = [asyncio.create_task(lanes.run(LONG_TEXT, gate.wait, NOBODY)) for _ in range(50)]
    try:
        for size in (0, 1, LONG_TEXT - 1):
            assert await lanes.run(size, lambda: "done", NOBODY) == "done"
        assert not any(task.done() for task in long)
    finally:
        gate.set()
    assert all(await asyncio.gather(*long))


async def test_a_long_text_whose_caller_left_is_not_tokenized(lanes: Lanes) -> None:
    gate = threading.Event()
    running = [
        asyncio.create_task(lanes.run(LONG_TEXT, gate.wait, NOBODY))
        for _ in range(LONG_THREADS)
    ]
    await asyncio.sleep(0)
    ran: list[int] = []
    left = asyncio.create_task(lanes.run(LONG_TEXT, lambda: ran.append(1), NOBODY))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait({left})
    gate.set()
    await asyncio.gather(*running)
    await lanes.run(LONG_TEXT, lambda: ran.append(2), NOBODY)
    assert ran == [2]


async def test_many_connections_have_one_turn(lanes: Lanes) -> None:
    """Of one tenant, or of one host where there are no keys."""
    gate = threading.Event()
    running = asyncio.create_task(lanes.run(LONG_TEXT, gate.wait, NOBODY))
    await asyncio.sleep(0)
    order: list[str] = []

    async def text(sender: Sender) -> None:
        await lanes.run(LONG_TEXT, lambda: order.append(sender.tenant), sender)

    bad = [text(Sender("bad", f"key {n % 3}", "", f"connection {n}")) for n in range(150)]
    good = [text(Sender("good", "key", "", "one")) for _ in range(2)]
    tasks = [asyncio.create_task(each) for each in (*bad, *good)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(running, *tasks)
    assert order[:4].count("good") == 2


async def test_a_thread_is_free_when_its_work_has_ended(lanes: Lanes) -> None:
    """Also if whoever asked for it has left: else many who leave fill the threads' own queue,
    where nobody takes turns."""
    gate, ran = threading.Event(), []
    left = asyncio.create_task(lanes.run(LONG_TEXT, gate.wait, NOBODY))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait({left})
    tasks = [
        asyncio.create_task(lanes.run(LONG_TEXT, lambda n=n: ran.append(n), Sender(str(n))))
        for n in range(2)
    ]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.wait({tasks[0]})
    gate.set()
    await tasks[1]
    assert ran == [1]


@pytest.mark.push
@pytest.mark.parametrize("text", ["a" * 4_000_000, "é" * 2_000_000, " " * 700_000])
async def test_a_text_that_cannot_fit_is_not_tokenized(
    prompts: Prompts, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> list[int]:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(prompts.tokenizer, "encode", never)
    with pytest.raises(ContextTooLong) as caught:
        await prompts.from_text(text, ROOM)
    assert caught.value.metadata["field"] == "prompt"
    assert int(caught.value.metadata["largest_bytes"]) == 8191 * 81
    with pytest.raises(ContextTooLong) as caught:
        await prompts.from_messages([{"role": "user", "content": text}], None, ROOM)
    assert caught.value.metadata["field"] == "messages"


async def test_the_longest_text_that_fits_is_tokenized(prompts: Prompts) -> None:
    """8,191 times the vocabulary's longest token, and not a byte less."""
    made = await prompts.from_text(("\n" + " " * 80) * 8191, ROOM)
    assert len(made.ids) == 8191
