"""Run the real server as a user would: a process with sockets, on the real base."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2_grpc,
)

from tests.backends_ran import check_ready_line, server_environment

CHUNK = 1 << 20
TEMPLATE = "chat_template.jinja"
READY_SECONDS = 240
"""The first start on a machine compiles kernels and quantizes the base, beside two others."""
SERVICE = "veneer.v1.InferenceService"


@dataclass(frozen=True)
class Refusal:
    """The error of a failed call."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Read an error's rich status; every error of ours must have an ErrorInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no rich status: {error.code()} {error.details()}"
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after = None
    found = False
    for detail in status.details:
        found = detail.Unpack(info) or found
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    assert found, "no ErrorInfo"
    assert info.domain == "veneer"
    return Refusal(
        error.code().name, info.reason, status.message, dict(info.metadata), retry_after
    )


class _CallerKey:
    """Adds an API key to calls."""

    def __init__(self, key: str) -> None:
        self._header = ("authorization", f"Bearer {key}")

    async def _with_key(self, proceed: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._header)
        return await proceed(details._replace(metadata=metadata), request)

    intercept_unary_unary = intercept_unary_stream = _with_key
    intercept_stream_unary = intercept_stream_stream = _with_key


def caller_key(key: str) -> list[Any]:
    """Return interceptors that add an API key to all calls of a channel."""
    # A channel takes an interceptor for one kind of call only.
    kinds = (
        grpc.aio.UnaryUnaryClientInterceptor,
        grpc.aio.UnaryStreamClientInterceptor,
        grpc.aio.StreamUnaryClientInterceptor,
        grpc.aio.StreamStreamClientInterceptor,
    )
    return [type(kind.__name__, (_CallerKey, kind), {})(key) for kind in kinds]


class Stream:
    """A GenerateStream call; grpc.aio allows only one style of reading a call."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._messages = aiter(call)

    async def first(self) -> Any:
        return await anext(self._messages)

    async def rest(self) -> list[Any]:
        """Return all further messages, or raise the error that ended the call."""
        return [message async for message in self._messages]


class Server:
    """A running server process and stubs that talk to it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        grpc_at: str,
        metrics_at: str,
        openai_at: str = "",
        key: str | None = None,
    ) -> None:
        self.process = process
        self.address = grpc_at
        self.metrics = metrics_at
        self.openai = openai_at
        self.key = key
        interceptors = caller_key(key) if key else ()
        self.channel = grpc.aio.insecure_channel(grpc_at, interceptors=interceptors)
        # The stubs are typed for synchronous channels.
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.about: Any = server_pb2_grpc.ServerServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def push(self, folder: Path, name: str, **spec: Any) -> Any:
        return await self.push_files(read_files(folder), name, **spec)

    async def push_files(self, files: dict[str, bytes], name: str, **spec: Any) -> Any:
        return await self.adapters.UploadAdapter(upload_messages(files, name, **spec))

    async def generate(self, **fields: Any) -> Any:
        return await self.inference.Generate(request(**fields))

    def stream(self, **fields: Any) -> Stream:
        return Stream(self.inference.GenerateStream(request(**fields)))

    async def refused(self, call: Any) -> Refusal:
        """Return the error of a call that must fail."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return refusal(error)
        raise AssertionError(f"the call succeeded: {answer}")

    async def serving(self, service: str = SERVICE) -> bool:
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_for_health(self, wanted: bool, seconds: float) -> None:
        """Follow the health stream until its status is ``wanted``."""
        status = health_pb2.HealthCheckResponse.SERVING

        async def follow() -> None:
            watch = self.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            async for message in watch:
                if (message.status == status) == wanted:
                    return

        await asyncio.wait_for(follow(), seconds)

    async def metric(self, name: str) -> dict[str, float]:
        """Return the samples of one metric, scraped over HTTP: labels -> value."""
        (found,) = await self.scrape(name)
        return found

    async def scrape(self, *names: str) -> list[dict[str, float]]:
        """Return the samples of each metric, from one scrape: labels -> value."""
        host, port = self.metrics.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        writer.write(f"GET /metrics HTTP/1.0\r\n{key}\r\n".encode())
        body = (await reader.read()).decode()
        writer.close()
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for line in body.splitlines():
            sample, _, value = line.rpartition(" ")
            name, _, labels = sample.partition("{")
            if name in found:
                found[name][labels.strip("}")] = float(value)
        return list(found.values())

    @property
    def engine(self) -> psutil.Process:
        """The process that runs the model; other children of the front check uploads."""
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "veneer_server.engine.process" in child.cmdline()
        ]
        return found

    async def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 60)


def read_files(folder: Path) -> dict[str, bytes]:
    """Read the files of an adapter folder that a server needs, and its template if any."""
    names = ["adapter_config.json", "adapter_model.safetensors"]
    if (folder / TEMPLATE).exists():
        names.append(TEMPLATE)
    return {name: (folder / name).read_bytes() for name in names}


def upload_messages(
    files: dict[str, bytes],
    name: str,
    *,
    tamper: Callable[[Any], None] = lambda m: None,
    **spec: Any,
) -> list[Any]:
    """Build the messages of a valid upload; ``tamper`` may change each one."""
    described = [
        adapters_pb2.UploadFile(
            name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        for file, data in files.items()
    ]
    messages = [
        adapters_pb2.UploadAdapterRequest(
            spec=adapters_pb2.UploadSpec(name=name, files=described, **spec)
        )
    ]
    for file, data in files.items():
        messages += [
            adapters_pb2.UploadAdapterRequest(
                chunk=adapters_pb2.UploadChunk(
                    file=file, offset=offset, data=data[offset : offset + CHUNK]
                )
            )
            for offset in range(0, len(data), CHUNK)
        ]
    for message in messages:
        tamper(message)
    return messages


def request(
    *,
    prompt: str | None = None,
    token_ids: Iterable[int] | None = None,
    adapter: str = "",
    sampling: dict[str, Any] | None = None,
    stopping: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    """Build a request, greedy unless ``sampling`` says otherwise."""
    built = inference_pb2.GenerateRequest(
        adapter=adapter,
        sampling=inference_pb2.SamplingOptions(**(sampling or {"temperature": 0})),
        stopping=inference_pb2.StoppingOptions(**(stopping or {"max_tokens": 8})),
        output=inference_pb2.OutputOptions(**(output or {})),
        **more,
    )
    if prompt is not None:
        built.prompt = prompt
    if token_ids is not None:
        built.token_ids.ids.extend(token_ids)
    return built


@asynccontextmanager
async def running_server(
    data_dir: Path,
    cache_dir: Path,
    *flags: str,
    log: Path | None = None,
    open_files: int | None = None,
    key: str | None = None,
    environment: Mapping[str, str] | None = None,
    program: Path | None = None,
) -> AsyncIterator[Server]:
    """Start a server and wait until it is ready.

    Args:
        environment: variables besides the suite's.
        program: what to run instead of ``veneer-server``.
        key: API key of the harness's own calls.
        open_files: the server's file descriptor limit; None: the same as for the tests.
    """
    port_file = data_dir.parent / f"{data_dir.name}-ports.json"
    port_file.unlink(missing_ok=True)
    log = log or data_dir.parent / f"{data_dir.name}.log"
    with log.open("ab") as stderr:
        limited: tuple[str, ...] = ()
        if open_files is not None:
            limited = ("sh", "-c", f'ulimit -n {open_files}; exec "$@"', "")
        process = await asyncio.create_subprocess_exec(
            *limited,
            str(program or Path(sys.executable).with_name("veneer-server")),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
            *("--openai-listen", "127.0.0.1:0"),
            *("--data-dir", str(data_dir), "--cache-dir", str(cache_dir)),
            *("--port-file", str(port_file), "--device", "cpu"),
            *flags,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            env=server_environment() | dict(environment or {}),
        )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), READY_SECONDS)
        assert b"ready" in line, f"server did not start:\n{log.read_text()}"
        check_ready_line(line.decode(), flags)
        ports = json.loads(port_file.read_text())
        server = Server(process, ports["grpc"], ports["metrics"], ports["openai"], key)
        yield server
        await server.channel.close()
    finally:
        if process.returncode is None:
            # A child that has not yet begun its program has the server's pipes, and `wait`
            # waits for their end.
            children = []
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
            for each in (process, *children):
                with suppress(ProcessLookupError, psutil.NoSuchProcess):
                    each.kill()
            await process.wait()
