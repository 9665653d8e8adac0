"""The server's configuration: one table, one frozen record, validated once.

`OPTIONS` is the only list of settings. It drives the command line flags, the
keys of a TOML ``--config`` file and the ``VENEER_*`` variables; of several
sources for one setting the flag wins, then the variable, then the file.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

from veneer_registry.bundled_base import CACHE_DIR
from veneer_registry.errors import VeneerError

__all__ = ["OPTIONS", "Address", "ConfigInvalid", "Option", "ServerConfig", "load_config"]


class ConfigInvalid(VeneerError):
    """A setting is unknown or has a value that cannot be used."""

    code = "INVALID_ARGUMENT"
    reason = "CONFIG_INVALID"


class Address(NamedTuple):
    """Where a socket listens. Port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything an operator can set. Sizes are bytes, times are seconds.

    Attributes are described by their row in `OPTIONS`.
    """

    base: str
    listen: Address
    metrics_listen: Address | None
    openai_listen: Address | None
    allowed_hosts: tuple[str, ...]
    insecure: bool
    data_dir: Path
    cache_dir: Path
    device: Literal["auto", "cpu", "cuda"]
    quantization: Literal["nf4", "fp4", "none"]
    dtype: Literal["bfloat16", "float16", "float32"]
    backend: Literal["auto", "native", "torch"]
    native_instructions: Literal["auto", "avx512-bf16", "avx2"]
    threads: int
    max_running: int
    max_batch_tokens: int
    max_prefill_tokens: int
    prefix_cache: bool
    exact: bool
    max_queue: int
    default_max_tokens: int
    default_temperature: float | None
    default_top_p: float | None
    max_connections: int
    max_watchers: int
    refusal_rate: int
    kv_cache_bytes: int | None
    host_cache_bytes: int
    device_adapter_bytes: int
    max_adapter_bytes: int
    retain_superseded: int
    upload_ttl: float
    min_upload_rate: int
    upload_deadline: float
    max_broken_uploads: int
    max_broken_upload_bytes: int
    quarantine_ttl: float
    quarantine_bytes: int
    allow_base_name: tuple[str, ...]
    grace: float
    reader_limit: float
    constraint_bytes: int
    constraint_workers: int
    constraint_seconds: float
    constraint_memory: int
    constraint_mask_seconds: float
    constraint_fuel: int
    constraint_matcher_memory: int
    log_format: Literal["console", "json"]
    port_file: Path | None


# ------------------------------------------------------------------------ parsers
# Each turns a flag's or variable's string, or a TOML value, into the field's
# type, and raises ValueError with a phrase that completes "... is not allowed: ".

_UNITS: Final = {
    "": 1,
    "b": 1,
    # As Docker and the JVM have them.
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("give some text")
    return value.strip()


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser()


def _optional_path(value: Any) -> Path | None:
    return None if value in ("", None) else _path(value)


def _bytes(value: Any) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
    if isinstance(value, bool) or match is None or match[2] not in _UNITS:
        raise ValueError("give bytes, such as 1073741824, 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2]]) if match[2] else int(float(match[1]))


def _auto_bytes(value: Any) -> int | None:
    return None if value == "auto" else _bytes(value)


def _whole(low: int, high: int = 1 << 31) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"\d{1,12}", text):
            raise ValueError(f"give a whole number of {low} or more")
        number = int(text)
        if not low <= number <= high:
            raise ValueError(f"give a whole number from {low} to {high}")
        return number

    return parse


def _hours(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= 8760:
        raise ValueError("give hours from 0 to 8760")
    return number


def _seconds(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= 86400:
        raise ValueError("give seconds from 0 to 86400")
    return number


def _some_seconds(value: Any) -> float:
    if (number := _seconds(value)) == 0:
        raise ValueError("give more than 0 seconds")
    return number


def _cpu_seconds(value: Any) -> float:
    number = _seconds(value)
    if not 0.001 <= number <= 60:
        raise ValueError("give seconds from 0.001 to 60")
    return number


def _bytes_between(low: str, high: str) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = _bytes(value)
        if not _bytes(low) <= number <= _bytes(high):
            raise ValueError(f"give {low} to {high}")
        return number

    return parse


def _auto_number(low: float, high: float) -> Callable[[Any], float | None]:
    def parse(value: Any) -> float | None:
        if value == "auto":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError(f"give a number from {low:g} to {high:g}, or auto")
        return number

    return parse


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    parsed = known.get(str(value).strip().lower())
    if parsed is None:
        raise ValueError("give true or false")
    return parsed


def _names(value: Any) -> tuple[str, ...]:
    """Several names: a list, or one text with commas between them."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts):
        raise ValueError("give names, such as meta-llama/Llama-3.2-1B")
    return tuple(name for part in parts for p in part.split(",") if (name := p.strip()))


_SHORT: Final = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "gpu": "cuda",
}
"""Other names of choices."""


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        found = _SHORT.get(value, value) if isinstance(value, str) else value
        if found not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return cast(str, found)

    return parse


def _address(value: Any) -> Address:
    match = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+)):(\d{1,5})", str(value).strip()
    )
    if match is None or int(match[3]) > 65535:
        raise ValueError("give HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    return Address(match[1] or match[2], int(match[3]))


def _optional_address(value: Any) -> Address | None:
    return None if value == "" else _address(value)


def _hosts(value: Any) -> tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError("give names, such as veneer.internal,gpu1")
    names = tuple(name.strip().lower() for name in given if name.strip())
    for name in names:
        if name != "*" and not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", name):
            raise ValueError(
                f"{name!r} is not a valid host name: give it without scheme and port"
            )
    return names


# -------------------------------------------------------------------------- table

_PREFIX: Final = "VENEER_"
_OTHERS: Final = frozenset({"SERVER", "ACTOR"})
"""Variables of the clients."""
_ALSO: Final = {"MODEL": "BASE"}
"""What people try, as --model is a flag."""
_KUBERNETES: Final = re.compile(r"SERVICE_(HOST|PORT)|^(\w+_)?PORT(_\d+_(TCP|UDP)\w*)?$")


@dataclass(frozen=True, slots=True)
class Option:
    """One setting.

    Attributes:
        name: field of `ServerConfig`, key of the file; ``--`` and ``VENEER_``
            names follow from it.
        default: as a person would write it.
        metavar: what the help shows for the value; empty for a switch.
        repeated: the flag may be given several times, the file's key is a list, and the
            variable has commas.
        parse: string or TOML value -> field value.
    """

    name: str
    default: str
    metavar: str
    parse: Callable[[Any], Any]
    help: str
    repeated: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return _PREFIX + self.name.upper()

    @property
    def switch(self) -> bool:
        return not self.metavar


OPTIONS: Final[tuple[Option, ...]] = (
    Option("base", "smollm2-135m", "PATH|HUB_ID|NAME", _text,
           "Base model: a Hugging Face folder, a hub name, or the bundled smollm2-135m."),
    Option("listen", "127.0.0.1:50051", "HOST:PORT", _address,
           "Address for gRPC; port 0 chooses a free one."),
    Option("metrics_listen", "127.0.0.1:9095", "HOST:PORT", _optional_address,
           "Address for Prometheus; empty turns it off."),
    Option("openai_listen", "", "HOST:PORT", _optional_address,
           "Address for the OpenAI-compatible HTTP gateway; empty leaves it off."),
    Option("allowed_hosts", "", "NAME,NAME", _hosts,
           "Host names that the HTTP gateway and the metrics port answer to, beside localhost "
           "and their address; * is any. Empty allows any where other machines can connect."),
    Option("insecure", "false", "", _flag,
           "Allow addresses that other machines can reach, without authentication."),
    Option("data_dir", "~/.local/share/veneer", "DIR", _path,
           "Adapters and their catalog; one server owns it."),
    Option("cache_dir", CACHE_DIR, "DIR", _path,
           "Imported bases and 4-bit checkpoints; may be shared and deleted."),
    Option("device", "auto", "auto|cpu|cuda", _one_of("auto", "cpu", "cuda"),
           "Where the model runs; auto takes CUDA if there is one."),
    Option("quantization", "nf4", "nf4|fp4|none", _one_of("nf4", "fp4", "none"),
           "Of the base model's linear layers."),
    Option("dtype", "bfloat16", "bfloat16|float16|float32",
           _one_of("bfloat16", "float16", "float32"),
           "Of activations, KV cache and adapters."),
    Option("backend", "auto", "auto|native|torch", _one_of("auto", "native", "torch"),
           "What executes a step; auto takes the native CPU kernels where they can run."),
    Option("native_instructions", "auto", "auto|avx512-bf16|avx2",
           _one_of("auto", "avx512-bf16", "avx2"),
           "Instructions that the native kernels use; auto is the most that the CPU has."),
    Option("threads", "0", "N", _whole(0, 1024), "CPU threads of a step; 0 means all cores."),
    Option("max_running", "64", "N", _whole(1, 4096), "Most sequences in one batch."),
    Option("max_batch_tokens", "512", "N", _whole(16, 1 << 20), "Most tokens in one step."),
    Option("max_prefill_tokens", "128", "N", _whole(1, 1 << 20),
           "Most prompt tokens in a step that also decodes (a quarter more to end one)."),
    Option("prefix_cache", "true", "", _flag,
           "Keep keys and values of prompts and share them between requests."),
    Option("exact", "false", "", _flag,
           "Tokens and log-probabilities that do not depend on what shares a step, bit by bit; "
           "with the torch backend much slower, and without the prefix cache."),
    Option("max_queue", "256", "N", _whole(0, 1 << 20),
           "Requests that may wait; more are refused."),
    Option("default_max_tokens", "512", "N", _whole(1, 1 << 31),
           "New tokens of a request that sets no max_tokens; 16 for /v1/completions."),
    Option("default_temperature", "auto", "X", _auto_number(0, 100),
           "Of requests that set none; auto is the base's own, else 0.7."),
    Option("default_top_p", "auto", "X", _auto_number(0.01, 1),
           "Of requests that set none; auto is the base's own, else 0.9."),
    Option("max_connections", "512", "N", _whole(8, 1 << 20),
           "Connections to the gRPC port, and to the HTTP gateway. One more takes the place of "
           "an idle one, and is refused where there is none."),
    Option("max_watchers", "256", "N", _whole(1, 1 << 20),
           "WatchAdapters calls that may be open; more are refused."),
    Option("refusal_rate", "100", "N", _whole(0, 1 << 20),
           "Invalid requests a second from one host that are refused at once; refusals beyond "
           "that are delayed by up to 3 s. 0 delays none."),
    Option("kv_cache_bytes", "auto", "BYTES", _auto_bytes,
           "Memory for keys and values; auto is 1 GiB, or less where memory is short."),
    Option("host_cache_bytes", "2GiB", "BYTES", _bytes, "Adapters ready in host memory."),
    Option("device_adapter_bytes", "1GiB", "BYTES", _bytes, "Adapters ready to run."),
    Option("max_adapter_bytes", "2GiB", "BYTES", _bytes, "Largest upload."),
    Option("retain_superseded", "2", "N", _whole(0, 1000),
           "Replaced revisions kept on disk for each name."),
    Option("upload_ttl", "24", "HOURS", _hours,
           "How long what arrived of an interrupted upload is kept, to be resumed."),
    Option("min_upload_rate", "16KiB", "BYTES", _bytes,
           "Bytes a second that an upload must bring, over a minute; a slower one is ended."),
    Option("upload_deadline", "3600", "SECONDS", _some_seconds,
           "How long an upload may take; what arrived by then is kept, and can be resumed."),
    Option("max_broken_uploads", "16", "N", _whole(1, 1 << 20),
           "Interrupted uploads to keep; older ones are removed."),
    Option("max_broken_upload_bytes", "512MiB", "BYTES", _bytes,
           "Bytes of all interrupted uploads kept; the newest stays whatever its size."),
    Option("quarantine_ttl", "720", "HOURS", _hours,
           "How long the quarantine keeps damaged adapters and content that no adapter names."),
    Option("quarantine_bytes", "10GiB", "BYTES", _bytes,
           "Size limit of the quarantine; the oldest content is removed first."),
    Option("allow_base_name", "", "NAME", _names,
           "Also accept adapters whose config names the base NAME; may be repeated.",
           repeated=True),
    Option("grace", "30", "SECONDS", _seconds,
           "How long running requests may finish when the server is told to stop."),
    Option("reader_limit", "30", "SECONDS", _seconds,
           "How long a stream may wait for a caller that reads nothing, before it is ended."),
    Option("constraint_bytes", "32KiB", "BYTES", _bytes_between("1KiB", "128KiB"),
           "Largest JSON schema, regular expression or list of choices."),
    Option("constraint_workers", "2", "N", _whole(1, 64),
           "Constraints compiled at once; one caller may use all but one of these workers."),
    Option("constraint_seconds", "0.5", "SECONDS", _cpu_seconds,
           "CPU time that compiling a constraint may take."),
    Option("constraint_memory", "16MiB", "BYTES", _bytes_between("4MiB", "64GiB"),
           "Memory that compiling or following one constraint may take."),
    Option("constraint_mask_seconds", "0.1", "SECONDS", _cpu_seconds,
           "CPU time for finding the tokens that may come next, before each token."),
    Option("constraint_fuel", "50000", "N", _whole(1000, 10_000_000),
           "The same, in llguidance's own count (step_lexer_fuel), whatever the machine."),
    Option("constraint_matcher_memory", "48MiB", "BYTES", _bytes_between("16MiB", "64GiB"),
           "Memory for all running constraints; slow ones get half as much again."),
    Option("log_format", "console", "console|json", _one_of("console", "json"),
           "Format of the log on stderr."),
    Option("port_file", "", "FILE", _optional_path,
           "Write the bound addresses there as JSON when ready."),
)  # fmt: skip
"""Every setting, in the order that the help shows."""

_BY_NAME: Final = {option.name: option for option in OPTIONS}


def load_config(
    flags: Mapping[str, str | bool | list[str] | None],
    environ: Mapping[str, str],
    file: Path | None = None,
) -> ServerConfig:
    """Merge flag, variable, file and default of each setting, and check them all.

    Args:
        flags: option name -> value given on the command line; None is "not given".
        environ: the process environment.
        file: a TOML file of option names.

    Raises:
        ConfigInvalid: the first thing wrong, its source and the fix.
    """
    in_file = _read_file(file) if file is not None else {}
    _check_names(environ)
    values: dict[str, Any] = {}
    for option in OPTIONS:
        source, value = _pick(option, flags, environ, file, in_file)
        try:
            values[option.name] = option.parse(value)
        except ValueError as error:
            raise ConfigInvalid(
                f"{source}: {value!r} is not allowed: {error}", metadata={"key": option.name}
            ) from error
    config = ServerConfig(**values)
    _check(config)
    return config


def _pick(
    option: Option,
    flags: Mapping[str, str | bool | list[str] | None],
    environ: Mapping[str, str],
    file: Path | None,
    in_file: Mapping[str, Any],
) -> tuple[str, Any]:
    flag = flags.get(option.name)
    if flag is not None and flag != []:
        return option.flag, flag
    if option.variable in environ:
        return option.variable, environ[option.variable]
    if option.name in in_file:
        return f"{option.name} in {file}", in_file[option.name]
    return f"default of {option.flag}", option.default


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        loaded = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"--config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigInvalid(f"--config {path} is not valid TOML: {error}") from error
    for key in loaded:
        if key not in _BY_NAME:
            near = difflib.get_close_matches(key.replace("-", "_"), _BY_NAME, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see veneer-server serve --help"
            raise ConfigInvalid(f"unknown key {key!r} in {path}: {hint}", metadata={"key": key})
    return loaded


def _check_names(environ: Mapping[str, str]) -> None:
    """Raises ConfigInvalid for a variable that is nearly one of ours. Others may be somebody
    else's: Kubernetes sets VENEER_SERVICE_HOST and the like for a Service of that name."""
    names = (option.variable.removeprefix(_PREFIX) for option in OPTIONS)
    ours = {name: name for name in names} | _ALSO
    for variable in sorted(environ):
        name = variable.removeprefix(_PREFIX)
        right = ours.get(name) == name or name in _OTHERS
        if name == variable or right or _KUBERNETES.search(name):
            continue
        if near := difflib.get_close_matches(name, ours, n=1, cutoff=0.75):
            raise ConfigInvalid(
                f"unknown variable {variable}: did you mean {_PREFIX}{ours[near[0]]}?",
                metadata={"key": variable},
            )


def _check(config: ServerConfig) -> None:
    """Rules that need more than one setting."""
    for flag, address in (
        ("--listen", config.listen),
        ("--metrics-listen", config.metrics_listen),
        ("--openai-listen", config.openai_listen),
    ):
        if address is not None and not address.loopback and not config.insecure:
            raise ConfigInvalid(
                f"{flag} {address} can be reached from other machines and this version has no "
                f"authentication: use 127.0.0.1:{address.port}, or add --insecure if the "
                "network is trusted"
            )
    if config.port_file is not None and not config.port_file.parent.is_dir():
        raise ConfigInvalid(f"--port-file: make the folder {config.port_file.parent} first")
    if config.data_dir.resolve() == config.cache_dir.resolve():
        raise ConfigInvalid("--data-dir and --cache-dir must be two folders")


assert {field.name for field in fields(ServerConfig)} == set(_BY_NAME), "table and record"
