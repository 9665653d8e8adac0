"""Uploaded templates cannot hold up or fill up the server."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator

import pytest
from veneer_registry.errors import TemplateFailed
from veneer_server.text import template_process
from veneer_server.text.template_process import MEMORY_LIMIT, TemplateProcess

USER = [{"role": "user", "content": "Hi"}]
GOOD = "{{ bos_token }}{{ messages[0].content }}"
SILENT_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='xxxxxxxx') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.fixture
async def templates() -> AsyncIterator[TemplateProcess]:
    process = TemplateProcess({"bos_token": "<s>"}, limit_s=0.2)
    yield process
    await process.close()


async def test_renders_and_reports_as_in_the_front(templates: TemplateProcess) -> None:
    assert await templates.render(GOOD, USER) == "<s>Hi"
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        await templates.render("{{ raise_exception('roles must alternate') }}", USER)
    with pytest.raises(TemplateFailed, match="not valid Jinja"):
        await templates.render("{% if %}", USER)
    with pytest.raises(TemplateFailed, match="not valid Jinja"):
        await templates.render("{{ " + "(" * 30_000, USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"


async def test_an_endless_template_is_killed_and_refused_from_then_on(
    templates: TemplateProcess,
) -> None:
    with pytest.raises(TemplateFailed, match=r"0\.2 s"):
        await templates.render(SILENT_LOOP, USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"
    running = templates._process
    with pytest.raises(TemplateFailed, match="push the adapter again"):
        await templates.render(SILENT_LOOP, USER)
    assert templates._process is running


async def test_memory_is_bounded(templates: TemplateProcess) -> None:
    with pytest.raises(TemplateFailed):
        await templates.render(DOUBLING, USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"
    assert templates._process is not None
    limits = resource.prlimit(templates._process.pid, resource.RLIMIT_AS)
    assert limits == (MEMORY_LIMIT, MEMORY_LIMIT)


async def test_what_a_template_raises_is_bounded(templates: TemplateProcess) -> None:
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
    templates: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a process that a template has taken over could send one."""
    monkeypatch.setattr(template_process, "MAX_ANSWER", 1000)
    with pytest.raises(TemplateFailed):
        await templates.render("{{ messages[0].content * 1000 }}", USER)
    assert await templates.render(GOOD, USER) == "<s>Hi"


async def test_a_cancelled_rendering_does_not_answer_the_next(
    templates: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await templates.render(GOOD, USER) == "<s>Hi"
    assert templates._process is not None
    jobs, sent = templates._process.stdin, asyncio.Event()
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


async def test_many_at_once_get_their_own_answers(templates: TemplateProcess) -> None:
    chats = [[{"role": "user", "content": str(n)}] for n in range(50)]
    answers = await asyncio.gather(*(templates.render(GOOD, chat) for chat in chats))
    assert answers == [f"<s>{n}" for n in range(50)]
