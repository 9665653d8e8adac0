"""The PEFT peer: transformers + bitsandbytes + PEFT in a separate process.

Run as ``python -m veneer_loadtest.peers.peft_process``; it reads `peft_messages` from
standard input and answers on standard output. This is PEFT in its fastest setup:
the same NF4 base, with double quantization and bf16 compute, bitsandbytes' packed
4-bit weights where the CPU supports them (packed at the first forward pass in eval mode),
SDPA attention, one padded batch with ``adapter_names``. On a CPU, adapters are widened to
fp32, PEFT's default: a decode step was measured to be 1.3 to 1.6 times faster than with bf16
adapters. On CUDA they stay in bf16. OpenMP's threads spin at barriers, as they do by default:
on an idle machine a step is 10 to 20 % faster than with sleeping threads, but up to 10 times
slower next to another busy process. So measure on an idle machine, or the comparison is
unfair to PEFT.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from typing import Any, BinaryIO

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StoppingCriteria

from veneer_loadtest.peers.peft_messages import (
    Generate,
    Generated,
    PeerFailed,
    PeerReady,
    PeftScore,
    PeftSetup,
    Scored,
    decode_to_peer,
    encode,
)


class _StepClock(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Never stops generation; records when each step's tokens are known."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.times: list[float] = []
        self._never = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return self._never


class PeftPeer:
    """An NF4 base with PEFT adapters; decodes mixed batches by ``adapter_names``."""

    def __init__(self, setup: PeftSetup) -> None:
        torch.set_num_threads(setup.threads)
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        base = AutoModelForCausalLM.from_pretrained(  # nosec B615
            setup.base_folder,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            dtype=torch.bfloat16,
            device_map={"": self.device},
            local_files_only=True,
        )
        widen = self.device.type == "cpu"
        model: Any = None
        for name, folder in setup.adapters.items():
            if model is None:
                model = PeftModel.from_pretrained(
                    base, folder, adapter_name=name, autocast_adapter_dtype=widen
                )
            else:
                model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=widen)
        model.eval()
        # No early end of sequence: every row gets exactly the requested number of tokens.
        model.generation_config.eos_token_id = None
        self.model = model

    @torch.inference_mode()
    def generate(self, call: Generate) -> Generated:
        """Decode one left-padded batch greedily."""
        width = max(len(p) for p in call.prompts)
        ids = torch.zeros(len(call.prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(call.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        cpu, start = time.process_time(), time.perf_counter()
        ids, mask = ids.to(self.device), mask.to(self.device)
        clock = _StepClock(len(call.prompts), self.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=call.adapters,
            do_sample=False,
            max_new_tokens=call.tokens,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        rows = out[:, width:].tolist()
        end = time.perf_counter()
        return Generated(
            rows=rows,
            step_s=[t - start for t in clock.times],
            wall_s=end - start,
            cpu_s=time.process_time() - cpu,
        )

    @torch.inference_mode()
    def score(self, call: PeftScore) -> Scored:
        """Compute teacher-forced log-probabilities: one row, one active adapter, no padding."""
        self.model.set_adapter(call.adapter)
        ids = torch.tensor([call.row], device=self.device)
        logits = self.model(input_ids=ids).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])
        return Scored(logprobs=picked[:, 0].tolist(), best=logprobs.amax(-1).tolist())


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {name: importlib.metadata.version(name) for name in names}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the parent closes the pipe."""

    def send(message: PeerReady | Generated | Scored | PeerFailed) -> None:
        answers.write(encode(message))
        answers.flush()

    peer: PeftPeer | None = None
    for line in requests:
        call = decode_to_peer(line)
        try:
            match call:
                case PeftSetup():
                    start = time.perf_counter()
                    peer = PeftPeer(call)
                    send(
                        PeerReady(
                            device=_device_name(peer.device),
                            versions=_versions(),
                            load_s=time.perf_counter() - start,
                        )
                    )
                case Generate() if peer:
                    send(peer.generate(call))
                case PeftScore() if peer:
                    send(peer.score(call))
                case _:
                    raise RuntimeError("the first message must be PeftSetup")
        except Exception as error:
            # The parent prints one line; the traceback goes to standard error.
            send(PeerFailed(message=f"{type(error).__name__}: {error}"))
            raise


def main() -> None:
    """Entry point of the peer process."""
    # Libraries print to standard output: send that to standard error, keep the pipe.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with answers:
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
