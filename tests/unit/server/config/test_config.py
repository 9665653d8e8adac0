"""One table for flags, environment variables and file keys; everything else is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from veneer_server.config import OPTIONS, Address, ConfigInvalid, load_config

from tests.refused import refused


def test_defaults() -> None:
    config = load_config({}, {})
    assert config.base == "smollm2-135m"
    assert str(config.listen) == "127.0.0.1:50051"
    assert config.metrics_listen == Address("127.0.0.1", 9095)
    assert config.host_cache_bytes == 2 << 30
    assert config.port_file is None
    assert not config.insecure
    assert config.cache_dir.is_absolute()


def test_flag_then_variable_then_file_then_default(tmp_path: Path) -> None:
    file = tmp_path / "veneer.toml"
    file.write_text('threads = 1\nmax_queue = 2\nmax_running = 3\nlog_format = "json"\n')
    config = load_config(
        {"threads": "7", "max_queue": None},
        {"VENEER_THREADS": "5", "VENEER_MAX_QUEUE": "6", "VENEER_SERVER": "not ours"},
        file,
    )
    assert (config.threads, config.max_queue, config.max_running) == (7, 6, 3)
    assert config.log_format == "json"
    assert config.max_batch_tokens == 512


@pytest.mark.parametrize(
    ("given", "threads"), [("auto", 0), ("0", 0), (0, 0), ("3", 3), (3, 3)]
)
def test_threads_are_a_number_or_auto(tmp_path: Path, given: str | int, threads: int) -> None:
    file = tmp_path / "veneer.toml"
    file.write_text(f"threads = {given!r}\n")
    assert load_config({}, {}, file).threads == threads
    assert load_config({"threads": str(given)}, {}).threads == threads


def test_answers_have_no_limit_unless_one_is_given() -> None:
    assert load_config({}, {}).default_max_tokens is None
    assert load_config({"default_max_tokens": "auto"}, {}).default_max_tokens is None
    assert load_config({"default_max_tokens": "7"}, {}).default_max_tokens == 7


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5 gib", 3 << 29),
        ("17", 17),
        (17, 17),
        ("4G", 4 << 30),
        ("512m", 512 << 20),
        ("4Gi", 4 << 30),
    ],
)
def test_sizes(tmp_path: Path, text: str | int, size: int) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"kv_cache_bytes = {text!r}\n")
    assert load_config({}, {}, file).kv_cache_bytes == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_cache_bytes", "2 parsecs"),
        ("kv_cache_bytes", "-1"),
        ("threads", "-1"),
        ("threads", "two"),
        ("threads", "1025"),
        ("threads", "auto "),
        ("max_running", "0"),
        ("grace", "nan"),
        ("grace", "-1"),
        ("upload_deadline", "0"),
        ("device", "tpu"),
        ("quantization", "int8"),
        ("log_format", "xml"),
        ("listen", "50051"),
        ("listen", "127.0.0.1:99999"),
        ("listen", ""),
        ("base", " "),
        ("insecure", "maybe"),
        ("store_responses", "yes"),
        ("stored_responses_bytes", "1MiB"),
        ("stored_responses_age", "-1"),
        ("default_max_tokens", "0"),
        ("default_max_tokens", "none"),
        ("unknown_fields", "drop"),
    ],
)
def test_bad_values_name_the_flag_and_the_fix(name: str, value: str) -> None:
    # The sentence itself is tested: each kind of value says what would do.
    with pytest.raises(ConfigInvalid, match=r"is not allowed: (give|choose)") as caught:
        load_config({name: value}, {})
    assert "--" + name.replace("_", "-") in str(caught.value)
    with refused(ConfigInvalid, key=name, source=f"VENEER_{name.upper()}"):
        load_config({}, {f"VENEER_{name.upper()}": value})


@pytest.mark.parametrize(
    ("key", "hint"), [("max_quue", "max_queue"), ("zzzzz", "--help"), ("data-dir", "data_dir")]
)
def test_unknown_keys_suggest_the_nearest(tmp_path: Path, key: str, hint: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"{key} = 1\n")
    with refused(ConfigInvalid, key=key) as caught:
        load_config({}, {}, file)
    assert hint in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with refused(ConfigInvalid, key="config", cause="unreadable"):
        load_config({}, {}, tmp_path / "none.toml")
    (tmp_path / "c.toml").write_text("= 1")
    with refused(ConfigInvalid, key="config", cause="not_toml"):
        load_config({}, {}, tmp_path / "c.toml")


@pytest.mark.parametrize("name", ["listen", "metrics_listen"])
@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "[::]", "example.com"])
def test_open_addresses_need_insecure(name: str, host: str) -> None:
    with refused(ConfigInvalid, key=name, needs="insecure"):
        load_config({name: f"{host}:1"}, {})
    config = load_config({name: f"{host}:1", "insecure": True}, {})
    assert str(getattr(config, name)) == f"{host}:1"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_loopback_addresses_do_not(host: str) -> None:
    assert load_config({"listen": f"{host}:0"}, {}).listen.loopback


def test_metrics_can_be_turned_off() -> None:
    assert load_config({"metrics_listen": ""}, {}).metrics_listen is None


def test_data_and_cache_are_two_folders(tmp_path: Path) -> None:
    with refused(ConfigInvalid, key="cache_dir"):
        load_config({"data_dir": str(tmp_path), "cache_dir": str(tmp_path)}, {})


def test_the_record_is_frozen_and_each_option_is_described() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config({}, {}).threads = 1  # type: ignore[misc]
    assert all(option.help.endswith(".") for option in OPTIONS)


def test_names_may_be_repeated(tmp_path: Path) -> None:
    file = tmp_path / "veneer.toml"
    file.write_text('allow_base_name = ["a/b", "c"]\n')
    assert load_config({}, {}).allow_base_name == ()
    assert load_config({}, {}, file).allow_base_name == ("a/b", "c")
    assert load_config({}, {"VENEER_ALLOW_BASE_NAME": "d, e/f"}, file).allow_base_name == (
        "d",
        "e/f",
    )
    flags: dict[str, str | bool | list[str] | None] = {"allow_base_name": ["g", "h/i"]}
    assert load_config(flags, {}, file).allow_base_name == ("g", "h/i")
    file.write_text("allow_base_name = [1]\n")
    with refused(ConfigInvalid, key="allow_base_name"):
        load_config({}, {}, file)


def test_bounds_of_the_quarantine() -> None:
    config = load_config({}, {"VENEER_QUARANTINE_BYTES": "1GiB"})
    assert (config.quarantine_bytes, config.quarantine_ttl) == (1 << 30, 720.0)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("VENEER_MAX_QUEU", "VENEER_MAX_QUEUE"),
        ("VENEER_KV_CACHE_BYTE", "VENEER_KV_CACHE_BYTES"),
        ("VENEER_LISTENS", "VENEER_LISTEN"),
        ("VENEER_MODEL", "VENEER_BASE"),
        ("VENEER_MODLE", "VENEER_BASE"),
    ],
)
def test_a_variable_that_is_nearly_one_is_refused(wrong: str, meant: str) -> None:
    with refused(ConfigInvalid, key=wrong, did_you_mean=meant):
        load_config({}, {wrong: "1"})


def test_variables_of_others_are_not() -> None:
    """Kubernetes gives every container those of a Service that is called veneer."""
    load_config(
        {},
        {
            "VENEER_SERVER": "gpu1:50051",
            "VENEER_ACTOR": "ada",
            "VENEER_PROFILE": "team",
            "VENEER_API_KEY": "vn_x_y",
            "VENEER_CA": "ca.pem",
            "VENEER_CERT": "cert.pem",
            "VENEER_KEY": "key.pem",
            "VENEER_SERVICE_HOST": "10.0.0.1",
            "VENEER_SERVICE_PORT": "50051",
            "VENEER_SERVICE_PORT_GRPC": "50051",
            "VENEER_METRICS_SERVICE_PORT": "9095",
            "VENEER_PORT": "tcp://10.0.0.1:50051",
            "VENEER_PORT_50051_TCP": "tcp://10.0.0.1:50051",
            "VENEER_PORT_50051_TCP_ADDR": "10.0.0.1",
            "VENEER_METRICS_PORT_9095_TCP_PROTO": "tcp",
            "VENEER_OF_SOMEBODY_ELSE": "1",
        },
    )


@pytest.mark.parametrize(
    ("given", "meant"), [("bf16", "bfloat16"), ("half", "float16"), ("fp32", "float32")]
)
def test_short_names_of_dtypes(given: str, meant: str) -> None:
    assert load_config({"dtype": given}, {}).dtype == meant


def test_a_follower_needs_its_registry_and_sends_no_key_in_the_clear(tmp_path: Path) -> None:
    key = {"role": "engine", "registry_key_file": str(tmp_path / "key")}
    with refused(ConfigInvalid, key="registry"):
        load_config({"role": "engine"}, {})
    with refused(ConfigInvalid, key="registry"):
        load_config({"role": "engine", "registry": "nowhere"}, {})
    with refused(ConfigInvalid, key="registry"):
        load_config({"registry": "127.0.0.1:50051"}, {})
    with refused(ConfigInvalid, key="registry_key_file", needs="insecure"):
        load_config({**key, "registry": "10.0.0.1:50051"}, {})
    with refused(ConfigInvalid, key="registry_cert"):
        load_config({"role": "engine", "registry": "10.0.0.1:1", "registry_cert": "x.pem"}, {})
    for allowed in ("127.0.0.1:50051", "https://10.0.0.1:50051"):
        assert load_config({**key, "registry": allowed}, {}).registry == allowed


@pytest.mark.parametrize(
    ("key", "flags"),
    [
        ("tensor_parallel", {"tensor_parallel": "2"}),
        ("tensor_parallel", {"tensor_parallel": "2", "backend": "native"}),
        ("quantization", {"quantization": "fp8"}),
        ("quantization", {"quantization": "fp8", "backend": "torch"}),
        ("backend", {"backend": "cuda", "device": "cpu"}),
        ("backend", {"backend": "native", "device": "cuda"}),
        ("backend", {"backend": "native", "dtype": "float32"}),
        ("speculation", {"speculation": "on", "backend": "torch"}),
        ("speculation", {"speculation": "on", "backend": "cuda", "device": "cuda"}),
        ("int8_activations", {"int8_activations": "true", "backend": "torch"}),
        ("int8_activations", {"int8_activations": "true", "device": "cuda"}),
        ("int8_activations", {"int8_activations": "true", "dtype": "float16"}),
    ],
)
def test_settings_that_exclude_each_other_are_found_before_anything_is_loaded(
    key: str, flags: dict[str, str]
) -> None:
    with refused(ConfigInvalid, key=key):
        load_config(flags, {})


def test_settings_that_go_together() -> None:
    for flags in (
        {"backend": "cuda", "device": "cuda", "tensor_parallel": "2", "quantization": "fp8"},
        {"backend": "cuda"},
        {"backend": "native", "int8_activations": "true", "device": "cpu"},
        {"backend": "torch", "dtype": "float32"},
        {"backend": "torch", "speculation": "auto"},
        {"speculation": "on"},
    ):
        load_config(flags, {})
