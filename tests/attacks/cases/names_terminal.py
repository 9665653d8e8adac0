"""A shared adapter whose manifest has escape sequences, shown on another tenant's terminal."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import re
import sys
import tty
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import adapters_pb2_grpc

from tests.adapter_files import write_adapter
from tests.attacks.case import Bug, Target

TITLE = "escape sequences in the manifest of a shared adapter"
KEYS = True
BUG = Bug(
    "veneer_server.rpc.adapter_service",
    "{visible(k): visible(v) for k, v in manifest.training.items()}",
    "dict(manifest.training)",
)

_SEQUENCES: Final = (
    "\x1b]52;c;cHduZWQ=\x07",
    "\x1b[2J",
    "\x9b2J",
    "\x9d0;t\x9c",
    "\r",
    "\u202e",
)
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_OURS: Final = re.compile(r"\x1b\[[0-9;]*m")
_HIDDEN: Final = 576


async def attack(target: Target) -> list[str]:
    """Neither the server's answer nor the client's output has a control character."""
    wrong: list[str] = []
    ends = asyncio.get_running_loop().time() + target.seconds
    async with grpc.aio.insecure_channel(target.grpc) as channel:
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        number = 0
        while not number or asyncio.get_running_loop().time() < ends:
            number += 1
            name = f"evil-{number}"
            facts = {f"note{n}": _text(target) for n in range(target.rng.randint(1, 20))}
            facts["config"] = {"lora": {"alpha": _text(target)}}  # type: ignore[assignment]
            await adapters.UploadAdapter(
                _upload(target.work / name, name, facts), metadata=target.metadata("team-a")
            )
            share = pb.UpdateAdapterRequest(name=name, shared=True)
            await adapters.UpdateAdapter(share, metadata=target.metadata("team-a"))
            found = await adapters.GetAdapter(
                pb.GetAdapterRequest(name=f"team-a/{name}"), metadata=target.metadata("team-b")
            )
            told = found.adapter.training
            wrong += [
                f"{name}: {k!r}: {v!r}" for k, v in told.items() if _CONTROLS.search(k + v)
            ]
            shown = _OURS.sub("", await _shown(target, f"team-a/{name}")).replace("\r\n", "\n")
            if _CONTROLS.search(shown) or name not in shown:
                wrong.append(f"{name} on a terminal: {shown[:500]!r}")
            gone = pb.DeleteAdapterRequest(name=name)
            await adapters.DeleteAdapter(gone, metadata=target.metadata("team-a"))
    return wrong


def _text(target: Target) -> str:
    random = target.rng
    odd = (*range(9), *range(11, 32), *range(127, 160))
    parts = (
        random.choice(_SEQUENCES) if random.random() < 0.6 else chr(random.choice(odd))
        for _ in range(random.randint(1, 8))
    )
    return "x" + "".join(parts)


async def _shown(target: Target, name: str) -> str:
    """Return the terminal output of `veneer adapter show NAME --full` for the other tenant."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    arguments = ("-m", "veneer_client.cli.main", "adapter", "show", name, "--full")
    ours_env = {"VENEER_SERVER": target.grpc, "VENEER_API_KEY": target.keys["team-b"]}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **ours_env, "TERM": "xterm"},
    )
    os.close(theirs)
    loop, data = asyncio.get_running_loop(), b""
    try:
        while piece := await loop.run_in_executor(None, os.read, ours, 65536):
            data += piece
    except OSError:  # the process has ended
        pass
    finally:
        os.close(ours)
    await process.wait()
    return data.decode()


def _upload(folder: Path, name: str, facts: dict[str, str]) -> list[pb.UploadAdapterRequest]:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    write_adapter(
        folder,
        {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]},
        {
            f"{stem}.lora_A.weight": np.zeros((1, _HIDDEN), np.float32),
            f"{stem}.lora_B.weight": np.zeros((_HIDDEN, 1), np.float32),
        },
    )
    (folder / "training_manifest.json").write_text(json.dumps(facts))
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    spec = pb.UploadSpec(name=name)
    for file, data in files.items():
        spec.files.add(name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return [
        pb.UploadAdapterRequest(spec=spec),
        *(
            pb.UploadAdapterRequest(chunk=pb.UploadChunk(file=file, data=data))
            for file, data in files.items()
        ),
    ]
