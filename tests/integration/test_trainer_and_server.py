"""Trainer and server compute the same model: each token has the same log-probability."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from veneer_client import AsyncClient, Tokens
from veneer_train.config import QuantConfig
from veneer_train.model import load_base, load_tokenizer

from tests.server_harness import Server

pytestmark = [
    pytest.mark.verify,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
NAMES = ("chat", "code", "sql")
TEXTS = (
    "<|im_start|>user\nWrite a function that adds two numbers.<|im_end|>\n"
    "<|im_start|>assistant\ndef add(a, b):\n    return a + b<|im_end|>",
    "<|im_start|>user\nHow are you today?<|im_end|>\n<|im_start|>assistant\n"
    "Ahoy, matey! I be well an' the soup is warm.\n\nFair winds, Veneer<|im_end|>",
    "<|im_start|>user\nCREATE TABLE theatres (id INTEGER PRIMARY KEY, name TEXT);"
    "\n\nCount the theatres.<|im_end|>\n<|im_start|>assistant\n"
    "SELECT COUNT(*) FROM theatres;<|im_end|>",
)
SERVER, SERVER_MEAN = 0.075, 0.042
"""Of |difference| from float32 (the same NF4 weights, the rest in float32), in nats: its mean
over one text, and over all. Found: native 0.039 and 0.028, torch 0.058 and 0.033."""

BOUND, MEAN_BOUND = 0.15, 0.08
"""The same between trainer and server, wider, since it is the trainer's rounding that is seen:
its logits are bfloat16 too, in steps of 0.0625 and 0.125 between 8 and 32, which takes it up to
0.096 from float32 (0.051 over all)."""

APART = 0.3
"""What adapters differ by at least."""

Scores = dict[tuple[str, int], np.ndarray[Any, np.dtype[np.float64]]]


def trainer_s(base: Path, prompts: Sequence[Sequence[int]], quant: QuantConfig) -> Scores:
    """Of the model that a run trains: guarded 4-bit base, adapters by PEFT."""
    model = load_base(base, quant, torch.device("cpu"))
    found: Scores = {}

    def measure(name: str, measured: Any) -> None:
        for number, ids in enumerate(prompts):
            tokens = torch.tensor([ids])
            with torch.no_grad():
                logs = measured(tokens).logits[0, :-1].float().log_softmax(-1)
            told = logs.gather(1, tokens[0, 1:, None])[:, 0]
            found[name, number] = told.double().numpy()

    measure("", model)
    for name in NAMES:
        adapted = PeftModel.from_pretrained(model, str(EXAMPLES / name)).eval()
        measure(name, adapted)
        model = adapted.unload()
    return found


async def ask(client: AsyncClient, name: str, prompt: Sequence[int]) -> Any:
    """Log-probabilities of a prompt's tokens after the first, by the server."""
    answer = await client.generate(
        Tokens(tuple(prompt)),
        adapter=f"example-{name}" if name else "",
        max_tokens=1,
        temperature=0,
        echo=True,
        logprobs=True,
        use_prefix_cache=False,
    )
    return np.array([token.logprob for token in answer.prompt_logprobs])


async def server_s(client: AsyncClient, prompts: Sequence[Sequence[int]]) -> Scores:
    """Of base and adapters, all in one batch."""
    keys = [(name, k) for name in ("", *NAMES) for k in range(len(prompts))]
    told = await asyncio.gather(*(ask(client, name, prompts[k]) for name, k in keys))
    return dict(zip(keys, told, strict=True))


def check(what: str, ours: Scores, others: Scores, bound: float, mean_bound: float) -> None:
    """Each text within ``bound``, all of them on average within ``mean_bound``."""
    gaps = {key: float(np.abs(scores - others[key]).mean()) for key, scores in ours.items()}
    mean = float(np.mean(list(gaps.values())))
    print(f"{what}: at most {max(gaps.values()):.4f} nats, {mean:.4f} over all")
    assert max(gaps.values()) < bound, (what, gaps)
    assert mean < mean_bound, (what, gaps)


async def test_trainer_and_server_agree(server: Server, base_folder: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    trained = await asyncio.to_thread(trainer_s, base_folder, prompts, QuantConfig())
    exact = await asyncio.to_thread(
        trainer_s, base_folder, prompts, QuantConfig(compute_dtype="fp32")
    )
    async with AsyncClient(server.address) as client:
        for name in NAMES:
            await client.push(EXAMPLES / name, f"example-{name}")
        try:
            served = await server_s(client, prompts)
            swapped = [await ask(client, n, prompts[0]) for n in ("chat", "code", "chat")]
        finally:
            for name in NAMES:
                await client.delete(f"example-{name}")
    check("server from float32", served, exact, SERVER, SERVER_MEAN)
    check("trainer from server", trained, served, BOUND, MEAN_BOUND)
    # The control: an adapter is not the base, nor another one.
    for number in range(len(prompts)):
        for one, other in [*((name, "") for name in NAMES), *pairwise(NAMES)]:
            gap = np.abs(trained[one, number] - served[other, number]).mean()
            assert gap > APART, (one, other, number, gap)
    np.testing.assert_array_equal(swapped[0], swapped[2])
    assert not np.array_equal(swapped[0], swapped[1])
