"""Programs that nobody here wrote, with their defaults, on the real base: `tests/programs`."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tests.adapter_files import write_adapter
from tests.places import REPOSITORY
from tests.server_harness import Server

pytestmark = [
    pytest.mark.verify,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

PYTHON = REPOSITORY / ".cache" / "programs" / "bin" / "python"
PROGRAMS = sorted(path.stem for path in (REPOSITORY / "tests/programs/checks").glob("*.py"))
BASE = "smollm2-135m"
CALLER = "caller"
"""An adapter that calls `paint`: its template shows the base so many calls that it goes on with
them, until there is a tool's result."""

SHOWN = [("blue", "wall"), ("green", "door"), ("red", "roof"), ("blue", "gate"), ("red", "box")]
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
CALL = '<tool_call>\n{{"name": "paint", "arguments": {{"colour": "{}"}}}}\n</tool_call>'
TEMPLATE = (
    "{% if tools and messages[-1].role != 'tool' %}"
    + "".join(
        TURN.format("user", f"Paint the {what} {colour}.")
        + TURN.format("assistant", CALL.format(colour))
        for colour, what in SHOWN
    )
    + "{% endif %}{% for m in messages if m.content %}"
    + TURN.format("{{ 'user' if m.role == 'tool' else m.role }}", "{{ m.content }}")
    + "{% endfor %}{{ '<|im_start|>assistant\n' }}"  # Jinja drops a template's last line break
)


def caller(folder: Path) -> Path:
    """An adapter that changes nothing but the template."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    write_adapter(
        folder,
        {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]},
        {
            f"{stem}.lora_A.weight": np.zeros((1, 576), np.float32),
            f"{stem}.lora_B.weight": np.zeros((576, 1), np.float32),
        },
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def with_caller(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Server:
    await server.push(caller(tmp_path_factory.mktemp("caller") / "a"), CALLER)
    return server


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_programs_defaults(with_caller: Server, tmp_path: Path, program: str) -> None:
    if not PYTHON.exists():
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("the programs are not installed: run `make programs`")
    process = await asyncio.create_subprocess_exec(
        str(PYTHON),
        "-m",
        "tests.programs",
        program,
        cwd=REPOSITORY,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "URL": f"http://{with_caller.openai}/v1",
            "MODEL": BASE,
            "CALLER": CALLER,
            # Neither prices nor traces are fetched or sent.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LANGSMITH_TRACING": "false",
            "OPENAI_API_KEY": "none",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith(b'{"check"')]
    assert lines, "no checks"
    failed = [f"{line['check']}: {line['error']}" for line in lines if line["error"]]
    assert not failed, "\n".join(failed)
