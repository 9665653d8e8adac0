"""The programs share a help layout, fit the terminal, and support shell completion."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from veneer_client.cli.main import cli as veneer
from veneer_loadtest.cli import cli as loadtest
from veneer_loadtest.simulation.command import cli as simulator
from veneer_registry.command_line import Command, CommandGroup, Program
from veneer_server.__main__ import cli as server
from veneer_train.cli import app as train

from tests.ports import free_port
from tests.unit.client.fake_server import FakeServer

PROGRAMS = {
    "veneer": veneer,
    "veneer-server": server,
    "veneer-train": train,
    "veneer-loadtest": loadtest,
    "veneer-sim": simulator,
}
SECTIONS = ("Arguments:", "Options:", "Commands:", "Examples:", "Example:")


def commands(program: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its path, the program itself first."""
    left: list[tuple[tuple[str, ...], Any]] = [((), get_command(PROGRAMS[program]))]
    while left:
        path, command = left.pop(0)
        yield path, command
        left += [((*path, name), one) for name, one in getattr(command, "commands", {}).items()]


def page(program: str, path: tuple[str, ...], columns: int) -> str:
    return shown(PROGRAMS[program], program, path, columns)


def shown(app: Program, name: str, path: tuple[str, ...], columns: int) -> str:
    """Help as the program prints it. (Typer's own runner has a width of its own.)"""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", str(columns))
        get_command(app).main([*path, "-h"], prog_name=name, standalone_mode=False)
    return out.getvalue()


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_the_terminal(program: str, columns: int) -> None:
    for path, _ in commands(program):
        widest = max(page(program, path, columns).splitlines(), key=len)
        assert len(widest) <= columns, (path, widest)


@pytest.mark.push
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wide_terminal_is_used(program: str) -> None:
    narrow, wide = (
        sum(len(page(program, path, columns).splitlines()) for path, _ in commands(program))
        for columns in (80, 120)
    )
    assert wide < narrow


@pytest.mark.push
@pytest.mark.parametrize("program", PROGRAMS)
def test_all_help_has_the_same_look(program: str) -> None:
    for path, command in commands(program):
        text = page(program, path, 80)
        assert isinstance(command, Command | CommandGroup), path
        assert text.startswith(f"Usage: {' '.join((program, *path))} "), path
        assert not set(text) & set("╭│╰"), path
        heads = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
        known = [head for head in heads if head in SECTIONS]
        assert known == sorted(known, key=SECTIONS.index), path
        assert "Options:" in known, path


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_and_option_says_what_it_does(program: str) -> None:
    for path, command in commands(program):
        assert (command.help or "").strip(), path
        for parameter in command.params:
            assert (getattr(parameter, "help", "") or "").strip(), (path, parameter.name)


@pytest.mark.push
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_example_is_a_command_line_of_the_program(program: str) -> None:
    """Joined as a shell joins them, at the width where most of them are broken."""
    for path, _ in commands(program):
        after = re.split(r"(?m)^Examples?:\n", page(program, path, 80))[1:]
        for block in after:
            text = re.sub(r"(?m)^\S.*$", "", block).replace("\\\n", " ")
            for line in filter(None, map(str.strip, text.splitlines())):
                assert line.startswith("#") or PROGRAMS.keys() & set(shlex.split(line)), line


def test_what_does_not_fit_is_broken_where_a_shell_joins_it() -> None:
    long = "tool run " + " ".join(f"--option-{n} value-{n}" for n in range(9))
    tool = Program(help="A tool.", epilog=f"Examples:\n\n  {long}\n\n  tool x   {'why ' * 30}")
    tool.callback()(lambda: None)

    @tool.command()
    def run() -> None:
        """Run. And more of it."""

    text = shown(tool, "tool", (), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert long in re.sub(r"\s*\\\n\s*", " ", text)
    assert "\n  # why why" in text
    assert "\n  tool x\n" in text
    assert "  run  Run\n" in text


# -------------------------------------------------------------------------- completion


def script(program: str, shell: str = "bash") -> str:
    """What `--install-completion` installs."""
    variable = program.upper().replace("-", "_")
    return subprocess.run(
        [executable(program)],
        env={**os.environ, f"_{variable}_COMPLETE": f"source_{shell}"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


def executable(program: str) -> str:
    return str(Path(sys.executable).with_name(program))


def completed(program: str, typed: str, setup: str | None = None, **more: str) -> set[str]:
    """What bash offers at the end of ``typed``."""
    words = typed.split(" ")
    function = f"_{program.replace('-', '_')}_completion"
    if setup is None:
        setup = script(program)
    run = (
        f"{setup}\nCOMP_WORDS=({' '.join(map(shlex.quote, words))})\n"
        f"COMP_CWORD={len(words) - 1}\n{function} {program}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", run],
        env={**os.environ, "PATH": path, **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.push
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("veneer ge", {"generate"}),
        ("veneer adapter wa", {"watch"}),
        ("veneer adapter evict sql --mo", {"--mode"}),
        ("veneer-server st", {"store"}),
        ("veneer-server store re", {"recover"}),
        ("veneer-server --kv", {"--kv-cache-bytes"}),
        ("veneer-server --base x --kv", {"--kv-cache-bytes"}),
        ("veneer-server --vers", {"--version"}),
        ("veneer-train tr", {"train"}),
        ("veneer-train merge --int", {"--into"}),
        ("veneer-train merge --into d", {"dequant"}),
        ("veneer-loadtest fi", {"find-max"}),
        ("veneer-loadtest run --strea", {"--streams"}),
    ],
)
def test_bash_completes(typed: str, offered: set[str]) -> None:
    assert completed(typed.split()[0], typed) == offered


@pytest.mark.push
@pytest.mark.parametrize("program", PROGRAMS)
def test_completion_is_installed_by_the_program(program: str, tmp_path: Path) -> None:
    """From a login to the first Tab; bash is found by looking at the parent process."""
    told = subprocess.run(
        ["bash", "-c", f"{shlex.quote(executable(program))} --install-completion; true"],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "completion installed" in told.stdout, told.stderr
    rc = tmp_path / ".bashrc"
    assert program in rc.read_text("utf-8")
    offered = completed(program, f"{program} --ver", f"source {rc}", HOME=str(tmp_path))
    assert offered == {"--version"}


@pytest.mark.push
@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_other_shells_have_their_script(program: str, shell: str, tmp_path: Path) -> None:
    text = script(program, shell)
    assert program in text
    assert f"complete_{shell}" in text
    if found := shutil.which(shell):
        file = tmp_path / "script"
        file.write_text(text)
        subprocess.run([found, "-n", str(file)], check=True, timeout=60)
    asked = subprocess.run(
        [executable(program)],
        env={
            **os.environ,
            f"_{program.upper().replace('-', '_')}_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": f"{program} --ver",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_WORD_TO_COMPLETE": "--ver",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--version" in asked.stdout


@pytest.mark.push
def test_adapter_names_complete() -> None:
    with FakeServer() as server:
        server.add("chat")
        there = {"VENEER_SERVER": server.address}
        assert completed("veneer", "veneer adapter show ch", **there) == {"chat"}
        assert completed("veneer", "veneer generate -a ch", **there) == {"chat"}
        assert completed("veneer", f"veneer --server {server.address} rm ch") == {"chat"}


@pytest.mark.push
def test_words_that_bash_takes_apart_complete() -> None:
    """As bash hands them over, and only what it will put in place of the last part."""
    with FakeServer() as server:
        revision = server.add("chat").revision[:12]
        there = {"VENEER_SERVER": server.address}
        for typed in (f"chat @ {revision[:3]}", "chat @"):
            assert completed("veneer", f"veneer rm {typed}", **there) == {revision}
        host, _, port = server.address.partition(":")
        assert completed("veneer", f"veneer --server {host} : {port} rm ch") == {"chat"}
        assert completed("veneer", "veneer rm chat --mode = d") == {"drain"}


def test_completion_without_a_server_is_empty_and_quiet() -> None:
    elsewhere = f"127.0.0.1:{free_port()}"
    assert completed("veneer", "veneer adapter show s", VENEER_SERVER=elsewhere) == set()
