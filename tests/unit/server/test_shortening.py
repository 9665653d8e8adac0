"""Which turns of a conversation are left out when it is too long."""

from __future__ import annotations

from typing import Any

from veneer_server.serving.generation import starts, without_oldest

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def talk(letters: str) -> list[dict[str, Any]]:
    return [
        {"role": ROLES[letter], "content": f"{letter}{at}"} for at, letter in enumerate(letters)
    ]


def forms(letters: str) -> list[str]:
    """What is kept, the longest first."""
    messages = talk(letters)
    kept = [without_oldest(messages, start) for start in starts(messages)]
    return [" ".join(message["content"] for message in each) for each in kept]


def test_the_oldest_turns_go_and_the_system_stays() -> None:
    assert forms("suauau") == ["s0 u1 a2 u3 a4 u5", "s0 u3 a4 u5", "s0 u5"]
    assert forms("u") == ["u0"]
    assert forms("su") == ["s0 u1"]


def test_a_call_goes_with_its_results_and_the_question_stays() -> None:
    assert forms("suauattat") == [
        "s0 u1 a2 u3 a4 t5 t6 a7 t8",
        "s0 u3 a4 t5 t6 a7 t8",
        "s0 u3 a7 t8",
    ]


def test_what_the_system_says_in_between_stays() -> None:
    assert forms("usau") == ["u0 s1 a2 u3", "s1 u3"]


def test_a_conversation_without_a_user() -> None:
    assert forms("aaa") == ["a0 a1 a2", "a2"]
    assert forms("s") == ["s0"]
