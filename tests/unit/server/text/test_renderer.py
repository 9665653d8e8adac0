"""Uploaded templates cannot block the server or exhaust its memory."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.errors import QueueFull, TemplateFailed
from veneer_server.queues.fairness import Sender
from veneer_server.text import template_renderer as template_renderer
from veneer_server.text import template_worker as template_worker
from veneer_server.text import turns as template_turns
from veneer_server.text.prompts import Prompts, Room
from veneer_server.text.template_process import MEMORY_LIMIT, ChatToRender, RenderJob
from veneer_server.text.template_renderer import Renderer, Size
from veneer_server.text.turns import TemplateOptions

from tests.refused import refused

USER = [{"role": "user", "content": "Hi"}]
GOOD = "{{ bos_token }}{{ messages[0].content }}"
SILENT_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='xxxxxxxx') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.fixture
async def templates() -> AsyncIterator[Renderer]:
    process = Renderer({"bos_token": "<s>"}, limit_s=0.2)
    yield process
    await process.close()


async def test_renders_and_reports_as_in_the_front(templates: Renderer) -> None:
    assert await templates.render(GOOD, USER) == "<s>Hi"
    with refused(TemplateFailed, cause="rendering") as caught:
        await templates.render("{{ raise_exception('roles must alternate') }}", USER)
    assert caught.value.message.endswith("roles must alternate"), "the template's own words"
    with refused(TemplateFailed, cause="syntax"):
        await templates.render("{% if %}", USER)
    with refused(TemplateFailed, cause="syntax"):
        await templates.render("{{ " + "(" * 30_000, USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"


async def test_an_endless_template_is_killed_and_refused_from_then_on(
    templates: Renderer,
) -> None:
    with refused(TemplateFailed, cause="too_slow", limit_s="0.2"):
        await templates.render(SILENT_LOOP, USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"
    running = templates.quick.process
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(SILENT_LOOP, USER)
    assert templates.quick.process is running


@pytest.mark.push
async def test_memory_is_bounded(templates: Renderer) -> None:
    with pytest.raises(TemplateFailed):
        await templates.render(DOUBLING, USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"
    assert templates.quick.process is not None
    limits = resource.prlimit(templates.quick.process.pid, resource.RLIMIT_AS)
    assert limits == (MEMORY_LIMIT, MEMORY_LIMIT)


async def test_what_a_template_raises_is_bounded(templates: Renderer) -> None:
    """It goes to the caller and through the front's event loop."""
    for source in (
        "{{ raise_exception(messages[0].content * 20_000_000) }}",
        "{{ messages[0][messages[0].content * 20_000_000].x }}",
        "{{ " + "x" * 60_000 + " y }}",
    ):
        with pytest.raises(TemplateFailed) as caught:
            await templates.render(source, USER)
        assert "chat template" in caught.value.message
        assert len(caught.value.message) < 1000
    assert await templates.render(GOOD, USER) == "<s>Hi"


async def test_an_answer_that_no_template_can_give_is_not_read(
    templates: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a process that a template has taken over could send one."""
    monkeypatch.setattr(template_worker, "MAX_ANSWER", 1000)
    with pytest.raises(TemplateFailed):
        await templates.render("{{ messages[0].content * 1000 }}", USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"


async def test_a_cancelled_rendering_does_not_answer_the_next(
    templates: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await templates.render(GOOD, USER) == "<s>Hi"
    assert templates.quick.process is not None
    jobs, sent = templates.quick.process.stdin, asyncio.Event()
    assert jobs is not None
    drain = jobs.drain

    async def noted() -> None:
        await drain()
        sent.set()

    monkeypatch.setattr(jobs, "drain", noted)
    first = asyncio.create_task(templates.render("{{ messages[0].content * 2 }}", USER))
    await sent.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await templates.render(GOOD, USER) == "<s>Hi"


async def test_many_at_once_get_their_own_answers(templates: Renderer) -> None:
    chats = [[{"role": "user", "content": str(n)}] for n in range(50)]
    answers = await asyncio.gather(*(templates.render(GOOD, chat) for chat in chats))
    assert answers == [f"<s>{n}" for n in range(50)]


# ------------------------------------------------------------------------- slow ones


def caller(number: int) -> Sender:
    """A connection of a server without keys."""
    return Sender("default", "127.0.0.1", "", str(number))


SLOW = (
    "{% for a in range(messages[0].content | int) %}{% for b in range(100) %}{% endfor %}"
    "{{ a }}{% endfor %}"
)
"""As slow as the message says, and no slower than is allowed."""


def slow(extra: str = "") -> str:
    return SLOW + "{# " + extra + " #}"


@pytest.fixture
async def hurried() -> AsyncIterator[Renderer]:
    """Slow is what takes more than a fraction of what is allowed."""
    processes = Renderer({"bos_token": "<s>"}, limit_s=10, quick_limit_s=0.1)
    yield processes
    await processes.close()


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


WORK = "60000"


@pytest.mark.push
async def test_slow_templates_do_not_hold_up_another(hurried: Renderer) -> None:
    """Sixteen slow ones delayed the chat of another adapter by 3 s."""
    first = await hurried.render(slow(), chat(WORK))
    assert first.startswith("0123"), "it is slow, and right"
    waiting = [asyncio.create_task(hurried.render(slow(), chat(WORK))) for _ in range(8)]
    await asyncio.sleep(0)
    assert await hurried.render(GOOD, USER) == "<s>Hi"
    assert sum(task.done() for task in waiting) < 5
    assert set(await asyncio.gather(*waiting)) == {first}


@pytest.mark.push
async def test_slow_templates_take_turns(hurried: Renderer) -> None:
    order: list[str] = []

    async def noted(name: str) -> None:
        await hurried.render(slow(name), chat(WORK))
        order.append(name)

    await asyncio.gather(*(noted(name) for name in ("many", "one")))
    order.clear()
    await asyncio.gather(*(noted(name) for name in ("many",) * 6 + ("one",)))
    assert order.index("one") <= 2


@pytest.mark.push
async def test_a_process_that_hangs_is_replaced(
    hurried: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_worker, "WALL_LEAST_S", 2.0)
    assert await hurried.render(GOOD, USER) == "<s>Hi"
    assert hurried.quick.process is not None
    pid = hurried.quick.process.pid
    os.kill(pid, signal.SIGSTOP)
    assert await hurried.render(GOOD, USER) == "<s>Hi"
    assert await hurried.render(GOOD, USER) == "<s>Hi"
    assert hurried.quick.process is not None
    assert hurried.quick.process.pid != pid


async def test_one_that_never_answers_is_refused_at_once_for_a_while(
    templates: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def silent(process: object, job: object) -> None:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(template_worker, "exchange", silent)
        patch.setattr(template_worker, "WALL_FACTOR", 0.05)
        patch.setattr(template_worker, "WALL_LEAST_S", 0.01)
        with pytest.raises(TemplateFailed):
            await templates.render(GOOD, USER)
        assert asked == 2, "in either process"
    with pytest.raises(TemplateFailed):
        await templates.render(GOOD, USER)
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + template_renderer.SLOW_FOR_S)
    assert await templates.render(GOOD, USER) == "<s>Hi"


async def test_too_many_of_one_template_are_refused(
    hurried: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_turns, "MAX_WAITING", 2)
    await hurried.render(slow(), chat(WORK))
    tasks = [asyncio.create_task(hurried.render(slow(), chat(WORK))) for _ in range(4)]
    with pytest.raises(QueueFull):
        await tasks[3]
    tasks[1].cancel()
    assert await tasks[2]
    assert await tasks[0]
    assert await hurried.render(slow("other"), chat("3")) == "012"


@pytest.mark.push
async def test_sixteen_slow_templates_do_not_hold_up_another() -> None:
    """Each of them was quick enough for the quick process; a chat waited for all of them."""
    processes = Renderer({"bos_token": "<s>"}, limit_s=10)
    try:
        waiting = [
            asyncio.create_task(processes.render(slow(str(n)), chat("50000"), caller(n)))
            for n in range(16)
        ]
        await asyncio.sleep(0)
        assert await processes.render(GOOD, USER, caller(-1)) == "<s>Hi"
        assert sum(task.done() for task in waiting) < 8
        assert len(set(await asyncio.gather(*waiting))) == 1
    finally:
        await processes.close()


@pytest.mark.push
async def test_a_process_outlives_what_it_interrupts(templates: Renderer) -> None:
    """Starting another one takes far longer than a chat."""
    assert await templates.render(GOOD, USER) == "<s>Hi"
    process = templates.quick.process
    for n in range(3):
        with pytest.raises(TemplateFailed):
            await templates.render(SILENT_LOOP + str(n), USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"
    assert templates.quick.process is process


async def test_what_cannot_be_interrupted_is_killed_and_refused_from_then_on(
    templates: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operation in C code, which no exception reaches."""
    monkeypatch.setattr(template_worker, "WALL_LEAST_S", 60.0)  # for a busy machine
    large = "[messages] * 1000000"
    source = f"{{% set a, b = {large}, {large} %}}{{{{ ([a] * 9999).count(b) }}}}"
    with pytest.raises(TemplateFailed):
        await templates.render(source, USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"
    running = templates.quick.process
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + template_renderer.SLOW_FOR_S)
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(source, USER)
    assert templates.quick.process is running, "it was not tried again"


@pytest.mark.push
async def test_a_template_that_ends_processes_ends_one_of_the_quick_ones(
    templates: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other variables, or a larger input that was quick, keep verdicts from being made; each
    such chat then had whoever was next wait for another process to start."""
    monkeypatch.setattr(template_worker, "WALL_LEAST_S", 60.0)  # for a busy machine
    large = "[messages] * 1000000"
    source = (
        f"{{% if n %}}{{% set a, b = {large}, {large} %}}{{{{ ([a] * 9999).count(b) }}}}"
        "{% endif %}{{ messages | length }}"
    )
    attacker, other = Sender("attacker", "key"), Sender("other", "key")
    plain = TemplateOptions({"n": 0})
    assert await templates.render(source, USER * 9, attacker, options=plain) == "9"
    used = set()
    for n in (1, 2, 3):
        with refused(TemplateFailed, cause="too_slow"):
            await templates.render(source, USER, attacker, options=TemplateOptions({"n": n}))
        assert await templates.render(source, USER, other, options=plain) == "1"
        assert templates.quick.process is not None
        used.add(templates.quick.process.pid)
    assert len(used) == 1
    assert await templates.render(source, USER, attacker, options=plain) == "1"


def address_space(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


async def test_a_process_that_templates_have_filled_is_replaced() -> None:
    """Constants that are made while a template is compiled stay for as long as it does: a few
    templates had the process run out of memory in whoever's chat was next."""
    worker, charged = template_worker.RenderWorker(), list[float]()

    async def job(source: str) -> int:
        chat = ChatToRender(source, {}, USER)
        done = await worker.do(RenderJob(chat, 60.0, 60.0), lambda s, done: charged.append(s))
        assert done.text == "1"
        return 0 if worker.process is None else worker.process.pid

    pid = await job("{{ messages | length }}")
    most = 2 * (address_space(pid) + (8 << 20))
    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
    pids = []
    for n in range(16):
        long = f"{{% set a = '- ' * {1 << 19} %}}{{{{ messages | length }}}}{{# {n} #}}"
        pids.append(await job(long))
    await worker.close()
    assert pids.count(pid) < 16, "it was replaced"
    ended = next(at for at, each in enumerate(pids) if each != pid)
    assert charged[ended + 1] > template_worker.START_S


LARGE = "{{ messages[0].content }}{% if messages[1] %}{{ messages[2] }}{% endif %}" * 800
"""Takes a quarter of a second to compile, and less than a millisecond to render."""

BUSY = "{% for a in range(499) %}{% for b in range(9999) %}{% endfor %}{% endfor %}{{ 'Hi' }}"
"""Takes a fifth of a second to render."""


async def test_a_large_template_is_compiled_in_the_quick_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_renderer, "COMPILE_LIMIT_S", 10.0)
    processes = Renderer({})
    try:
        for _ in range(2):
            assert await processes.render(LARGE, USER) == "Hi" * 800
        assert processes.slow.process is None
    finally:
        await processes.close()


async def test_one_that_is_too_large_for_that_is_compiled_in_the_slow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_renderer, "COMPILE_LIMIT_S", 0.03)
    processes = Renderer({}, limit_s=10)
    try:
        for _ in range(2):
            assert await processes.render(LARGE, USER) == "Hi" * 800
        assert processes.slow.process is not None
    finally:
        await processes.close()


def with_template(base: Path, folder: Path, source: str) -> Path:
    """A base model's folder with another template."""
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(source)
    return folder


@pytest.mark.parametrize(("source", "slow"), [(LARGE, False), (BUSY, True)])
async def test_the_base_s_template_has_all_its_time_to_be_compiled(
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    source: str,
    slow: bool,
) -> None:
    """The operator chose it: all chats were slow for a minute, and nothing said why."""
    monkeypatch.setattr(template_renderer, "COMPILE_LIMIT_S", 0.03)
    prompts = Prompts(with_template(base_folder, tmp_path, source))
    try:
        await prompts.start()
        prompt = await prompts.from_messages(USER, None, Room(49152, 8191))
        assert prompt.text
        logged = [each for each in caplog.records if "slow" in each.message]
        assert len(logged) == slow
    finally:
        await prompts.close()


@pytest.mark.push
async def test_a_template_that_takes_too_much_memory_is_refused_from_then_on() -> None:
    """It was called invalid Jinja, with nothing behind the colon, and tried again each time."""
    processes = Renderer({})
    try:
        for source in ('{% set x = "a" * 400_000_000 %}', "{{ 'a' * 400_000_000 }}x"):
            with refused(TemplateFailed, cause="too_slow"):
                await processes.render(source, USER)
            running = processes.slow.process
            with refused(TemplateFailed, cause="too_slow"):
                await processes.render(source, USER)
            assert processes.slow.process is running
        assert await processes.render(GOOD, USER) == "Hi"
    finally:
        await processes.close()


async def test_an_answer_that_makes_no_sense_is_the_templates_fault(
    templates: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake for a process that a template has taken over: it sends back what it gets."""
    with monkeypatch.context() as patch:
        patch.setattr(template_worker, "child_python", lambda *arguments: ["cat"])
        with pytest.raises(TemplateFailed):
            await templates.render(GOOD, USER)
    assert await templates.render(GOOD + "!", USER) == "<s>Hi!"


# ---------------------------------------------------- processes killed from outside


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SIGKILL at each rendering, as by the kernel where memory ends; ``[n]`` is how many."""
    left, exchange = [0], template_worker.exchange

    async def killed(process: asyncio.subprocess.Process, job: Any) -> Any:
        if left[0]:
            left[0] -= 1
            process.kill()
        return await exchange(process, job)

    monkeypatch.setattr(template_worker, "exchange", killed)
    return left


async def test_a_chat_outlives_a_kill_of_the_process(
    templates: Renderer, killer: list[int]
) -> None:
    for _ in range(3):
        killer[0] = 1
        assert await templates.render(GOOD, USER) == "<s>Hi"


@pytest.mark.push
async def test_a_chat_outlives_a_kill_of_the_slow_process(
    hurried: Renderer, killer: list[int]
) -> None:
    answer = await hurried.render(slow(), chat(WORK))
    killer[0] = 1
    assert await hurried.render(slow(), chat(WORK)) == answer


async def test_a_template_whose_process_is_killed_twice_is_refused_for_a_while_only(
    templates: Renderer, killer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    killer[0] = 2
    with refused(TemplateFailed, cause="killed"):
        await templates.render(GOOD, USER)
    assert killer == [0]
    with pytest.raises(TemplateFailed):
        await templates.render(GOOD, USER)
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + template_renderer.SLOW_FOR_S)
    assert await templates.render(GOOD, USER) == "<s>Hi"


# --------------------------------------------------------- whom a slow chat is held against

BY_SIZE = (
    "{% for a in messages %}{% for b in messages %}{% for c in range(200) %}{% endfor %}"
    "{% endfor %}{% endfor %}{{ messages | length }}"
)
"""Takes quadratic time: 2 messages are quick, 400 exceed the limit."""


def many(count: int, content: str = "Hi") -> list[dict[str, str]]:
    return [{"role": "user", "content": content} for _ in range(count)]


def party(number: int) -> Sender:
    return Sender(f"tenant {number}", "key", "", "connection")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of messages of each chat that reaches a process."""
    seen: list[int] = []
    exchange = template_worker.exchange

    async def noted(process: asyncio.subprocess.Process, job: Any) -> Any:
        seen.append(len(job.chat.messages))
        return await exchange(process, job)

    monkeypatch.setattr(template_worker, "exchange", noted)
    return seen


@pytest.mark.push
async def test_a_verdict_is_about_a_size_and_a_party(
    templates: Renderer, jobs: list[int]
) -> None:
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(BY_SIZE, many(400), party(1))
    before = len(jobs)
    for count in (400, 500):
        with refused(TemplateFailed, cause="too_slow"):
            await templates.render(BY_SIZE, many(count), party(1)._replace(connection="new"))
    assert len(jobs) == before, "what is as large is refused at once"
    assert await templates.render(BY_SIZE, many(2), party(1)) == "2"
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(BY_SIZE, many(400), party(2))
    assert len(jobs) > before + 1, "another party's is tried"


@pytest.mark.push
async def test_a_verdict_is_forgotten_after_minutes(
    templates: Renderer, jobs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(BY_SIZE, many(400))
    before = len(jobs)
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + template_renderer.REFUSED_FOR_S)
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(BY_SIZE, many(400))
    assert len(jobs) > before


async def test_nothing_is_concluded_from_a_size_that_was_quick(
    templates: Renderer, jobs: list[int]
) -> None:
    """A template's loops may depend on what the messages say, and without keys all callers of a
    host are one party."""
    steered = (
        "{% for a in range(messages[0].content | int) %}{% for b in range(1000) %}{% endfor %}"
        "{% endfor %}{{ messages | length }}"
    )
    assert await templates.render(steered, many(3, "2")) == "3"
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(steered, many(1, "99999"))
    assert await templates.render(steered, many(2, "2")) == "2"
    assert len(jobs) == 4, "the slow one was tried in both processes"
    assert await templates.render(steered, many(5, "2")) == "5"


async def test_nor_from_other_variables(templates: Renderer) -> None:
    steered = "{% for a in range(n) %}{% for b in range(999) %}{% endfor %}{% endfor %}ok"
    with refused(TemplateFailed, cause="too_slow"):
        await templates.render(steered, USER, options=TemplateOptions({"n": 99999}))
    assert await templates.render(steered, USER, options=TemplateOptions({"n": 1})) == "ok"


def test_what_is_remembered_is_bounded() -> None:
    """Also about one who alternates templates, sizes and keys."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    verdicts = template_renderer.Verdicts(lambda: 0.0)  # private: nothing else shows it
    for _ in range(20_000):
        what = template_renderer.Input(
            party(rng.randrange(3)),
            template := bytes([rng.randrange(200)]),
            template,
            Size(rng.randrange(4096), rng.randrange(1 << 22)),
        )
        if rng.random() < 0.1:
            verdicts.quick(what)
        else:
            verdicts.note(what, 60.0, None)
            assert verdicts.slow(what) or verdicts.known(what).quick
    for templates_ in verdicts.parties.values():
        assert len(templates_) <= template_renderer.MOST_TEMPLATES
        for known in templates_.values():
            assert len(known.verdicts) <= template_renderer.MOST_SIZES
            assert len(known.quick) <= template_renderer.MOST_SIZES


async def test_chats_that_wait_outlive_a_kill_of_the_process(
    templates: Renderer, killer: list[int]
) -> None:
    """Whichever chat it was that had it killed."""
    killer[0] = 1
    chats = [templates.render(GOOD, chat(str(n)), party(n)) for n in range(20)]
    assert await asyncio.gather(*chats) == [f"<s>{n}" for n in range(20)]


async def test_callers_who_leave_do_not_cost_a_process_each(templates: Renderer) -> None:
    """Starting another one takes longer than most chats; the next chat would wait for it."""
    assert await templates.render(GOOD, USER) == "<s>Hi"
    process = templates.quick.process
    for n in range(10):
        leaver = asyncio.create_task(templates.render(SILENT_LOOP + str(n), USER, party(n)))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.wait({leaver})
        assert await templates.render(GOOD, USER, party(n)) == "<s>Hi"
    assert templates.quick.process is process
