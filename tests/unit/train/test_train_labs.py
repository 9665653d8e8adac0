"""Labs write a page, a table, a plot and their settings, and state their limitations."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from veneer_registry.extras import install_extra
from veneer_train.cli import app
from veneer_train.labs import one_run, training
from veneer_train.labs.one_run import LabResult
from veneer_train.plan import Method


def lab(*arguments: object) -> list[dict[str, str]]:
    """Runs it; the rows of its table."""
    done = CliRunner().invoke(app, ["lab", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    out = Path(arguments[list(arguments).index("--out") + 1])  # type: ignore[arg-type]
    assert {"README.md", "results.csv", "plot.png", "facts.json"} <= {
        path.name for path in out.iterdir()
    }
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "facts.json").read_text())
    assert {"torch", "peft", "bitsandbytes"} <= set(facts["versions"])
    assert "seed" in facts
    page = (out / "README.md").read_text()
    assert "Limitations:" in page
    assert str(out.parent) not in page  # no place on this machine
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, table
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_quant_error(tiny_base: Path, tmp_path: Path) -> None:
    rows = lab("quant-error", "--base", tiny_base, "--out", tmp_path / "lab")
    errors = {r["mode"]: float(r["mean absolute error on N(0, 1)"]) for r in rows}
    assert errors["nf4"] < errors["int4"] < errors["fp4"]


def test_quant_ppl(tiny_base: Path, tmp_path: Path) -> None:
    rows = lab(
        "quant-ppl",
        "--base",
        tiny_base,
        "--modes",
        "bf16,nf4-dq",
        "--tokens",
        256,
        *("--window", 64, "--out", tmp_path / "lab"),
    )
    assert [r["mode"] for r in rows] == ["bf16", "nf4-dq"]
    assert float(rows[0]["above the first, %"]) == 0


SHORT = ("--set", "train.steps=2", "--set", "data.max_len=512", "--threads", 1)


def test_a_run_is_a_process_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "lab"
    (row,) = lab("rank", "--base", tiny_base, "--out", out, "--r", "2", *SHORT)
    assert row["rank"] == "2"
    assert float(row["peak, MB"]) > 100
    assert float(row["tokens/s"]) > 0


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAKE: a process takes seconds to import what this one has; see the test above."""

    def run(
        config: dict[str, Any], method: Method, scratch: Path, *, threads: int
    ) -> LabResult:
        return one_run.train(config, method)

    monkeypatch.setattr(training, "run", run)


@pytest.mark.usefixtures("_in_this_process")
def test_ranks(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    rows = lab(
        "rank",
        "--base",
        tiny_base,
        "--out",
        tmp_path / "lab",
        "--r",
        "2,4",
        *SHORT,
        "--set",
        f"data.train={chats}",
    )
    assert [r["rank"] for r in rows] == ["2", "4"]
    trained = [float(r["trained, M"]) for r in rows]
    assert trained[1] == pytest.approx(2 * trained[0], rel=0.01)


@pytest.mark.usefixtures("_in_this_process")
def test_optimizers(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    names = "adamw_torch_fused,adamw_8bit,sgd"
    rows = lab(
        "optimizers",
        "--base",
        tiny_base,
        "--out",
        tmp_path / "lab",
        "--optim",
        names,
        *SHORT,
        "--set",
        f"data.train={chats}",
    )
    assert [r["optimizer"] for r in rows] == names.split(",")


@pytest.mark.usefixtures("_in_this_process")
def test_qlora_beside_lora_and_full(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    rows = lab(
        "qlora-vs-lora",
        "--base",
        tiny_base,
        "--out",
        tmp_path / "lab",
        *SHORT,
        "--set",
        f"data.train={chats}",
    )
    assert [r["method"] for r in rows] == ["qlora", "lora", "full"]
    assert float(rows[2]["trained, M"]) > float(rows[1]["trained, M"])
    assert all(float(row["base loss"]) > 0 for row in rows)


@pytest.mark.usefixtures("_in_this_process")
def test_one_method_alone(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    rows = lab(
        "qlora-vs-lora",
        "--base",
        tiny_base,
        "--out",
        tmp_path / "lab",
        *SHORT,
        *("--methods", "lora", "--set", f"data.train={chats}"),
    )
    assert [r["method"] for r in rows] == ["lora"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rank"], "needs the base"),
        (["swap", "--adapters", "a=nowhere,b=nowhere"], "two or more"),
        (["quant-ppl", "--base", "BASE", "--modes", "nf5"], "not one of bf16"),
        (["rank", "--base", "BASE", "--r", "x"], "comma-separated integers"),
        (["qlora-vs-lora", "--base", "BASE", "--methods", "qlora,dora"], "qlora, lora, full"),
        (["rank", "--base", "BASE", "--set", "train.stpes=3"], "did you mean"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_base: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    asked = [str(tiny_base) if a == "BASE" else a for a in arguments]
    done = CliRunner().invoke(app, ["lab", *asked, "--out", str(tmp_path / "lab")])
    assert done.exit_code == 1
    assert told in done.stderr


def test_a_folder_with_something_in_it_is_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    done = CliRunner().invoke(
        app, ["lab", "quant-error", "--base", str(tiny_base), "--out", str(tmp_path)]
    )
    assert (done.exit_code, "not empty" in done.stderr) == (1, True)


WITHOUT = """
import sys
sys.modules["matplotlib"] = None
from veneer_train.__main__ import main
main()
"""


def test_what_labs_alone_import_is_named_with_its_extra(tmp_path: Path) -> None:
    """Imported by a command that runs, not as the program starts."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "lab", "swap", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"the package matplotlib is not installed: {install_extra('train')}")
