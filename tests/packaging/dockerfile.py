"""Parses the steps of a Dockerfile, as far as ours uses them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """An instruction: ``RUN`` and what follows it, in one line."""

    kind: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the JSON form, or as a shell would split them."""
        return list(json.loads(self.text)) if self.text.startswith("[") else self.text.split()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """NAME=VALUE pairs of ENV and ARG."""
        found = (word.partition("=") for word in shlex.split(self.text))
        return [(name, value) for name, _, value in found]


@dataclass
class Stage:
    """The steps from one FROM to the next."""

    base: str
    name: str
    steps: list[Step] = field(default_factory=list)

    def one(self, kind: str) -> Step:
        """The only step of a kind."""
        (found,) = (step for step in self.steps if step.kind == kind)
        return found


def parse(text: str) -> list[Stage]:
    """Stages with their steps; drops comments and joins continued lines."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, whole.splitlines())):
        kind, _, rest = line.partition(" ")
        if kind == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        else:
            stages[-1].steps.append(Step(kind, " ".join(rest.split())))
    return stages
