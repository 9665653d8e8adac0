"""Send random requests over gRPC and HTTP, and compare each answer with the expected one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import aiohttp
from veneer_server.serving.samples import sample_seed

from tests.torture.doors.callers import (
    Answer,
    Callers,
    Case,
    Score,
    WrongShape,
    narrow,
)
from tests.torture.doors.scripted import (
    EMOJI,
    EOS,
    STOPS,
    Asked,
    Script,
    ScriptedEngine,
    expected,
    offsets,
)
from tests.unit.server.rpc.front_harness import Front, make_adapter, running

ADAPTERS: Final = ("", "one", "two", "templated")
TEMPLATE: Final = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
)
TEXTS: Final = ("The sea is", "Say 😀", "👩‍💻 and", "x", "é", "Hello there, 🇫🇷")
AT_ONCE: Final = 8
MOST_FAILURES: Final = 20


@dataclass(slots=True)
class Report:
    """Counts of a run.

    Attributes:
        cut: number of choices that end within a character; ``stopped``: at a stop string.
    """

    cases: int = 0
    choices: int = 0
    tokens: int = 0
    cut: int = 0
    stopped: int = 0
    failures: list[str] = field(default_factory=list)


def cases(rng: random.Random, count: int, script: Script) -> Iterator[Case]:
    """Yield random valid requests, all with different seeds."""
    for number, seed in enumerate(rng.sample(range(1 << 48), count)):
        chat = rng.random() < 0.4
        prompts: list[str | tuple[int, ...]] = []
        messages: list[tuple[str, str]] = []
        if chat:
            for at in range(rng.choice((1, 1, 3))):
                messages.append(("assistant" if at % 2 else "user", _text(rng)))
            if rng.random() < 0.3:
                messages.insert(0, ("system", _text(rng)))
        else:
            ids = rng.random() < 0.4
            for _ in range(rng.choice((1, 1, 1, 3))):
                prompts.append(_ids(rng, script) if ids else _text(rng))
        yield Case(
            number=number,
            prompts=tuple(prompts),
            messages=tuple(messages),
            adapter=rng.choice(ADAPTERS),
            max_tokens=rng.randint(1, 24),
            stops=tuple(rng.sample(STOPS, rng.choice((0, 0, 1, 1, 2, 4)))),
            stop_token_ids=tuple(_stop_ids(rng, script)),
            ignore_eos=rng.random() < 0.3,
            seed=seed,
            temperature=rng.choice((0.0, 0.8, 1.0)),
            n=rng.choice((1, 1, 1, 2, 3)),
            logprobs=rng.choice((None, None, 0, 1, 5)),
            echo=not chat and rng.random() < 0.4,
            usage_as_it_comes=rng.random() < 0.3,
        )


def _text(rng: random.Random) -> str:
    return rng.choice(TEXTS) + "".join(rng.sample(EMOJI, rng.randrange(3)))


def _ids(rng: random.Random, script: Script) -> tuple[int, ...]:
    """Make a prompt that may begin and end within a character."""
    found = [token for _ in range(rng.randint(1, 4)) for token in script.piece(rng)]
    return tuple(found[rng.randrange(len(found)) :])


def _stop_ids(rng: random.Random, script: Script) -> list[int]:
    if rng.random() < 0.7:
        return []
    return [EOS, *script.piece(rng)][rng.randrange(2) : 3]


# --------------------------------------------------------------------------- judgement


class _Judge:
    def __init__(self, script: Script, engine: ScriptedEngine) -> None:
        self._script = script
        self._engine = engine

    def problems(self, case: Case, answers: dict[str, Answer], report: Report) -> Iterator[str]:
        made = self._made(case)
        if isinstance(made, str):
            yield made
            return
        wanted = [
            expected(one, self._script.tokenizer, case.stops, case.stop_token_ids)
            for one in made
        ]
        firsts = made[:: case.n]
        usage = (
            sum(len(one.prompt) for one in firsts),
            sum(one.count for one in wanted),
            sum(one.cached for one in firsts),
        )
        report.choices += len(wanted)
        report.tokens += usage[1]
        report.cut += sum(one.text.endswith("\ufffd") for one in wanted)
        report.stopped += sum(
            one.finish == "stop" and (one.count < len(its.tokens) or its.ended == "length")
            for one, its in zip(wanted, made, strict=True)
        )
        for form, answer in answers.items():
            if answer.usage != usage:
                yield f"{form}: usage is {answer.usage}, not {usage}"
            if sorted(answer.choices) != list(range(len(wanted))):
                yield f"{form}: choices {sorted(answer.choices)} of {len(wanted)}"
                continue
            for at, want in enumerate(wanted):
                found = answer.choices[at]
                text = self._echoed(case, made[at], at) + want.text
                if found.text != text:
                    yield f"{form}, choice {at}: text {found.text!r}, not {text!r}"
                if found.finish != want.finish:
                    yield f"{form}, choice {at}: ended by {found.finish}, not {want.finish}"
                scores = self._scores(case, form, made[at], want.count)
                if found.scores != scores:
                    yield f"{form}, choice {at}: {_apart(found.scores, scores)}"
                if form.startswith("HTTP") and not case.chat:
                    places = self._offsets(case, made[at], at, want.count)
                    pairs = zip(found.offsets, places, strict=False)
                    wrong = any(place not in (None, got) for got, place in pairs)
                    if wrong or len(found.offsets) != len(places):
                        yield f"{form}, choice {at}: offsets {found.offsets}, not {places}"

    def _made(self, case: Case) -> list[Asked] | str:
        """Return the engine's output by choice, or a problem if the APIs sent it different
        requests."""
        made: list[Asked] = []
        samples = []
        for index in range(case.n):
            by_prompt: dict[tuple[int, ...], list[Asked]] = {}
            for one in self._engine.asked.pop(sample_seed(case.seed, index), []):
                by_prompt.setdefault(one.prompt, []).append(one)
            for same in by_prompt.values():
                if any(one.fields != same[0].fields for one in same):
                    return f"the engine was asked for {[one.fields for one in same]}"
            samples.append({prompt: same[0] for prompt, same in by_prompt.items()})
        if case.chat:
            if any(len(found) != 1 for found in samples):
                return f"the doors made {[list(found) for found in samples]} of the messages"
            return [next(iter(found.values())) for found in samples]
        for prompt in case.prompts:
            for found in samples:
                ids = self._prompt_ids(prompt)
                if ids not in found:
                    return f"{prompt!r} is {ids}, but the engine got {list(found)}"
                made.append(found[ids])
        return made

    def _prompt_ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        return tuple(self._script.tokenizer.encode(prompt, add_special_tokens=True))

    def _echoed(self, case: Case, made: Asked, at: int) -> str:
        if not case.echo:
            return ""
        prompt = case.prompts[at // case.n]
        if isinstance(prompt, str):
            return prompt
        data = b"".join(map(self._script.tokenizer.token_bytes, made.prompt))
        return data.decode(errors="replace")

    def _offsets(self, case: Case, made: Asked, at: int, count: int) -> list[int | None]:
        if case.logprobs is None:
            return []
        tokenizer, echoed = self._script.tokenizer, self._echoed(case, made, at)
        head = offsets(made.prompt, tokenizer, 0) if case.echo else []
        return head + offsets(made.tokens[:count], tokenizer, len(echoed))

    def _scores(self, case: Case, form: str, made: Asked, count: int) -> list[Score]:
        if case.logprobs is None:
            return []
        label = self._script.tokenizer.token_label
        given = list(zip(made.tokens, made.logprobs, made.tops, strict=True))[:count]
        scores: list[Score] = []
        if case.echo:
            if form.startswith("HTTP"):  # which includes the first token
                scores.append((label(made.prompt[0]), None, {}))
            parts = made.prompt[1:], made.prompt_logprobs, made.prompt_tops
            given = [*zip(*parts, strict=True), *given]
        for token, logprob, likely in given:
            tops = {label(one): cast(float, narrow(score)) for one, score in likely}
            if not case.chat:
                tops[label(token)] = cast(float, narrow(logprob))
            scores.append((label(token), narrow(logprob), tops))
        return scores


def _apart(found: Sequence[Score], wanted: Sequence[Score]) -> str:
    """Describe the first difference between two lists of scores."""
    for at, (one, other) in enumerate(zip(found, wanted, strict=False)):
        if one != other:
            return f"score {at} is {one}, not {other}"
    return f"{len(found)} scores, not {len(wanted)}"


# --------------------------------------------------------------------------------- run


class Doors:
    """Sends random requests over each API of a running front, whole and streamed."""

    def __init__(self, front: Front, http: aiohttp.ClientSession, script: Script) -> None:
        self._callers = Callers(front.inference, http)
        self._script = script
        self._judge = _Judge(script, cast(ScriptedEngine, front.engine))

    async def ask(self, rng: random.Random, count: int, *, until_one: bool = False) -> Report:
        """Send ``count`` requests; if ``until_one``, stop at the first failure."""
        report = Report()
        todo = cases(rng, count, self._script)
        workers = (self._work(todo, report, until_one) for _ in range(AT_ONCE))
        await asyncio.gather(*workers)
        return report

    async def _work(self, todo: Iterator[Case], report: Report, until_one: bool) -> None:
        most = 1 if until_one else MOST_FAILURES
        for case in todo:
            if len(report.failures) >= most:
                return
            try:
                answers = await self._callers.all(case)
                problems = list(self._judge.problems(case, answers, report))
            except WrongShape as error:
                problems = [str(error)]
            report.cases += 1
            report.failures += [f"{problem} ({case})" for problem in problems]


@asynccontextmanager
async def open_doors(base: Path, folder: Path, rng: random.Random) -> AsyncIterator[Doors]:
    """Run a front with adapters over the scripted engine, in ``folder``, which exists."""
    ScriptedEngine.script_of = script = Script(base)
    ScriptedEngine.splits = random.Random(rng.random())
    flags = {"openai_listen": "127.0.0.1:0", "max_queue": "1000"}
    async with running(
        base, folder / "cache", folder / "data", engine=ScriptedEngine, **flags
    ) as front:
        for at, name in enumerate(ADAPTERS[1:]):
            template = TEMPLATE if name == "templated" else None
            adapter = make_adapter(folder / name, seed=at, template=template)
            await front.push(adapter, name)
        async with aiohttp.ClientSession(f"http://{front.addresses['openai']}") as http:
            yield Doors(front, http, script)
