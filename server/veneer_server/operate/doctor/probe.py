"""``python -m veneer_server.operate.doctor.probe DEVICE [KERNELS]``: tries out torch and
bitsandbytes, or times the native kernels in the file KERNELS.

Runs in a separate process, since the front never imports torch, and a broken installation
may crash the process. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer_server.backends.native.library import Library
from veneer_server.backends.native.linear import int8_gain


def main() -> None:
    """Entry point; ``auto`` uses CUDA if available."""
    wanted, *kernels = sys.argv[1:]
    if kernels:
        print(json.dumps({"int8_gain": int8_gain(Library(Path(kernels[0])))}))
        return
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda and wanted != "cpu" else "cpu"
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "cuda": torch.cuda.get_device_name(0) if cuda else "",
                "device": device,
                **_four_bit(device),
            }
        )
    )


def _four_bit(device: str) -> dict[str, Any]:
    """Compare a small 4-bit matmul with full precision; return the problem ("" if they agree)
    and whether the weights are packed."""
    try:
        import bitsandbytes as bnb

        torch.manual_seed(0)
        dense = nn.Linear(256, 128, bias=False)
        four = bnb.nn.Linear4bit(
            256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        four.load_state_dict(dense.state_dict())
        four = four.to(device).eval()
        x = torch.randn(4, 256)
        with torch.inference_mode():
            wanted = dense(x)
            given = four(x.to(device, torch.bfloat16)).float().cpu()
        error = float((given - wanted).norm() / wanted.norm())
    except Exception as problem:  # whatever it is, the doctor reports it
        return {"four_bit": f"{type(problem).__name__}: {problem}", "packed": False}
    packed = bool(getattr(four.weight.quant_state, "packing_format_for_cpu", False))
    # NF4 of normally distributed weights is off by about a tenth.
    agrees = "" if error < 0.3 else f"a 4-bit matmul is off by {error:.0%}"
    return {"four_bit": agrees, "packed": packed}


if __name__ == "__main__":
    main()
