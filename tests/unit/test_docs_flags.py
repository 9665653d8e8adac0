"""Commands and flags that a page names exist, even in blocks that the suite does not run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer
import veneer_client.cli.main
import veneer_loadtest.cli
import veneer_loadtest.simulation.command
import veneer_ray.command
import veneer_server.__main__
import veneer_train.cli
from markdown_it import MarkdownIt

from tests.docs.pages import REPOSITORY, pages

PROGRAMS = {
    "veneer": veneer_client.cli.main.cli,
    "veneer-server": veneer_server.__main__.cli,
    "veneer-train": veneer_train.cli.app,
    "veneer-loadtest": veneer_loadtest.cli.cli,
    "veneer-ray": veneer_ray.command.cli,
    "veneer-sim": veneer_loadtest.simulation.command.cli,
}
COMMAND = re.compile(
    r"(?:^|\s)(?:[\w./]+/)?(veneer(?:-server|-train|-loadtest|-ray|-sim)?) (.+)"
)
APART = re.compile(r"[;&|()]")
"""What stands between two commands of a line."""
FLAG = re.compile(r"^(?P<flag>--?[a-z][\w-]*)")
OTHERS = {"--kernels", "--only", "--rehearse", "--show", "--steps"}
"""Of ``tests.gpu``, ``veneer_train.labs.answers`` and examples/train_and_swap."""


@cache
def program(name: str) -> click.Command:
    return typer.main.get_command(PROGRAMS[name])


def flags_of(command: click.Command) -> set[str]:
    found = {"--help", "-h"}
    for parameter in command.params:
        found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def all_flags() -> set[str]:
    def walk(command: click.Command) -> Iterator[str]:
        yield from flags_of(command)
        for below in getattr(command, "commands", {}).values():
            yield from walk(below)

    return {flag for name in PROGRAMS for flag in walk(program(name))}


def unknown(name: str, rest: str) -> str | None:
    """What of a command line the program does not know."""
    command = program(name)
    try:
        words = shlex.split(rest, comments=True)
    except ValueError:  # a quote that a later line ends
        words = rest.split()
    if words[:1] == [name]:  # `docker compose exec veneer veneer`: a service of that name
        words = words[1:]
    known = flags_of(command)
    if name == "veneer-ray" and "--" in words:  # what follows is for the servers
        at = words.index("--")
        if problem := unknown("veneer-server", shlex.join(words[at + 1 :])):
            return problem
        words = words[:at]
    if name == "veneer-server" and words[0].startswith("-"):
        words = ["serve", *words]  # as `veneer_server.__main__.main` does
    for word in words:
        below = getattr(command, "commands", None)
        flag = FLAG.match(word)
        if flag and flag["flag"] not in known:
            return f"{name}: {command.name} has no {flag['flag']}"
        if below and not flag and re.fullmatch(r"[a-z-]+", word):
            if word not in below:
                return f"{name}: no command {word}"
            command = below[word]
            known |= flags_of(command)
    return None


def spans(page: Path) -> Iterator[str]:
    """Code of a page: what stands in its text, and the lines of its blocks."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8")):
        if token.type == "fence" and token.info.strip() != "text":
            yield from token.content.replace("\\\n", " ").splitlines()
        for child in token.children or ():
            if child.type == "code_inline":
                yield " ".join(child.content.split())


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_and_flags_of_the_page_exist(page: Path) -> None:
    wrong = []
    known = all_flags() | OTHERS
    for text in spans(page):
        for part in APART.split(text):
            for name, rest in COMMAND.findall(part):
                if problem := unknown(name, rest):
                    wrong.append(f"{text}: {problem}")
        flag = FLAG.match(text)
        if flag and flag["flag"].startswith("--") and flag["flag"] not in known:
            wrong.append(f"{text}: no program has {flag['flag']}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "veneer adapter publish x",
        "veneer adapter push x --nmae chat",
        "veneer-server --lisen 127.0.0.1:0",
        "veneer-server serve --lisen 127.0.0.1:0",
        "BASE=$(veneer-server model where smollm2-135m)",
        ".venv/bin/veneer-train train x --stepz 3",
        "veneer-loadtest runs --spawn",
        "veneer-ray up --replicas 2 -- --thread 1",
    ],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    ((name, rest),) = (found for part in APART.split(line) for found in COMMAND.findall(part))
    assert unknown(name, rest) is not None
