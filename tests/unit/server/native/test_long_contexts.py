"""Long contexts in both backends: logits beyond the context that a base had before its rotary
scaling, and blocks behind a window."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from veneer_server.backends.native.library import BFLOAT16, Library
from veneer_server.step.arrays import Backend
from veneer_server.step.reach import first_reached

from tests.unit.server.native import test_native as native
from tests.unit.server.test_decoder import SHAPES, build, save_random, step
from tests.unit.server.test_rope import SCALINGS, scaled

pytestmark = pytest.mark.push

SEED = 5
ORIGINAL = 64
"""Context before scaling."""
LENGTH = 3 * ORIGINAL

WINDOW = 24
"""Of the tiny Mistral, in tokens: it begins and ends within a block of 16."""
POISON = 7
"""A token whose embedding is infinite."""


@pytest.mark.parametrize("name", sorted(SCALINGS))
def test_logits_beyond_the_original_context_are_transformers(
    name: str, library: Library, tmp_path: Path
) -> None:
    """A long prompt in chunks, then decoding; in both backends."""
    # Weights that bfloat16 holds, so that rounding them is no difference. Read again, since
    # rounding a model rounds its frequencies too.
    save_random(scaled(name), tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, 320, (LENGTH + 4,), generator=generator).tolist()
    blocks = list(range(13, 0, -1))
    edges = [0, 100, LENGTH, *range(LENGTH + 1, LENGTH + 5)]
    parts = [step([(tokens[a:b], a, blocks)]) for a, b in pairwise(edges)]
    with torch.no_grad():
        want = oracle(torch.tensor([tokens])).logits[0]
    exact = native.run_all(build(tmp_path, torch.float32), parts)
    # float32 both; sums run in another order (fused qkv, paged attention).
    torch.testing.assert_close(torch.cat(exact), want, atol=2e-5, rtol=1e-4)
    # In bfloat16 the kernels round less than torch does, as in `test_native`.
    rounded = native.run_all(build(tmp_path, torch.bfloat16), parts)
    kernels = native.run_all(native.decoder(library, tmp_path, head=BFLOAT16), parts)
    assert native.wrong_by(kernels, [want]) <= native.wrong_by(rounded, [want])
    # A control: positions as they were before scaling.
    unscaled = json.loads((tmp_path / "config.json").read_text())
    unscaled["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(unscaled))
    other = native.run_all(build(tmp_path, torch.float32), parts)
    apart = native.wrong_by(other, [want])
    assert apart < 1e-4 if name == "dynamic" else apart > 0.05


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_what_is_in_a_block_that_was_given_back_reaches_no_logit(
    kind: str, library: Library, tmp_path: Path
) -> None:
    """Bit for bit, though the block is another sequence's by then, and holds NaN."""
    model = save_random(SHAPES["mistral-window"], tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.inf
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(8, 320, (90,), generator=generator).tolist()
    blocks = [7, 3, 11, 1, 9, 4]
    made: list[torch.Tensor] = []
    for reuse in (False, True):
        backend: Backend = (
            build(tmp_path, torch.bfloat16)
            if kind == "torch"
            else native.decoder(library, tmp_path)
        )
        table, logits = list(blocks), []
        for begin, end in ((0, 40), (40, 75), (75, 76), (76, 90)):
            gone = first_reached(begin, WINDOW, 16)
            dead = [block for block in table[:gone] if block]
            if reuse and dead:
                table[:gone] = [0] * gone
                broken = [POISON] * (16 * len(dead))
                lost = backend.execute(step([(broken, 0, dead)]))
                assert not bool(lost.isfinite().all())
            logits.append(backend.execute(step([(tokens[begin:end], begin, table)])).clone())
        made.append(torch.cat(logits))
        assert (0 in table) == reuse
    assert bool(made[0].isfinite().all())
    assert torch.equal(*made)
