"""The engine process: one socket, one loop thread, one reader thread, load workers.

`EngineClient` starts it as ``python -m veneer_server.engine.process FD``. The
first frame on the socket is an `EngineConfig`; the answer, once the base model
is loaded, is an `EngineInfo`. When the socket closes, the process ends.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from veneer_registry.errors import FailedPrecondition, VeneerError

from veneer_server import logs
from veneer_server.adapters.memory import LoraMemory
from veneer_server.adapters.references import References, ServedBase
from veneer_server.constraints.grammars import Grammars
from veneer_server.engine.execution.ahead import AheadModelRunner
from veneer_server.engine.execution.backend_choice import BackendUnavailable, Chosen, choose
from veneer_server.engine.execution.exact import ExactRunner
from veneer_server.engine.execution.model_runner import ModelRunner
from veneer_server.engine.execution.step_cost import measure
from veneer_server.engine.loop import StepLoop
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.speculation import Speculation
from veneer_server.engine.scheduling.step_limits import SCORED_WORK, SchedulerLimits
from veneer_server.models.config import read_decoder_config
from veneer_server.models.loader import torch_dtype
from veneer_server.progress import SINK, StartPart, stage
from veneer_server.step.inbox import Inbox, Unheld
from veneer_server.step.plan import Runner
from veneer_server.system.numa import spread_memory, stay_on
from veneer_server.system.placement import Placement, place
from veneer_server.wire.frames import read_frame
from veneer_server.wire.messages import (
    EngineConfig,
    EngineInfo,
    FromEngine,
    StartProgress,
    Stop,
    decode_to_engine,
    encode,
)

log = logging.getLogger("veneer_server.engine.process")  # __name__ is "__main__" here

_SAY_SECONDS = 0.1
"""Minimum time between two progress messages about a part of the startup."""


def build_engine(
    config: EngineConfig, inbox: Inbox
) -> tuple[EngineInfo, Scheduler, Residency, Runner, LoraMemory, Grammars | None]:
    """Load the base model and assemble the engine."""
    began = time.monotonic()
    device = _device(config.device)
    placement = place(config.threads)
    if device.type == "cpu":
        _stay(placement)
    torch.set_num_threads(placement.threads)
    dtype = torch_dtype(config.dtype)
    model = read_decoder_config(Path(config.base_folder))
    kv_heads = model.num_kv_heads // config.tensor_parallel  # on each card
    token_bytes = 2 * model.num_layers * kv_heads * model.head_dim * dtype.itemsize
    num_blocks = max(2, config.kv_cache_bytes // (token_bytes * config.block_size))
    # Created first, so that it reads the vocabulary while the weights load.
    grammars = Grammars.of_base(
        Path(config.base_folder),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        limits=config.constraints,
        unhold=lambda sequence: inbox.put(Unheld(sequence)),
        report=inbox.put,
    )
    chosen = choose(config, device, dtype, num_blocks, placement)
    weights, lora_dtype = chosen.weights, chosen.lora_dtype
    memory = LoraMemory(
        inbox=inbox,
        config=model,
        dtype=lora_dtype,
        device=device,
        workers=config.load_workers,
        references=References(
            inbox,
            ServedBase(
                Path(config.base_folder),
                config.quantization,
                dtype,
                config.weights_fingerprint,
            ),
        ),
        placer=chosen.placer,
        room=None if chosen.placer is None else config.device_adapter_bytes,
        paired=chosen.paired,
    )
    residency = Residency(
        host_budget=config.host_adapter_bytes,
        device_budget=config.device_adapter_bytes,
        itemsize=lora_dtype.itemsize,
        shared=device.type == "cpu" and chosen.placer is None,
        parts=config.tensor_parallel,
        # Enough that workers find another load while the loop is in a step, and few enough that
        # an urgent load does not wait long behind less urgent ones.
        most_loads=4 * config.load_workers,
    )
    # A backend whose results do not depend on the batch is already exact.
    alone = config.exact and not chosen.invariant
    speculates = may_speculate(config, chosen)
    with stage("measuring a step"):
        cost = measure(
            chosen.backend,
            model,
            block_size=config.block_size,
            blocks=num_blocks,
            threads=chosen.placement.threads if device.type == "cpu" else 0,
            sampled=speculates,
        )
    limits = SchedulerLimits(
        max_batch_tokens=max(config.max_batch_tokens, config.max_running),
        max_running=config.max_running,
        context_length=model.context_length,
        prefill_beside_decode=config.max_prefill_tokens,
        prefill_beside_decode_s=cost.prefill_beside_decode_s
        if config.max_prefill_seconds is None
        else config.max_prefill_seconds,
        exact=alone,
        cost=cost,
        score_work=SCORED_WORK * model.vocab_size * model.hidden_size / weights.parameters,
        base_parameters=weights.parameters,
    )
    blocks = BlockManager(
        num_blocks,
        config.block_size,
        # Cached prefixes are computed in different chunks from those of exact mode.
        prefix_cache=config.prefix_cache and not alone,
        window=model.window,
        # With a step ahead, blocks are given back a step later.
        chunk=limits.chunk if chosen.ahead is None else 2 * limits.chunk,
    )
    longest_step = limits.longest_step_s(blocks.total * config.block_size)
    _log_cost(config, limits, longest_step)
    eos = frozenset(model.eos_token_ids)
    speculation = Speculation(cost.sampled_s, eos) if speculates else None
    scheduler = Scheduler(limits, blocks, residency, eos, speculation)
    followed = grammars if grammars.usable() else None
    runner = _runner(chosen, memory, config, followed, model.smallest_window)
    if alone:
        runner = ExactRunner(runner)
    info = EngineInfo(
        device=_describe(device),
        backend=chosen.name,
        why_not_native=chosen.why_not_native,
        int8_gain=chosen.int8_gain,
        threads=chosen.placement.threads,
        why_threads=chosen.placement.why,
        architecture=model.architecture,
        parameters=weights.parameters,
        weights_bytes=weights.nbytes,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        kv_cache_tokens=blocks.total * config.block_size,
        longest_sequence=blocks.longest(model.context_length),
        window_blocks=blocks.window_blocks,
        adapter_itemsize=lora_dtype.itemsize,
        load_seconds=time.monotonic() - began,
        max_batch_tokens=limits.prompt_tokens,
        max_prefill_tokens=limits.prompt_tokens_beside_decode,
        step_seconds=cost.step_s,
        token_seconds=cost.token_s,
        longest_step_seconds=longest_step,
        speculation=speculation is not None,
    )
    return info, scheduler, residency, runner, memory, followed


def may_speculate(config: EngineConfig, chosen: Chosen) -> bool:
    """Whether to draft tokens. Raises BackendUnavailable if that is required and the backend's
    rows depend on the rows beside them."""
    if config.speculation == "on" and not chosen.invariant:
        raise BackendUnavailable(
            "--speculation on needs the native backend: with others, the rows of a draft would "
            f"change the answer. Here it is {chosen.name}; use --speculation auto or off"
        )
    return config.speculation != "off" and chosen.invariant


def _runner(
    chosen: Chosen,
    memory: LoraMemory,
    config: EngineConfig,
    grammars: Grammars | None,
    window: int | None,
) -> Runner:
    if chosen.ahead is not None:
        return AheadModelRunner(
            chosen.ahead, memory.tables, config.block_size, grammars, window
        )
    return ModelRunner(
        chosen.backend, memory.tables, config.block_size, grammars, chosen.draws, window
    )


def _stay(placement: Placement) -> None:
    """Keep this thread, the threads that it starts, and their memory where the placement
    says."""
    if placement.cpus and (why := stay_on(placement.cpus)):
        log.info("threads may run on another CPU package: %s", why)
    if placement.nodes and (why := spread_memory(placement.nodes)):
        log.info("memory is not interleaved over NUMA nodes: %s", why)


def _log_cost(config: EngineConfig, limits: SchedulerLimits, longest: float) -> None:
    assert limits.cost is not None
    if limits.prompt_tokens < config.max_batch_tokens:
        log.warning(
            "a prompt token takes %.0f ms here: limiting steps to %d prompt tokens (%d if "
            "they also decode) instead of %d; the longest step may take %.0f s",
            1e3 * limits.cost.token_s,
            limits.prompt_tokens,
            limits.prompt_tokens_beside_decode,
            config.max_batch_tokens,
            longest,
        )


def _device(wanted: str) -> torch.device:
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise FailedPrecondition(
            "torch finds no CUDA device: use --device cpu, or --device auto, which uses a GPU "
            "if there is one"
        )
    if wanted == "auto":
        wanted = "cuda" if found else "cpu"
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda:{device.index} ({torch.cuda.get_device_name(device)})"
    return device.type


def _reader(connection: socket.socket, inbox: Inbox, on_end: Callable[[], None]) -> None:
    while True:
        try:
            body = read_frame(connection)
        except OSError:
            body = None
        if body is None:
            inbox.put(Stop())
            on_end()
            return
        for message in decode_to_engine(body):
            inbox.put(message)


class WhileLoading:
    """Reports progress to the front process while the base is loading. If the front goes away,
    ends this process, along with the compiler and anything else that it started."""

    def __init__(self, send: Callable[[list[FromEngine]], None]) -> None:
        self._send = send
        self._said = 0.0
        self._over = False
        self._main = threading.get_ident()

    @contextmanager
    def running(self) -> Iterator[None]:
        signal.signal(signal.SIGUSR1, self._give_up)
        told = SINK.set(self._tell)
        try:
            yield
        finally:
            SINK.reset(told)
            self._over = True
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def front_gone(self) -> None:
        """End this process if it is still loading. Called on the reader's thread."""
        if not self._over:
            signal.pthread_kill(self._main, signal.SIGUSR1)

    @staticmethod
    def _give_up(number: int, frame: object) -> None:
        raise SystemExit(1)  # runs every `finally`, which a kill does not

    def _tell(self, part: StartPart) -> None:
        now = time.monotonic()
        if part.state == "running" and part.done > 0 and now - self._said < _SAY_SECONDS:
            return
        self._said = now
        try:
            self._send([StartProgress(part)])
        except OSError as error:
            # Not OSError, or the file being read would be reported as damaged.
            raise SystemExit(1) from error


def tame_collector() -> None:
    """Keep Python's garbage collector out of the steps.

    A collection of the oldest generation visits every object of torch, transformers and
    the resident adapters: nothing else runs for 50 ms or more. Objects that exist now
    are exempted; later ones are freed by reference counting, and cycles by collections of
    the young generations.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 1_000_000)


def main() -> None:
    """Entry point of the engine process."""
    # bitsandbytes warns about a missing optional package, which must stay missing: that
    # package would download native code from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Only the front decides when the engine ends, so ignore signals from anyone else.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it must log in the background too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    body = read_frame(connection)
    if body is None:
        return
    config = msgspec.msgpack.decode(body, type=EngineConfig)
    logs.configure(config.log_format, process="engine")
    logging.captureWarnings(True)
    inbox: Inbox = queue.SimpleQueue()

    def send(messages: list[FromEngine]) -> None:
        connection.sendall(encode(messages))

    loading = WhileLoading(send)
    try:
        with loading.running():
            threading.Thread(
                target=_reader, args=(connection, inbox, loading.front_gone), daemon=True
            ).start()
            info, scheduler, residency, runner, memory, grammars = build_engine(config, inbox)
    except VeneerError as error:
        log.error("%s", error)
        sys.exit(1)
    except (SystemExit, BrokenPipeError, ConnectionResetError):
        log.info("the front process exited")
        os._exit(1)

    tame_collector()
    memory.start()
    send([info])
    loop = StepLoop(
        inbox=inbox,
        scheduler=scheduler,
        residency=residency,
        runner=runner,
        memory=memory,
        send=send,
        grammars=grammars,
    )
    try:
        loop.run()
    except (BrokenPipeError, ConnectionResetError):
        log.info("the front process exited")
    except Exception:
        log.exception("fatal: step loop failed")
        # Load workers must not keep a broken engine alive.
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
