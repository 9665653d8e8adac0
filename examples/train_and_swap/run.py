"""From data to a live adapter, and a swap; see README.md beside this file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

from veneer_client import AsyncClient, Chat, Generation
from veneer_client.local import LocalServer
from veneer_registry.errors import AdapterNotFound
from veneer_registry.screen import Screen

HERE = Path(__file__).parent
CHAT = HERE.parent / "adapters" / "chat"

console = Screen(highlight=False, soft_wrap=True)


def main() -> None:
    """The whole example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps; fewer for a quick look")
    steps = parser.parse_args().steps
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="veneer-example-") as scratch:
        console.print("starting a server ...", style="dim")
        server = LocalServer()
        try:
            asyncio.run(show(server.address, Path(scratch), steps))
        finally:
            server.stop()
    console.print(f"{time.perf_counter() - began:.0f} s in total", style="dim")


async def show(address: str, scratch: Path, steps: int) -> None:
    """Build the data, train while serving, then swap adapters."""
    await run("veneer-train", "data", "sql", "--out", str(scratch / "data"))
    sample = json.loads((scratch / "data" / "val.jsonl").read_text("utf-8").splitlines()[0])
    question, wanted = (message["content"] for message in sample["messages"])
    console.print(f"\n[bold]{question}[/bold]\n", markup=True)
    async with AsyncClient(address) as client:
        tell("base model", await ask(client, question, ""))
        base = await run("veneer-server", "model", "path", "smollm2-135m")
        training = asyncio.create_task(
            run(
                "veneer-train",
                "train",
                str(HERE / "sql.yaml"),
                "--base",
                base,
                *("--set", f"data.train={scratch / 'data' / 'train.jsonl'}"),
                *("--set", f"output.dir={scratch / 'sql'}"),
                *("--set", f"train.steps={steps}", "--push", address, "--name", "sql"),
                *("--push-every", str(max(1, steps // 3))),
                shown=True,
            )
        )
        told = ""
        while not training.done():
            with contextlib.suppress(AdapterNotFound):  # until the first is published
                answer = await ask(client, question, "sql")
                if answer.provenance.revision != told:
                    told = answer.provenance.revision
                    tell("while it trains", answer)
            await asyncio.wait((training,), timeout=5)
        await training
        await client.push(CHAT, "chat")
        for adapter in ("sql", "chat", "sql"):
            tell(adapter, await ask(client, question, adapter))
    console.print(f"\nthe sample's reference answer: {wanted}", style="dim")


async def ask(client: AsyncClient, question: str, adapter: str) -> Generation:
    """Return a greedy answer."""
    return await client.generate(
        Chat.user(question), adapter=adapter, temperature=0, max_tokens=64
    )


def tell(who: str, answer: Generation) -> None:
    """Print the answer, which weights gave it, and how long its first token took."""
    waited = answer.provenance.timings
    text = " ".join(answer.text.split())
    console.print(f"{who:<16}", style="bold", end="")
    console.print(text[:160], markup=False)
    console.print(
        f"{'':<16}{answer.provenance.short or 'no adapter'}, "
        f"first token after {1e3 * waited.time_to_first_token_s:.0f} ms "
        f"({1e3 * waited.adapter_load_s:.0f} ms of them for the adapter)",
        style="dim",
    )


async def run(program: str, *arguments: str, shown: bool = False) -> str:
    """Run a command of this Python's environment; return its output, stripped."""
    command = str(Path(sys.executable).with_name(program))
    process = await asyncio.create_subprocess_exec(
        command, *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"{program} {arguments[0]} ended with status {process.returncode}")
    if shown:
        console.print(out.decode(), style="dim", markup=False)
    return out.decode().strip()


if __name__ == "__main__":
    main()
