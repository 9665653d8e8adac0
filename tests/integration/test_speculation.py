"""Answers with speculation and without it, by the real native engine: no bit may differ.

Random requests run in batches, first without drafts and then with them, in an engine that is
told that rows cost nothing, so that every draft is verified as far as it goes.
``VENEER_REQUESTS`` sets how many the long form compares.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import httpx
import pytest
import torch
from veneer_server.backends.native.compiler import NativeUnavailable, build
from veneer_server.engine.execution import model_runner
from veneer_server.engine.execution.backend_choice import BackendUnavailable
from veneer_server.engine.process import may_speculate
from veneer_server.serving.samples import sample_request
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import (
    Constraint,
    EngineConfig,
    Evict,
    SamplingParams,
    SequenceRequest,
)

from tests.engine_harness import Answer, EngineHarness, engine, source
from tests.places import REPOSITORY
from tests.planted import planted
from tests.server_harness import running_server
from tests.unit.server.engine.world import FreeSteps

pytestmark = [pytest.mark.push, pytest.mark.real_base]

SEED = int(os.environ.get("VENEER_SEED", "45"))
MANY = int(os.environ.get("VENEER_REQUESTS", "5000"))
ADAPTERS = REPOSITORY / "examples" / "adapters"
BATCH = 24
"""Requests that run together; a third of the batches has too few KV blocks for all."""

TEXTS = (
    "def area(shape):\n    if shape.kind == 'circle':\n        return 3.14 * shape.size ** 2\n"
    "    if shape.kind == 'square':\n        return shape.size ** 2\n"
    "    raise ValueError(shape.kind)\n",
    "Apples are red, pears are green, plums are blue. Pears are green, plums are blue.",
    "SELECT name, price FROM items WHERE price > 10 ORDER BY price;\nSELECT name FROM items;\n",
    "1 2 3 4 5 6 7 8 1 2 3 4 5 6 7 8 1 2 3 4",
)
ASKS = ("Repeat: ", "Rewrite with better names: ", "Continue: ", "What is this? ")
CONSTRAINTS = (
    Constraint("regex", r"[a-z ]{3,40}"),
    Constraint("choice", '["pears are green", "pears are blue", "plums are blue"]'),
    Constraint(
        "json_schema",
        '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, '
        '"count": {"type": "integer"}}, "required": ["name", "count"], '
        '"additionalProperties": false}',
    ),
)


def start(base: Path, cache: Path, **options: Any) -> EngineConfig:
    return EngineConfig(
        base_folder=str(base),
        cache_folder=str(cache),
        base_name="smollm2-135m",
        weights_fingerprint="",
        device="cpu",
        kv_cache_bytes=64 << 20,
        **options,
    )


@pytest.fixture(scope="module")
def native(base_folder: Path, cache_dir: Path) -> Iterator[EngineHarness]:
    try:
        build(cache_dir)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    threads = torch.get_num_threads()
    with engine(start(base_folder, cache_dir, backend="native", speculation="on")) as harness:
        yield harness
    torch.set_num_threads(threads)


class Requests:
    """Random requests.

    Each uses an example adapter or none.
    """

    def __init__(self, base: Path, seed: int) -> None:
        print(f"seed {seed}")
        self.random = random.Random(seed)
        self._tokenizer = TextTokenizer.from_folder(base)
        self._sources = [None, *map(source, sorted(ADAPTERS.iterdir()))]

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def batch(self, count: int) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        while len(made) < count:
            made += self._one()
        return made[:count]

    def _one(self) -> list[dict[str, Any]]:
        """A request with its samples."""
        draw = self.random
        text = draw.choice(TEXTS)
        prompt = self._tokens(draw.choice(ASKS) + text)
        new = draw.choice([1, 5, 20, 40, 60])
        fields: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": new,
            "adapter": draw.choice(self._sources),
            "sampling": self._sampling(),
            "tenant": draw.choice(["", "other"]),
            "logprobs": draw.random() < 0.5,
            "ignore_eos": draw.random() < 0.3,
            "use_prefix_cache": draw.random() < 0.8,
        }
        if fields["logprobs"]:
            fields["top_logprobs"] = draw.choice([0, 0, 3])
        if draw.random() < 0.1:
            fields["prompt_logprobs"] = True
        if draw.random() < 0.3:
            fields["stop_token_ids"] = draw.sample(prompt, 2)
        if draw.random() < 0.2:
            fields["min_tokens"] = draw.randrange(new + 1)
        if draw.random() < 0.25:
            fields["constraint"] = draw.choice(CONSTRAINTS)
        if draw.random() < 0.4:
            expected = self._tokens(text)
            for _ in range(draw.randrange(4)):
                expected[draw.randrange(len(expected))] = draw.randrange(100, 40000)
            fields["prediction"] = expected
        request = SequenceRequest(**fields)
        samples = draw.choice([1, 1, 1, 2, 3])
        further = [sample_request(request, index) for index in range(1, samples)]
        return [
            {name: getattr(each, name) for name in SequenceRequest.__struct_fields__}
            for each in (request, *further)
        ]

    def _sampling(self) -> SamplingParams:
        draw = self.random
        temperature = draw.choice([0.0, 0.0, 0.2, 0.7, 1.0, 1.5])
        options: dict[str, Any] = {"temperature": temperature, "seed": draw.randrange(1 << 40)}
        if draw.random() < 0.3:
            options |= {"top_k": draw.choice([1, 5, 50]), "top_p": draw.choice([0.3, 0.9, 1.0])}
        if draw.random() < 0.15:
            options["min_p"] = 0.1
        if draw.random() < 0.3:
            options |= {
                "repetition_penalty": draw.choice([1.0, 1.1, 0.8]),
                "presence_penalty": draw.choice([0.0, 0.5]),
                "frequency_penalty": draw.choice([0.0, -0.4, 0.6]),
            }
        if draw.random() < 0.1:
            options["logit_bias"] = {
                draw.randrange(40000): draw.uniform(-5, 9) for _ in range(3)
            }
        return SamplingParams(**options)


def differ(request: dict[str, Any], one: Answer, other: Answer) -> bool:
    """Whether a caller is told other things, to the bit.

    Two things are a matter of time, with speculation or without: how many tokens a cancelled
    answer has, so that only as many are compared as both have; and whether a constraint that is
    complete with the very last token of `max_tokens` says so in time, so that the answer ends
    with ``stop`` and not ``length``.
    """
    told = [
        (a.tokens, a.logprobs, [top for each in a.outputs for top in each.top_logprobs or ()])
        for a in (one, other)
    ]
    if "cancelled" in (one.finish, other.finish):
        pairs = zip(*told, strict=True)
        return any(a != b for each in pairs for a, b in zip(*each, strict=False))
    rest = [(a.prompt_logprobs, a.finish, a.error) for a in (one, other)]
    if request["constraint"] is not None and len(one.tokens) == request["max_tokens"]:
        rest = [(a.prompt_logprobs, a.error) for a in (one, other)]
    return told[0] != told[1] or rest[0] != rest[1]


def run_both(
    harness: EngineHarness,
    requests: list[dict[str, Any]],
    blocks: int | None,
    cancels: dict[int, int],
) -> tuple[list[Answer], list[Answer], int, int]:
    """Answers without drafts and with them, and the draft tokens accepted and rejected. All
    adapters have to be loaded again for the second."""
    harness.reconfigure(kv_blocks=blocks)
    speculation, harness.scheduler.speculation = harness.scheduler.speculation, None
    plain = harness.run(requests, cancels)
    for used in {r["adapter"].weights_digest for r in requests if r["adapter"]}:
        harness.tell(Evict(0, used))
    harness.reconfigure(kv_blocks=blocks)
    harness.scheduler.speculation = speculation
    drafted = harness.run(requests, cancels)
    outputs = [output for answer in drafted for output in answer.outputs]
    accepted, rejected = (
        sum(getattr(output, name) for output in outputs) for name in ("accepted", "rejected")
    )
    return plain, drafted, accepted, rejected


def compare(harness: EngineHarness, base: Path, count: int) -> tuple[int, int, int]:
    """Compare ``count`` requests; return how many differ, and the draft tokens accepted and
    rejected."""
    speculation = harness.scheduler.speculation
    assert speculation is not None
    speculation.times = FreeSteps([(1, 1.0)])
    requests = Requests(base, SEED)
    different = accepted = rejected = done = 0
    while done < count:
        batch = requests.batch(min(BATCH, count - done))
        longest = max(len(r["prompt"]) + r["max_tokens"] for r in batch)
        few = -(-longest // 16) + 12 if requests.random.random() < 0.33 else None
        cancels = {
            at: requests.random.randrange(1, 20)
            for at in range(len(batch))
            if requests.random.random() < 0.05
        }
        plain, drafted, right, wrong = run_both(harness, batch, few, cancels)
        for request, one, other in zip(batch, plain, drafted, strict=True):
            if differ(request, one, other):
                different += 1
                ends = one.finish, other.finish
                print("differs:", request, one.tokens, other.tokens, ends, sep="\n  ")
        done, accepted, rejected = done + len(batch), accepted + right, rejected + wrong
        if done % (8 * BATCH) == 0 or done >= count:
            drafts = f"drafts: {accepted} right, {rejected} wrong"
            print(f"{done} requests, {different} differ; {drafts}", flush=True)
    return different, accepted, rejected


def test_no_answer_differs_in_a_bit(native: EngineHarness, base_folder: Path) -> None:
    different, accepted, rejected = compare(native, base_folder, 2 * BATCH)
    assert not different
    assert min(accepted, rejected) > 2 * BATCH, "hardly anything was drafted"


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_none_of_many_answers_differs_in_a_bit(
    native: EngineHarness, base_folder: Path
) -> None:
    different, accepted, rejected = compare(native, base_folder, MANY)
    assert not different
    assert min(accepted, rejected) > MANY


BUGS: Final = {
    "every position draws with the same random number": (
        model_runner,
        "position=sequence.position + row.drafted",
        "position=sequence.position",
    ),
    "penalties do not count the draft": (
        model_runner,
        "return seen and seen.after(self.sequence.draft[: self.drafted])",
        "return seen",
    ),
    "a refused token's row is taken": (
        model_runner,
        "return last.drafted + 1 == self.drafted and last.accepted",
        "return last.drafted + 1 == self.drafted",
    ),
    "a constraint is given the draft, not the token": (
        model_runner,
        "chosen = {sequence: row.into.token or 0 for sequence, row in rows.items()}",
        "chosen = {\n"
        "            sequence: (*row.sequence.draft[row.drafted :], row.into.token or 0)[0]\n"
        "            for sequence, row in rows.items()\n"
        "        }",
    ),
    "a constraint's further rows are taken whatever was sampled": (
        model_runner,
        "                and row.accepted\n",
        "                and row.drafted < len(row.sequence.draft)\n",
    ),
}


# A refused token's K and V that are kept: `tests.unit.server.engine.test_histories`.
@pytest.mark.verify
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(native: EngineHarness, base_folder: Path, bug: str) -> None:
    module, right, wrong = BUGS[bug]
    with planted(module, right, wrong):
        different, *_ = compare(native, base_folder, 8 * BATCH)
    assert different


@pytest.mark.parametrize(("wanted", "found"), [("off", False), ("auto", False), ("on", None)])
def test_a_backend_whose_rows_depend_on_the_batch_does_not_speculate(
    base_folder: Path, cache_dir: Path, wanted: str, found: bool | None
) -> None:
    config = start(base_folder, cache_dir, backend="torch", speculation=wanted)
    chosen: Any = SimpleNamespace(invariant=False, name="torch")
    if found is None:
        with pytest.raises(BackendUnavailable, match="--speculation auto"):
            may_speculate(config, chosen)
    else:
        assert may_speculate(config, chosen) is found
    chosen.invariant = True
    assert may_speculate(config, chosen) is (wanted != "off")


async def test_a_server_takes_predictions_and_counts_them(
    cache_dir: Path, tmp_path: Path
) -> None:
    """The same answers as without, over both APIs, and fewer steps."""
    code = TEXTS[0]
    chat: Any = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": f"Repeat this:\n{code}"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    flags = ("--backend", "native", "--speculation", "on")
    async with (
        running_server(tmp_path / "data", cache_dir, *flags) as server,
        httpx.AsyncClient(base_url=f"http://{server.openai}", trust_env=False) as client,
    ):

        async def ask(**more: Any) -> Any:
            answer = await client.post(
                "/v1/chat/completions", json={**chat, **more}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            return answer.json()

        plain = await ask()
        expected = plain["choices"][0]["message"]["content"]
        predicted = await ask(
            prediction={"type": "content", "content": expected}, use_prefix_cache=False
        )
        assert predicted["choices"] == plain["choices"]
        # How long drafts are depends on what steps cost here, so these are not exact numbers.
        over_http = predicted["usage"]["completion_tokens_details"][
            "accepted_prediction_tokens"
        ]
        assert over_http > 0
        assert predicted["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
        over_grpc: Any = {
            "messages": {"messages": chat["messages"]},
            "stopping": {"max_tokens": 40},
            "sampling": {"temperature": 0},
            "use_prefix_cache": False,
        }
        whole = await server.generate(**over_grpc, prediction=expected)
        assert whole.text == expected
        assert whole.usage.accepted_prediction_tokens > 0
        names = (
            "veneer_speculation_drafted_tokens_total",
            "veneer_speculation_accepted_tokens_total",
        )
        drafted, accepted = [sum(found.values()) for found in await server.scrape(*names)]
        assert drafted >= accepted >= over_http + whole.usage.accepted_prediction_tokens
        too_long = await client.post(
            "/v1/chat/completions",
            json={**chat, "prediction": {"type": "content", "content": "word " * 50_000}},
        )
        assert too_long.status_code == 400
        assert "prediction" in too_long.text
