"""Settings from flags, variables and a file, merged and checked."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from veneer_server.config import kinds
from veneer_server.config.record import OPTIONS, ServerConfig
from veneer_server.config.setting import PREFIX, ConfigInvalid, Option

_OTHERS: Final = frozenset({"SERVER", "ACTOR", "API_KEY", "CA", "CERT", "KEY", "PROFILE"})
"""Variables that the clients read."""
_KUBERNETES: Final = re.compile(r"SERVICE_(HOST|PORT)|^(\w+_)?PORT(_\d+_(TCP|UDP)\w*)?$")
_BY_NAME: Final = {option.name: option for option in OPTIONS}


def load_config(
    flags: Mapping[str, str | bool | list[str] | None],
    environ: Mapping[str, str],
    file: Path | None = None,
) -> ServerConfig:
    """Merge flag, variable, file and default of each setting, and check them all.

    Args:
        flags: option name -> value from the command line; None if not given.
        environ: the process environment.
        file: a TOML file of option names.

    Raises:
        ConfigInvalid: names the first problem, its source and the fix.
    """
    in_file = _read_file(file) if file is not None else {}
    _check_names(environ)
    values: dict[str, Any] = {}
    for option in OPTIONS:
        source, value = _pick(option, flags, environ, file, in_file)
        try:
            values[option.name] = option.kind.parse(value)
        except ValueError as error:
            raise ConfigInvalid(
                f"{source}: {value!r} is not allowed: {error}",
                metadata={"key": option.name, "source": source},
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
        raise ConfigInvalid(
            f"--config {path}: {error.strerror or error}",
            metadata={"key": "config", "cause": "unreadable"},
        ) from error
    except ValueError as error:
        raise ConfigInvalid(
            f"--config {path} is not valid TOML: {error}",
            metadata={"key": "config", "cause": "not_toml"},
        ) from error
    for key in loaded:
        if key not in _BY_NAME:
            near = difflib.get_close_matches(key.replace("-", "_"), _BY_NAME, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see veneer-server serve --help"
            meant = {"did_you_mean": near[0]} if near else {}
            raise ConfigInvalid(
                f"unknown key {key!r} in {path}: {hint}", metadata={"key": key, **meant}
            )
    return loaded


def _check_names(environ: Mapping[str, str]) -> None:
    """Raise ConfigInvalid for a variable that looks like a misspelling of ours. Others are
    ignored: Kubernetes sets VENEER_SERVICE_HOST and the like for a Service named veneer."""
    ours = {
        name.upper(): option.name.upper()
        for option in OPTIONS
        for name in (option.name, *option.also)
    }
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        right = ours.get(name) == name or name in _OTHERS
        if name == variable or right or _KUBERNETES.search(name):
            continue
        if near := difflib.get_close_matches(name, ours, n=1, cutoff=0.75):
            meant = f"{PREFIX}{ours[near[0]]}"
            raise ConfigInvalid(
                f"unknown variable {variable}: did you mean {meant}?",
                metadata={"key": variable, "did_you_mean": meant},
            )


def _lacks(config: ServerConfig) -> list[str]:
    """The missing flags that would protect an address reachable from other machines."""
    lacks = []
    if config.tls_cert is None:
        lacks.append("--tls-cert and --tls-key (encryption)")
    if config.keys_file is None and not config.jwt_issuer and config.tls_client_ca is None:
        lacks.append("--keys-file or --jwt-issuer (authentication)")
    return lacks


def _check_role(config: ServerConfig) -> None:
    if config.role == "engine" and not config.registry:
        raise ConfigInvalid(
            "--role engine follows a registry: give its address with --registry HOST:PORT",
            metadata={"key": "registry"},
        )
    if config.role != "engine":
        for name in ("registry", "registry_ca", "registry_key_file", "registry_cert"):
            if getattr(config, name):
                raise ConfigInvalid(
                    f"{_BY_NAME[name].flag} has no effect with --role "
                    f"{config.role}: remove it, or use --role engine",
                    metadata={"key": name},
                )
    else:
        for name in ("catalog", "watch_dir", "fetch_allow", "resolve"):
            if getattr(config, name):
                raise ConfigInvalid(
                    f"{_BY_NAME[name].flag} has no effect with --role engine, which uses the "
                    "registry's adapters: set it on the registry",
                    metadata={"key": name},
                )
    if config.registry:
        _check_registry(config)
    if (config.registry_cert is None) != (config.registry_cert_key is None):
        raise ConfigInvalid(
            "--registry-cert and --registry-cert-key belong together: give both",
            metadata={"key": "registry_cert"},
        )


def _check_registry(config: ServerConfig) -> None:
    tls = config.registry.startswith("https://") or config.registry_ca is not None
    address = config.registry.removeprefix("https://").removeprefix("http://")
    try:
        loopback = kinds.ADDRESS.parse(address).loopback
    except ValueError as error:
        raise ConfigInvalid(
            f"--registry: {config.registry!r} is not allowed: {error}",
            metadata={"key": "registry"},
        ) from error
    if config.registry_key_file is not None and not (tls or loopback or config.insecure):
        raise ConfigInvalid(
            f"--registry-key-file: the key would be sent to {address} without encryption: add "
            "--registry-ca, use --registry https://HOST:PORT, or add --insecure if you trust "
            "the network",
            metadata={"key": "registry_key_file", "needs": "insecure"},
        )


def _check_backend(config: ServerConfig) -> None:
    """Refuse settings that exclude each other. The engine would find them too, but only after
    the base has been fetched and loaded."""

    def refuse(name: str, why: str) -> NoReturn:
        raise ConfigInvalid(f"{_BY_NAME[name].flag} {why}", metadata={"key": name})

    backend, native = config.backend, config.backend in ("auto", "native")
    if config.tensor_parallel > 1 and backend != "cuda":
        refuse(
            "tensor_parallel",
            f"{config.tensor_parallel} needs --backend cuda: other backends execute a whole "
            "base in one process",
        )
    if config.quantization == "fp8" and backend != "cuda":
        refuse(
            "quantization",
            "fp8 needs --backend cuda: other backends have no kernels for it; give nf4",
        )
    if backend == "cuda" and config.device == "cpu":
        refuse("backend", "cuda needs --device cuda, not cpu")
    if backend == "native" and config.device == "cuda":
        refuse("backend", "native is for CPUs: give --device cpu, or --backend auto")
    if backend == "native" and config.dtype != "bfloat16":
        refuse(
            "backend",
            f"native computes in bfloat16, not in {config.dtype}: leave --dtype out, or give "
            "--backend torch",
        )
    if config.speculation == "on" and not native:
        refuse(
            "speculation",
            f"on needs --backend native or auto, not {backend}: there, guesses would change "
            "answers. Give --speculation auto or off",
        )
    if config.int8_activations:
        if not native:
            refuse("int8_activations", f"needs --backend native or auto, not {backend}")
        if config.device == "cuda":
            refuse("int8_activations", "is for CPUs: give --device cpu, or leave it out")
        if config.dtype != "bfloat16":
            refuse(
                "int8_activations",
                f"needs --dtype bfloat16, not {config.dtype}: leave one of them out",
            )


def _check(config: ServerConfig) -> None:
    """Check the rules that involve more than one setting."""
    _check_role(config)
    _check_backend(config)
    for name, address in (
        ("listen", config.listen),
        ("metrics_listen", config.metrics_listen),
        ("openai_listen", config.openai_listen),
        ("admin_listen", config.admin_listen),
    ):
        lacks = _lacks(config)
        if address is not None and not address.loopback and lacks and not config.insecure:
            raise ConfigInvalid(
                f"{_BY_NAME[name].flag} {address} is reachable from other machines: add "
                f"{' and '.join(lacks)}, use 127.0.0.1:{address.port}, or add --insecure if "
                "you trust the network",
                metadata={"key": name, "needs": "insecure"},
            )
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigInvalid(
            "--tls-cert and --tls-key belong together: give both",
            metadata={"key": "tls_cert" if config.tls_cert is None else "tls_key"},
        )
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigInvalid(
            "--tls-client-ca needs TLS: also give --tls-cert and --tls-key",
            metadata={"key": "tls_client_ca"},
        )
    if config.role != "engine" and bool(config.store) != bool(config.catalog):
        raise ConfigInvalid(
            "--store and --catalog belong together: give both, or neither to keep adapters "
            "in --data-dir",
            metadata={"key": "catalog" if config.store else "store"},
        )
    if config.port_file is not None and not config.port_file.parent.is_dir():
        raise ConfigInvalid(
            f"--port-file: create the folder {config.port_file.parent} first",
            metadata={"key": "port_file"},
        )
    if os.path.realpath(config.data_dir) == os.path.realpath(config.cache_dir):
        raise ConfigInvalid(
            "--data-dir and --cache-dir must be different folders",
            metadata={"key": "cache_dir"},
        )
