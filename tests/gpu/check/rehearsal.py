"""The kernels' self-test on a CPU, by Triton's interpreter: in place of
``veneer_server.backends.cuda.self_test`` where there is no card."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from tests.gpu import interpreter


def main() -> None:
    """Entry point: prints one JSON object."""
    # Imported here: triton was told to interpret above.
    import triton
    from veneer_server.backends.cuda.self_test.report import run

    interpreter.allow([(0, 1 << 63)])
    report = run(torch.device("cpu"), int(sys.argv[1]))
    said = "; ".join(f"{name}: {what}" for name, what in report.wrong.items())
    facts = {
        "name": "no card: a rehearsal on the CPU",
        "capability": "",
        "torch": torch.__version__,
        "cuda": "",
        "triton": triton.__version__,
        "why": said,
    }
    print(json.dumps({**facts, **asdict(report)}))


if __name__ == "__main__":
    main()
