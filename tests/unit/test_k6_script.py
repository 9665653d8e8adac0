"""The load for k6 in examples/. k6 is not here: its two modules are FAKES in Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.places import REPOSITORY

SCRIPT = REPOSITORY / "examples" / "load.js"
FAKES = {
    "http.mjs": """
export default { post: (url, body, more) => {
  const status = Number(process.env.STATUS);
  console.log(JSON.stringify({ sent: [url, JSON.parse(body), more.headers] }));
  return { status, json: (path) => ({ "choices.0.text": "The sea is" })[path] };
} };
""",
    "k6.mjs": """
export const check = (answer, wanted) => {
  const held = Object.fromEntries(Object.entries(wanted).map(([k, f]) => [k, f(answer)]));
  console.log(JSON.stringify({ held }));
};
""",
    "run.mjs": """
globalThis.__ENV = process.env;
const load = await import("./load.mjs");
console.log(JSON.stringify({ options: load.options }));
load.default();
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if shutil.which("node") is None:
        pytest.skip("Node is not installed: examples/load.js is not checked")
    text = SCRIPT.read_text()
    for module, fake in (('"k6/http"', '"./http.mjs"'), ('"k6"', '"./k6.mjs"')):
        assert text.count(module) == 1
        text = text.replace(module, fake)
    for name, content in {**FAKES, "load.mjs": text}.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def run(folder: Path, **variables: str) -> dict[str, Any]:
    told = subprocess.run(
        ["node", "run.mjs"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "STATUS": "200", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = {}
    for line in told.stdout.splitlines():
        found |= json.loads(line)
    return found


def test_it_sends_the_key_and_asks_for_what_it_is_told(folder: Path) -> None:
    given = {"URL": "https://localhost:8000", "API_KEY": "vn_a_b", "MODEL": "chat"}
    told = run(folder, **given, STREAMS="3", REQUESTS="7")
    url, body, headers = told["sent"]
    assert url == "https://localhost:8000/v1/completions"
    assert headers["Authorization"] == "Bearer vn_a_b"
    assert (body["model"], body["max_tokens"]) == ("chat", 8)
    assert (told["options"]["vus"], told["options"]["iterations"]) == (3, 7)
    assert set(told["held"].values()) == {True}


def test_a_refusal_is_no_answer(folder: Path) -> None:
    told = run(folder, STATUS="401")
    assert set(told["held"].values()) == {False}
    assert "Authorization" not in told["sent"][2]
