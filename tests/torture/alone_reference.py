"""Use the native engine with one request at a time as the reference for its batched answers.

A row's numbers do not depend on the rest of the batch, on the chunking of its prompt, or on the
prefix cache. So an answer's log-probabilities must be bit-identical to those of an otherwise
idle engine. PEFT cannot be this reference, since it rounds to bfloat16 in other places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer_server.wire.messages import EngineConfig, unpack_tops

from tests.engine_harness import EngineHarness, engine, source
from tests.torture.forms import Form
from tests.torture.isolation import Case


class AloneReference:
    """Implements `isolation.Reference` for answers that have log-probabilities.

    Attributes:
        judged: number of answers compared.
    """

    def __init__(self, base: Path, form: Form, cache: Path) -> None:
        self._config = EngineConfig(
            base_folder=str(base),
            cache_folder=str(cache),
            base_name=base.name,
            weights_fingerprint="",
            device="cpu",
            max_running=1,
            kv_cache_bytes=8 << 20,
            prefix_cache=False,
            threads=1,
            **form.settings,
        )
        self.judged = 0

    def differences(self, cases: Sequence[Case]) -> list[str]:
        """See `Reference.differences`."""
        with engine(self._config) as harness:
            return [self._difference(harness, case) for case in cases]

    def _difference(self, harness: EngineHarness, case: Case) -> str:
        attempt = case.attempt
        if len(attempt.logprobs) != len(attempt.tokens):
            return f"{len(attempt.logprobs)} log-probabilities of {len(attempt.tokens)} tokens"
        asked = {
            "prompt": [*attempt.prompt, *attempt.tokens],
            "adapter": source(case.content.folder) if case.content is not None else None,
            "prompt_logprobs": True,
            "logprobs": True,
            "top_logprobs": 1,
        }
        (answer,) = harness.run([asked])
        self.judged += 1
        begin = len(attempt.prompt) - 1
        right = answer.prompt_logprobs[begin:]
        tops = [tops for out in answer.outputs for tops in out.prompt_top_logprobs or ()][
            begin:
        ]
        for at, (told, known) in enumerate(zip(attempt.logprobs, right, strict=True)):
            if told != known:
                return f"log-probability {at} is {told}, alone {known}"
            if not attempt.temperature and next(unpack_tops(tops[at]))[1] != known:
                return f"token {at} is not the likeliest"
        return ""
