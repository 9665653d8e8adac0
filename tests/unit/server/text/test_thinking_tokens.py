"""Tags of thinking that are special tokens, which the text of an answer otherwise hides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from veneer_server.serving.samples import Sample
from veneer_server.serving.tool_use import AnswerPlan, ReplyReader
from veneer_server.text.prompts import Prompt
from veneer_server.text.replies import TAGS, Tags, Thinking
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

THOUGHT, ANSWER = "\nHm 😀\n", "\n\nFour."


def tokenizer_with_tags(folder: Path, tags: Tags, *, special: bool) -> TextTokenizer:
    """The base's tokenizer, two of whose special tokens are the tags."""
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for old, new in (("<reponame>", tags.open), ("<filename>", tags.close)):
        [token] = [each for each in made["added_tokens"] if each["content"] == old]
        token |= {"content": new, "special": special}
        made["model"]["vocab"][new] = made["model"]["vocab"].pop(old)
    return TextTokenizer(Tokenizer.from_str(json.dumps(made)), made)


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_thinking_is_found(
    base_folder: Path, tags: Tags, special: bool, opened: bool, step: int
) -> None:
    tokenizer = tokenizer_with_tags(base_folder, tags, special=special)
    text = f"{'' if opened else tags.open}{THOUGHT}{tags.close}{ANSWER}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (tags.close in tokenizer.decode(ids)) is not special
    prompt = Prompt("", [0], Thinking.OPENED if opened else Thinking.TAGGED, tags)
    reader = ReplyReader.of(tokenizer, prompt, AnswerPlan.of(None, None, None, tokenizer))
    sample = Sample(0, reader.tokens, stops=(), stop_token_ids=(), parser=reader.parser())
    deltas = []
    for at in range(0, len(ids), step):
        last = at + step >= len(ids)
        output = SequenceOutput(1, ids[at : at + step], finish="stop" if last else None)
        deltas.append(sample.delta(output))
    assert "".join(delta.reasoning for delta in deltas) == THOUGHT
    assert "".join(delta.text for delta in deltas) == ANSWER
    assert sample.thought == len(tokenizer.encode(THOUGHT, add_special_tokens=False))
