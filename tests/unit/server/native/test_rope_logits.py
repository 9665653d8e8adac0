"""Logits beyond the context that a base had before its rotary scaling, in both backends."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from veneer_server.backends.native.library import BFLOAT16, Library

from tests.unit.server.native import test_native as native
from tests.unit.server.test_decoder import build, save_random, step
from tests.unit.server.test_rope import SCALINGS, scaled

SEED = 5
ORIGINAL = 64
"""Context before scaling."""
LENGTH = 3 * ORIGINAL


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
