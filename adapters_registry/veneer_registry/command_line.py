"""The same help layout for all four programs.

Typer's plain help, with three changes: it uses the terminal's width up to 120 columns, shows
a command's first sentence whole, and keeps an epilog's examples as lines that can be pasted.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from veneer_registry.bash_words import whole_words
from veneer_registry.terminal import guarded

_WIDEST: Final = 120
_EXAMPLE: Final = "  "
"""Indent of the lines of an epilog that are meant to be pasted."""
_COMMENT: Final = re.compile(r" {2,}(?=\S)")
_BREAK: Final = re.compile(r" (?=--?[a-zA-Z])")
"""Where a command that is too long may be broken."""


_MOST_MEANT: Final = 3
"""The most suggestions to show for an unknown command."""


def _near(word: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, sorted(names), n=1, cutoff=0.7)


def _paths(group: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every command below a group as (full path, own name)."""
    for name, command in getattr(group, "commands", {}).items():
        if not command.hidden:
            yield f"{path} {name}", name
            yield from _paths(command, f"{path} {name}")


class _Shown:
    """Formats a command's epilog."""

    epilog: str | None

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Show headings such as ``Examples:`` as sections."""
        for head, lines in _sections(self.epilog or ""):
            formatter.write_paragraph()
            if head:
                formatter.write_text(head)
            for line in _table(lines, formatter.width - len(_EXAMPLE)):
                formatter.write(f"{_EXAMPLE}{line}\n")


class Command(_Shown, TyperCommand):
    """A command of a program."""

    after_too_many = ""
    """Appended to the error for too many arguments: the usual cause, if there is one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Like Typer's, but the error for a wrong value lacks the prefix of Typer's parser, and
        the error for too many arguments ends with `after_too_many`."""
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            message = getattr(error, "message", "").removeprefix("Value error, ")
            if message.startswith("Got unexpected extra argument"):
                message += self.after_too_many
            error.message = message
            raise


class TextCommand(Command):
    """A command with an argument that is free text."""

    after_too_many = ": put text with spaces in quotes"


class CommandGroup(_Shown, TyperGroup):
    """A program, or a group of its commands."""

    guesses: Mapping[str, str] = {}
    """Word that people try -> the command line that they mean."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Like Typer's, but the error for an unknown command suggests the one that was probably
        meant, even if that is in another group of the program."""
        word = args[0]
        unknown = self.get_command(ctx, word) is None and not word.startswith("-")
        if unknown and not ctx.resilient_parsing:
            meant = " or ".join(f"`{line}`" for line in self.meant(ctx, word))
            hint = f": did you mean {meant}?" if meant else "."
            ctx.fail(f"No such command {word!r}{hint}")
        return super().resolve_command(ctx, args)

    def meant(self, ctx: Any, word: str) -> list[str]:
        """Return the command lines that an unknown ``word`` probably means; [] if none is
        similar."""
        if word in self.guesses:
            return [self.guesses[word]]
        root = ctx.find_root()
        paths = dict(_paths(root.command, root.info_name))
        if ctx is not root:  # `store ls` does not mean `key ls`
            paths = {path: name for path, name in paths.items() if path.count(" ") == 1}
        found = [path for path, name in paths.items() if name == word]
        if not found:
            own = {
                **self.guesses,
                **{name: f"{ctx.command_path} {name}" for name in self.commands},
            }
            found = [own[near] for near in _near(word, own)]
        if not found and ctx is root:
            near = _near(word, set(paths.values()))
            found = [path for path, name in paths.items() if name in near]
        return found[:_MOST_MEANT]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands, each with its first sentence."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, _first_sentence(command.short_help or command.help or ""))
            for name, command in found
            if command is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


class Program(typer.Typer):
    """A `typer.Typer` whose commands share this help layout."""

    def __init__(
        self,
        *,
        help: str,
        epilog: str = "",
        guesses: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        """Args:
        guesses: word that people try instead of a command -> the command line they mean.
        """
        group = more.pop("cls", CommandGroup)
        super().__init__(
            help=help,
            epilog=epilog,
            cls=type(group.__name__, (group,), {"guesses": guesses or {}}),
            no_args_is_help=more.pop("no_args_is_help", True),
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            context_settings={
                "help_option_names": ["-h", "--help"],
                "max_content_width": _WIDEST,
            },
            **more,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, with the process's arguments unless others are given. Untrusted text
        in its output cannot control a terminal (see `terminal`)."""
        with guarded(), whole_words():
            return super().__call__(*args, **kwargs)

    def command(self, name: str | None = None, **more: Any) -> Callable[[Any], Any]:
        """Like `typer.Typer.command`."""
        return super().command(name, cls=more.pop("cls", Command), **more)


def with_parameters(
    parameters: Iterable[inspect.Parameter], *, before: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**`` keyword arguments by these parameters in its signature, from
    which Typer reads the flags.

    Args:
        before: the command's own parameter that comes after them in the help; None puts them
            last.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        whole = inspect.signature(command, eval_str=True)
        own = [p for p in whole.parameters.values() if p.kind is not p.VAR_KEYWORD]
        at = len(own) if before is None else [p.name for p in own].index(before)
        own[at:] = [p.replace(kind=p.KEYWORD_ONLY) for p in own[at:]]
        own[at:at] = parameters
        command.__signature__ = whole.replace(parameters=own)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in own}
        return command

    return decorate


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"\.(?= [A-Z])", paragraph)[0].removesuffix(".")


def _sections(epilog: str) -> Iterator[tuple[str, list[str]]]:
    """Paragraphs, each with the example lines that follow it."""
    head, examples = "", list[str]()
    for block in re.split(r"\n\s*\n", epilog.strip("\n")):
        if block.startswith(_EXAMPLE):
            examples += block.splitlines()
            continue
        if head or examples:
            yield head, examples
        head, examples = " ".join(block.split()), []
    if head or examples:
        yield head, examples


def _table(lines: list[str], width: int) -> Iterator[str]:
    """Commands with their comments beside them if all fit, else above."""
    pairs = [(*_COMMENT.split(line.strip(), maxsplit=1), "")[:2] for line in lines]
    column = max((len(command) for command, comment in pairs if comment), default=0) + 2
    beside = all(column + len(comment) <= width for _, comment in pairs if comment)
    for command, comment in pairs:
        if comment and not beside:
            yield from textwrap.wrap(f"# {comment}", width, subsequent_indent="# ")
        first, *more = _broken(command, width)
        yield f"{first:<{column}}{comment}" if comment and beside else first
        yield from more


def _broken(command: str, width: int) -> list[str]:
    """A command broken into lines that a shell joins again."""
    lines, rest = [""], _BREAK.split(command)
    for at, part in enumerate(rest):
        room = width - (2 if at + 1 < len(rest) else 0)
        if at and len(lines[-1]) + 1 + len(part) > room:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] += f" {part}" if at else part
    return lines
