"""The tasks that base and adapters are asked are held out, and judge answers as they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from veneer_client.cli.example import examples_folder
from veneer_train.labs import answers
from veneer_train.labs.answers import NotHeldOut, TaskSet
from veneer_train.recipes import chat, code, sql

LEARNED = {"sql": sql, "code": code, "chat": chat}


@pytest.fixture(scope="module")
def sets() -> tuple[TaskSet, ...]:
    return answers.task_sets(examples_folder())


def test_no_task_is_in_the_training_data(sets: tuple[TaskSet, ...]) -> None:
    assert {each.adapter for each in sets} == set(LEARNED)
    for asked in sets:
        train, _ = LEARNED[asked.adapter].build(0)
        learned = {message["content"] for sample in train for message in sample["messages"]}
        prompts = [task.prompt for task in asked.tasks]
        assert len(set(prompts)) == len(prompts), "none is counted twice"
        for task in asked.tasks:
            assert task.text not in learned
            assert task.expected not in learned or asked.form or asked.adapter == "sql"
            # A function's name or a table's: the same task in other words.
            if asked.adapter == "code" and not asked.form:
                name = task.expected.split("(")[0]
                assert not any(f"{name}(" in text for text in learned), name
            if asked.adapter == "sql":
                schema = task.text.split("\n\n")[0]
                assert not any(schema in text for text in learned)


def test_the_tasks_own_answers_count_and_empty_or_constant_ones_do_not(
    sets: tuple[TaskSet, ...],
) -> None:
    for each in sets:
        asked = each if each.adapter == "sql" else each.first(16)
        assert all(answers.verdicts(asked, [task.expected for task in asked.tasks]))
        for constant in ("", *(f"SELECT {number}" for number in range(4))):
            by_luck = sum(answers.verdicts(asked, [constant] * len(asked.tasks)))
            assert by_luck <= 0.02 * len(asked.tasks), f"{constant}: two different values, say"
    for task in answers.code_tasks().tasks:
        name, rest = task.expected.split("\n")[0].split("(", 1)
        for constant in ("None", "True", "False", rest.split(")")[0].split(",")[0]):
            assert not task.right(f"{name}({rest}\n    return {constant}")


def test_an_adapter_trained_on_other_data_is_not_asked(tmp_path: Path) -> None:
    folder = tmp_path / "sql"
    shutil.copytree(examples_folder() / "sql", folder)
    file = folder / "training_manifest.json"
    facts = json.loads(file.read_text("utf-8"))
    facts["data"]["val"]["sha256"] = "0" * 64
    file.write_text(json.dumps(facts), "utf-8")
    with pytest.raises(NotHeldOut):
        answers.sql_tasks(tmp_path)


def test_only_the_base_gets_the_hint_and_the_first_tasks_say_so() -> None:
    asked = answers.sql_tasks(examples_folder()).first(3)
    assert asked.about.startswith("the first 3 of 160 questions held out")
    task = asked.tasks[0]
    assert answers.prompt_for(asked, task, "sql") == task.prompt
    base = answers.prompt_for(asked, task, "").messages[-1].content
    assert base == f"{task.text}\n\n{asked.hint}"


def test_code_that_was_cut_off_is_judged_by_what_is_whole() -> None:
    """As is fair to a base that goes on after its function."""
    add = answers.code_tasks().tasks[1]
    assert add.right(f"```python\n{add.expected}\n\ndef add_more(a, b):\n    retu")
    assert not add.right(f"{add.expected}\n\ndef add_more(a, b):\n    retu(")
