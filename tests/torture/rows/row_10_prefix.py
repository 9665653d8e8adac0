"""Row 10: a name is replaced again and again while requests share a prefix.

After each replace, a request continues the answer of the old weights: none of it may be found
in the prefix cache. Then the request is repeated (all of it must be found), and repeated
without the cache. The log-probabilities of the three answers must agree within 1e-4, in
float32, and with PEFT. Meanwhile another name and the base get the same requests. In exact mode
nothing is cached, and all answers are bit-identical whatever else is in the batch.

This is for torch in float32. The native kernels, in each supported instruction set, use the
prefix cache too. Their answers are still bit-identical, even to the answers of an engine that
computes one request at a time.

All of this runs on a tiny Llama, served in this process over real sockets. Isolation scopes are
tested in the engine, since no caller can choose one.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from veneer_registry.format import read_adapter
from veneer_server.sizing.memory_plan import BLOCK_TOKENS

from tests.engine_harness import source
from tests.server_harness import read_files, request, upload_messages
from tests.tiny_llama import VOCABULARY, make_lora, make_tiny_llama
from tests.torture.alone_reference import AloneReference
from tests.torture.churn_record import Attempt, Content
from tests.torture.forms import TORCH, Form, forms
from tests.torture.in_process import InProcess, in_process
from tests.torture.isolation import Case
from tests.torture.peft_reference import BOUND, PeftReference
from tests.torture.planted_isolation import (
    PLANTED,
    not_exact,
    prefixes_by_name,
    prefixes_without_scope,
)
from tests.torture.row import Control, Outcome, Scale
from tests.torture.tiny_engine import tiny_engine

ROW = 10
TITLE = "prefix cache over replaces"
BAR = f"equal to a cold cache within {BOUND:.0e}, bitwise in exact mode; 0 hits across"

PREFIX: Final = 3 * BLOCK_TOKENS + 5
NEW_TOKENS: Final = BLOCK_TOKENS + 4
NAMES: Final = ("replaced", "beside")


@dataclass(slots=True)
class Prefixes:
    """The prefixes that may be found in the cache: all that the same weights have computed."""

    computed: dict[str, list[list[int]]] = field(default_factory=lambda: defaultdict(list))

    def most(self, digest: str, prompt: list[int]) -> int:
        """Return how many tokens of ``prompt`` these weights ("" is the base) may find at
        most."""
        longest = max((_common(prompt, old) for old in self.computed[digest]), default=0)
        return min(longest, len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    def add(self, digest: str, prompt: list[int], answer: list[int]) -> None:
        """Add an answer, without its last token, which is never computed."""
        self.computed[digest].append([*prompt, *answer[:-1]])


def _common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass(slots=True)
class Found:
    """Results of a run, and its hits in the cache."""

    failures: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    answers: int = 0
    hits: int = 0
    across: int = 0
    worst: float = 0.0


def run(scale: Scale) -> Outcome:
    """Run with the prefix cache, in exact mode, and across scopes."""
    base = make_tiny_llama(scale.work / "base", seed=scale.seed)
    replaces = scale.pick(25, 200)
    cached = _run(scale, base, replaces, exact=False)
    exact = _run(scale, base, scale.pick(8, 200), exact=True)
    reference = PeftReference(base)
    differences = reference.differences(cached.cases + exact.cases)
    failures = [*cached.failures, *exact.failures, *_scopes(scale)]
    failures += [f"PEFT does not agree: {line}" for line in differences if line]
    native, wrong = _native(scale, base, scale.pick(12, 200))
    failures += wrong
    return Outcome(
        figure=(
            f"{replaces} replaces, {cached.answers} answers: {cached.across} tokens found "
            f"across weights, {cached.hits} of their own, within {cached.worst:.0e} of a cold "
            f"cache and {reference.worst:.0e} of PEFT; exact mode, {exact.answers} answers: "
            f"{exact.worst:.0e} apart, {exact.hits + exact.across} tokens found{native}"
        ),
        bar=BAR,
        failures=tuple(failures),
    )


def _native(scale: Scale, base: Path, replaces: int) -> tuple[str, list[str]]:
    """Run the native forms; return the figure and the failures."""
    figure, failures = "", []
    for form in forms():
        if not form.native:
            continue
        found = _run(scale, base, replaces, exact=False, form=form)
        reference = AloneReference(base, form, form.cache(scale.work))
        lines = [*found.failures, *reference.differences(found.cases)]
        failures += [f"{form.name}: {line}" for line in lines if line]
        figure += (
            f"; {form.name}, {found.answers} answers: {found.across} tokens found across, "
            f"{found.hits} of their own, {found.worst:.0e} from a cold cache, "
            f"{reference.judged} equal to one request at a time"
        )
    return figure, failures


def controls(scale: Scale) -> Iterator[Control]:
    """Plant cache keys that omit something, and an exact mode that is not exact."""
    base = make_tiny_llama(scale.work / "base", seed=scale.seed)
    without = "prefix cache keyed without the weights"
    for planted, bug in (
        (without, PLANTED[without].bug),
        ("keyed by the name", prefixes_by_name),
    ):
        for form in forms()[:2]:
            yield _control(
                f"{planted}, {form.name}",
                bug,
                functools.partial(_failures, scale, base, 6, exact=False, form=form),
            )
    yield _control("keyed without the scope", prefixes_without_scope, lambda: _scopes(scale))
    yield _control(
        "exact mode that computes sequences together",
        not_exact,
        functools.partial(_failures, scale, base, 4, exact=True),
    )


def _control(
    planted: str,
    bug: Callable[[], AbstractContextManager[None]],
    check: Callable[[], list[str]],
) -> Control:
    with bug():
        failures = check()
    return Control(planted, failures[0] if failures else "")


# ---------------------------------------------------------------------------- the check


def _failures(
    scale: Scale, base: Path, replaces: int, *, exact: bool, form: Form = TORCH
) -> list[str]:
    return _run(scale, base, replaces, exact=exact, form=form).failures


def _run(scale: Scale, base: Path, replaces: int, *, exact: bool, form: Form = TORCH) -> Found:
    folder = Path(tempfile.mkdtemp(dir=scale.work))
    return asyncio.run(run_replaces(scale, base, folder, replaces, exact=exact, form=form))


async def run_replaces(
    scale: Scale, base: Path, folder: Path, replaces: int, *, exact: bool, form: Form
) -> Found:
    found, known = Found(), Prefixes()
    generator = scale.random("prefix")
    prefix = [generator.randrange(3, VOCABULARY) for _ in range(PREFIX)]
    contents: dict[str, Content] = {}
    settings = {"exact": "true"} if exact else {"kv_cache_bytes": "16MiB"}
    bound = 0.0 if exact or form.native else BOUND
    async with in_process(base, folder, form, **settings) as server:

        async def publish(name: str, content: Content) -> None:
            contents[name] = content
            await server.adapters.UploadAdapter(
                upload_messages(read_files(content.folder), name, allow_replace=True)
            )

        made = [_content(folder / "beside", scale.seed)]
        await publish("beside", made[0])
        said: list[int] = []
        for number in range(replaces):
            if number % 5 == 4:  # back to earlier weights, whose prefixes are cached
                content = generator.choice(made)
            else:
                content = _content(folder / f"content-{number}", generator.getrandbits(32))
                made.append(content)
            await publish("replaced", content)
            where = f"replace {number}"
            ask = _Asker(server, found, known, where, [*prefix, *said], exact, bound)
            said = await ask.all(contents)
        await server.end()
    return found


def _content(folder: Path, seed: int) -> Content:
    make_lora(folder, seed=seed)
    return Content(folder, read_adapter(folder, None).weights_digest)


@dataclass(slots=True)
class _Asker:
    """The requests after one replace, all for the same prompt."""

    server: InProcess
    found: Found
    known: Prefixes
    where: str
    prompt: list[int]
    exact: bool
    bound: float

    async def all(self, contents: dict[str, Content]) -> list[int]:
        """Send and compare the requests; return the answer of the replaced name."""
        content = contents["replaced"]
        first = await self._ask("replaced", content)
        again, beside, bare = await asyncio.gather(
            self._ask("replaced", content),
            self._ask("beside", contents["beside"]),
            self._ask("", None),
        )
        cold = await self._ask("replaced", content, use_prefix_cache=False)
        whole = 0 if self.exact else (len(self.prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        if (found := again.usage.cached_prompt_tokens) != whole:
            self._fail(f"asked again, {found} tokens were found, not {whole}")
        if cold.usage.cached_prompt_tokens:
            self._fail("something was found without the cache")
        for what, answer in (("first", first), ("second", again)):
            self._same(what, answer, cold)
        others = [list(other.token_ids) for other in (beside, bare)]
        if content.digest != contents["beside"].digest and list(cold.token_ids) in others:
            self._fail("other weights give the same answer: this shows nothing")
        return list(cold.token_ids)

    async def _ask(self, name: str, content: Content | None, **fields: Any) -> Any:
        digest = content.digest if content is not None else ""
        most = 0 if self.exact else self.known.most(digest, self.prompt)
        answer = await self.server.inference.Generate(
            request(
                token_ids=self.prompt,
                adapter=name,
                stopping={"max_tokens": NEW_TOKENS, "ignore_eos": True},
                output={"logprobs": True},
                **fields,
            )
        )
        tokens = list(answer.token_ids)
        self.found.answers += 1
        across = max(0, answer.usage.cached_prompt_tokens - most)
        self.found.hits += answer.usage.cached_prompt_tokens - across
        self.found.across += across
        if across:
            self._fail(f"{name or 'base'} found {across} tokens that it had not computed")
        if (told := answer.provenance.weights_digest) != digest:
            self._fail(f"{name or 'base'} was answered by {told[:12]}, not {digest[:12]}")
        self.known.add(digest, self.prompt, tokens)
        attempt = Attempt(self.found.answers, name, self.prompt, NEW_TOKENS, 0.0, None)
        attempt.tokens = tokens
        attempt.logprobs = [entry.logprob for entry in answer.logprobs]
        self.found.cases.append(Case(attempt, content))
        return answer

    def _same(self, what: str, answer: Any, cold: Any) -> None:
        """Compare two answers as long as they have the same history. If greedy tokens differ,
        each is a likeliest one, and the rest is a different text."""
        pairs = list(zip(answer.logprobs, cold.logprobs, strict=True))
        parts = (at for at, (a, b) in enumerate(pairs) if a.token_id != b.token_id)
        end = next(parts, None)
        apart = max(
            abs(a.logprob - b.logprob) for a, b in pairs[: None if end is None else end + 1]
        )
        self.found.worst = max(self.found.worst, apart)
        if not self.bound and end is not None:
            self._fail(f"token {end} of the {what} answer is not that of a cold cache")
        if not apart <= self.bound:
            self._fail(f"the {what} answer is {apart:.1e} from a cold cache's")

    def _fail(self, line: str) -> None:
        self.found.failures.append(f"{self.where}: {line}")


def _scopes(scale: Scale) -> list[str]:
    """Alternate two scopes and two adapters: each must find its own prefix and no other."""
    folder = Path(tempfile.mkdtemp(dir=scale.work))
    adapters = {n: source(make_lora(folder / n, seed=i)) for i, n in enumerate(NAMES)}
    prompt = list(range(3, 3 + PREFIX))
    whole = (PREFIX - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    failures = []
    with tiny_engine(folder) as harness:
        keys = [(scope, name) for scope in ("one", "other") for name in ("", *NAMES)]
        for expected in (0, whole):
            for scope, name in keys:
                asked = {"prompt": prompt, "adapter": adapters.get(name), "cache_scope": scope}
                (answer,) = harness.run([asked])
                found = answer.outputs[0].cached_tokens
                if found != expected:
                    who = f"{name or 'base'} in scope {scope!r}"
                    failures.append(f"{who} found {found} tokens, not {expected}")
    return failures
