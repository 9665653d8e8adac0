"""Attack a real server while normal callers use it: ``make attacks``.

``python -m tests.attacks`` runs each module of `tests.attacks.cases` for some seconds against
the real server with the bundled base, along with 4 streams and a caller of small requests, and
checks that:

- all other callers are answered, and health stays SERVING
- the server's processes use at most 64 MB more memory than with the normal callers alone
- the attack itself is answered as documented
- the attack leaves nothing behind: no sequence, no lease, no corrupted engine state
- with ``--times``: the longest gap of the streams exceeds that of a control run without the
  attack by at most 50 ms

The attack runs in a separate process at the lowest priority, since an attacker on another
machine would use this one's CPU only through the server. Exit status 1 if an attack succeeds.

``--busy`` does the same while another process computes without pause.

An attack that succeeds is repeated once, with the same seed, on a fresh server; only if it
succeeds again has the server failed. What held only then is printed as such.

``--bugs`` runs each attack that has a `Bug` against a server with that bug, and exits with
status 1 if an attack does not fail then, with any of three seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import cast

import psutil
from veneer_proto.v1 import inference_pb2, server_pb2
from veneer_server.access.edit_keys import add_key

from tests import seeds, summary
from tests.attacks.case import KEYS, AttackModule, Bug, Target
from tests.attacks.planting import planting
from tests.attacks.watch import Memory, Noticed, notice
from tests.places import cache_dir
from tests.server_harness import Server, read_files, running_server
from tests.torture.cancels import all_free
from tests.torture.tenants import edited_server

CASES = Path(__file__).parent / "cases"
ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
NAMES = ("chat", "code", "sql")
"""Adapters that the normal callers use."""
WEIGHTS = "adapter_model.safetensors"
HANGS_S = 300.0
"""Seconds after which an attack counts as hung; a loaded machine may take most of them."""
TARGET = "target"
"""The attacker's adapter."""
KV_BYTES, SHORT_KV_BYTES = 256 << 20, 128 << 20
"""Size of the KV cache for the whole attacks, and for the short ones. It is filled before the
first attack, so that planned memory does not count as growth; filling takes up to a minute
without AMX."""
GAP_S = 0.050
CONTROLS, QUIET_S = 4, 0.050
"""The control run is repeated, at most ``CONTROLS`` times, until no gap exceeds ``QUIET_S``."""
MEMORY = 64 << 20
TRIES, BUG_SEEDS = 2, 3
"""How often an attack may run until it does no harm, and a planted bug until it shows."""
CLEAR_S = 30.0
"""Seconds after which an attack must have left nothing behind."""


def found_cases() -> list[str]:
    """Return the names of the attacks, from their file names."""
    return sorted(path.stem for path in CASES.glob("*.py") if path.stem != "__init__")


def case(name: str) -> AttackModule:
    return cast(AttackModule, importlib.import_module(f"tests.attacks.cases.{name}"))


@dataclass(slots=True)
class Result:
    """Result of one attack: figures to print, and failures.

    Attributes:
        attacker_cpu_s: CPU seconds that the attacker used.
        earlier: the failures of the run before, if this one repeats it.
    """

    name: str
    control_s: float | None
    longest_s: float
    growth: int
    answers: int
    attacker_cpu_s: float
    failures: list[str]
    earlier: list[str] = field(default_factory=list)


def attack_here(name: str, seed: int) -> None:
    """Run in the attacker's process: wait for the target, attack it, and print how answers
    differed from the documentation."""
    rng = random.Random(f"{seed} {name}")
    module = case(name)
    print("ready", flush=True)
    line = sys.stdin.readline()
    if not line:  # the run has ended early
        return
    target = json.loads(line)
    target |= {name: Path(target[name]) for name in ("work", "keys_file")}

    async def told() -> None:
        print(json.dumps(await module.attack(Target(**target, rng=rng))), flush=True)
        # Exiting takes a tenth of a second of CPU, which the other processes need.
        sys.stdin.readline()

    asyncio.run(told())


class Attackers:
    """Processes that will attack, at the lowest priority.

    Each takes a second or two to import its modules. Unless times count, the next attacker does
    so during the previous attack.
    """

    def __init__(self, names: list[str], given: argparse.Namespace) -> None:
        self._names = names
        self._given = given
        self._started: dict[str, asyncio.subprocess.Process] = {}

    async def take(self, name: str, seed: int) -> asyncio.subprocess.Process:
        """Return the attacker of that name and seed, ready to be told its target."""
        await self._start(name, seed)
        process = self._started.pop(name)
        assert process.stdout is not None
        await process.stdout.readline()
        return process

    async def start_next(self, name: str) -> None:
        """Start the attacker after that one, if there is one."""
        following = self._names[self._names.index(name) + 1 :]
        if following and not self._given.times:
            await self._start(following[0], self._given.seed)

    async def _start(self, name: str, seed: int) -> None:
        if name not in self._started:
            self._started[name] = await asyncio.create_subprocess_exec(
                "nice",
                "-n",
                "19",
                sys.executable,
                "-m",
                "tests.attacks",
                *("--attack", name, "--seed", str(seed)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=1 << 24,
            )


async def run_attack(
    server: Server,
    name: str,
    attackers: Attackers,
    given: argparse.Namespace,
    seed: int,
    keys: dict[str, str],
    keys_file: Path,
) -> Result:
    """Run one attack along with normal callers, after a control run without the attack."""
    adapters = ["", *NAMES]
    with tempfile.TemporaryDirectory() as work:
        target = {
            "grpc": server.address,
            "openai": server.openai,
            "metrics": server.metrics,
            "seconds": given.seconds,
            "full": given.full,
            "times": given.times,
            "work": work,
            "adapter": TARGET,
            "keys": keys,
            "keys_file": str(keys_file),
        }
        attacker = await attackers.take(name, seed)
        assert attacker.stdin is not None
        assert attacker.stdout is not None
        # Without times there is nothing to compare.
        control = await _control(server, adapters, given.seconds) if given.times else None
        began_cpu, attacker_cpu_s = sum(psutil.Process(attacker.pid).cpu_times()[:2]), 0.0
        until, noticed = asyncio.Event(), Noticed()
        callers = asyncio.create_task(notice(server, until, adapters, noticed))
        # Memory of the normal callers, such as their adapters' matrices, is not growth.
        await noticed.streaming.wait()
        memory = Memory(server.process.pid)
        watching = asyncio.gather(callers, memory.watch(until))
        try:
            async with asyncio.timeout(10 * given.seconds + HANGS_S):
                attacker.stdin.write(json.dumps(target).encode() + b"\n")
                await attackers.start_next(name)
                said = await attacker.stdout.readline()
                until.set()
                attacker_cpu_s = sum(psutil.Process(attacker.pid).cpu_times()[:2]) - began_cpu
                _, errors = await attacker.communicate(b"")  # closes its input
        except TimeoutError:
            attacker.kill()
            said, errors = b"", b"the attack did not end: somebody was not answered"
            await attacker.wait()
    until.set()
    await watching
    failures = list(noticed.unanswered)
    if attacker.returncode or not said:
        failures.append(f"the attack itself failed: {errors.decode()[-1500:]}")
    else:
        failures += json.loads(said.splitlines()[-1])
    if memory.growth > MEMORY + getattr(case(name), "LOADS", 0):
        failures.append(
            f"memory grew by {memory.growth >> 20} MB, more than {MEMORY >> 20} "
            f"({memory.largest()})"
        )
    waits = getattr(case(name), "WAITS", 0)
    if control is not None and noticed.longest > (1 + waits) * control.longest + GAP_S:
        failures.append(
            f"longest gap {noticed.longest * 1e3:.0f} ms ({noticed.worst}), "
            f"{control.longest * 1e3:.0f} without"
        )
    failures += await _left(server)
    without = None if control is None else control.longest
    return Result(
        name,
        without,
        noticed.longest,
        memory.growth,
        noticed.answers,
        attacker_cpu_s,
        failures,
    )


async def _control(server: Server, adapters: list[str], seconds: float) -> Noticed:
    """Run without an attack, after all work of the previous attack is done. Memory is measured
    as in an attack, since each measurement takes 20 ms of CPU."""
    for _ in range(CONTROLS):
        control = await _for_seconds(server, adapters, seconds)
        if control.longest < QUIET_S:
            break
    return control


async def _for_seconds(server: Server, adapters: list[str], seconds: float) -> Noticed:
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, until.set)
    noticed, memory = Noticed(), Memory(server.process.pid)
    await asyncio.gather(notice(server, until, adapters, noticed), memory.watch(until))
    return noticed


async def _fill_kv(server: Server) -> None:
    """Touch all of the KV cache, with prompts that the prefix cache keeps."""
    info = await server.about.GetServerInfo(server_pb2.GetServerInfoRequest())
    room = min(info.context_length, info.budgets.kv_cache_tokens) - 1
    for first in range(-(-info.budgets.kv_cache_tokens // room)):
        ids = [1000 + first, *range(2000, 2000 + room - 1)]
        await server.inference.Generate(
            inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=ids),
                stopping=inference_pb2.StoppingOptions(max_tokens=1),
            )
        )


def _other_weights() -> dict[str, bytes]:
    """Return files of an adapter that shares no weights with the normal callers' adapters."""
    # Imported here, since every attacker imports this module, and torch takes seconds.
    from safetensors.torch import load, save

    files = read_files(ADAPTERS / NAMES[0])
    tensors = load(files[WEIGHTS])
    return {**files, WEIGHTS: save({name: 0.5 * each for name, each in tensors.items()})}


async def _left(server: Server) -> list[str]:
    try:
        async with asyncio.timeout(CLEAR_S):
            await all_free(server)
    except (AssertionError, TimeoutError) as error:
        return [f"something is left of the attack: {error!r}"]
    return []


@dataclass(frozen=True, slots=True)
class Group:
    """Attacks that share a server.

    Attributes:
        bug: the bug planted in the server, with ``--bugs``.
    """

    flags: dict[str, str]
    keys: bool
    names: list[str]
    bug: Bug | None = None


def servers(names: list[str]) -> list[Group]:
    """Group the attacks by server: one for the attacks without flags, and one for each set of
    attacks whose flags do not contradict each other. Attacks with keys are separate."""
    groups: list[Group] = []
    for name in names:
        wanted, keys = flags_of(name), getattr(case(name), "KEYS", False)
        for group in groups:
            fits = all(group.flags.get(flag, value) == value for flag, value in wanted.items())
            if group.keys == keys and bool(group.flags) == bool(wanted) and fits:
                group.flags.update(wanted)
                group.names.append(name)
                break
        else:
            groups.append(Group(wanted, keys, [name]))
    return groups


def with_bugs(names: list[str]) -> list[Group]:
    """Make a group for each attack that has a bug, with that bug in its server."""
    return [
        Group(flags_of(name), getattr(case(name), "KEYS", False), [name], bug)
        for name in names
        if (bug := getattr(case(name), "BUG", None)) is not None
    ]


def flags_of(name: str) -> dict[str, str]:
    """Return the attack's flags with their values."""
    flags = getattr(case(name), "FLAGS", ())
    return dict(zip(flags[::2], flags[1::2], strict=True))


@asynccontextmanager
async def _server(
    group: Group, folder: Path, cache: Path, kv_bytes: int
) -> AsyncIterator[tuple[Server, dict[str, str], Path]]:
    """Start the group's server; yield it, its keys by name, and the file of keys."""
    flags, keys, file = list(chain(*group.flags.items())), {}, folder / "keys.toml"
    if group.keys:
        keys = {
            name: add_key(file, name=name, tenant=tenant, roles=[role], expires=None).key
            for name, (tenant, role) in KEYS.items()
        }
        flags += ["--keys-file", str(file)]
    kv = ("--kv-cache-bytes", str(kv_bytes))
    with contextlib.ExitStack() as stack:
        if group.bug:
            edit = planting(group.bug)
            stack.enter_context(edited_server(edit, folder / "bug"))
        async with running_server(
            folder / "data", cache, *kv, *flags, key=keys.get("operator")
        ) as server:
            yield server, keys, file


async def run_group(
    group: Group, attackers: Attackers, given: argparse.Namespace
) -> list[Result]:
    """Run the group's attacks; replace a server that an attack has harmed.

    A result that is not as it should be is replaced by that of another try, on a fresh server:
    with the same seed for an attack, with another one to notice a planted bug.
    """
    waiting, results = [(name, 0, list[str]()) for name in group.names], []
    while waiting:
        with tempfile.TemporaryDirectory() as folder:
            kv = KV_BYTES if given.full else SHORT_KV_BYTES
            async with _server(group, Path(folder), given.cache_dir, kv) as (server, *known):
                for name in NAMES:
                    await server.push(ADAPTERS / name, name)
                await server.push_files(_other_weights(), TARGET)
                await _fill_kv(server)
                await _for_seconds(server, ["", *NAMES], 2.0)
                while waiting:
                    began = time.perf_counter()
                    name, tried, earlier = waiting.pop(0)
                    seed = given.seed + tried if given.bugs else given.seed
                    result = await run_attack(server, name, attackers, given, seed, *known)
                    result.earlier = earlier
                    _print(result, time.perf_counter() - began)
                    wrong = bool(result.failures) != given.bugs
                    again = wrong and tried + 1 < (BUG_SEEDS if given.bugs else TRIES)
                    if again:
                        waiting.insert(0, (name, tried + 1, result.failures))
                    else:
                        results.append(result)
                    if result.failures or again:
                        break
    return results


async def run_cases(groups: list[Group], given: argparse.Namespace) -> list[Result]:
    """Run attacks on shared servers."""
    attackers = Attackers([name for group in groups for name in group.names], given)
    return [result for group in groups for result in await run_group(group, attackers, given)]


@contextlib.contextmanager
def _busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _print(result: Result, seconds: float) -> None:
    without = f" ({result.control_s * 1e3:.0f} without)" if result.control_s else ""
    print(
        f"{result.name:32} {'FAILED' if result.failures else 'held':6} longest gap "
        f"{result.longest_s * 1e3:4.0f} ms{without}, memory "
        f"{result.growth / 2**20:+5.1f} MB, {result.answers} answers, "
        f"attacker's CPU {result.attacker_cpu_s:.1f} s, {seconds:.0f} s",
        flush=True,
    )
    for failure in result.failures[:8]:
        print(f"    {failure}", flush=True)


def main() -> int:
    """Run the attacks that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog="tests.attacks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the whole attacks, not the short")
    parser.add_argument("--times", action="store_true", help="judge the streams' gaps, too")
    parser.add_argument("--busy", action="store_true", help="beside a process that computes")
    parser.add_argument("--bugs", action="store_true", help="plant each attack's bug")
    parser.add_argument("--only", action="append", choices=found_cases(), default=[])
    parser.add_argument("--except", action="append", choices=found_cases(), default=[])
    parser.add_argument("--seconds", type=float, help="of each attack (3, or 15 with --full)")
    parser.add_argument("--seed", type=int, default=seeds.seed())
    parser.add_argument("--cache-dir", type=Path, default=cache_dir())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        attack_here(given.attack, given.seed)
        return 0
    given.seconds = given.seconds or (15.0 if given.full else 3.0)
    given.times = given.times or given.full
    print(f"seed {given.seed}", flush=True)
    left_out = getattr(given, "except")
    names = [name for name in given.only or found_cases() if name not in left_out]
    groups = with_bugs(names) if given.bugs else servers(names)
    with _busy_process() if given.busy else contextlib.nullcontext():
        results = asyncio.run(run_cases(groups, given))
    failed = [result.name for result in results if bool(result.failures) != given.bugs]
    if given.json:
        given.json.write_text(json.dumps([asdict(result) for result in results], indent=2))
    wrong = "bug not noticed" if given.bugs else "failed"
    for result in results:
        if result.name in failed:
            summary.add(f"FAILED attack {result.name}: {'; '.join(result.failures) or wrong}")
        elif result.earlier:
            summary.add(f"HELD ONLY REPEATED {result.name}: {'; '.join(result.earlier)}")
    repeated = [each.name for each in results if each.earlier and each.name not in failed]
    print(
        f"{len(results)} attacks, {wrong}: {', '.join(failed) or 'none'}, "
        f"held only when repeated: {', '.join(repeated) or 'none'}"
    )
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
