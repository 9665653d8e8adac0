"""``python -m veneer_server.backends.cuda.self_test [SEEDS]``: prints one JSON object."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch


def main() -> None:
    """Entry point. Without a GPU it says so and runs nothing."""
    facts: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    if not torch.cuda.is_available():
        print(json.dumps({**facts, "why": "torch finds no CUDA device"}))
        return
    facts["name"] = torch.cuda.get_device_name(0)
    facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    try:
        import triton

        from veneer_server.backends.cuda.self_test.report import run
    except ImportError as error:
        print(json.dumps({**facts, "why": f"triton is missing: {error}"}))
        return
    report = run(torch.device("cuda", 0), int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    said = "; ".join(f"{name}: {what}" for name, what in report.wrong.items())
    print(json.dumps({**facts, "triton": triton.__version__, "why": said, **asdict(report)}))


if __name__ == "__main__":
    main()
