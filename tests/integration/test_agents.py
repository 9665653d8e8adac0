"""Coding agents that nobody here wrote, unchanged, through a call of a tool on the real server.

`make agents` installs their newest versions and runs this; without them each is skipped. Their
prompts are longer than the bundled base can read, so an adapter's template leaves them out and
shows it calls instead: what is checked is what agents send and read, not what a base can do.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from tests.integration.test_programs import BASE, CALLER, caller
from tests.places import REPOSITORY
from tests.server_harness import Server

pytestmark = [
    pytest.mark.verify,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

AGENTS: Final = REPOSITORY / ".cache" / "agents"
NODE: Final = AGENTS / "node_modules" / ".bin"
PAINTER: Final = "painter"
TASK: Final = "Paint it red."
CALLS: Final = {
    "Bash": {"command": "touch red", "description": "Paint it red"},  # Claude Code, Continue
    "bash": {"command": "touch red", "description": "Paint it red"},  # opencode
    "exec_command": {"cmd": "touch red"},  # Codex
    "run_commands": {"commands": ["touch red"]},  # Cline
    "run_shell_command": {"command": "touch red", "is_background": False},  # qwen-code
}
"""What the template shows for each agent's own tool."""

TURN: Final = "<|im_start|>{}\n{}<|im_end|>\n"
SHOWN: Final = {
    "call": (TASK, "<tool_call>\n{{ ns.call }}\n</tool_call>"),
    "file": ("Write red to wall.txt.", "wall.txt\n```\nred\n```"),
    "text": ("It is painted.", "All done."),
}
TEMPLATE: Final = (
    "{% set ns = namespace(show='text', call='') %}{% set calls = "
    + json.dumps({n: json.dumps({"name": n, "arguments": a}) for n, a in CALLS.items()})
    + " %}{% for t in tools or [] if t.function.name in calls %}"
    "{% set ns.call = calls[t.function.name] %}{% set ns.show = 'call' %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{% set ns.show = 'text' %}"
    "{% elif 'entire content of the updated file' in (m.content or '') %}"
    "{% set ns.show = 'file' %}{% endif %}{% endfor %}"
    + "".join(
        f"{{% if ns.show == '{kind}' %}}"
        + (TURN.format("user", asked) + TURN.format("assistant", said)) * 5
        + TURN.format("user", asked)
        + "{% endif %}"
        for kind, (asked, said) in SHOWN.items()
    )
    + "{{ '<|im_start|>assistant\n' }}"
)


@dataclass(frozen=True)
class Agent:
    """How an agent is started without a terminal.

    Attributes:
        program: below `AGENTS`.
        files: written into its home first; the texts may name ``{url}`` and ``{model}``.
        before: arguments of a run that prepares it; empty for none.
        environment: ``{url}`` is the server's, without ``/v1``.
        paints: the file that shows that its tool was run, and its content.
    """

    program: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    paints: tuple[str, str] = ("red", "")
    says: str = "all done"


OPENCODE: Final = """{{
"model": "veneer/{model}",
"provider": {{"veneer": {{
  "npm": "@ai-sdk/openai-compatible",
  "options": {{"baseURL": "{url}/v1", "apiKey": "none"}},
  "models": {{"{model}": {{}}}}
}}}}
}}"""
CODEX: Final = """\
model = "{model}"
model_provider = "veneer"
[model_providers.veneer]
name = "Veneer"
base_url = "{url}/v1"
wire_api = "responses"
"""
CONTINUE: Final = """\
name: Local
version: 1.0.0
schema: v1
models:
  - name: painter
    provider: openai
    model: {model}
    apiBase: {url}/v1
    apiKey: none
    capabilities: [tool_use]
"""
OPENAI: Final = {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "none"}
ALL: Final[dict[str, Agent]] = {
    "claude-code": Agent(
        NODE / "claude",
        ("-p", TASK, "--allowedTools", "Bash"),
        {
            "ANTHROPIC_BASE_URL": "{url}",
            "ANTHROPIC_API_KEY": "none",
            "ANTHROPIC_MODEL": "{model}",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
    ),
    "codex": Agent(
        NODE / "codex",
        # Its sandbox needs user namespaces, which containers often refuse.
        ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK),
        files={".codex/config.toml": CODEX},
    ),
    "opencode": Agent(
        NODE / "opencode",
        ("run", TASK),
        {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"},
        files={".config/opencode/opencode.json": OPENCODE},
    ),
    "cline": Agent(
        NODE / "cline",
        ("-P", "openai-compatible", TASK),
        before=(
            "auth",
            "-p",
            "openai-compatible",
            "-k",
            "none",
            *("-m", "{model}", "-b", "{url}/v1"),
        ),
    ),
    "continue": Agent(
        NODE / "cn",
        ("--config", "{home}/config.yaml", "--auto", "-p", TASK),
        files={"config.yaml": CONTINUE},
    ),
    "qwen-code": Agent(
        NODE / "qwen",
        ("-p", TASK, "--yolo", "--auth-type", "openai"),
        {**OPENAI, "OPENAI_MODEL": "{model}"},
    ),
    "aider": Agent(
        AGENTS / "aider" / "bin" / "aider",
        (
            *("--model", "openai/{model}", "--no-check-update", "--analytics-disable"),
            *("--no-git", "--no-show-model-warnings", "--yes-always"),
            *("--message", "Write red to wall.txt.", "wall.txt"),
        ),
        {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "none"},
        paints=("wall.txt", "red\n"),
        says="applied edit to wall.txt",
    ),
}
SDKS: Final = sorted(path.stem for path in (REPOSITORY / "tests/programs/node").glob("*.mjs"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def painter(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """With an adapter that changes nothing but the template."""
    folder = caller(tmp_path_factory.mktemp("painter") / "a")
    await server.push(folder, CALLER)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    await server.push(folder, PAINTER)
    return server


def installed(program: Path) -> str:
    if not program.exists():
        pytest.skip(f"{program.name} is not installed: run `make agents`")
    return str(program)


def environment(home: Path) -> dict[str, str]:
    """Nothing of the tests' own; no way to any other machine by HTTPS."""
    return {
        "PATH": f"{NODE}:{os.environ['PATH']}",
        "HOME": str(home),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "GIT_CONFIG_NOSYSTEM": "1",
    }


async def run(command: tuple[str, ...], folder: Path, given: Mapping[str, str]) -> str:
    """What a program prints; it must end well."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=given,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, f"{out.decode()}\n{errors.decode()}"
    return out.decode()


@pytest.mark.parametrize("name", ALL)
async def test_an_agent_runs_its_tool_and_says_the_answer(
    painter: Server, tmp_path: Path, name: str
) -> None:
    agent = ALL[name]
    program = installed(agent.program)
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    (work / "wall.txt").write_text("blue\n")
    filled: Callable[[str], str] = lambda text: text.format(  # noqa: E731
        url=f"http://{painter.openai}", model=PAINTER, home=home
    )
    for path, text in agent.files.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(filled(text))
    given = environment(home) | {k: filled(v) for k, v in agent.environment.items()}
    if agent.before:
        await run((program, *map(filled, agent.before)), work, given)
    said = await run((program, *map(filled, agent.arguments)), work, given)
    file, content = agent.paints
    assert (work / file).exists(), f"its tool was not run: {said}"
    assert (work / file).read_text() == content
    assert agent.says in said.lower()


@pytest.mark.parametrize("name", SDKS)
async def test_a_client_for_node(painter: Server, tmp_path: Path, name: str) -> None:
    node = installed(NODE / "node")
    given = environment(tmp_path) | {
        "URL": f"http://{painter.openai}/v1",
        "MODEL": BASE,
        "CALLER": CALLER,
    }
    # Its imports are looked for from the folder in which it lies.
    program = AGENTS / f"{name}.mjs"
    program.write_bytes((REPOSITORY / "tests/programs/node" / program.name).read_bytes())
    await run((node, str(program)), tmp_path, given)
