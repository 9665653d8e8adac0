"""The record of all settings, in the order that the help shows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal

from veneer_registry.bundled_base import CACHE_DIR

from veneer_server.config import kinds
from veneer_server.config.setting import Option, setting

__all__ = ["OPTIONS", "ServerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything an operator can set. Sizes are bytes, times are seconds unless they are hours.

    Each field gives its default as a user would write it, its kind of value, and its help.
    """

    # fmt: off
    base: str = setting(
        "smollm2-135m", kinds.BASE,
        "Base model: a Hugging Face folder, a hub name, or the bundled smollm2-135m.",
        also=("model",))
    role: Literal["all", "registry", "engine"] = setting(
        "all", kinds.one_of("all", "registry", "engine"),
        "What this server does: all; registry keeps adapters and generates nothing; engine "
        "follows the --registry of another server.")
    registry: str = setting(
        "", kinds.TEXT,
        "Of --role engine: the registry's gRPC address, HOST:PORT, or https://HOST:PORT for "
        "TLS; its --admin-listen if it has one.")
    registry_ca: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Certificates in PEM, one of which must have signed the registry's; implies TLS. Empty "
        "takes the system's.")
    registry_key_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "File with the API key that is shown to the registry; it needs the role operator.")
    registry_cert: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Certificate in PEM that is shown to the registry (mTLS).")
    registry_cert_key: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "That certificate's private key, in PEM.")
    adapter_cache_bytes: int = setting(
        "10GiB", kinds.BYTES,
        "Of --role engine: most bytes of adapters on this machine's disk; the least recently "
        "used go first.")
    max_registry_lag: float = setting(
        "0", kinds.SECONDS,
        "Of --role engine: calls that name an adapter are refused while what is known of the "
        "registry is older. 0 sets no limit; callers may set a lower one.")
    listen: kinds.Address = setting(
        "127.0.0.1:50051", kinds.ADDRESS,
        "Address for gRPC; port 0 picks a free port.")
    metrics_listen: kinds.Address | None = setting(
        "127.0.0.1:9095", kinds.optional(kinds.ADDRESS),
        "Address for Prometheus; empty turns it off.")
    metrics_names: Literal["veneer", "vllm"] = setting(
        "veneer", kinds.one_of("veneer", "vllm"),
        "Names of the metrics; vllm adds, beside our own, those that routers read by the names "
        "that vLLM gives them.")
    openai_listen: kinds.Address | None = setting(
        "", kinds.optional(kinds.ADDRESS),
        "Address for the OpenAI-compatible HTTP gateway; empty leaves it off.")
    otlp_traces_endpoint: str = setting(
        "", kinds.TEXT,
        "OTLP receiver of traces, such as http://127.0.0.1:4317; empty sends none, unless "
        "OTEL_EXPORTER_OTLP_ENDPOINT is set.")
    admin_listen: kinds.Address | None = setting(
        "", kinds.optional(kinds.ADDRESS),
        "Address of a second gRPC port: if given, methods that change something are answered "
        "there only; empty leaves it off.")
    allowed_hosts: tuple[str, ...] = setting(
        "", kinds.HOSTS,
        "Host names that the HTTP gateway and the metrics port accept, besides localhost and "
        "their address; * accepts any. Empty accepts any if other machines can connect and "
        "need keys, and without keys those that no stranger can register.")
    cors_origin: tuple[str, ...] = setting(
        "", kinds.ORIGINS,
        "Let web pages of ORIGIN, such as https://chat.example.org, call the HTTP gateway from "
        "a browser (CORS), also without keys; may be repeated, * lets all.",
        repeated=True)
    keys_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "File with the API keys that callers need, made by `veneer-server key new`; empty lets "
        "everybody in.")
    jwt_issuer: str = setting(
        "", kinds.TEXT,
        "Issuer (URL) of JSON Web Tokens that callers may send instead of a key; empty accepts "
        "none.")
    jwt_audience: str = setting(
        "veneer", kinds.TEXT,
        "Audience that such tokens must name.")
    jwt_keys: str = setting(
        "", kinds.TEXT,
        "File or URL of the issuer's public keys (JWKS); empty asks the issuer (OpenID Connect "
        "discovery).")
    jwt_tenant_claim: str = setting(
        "tenant", kinds.TEXT,
        "Claim that names a token's tenant.")
    jwt_roles_claim: str = setting(
        "roles", kinds.TEXT,
        "Claim with a token's roles.")
    audit_log: Path | None = setting(
        "auto", kinds.optional(kinds.FILE, "auto"),
        "File for the audit log, a JSON line for each change and each refusal; auto is "
        "audit.jsonl in --data-dir, if callers need a key or token.")
    tls_cert: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Certificate for TLS on every port, in PEM with its intermediate ones; read again when "
        "it changes.")
    tls_key: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "The certificate's private key, in PEM without a password.")
    tls_client_ca: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Certificates in PEM, one of which must have signed that of a client (mTLS).")
    insecure: bool = setting(
        "false", kinds.SWITCH,
        "Allow addresses that other machines can reach without keys or without TLS.")
    data_dir: Path = setting(
        "~/.local/share/veneer", kinds.FOLDER,
        "Folder for adapters and their catalog; one server owns it.")
    store: str = setting(
        "", kinds.TEXT,
        "Object store for the adapters, such as s3://bucket/prefix, which several servers may "
        "share; needs --catalog; empty keeps them in --data-dir. Of --role engine: the "
        "registry's, from which weights are fetched first.")
    catalog: str = setting(
        "", kinds.TEXT,
        "PostgreSQL database for the catalog, such as postgresql://veneer@host/veneer, without "
        "a password; needs --store; empty keeps it in --data-dir.")
    catalog_password_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "File with the password for --catalog; empty leaves it to PGPASSFILE.")
    store_cache_bytes: int = setting(
        "20GiB", kinds.bytes_between("1MiB", "100TiB"),
        "Most local disk for copies of weights from --store; more if requests need it.")
    max_tenants: int = setting(
        "64", kinds.whole(1, 4096),
        "Most tenants with adapters of their own; calls of further ones are refused.")
    cache_dir: Path = setting(
        CACHE_DIR, kinds.FOLDER,
        "Folder for imported bases and 4-bit checkpoints; may be shared, or deleted.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", kinds.one_of("auto", "cpu", "cuda"),
        "Where the model runs; auto uses CUDA if its kernels pass a self-test.")
    quantization: Literal["nf4", "fp4", "fp8", "none"] = setting(
        "nf4", kinds.one_of("nf4", "fp4", "fp8", "none"),
        "Quantization of the base model's linear layers; fp8 needs --backend cuda.")
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", kinds.one_of("bfloat16", "float16", "float32"),
        "Data type of activations, KV cache and adapters.")
    backend: Literal["auto", "native", "torch", "cuda"] = setting(
        "auto", kinds.one_of("auto", "native", "torch", "cuda"),
        "What executes steps; auto uses the native CPU kernels if they can run. cuda needs "
        "--device cuda, and was never run on a card yet (docs/gpu.md).")
    native_instructions: Literal[
        "auto", "amx-bf16", "avx512-bf16", "avx2", "neon-bf16", "neon"
    ] = setting(
        "auto", kinds.one_of("auto", "amx-bf16", "avx512-bf16", "avx2", "neon-bf16", "neon"),
        "Instruction set of the native kernels; auto picks the best that the CPU has.")
    int8_activations: bool = setting(
        "false", kinds.SWITCH,
        "Round what the base's weights are multiplied by to 8 bits: faster where few sequences "
        "run, and less exact (docs/cpus.md). Needs the native backend and 4-bit weights.")
    threads: int = setting(
        "auto", kinds.auto_whole(1, 1024),
        "CPU threads for a step; auto, or 0, is one for each physical core of one socket, or "
        "fewer if the container's quota is less.")
    tensor_parallel: int = setting(
        "1", kinds.whole(1, 64),
        "Cards that the base is divided among, a process for each; budgets are for each. More "
        "than 1 needs --backend cuda.")
    max_running: int = setting(
        "64", kinds.whole(1, 4096),
        "Most sequences in one batch.")
    max_batch_tokens: int = setting(
        "512", kinds.whole(16, 1 << 20),
        "Most tokens in one step.")
    max_prefill_tokens: int = setting(
        "128", kinds.whole(1, 1 << 20),
        "Most prompt tokens in a step that also decodes (a quarter more to finish one).")
    prefix_cache: bool = setting(
        "true", kinds.SWITCH,
        "Cache keys and values of prompts, and share them between requests.")
    exact: bool = setting(
        "false", kinds.SWITCH,
        "Make tokens and log-probabilities bit-identical whatever else is in the batch; with "
        "the torch backend, this is much slower and turns the prefix cache off.")
    max_queue: int = setting(
        "256", kinds.whole(0, 1 << 20),
        "Most sequences that may wait (a request may have several); more are refused, first of "
        "the tenant that has most for its weight.")
    max_queue_wait: float = setting(
        "0", kinds.SECONDS,
        "Longest time that a request may wait for its first token; one that would, or does, is "
        "refused. 0 sets no limit.")
    default_max_tokens: int = setting(
        "512", kinds.whole(1, 1 << 31),
        "Most new tokens of a request that sets no max_tokens; 16 for /v1/completions.")
    default_temperature: float | None = setting(
        "auto", kinds.auto_number(0, 100),
        "Temperature of requests that set none; auto is the base's own, else 0.7.")
    default_top_p: float | None = setting(
        "auto", kinds.auto_number(0.01, 1),
        "top_p of requests that set none; auto is the base's own, else 0.9.")
    max_connections: int = setting(
        "512", kinds.whole(8, 1 << 20),
        "Most connections to the gRPC port, and to the HTTP gateway. A further one replaces "
        "one that makes no progress or is idle, or is refused if there is none.")
    max_watchers: int = setting(
        "256", kinds.whole(1, 1 << 20),
        "Most WatchAdapters calls that may be open; more are refused.")
    refusal_rate: int = setting(
        "100", kinds.whole(0, 1 << 20),
        "Invalid requests per second from one host that are refused at once; further refusals "
        "are delayed by up to 3 s. 0 delays none.")
    kv_cache_bytes: int | None = setting(
        "auto", kinds.optional(kinds.BYTES, "auto"),
        "Memory for keys and values; auto is a quarter of what is free beside the base and the "
        "adapter budgets, more if 1 GiB or one sequence of the whole context fits, and never "
        "more than --max-running such sequences.")
    host_cache_bytes: int = setting(
        "2GiB", kinds.BYTES,
        "Memory for adapters in the HOST tier.")
    device_adapter_bytes: int = setting(
        "1GiB", kinds.BYTES,
        "Memory for adapters in the DEVICE tier, which are ready to run.")
    max_adapter_bytes: int = setting(
        "2GiB", kinds.BYTES,
        "Largest upload.")
    retain_superseded: int = setting(
        "2", kinds.whole(0, 1000),
        "Replaced revisions kept on disk for each name.")
    upload_ttl: float = setting(
        "24", kinds.HOURS,
        "How long the data of an interrupted upload is kept, so that it can be resumed.")
    min_upload_rate: int = setting(
        "16KiB", kinds.BYTES,
        "Bytes per second at which an upload must arrive, over a minute; slower ones end.")
    upload_deadline: float = setting(
        "3600", kinds.SOME_SECONDS,
        "How long an upload may take; its data is kept, and it can be resumed.")
    max_broken_uploads: int = setting(
        "16", kinds.whole(1, 1 << 20),
        "Most interrupted uploads to keep; older ones are removed.")
    max_broken_upload_bytes: int = setting(
        "512MiB", kinds.BYTES,
        "Most bytes of interrupted uploads to keep; the newest is kept whatever its size.")
    quarantine_ttl: float = setting(
        "720", kinds.HOURS,
        "How long damaged adapters and content without an adapter stay in quarantine.")
    quarantine_bytes: int = setting(
        "10GiB", kinds.BYTES,
        "Size limit of the quarantine; the oldest content is removed first.")
    allow_base_name: tuple[str, ...] = setting(
        "", kinds.NAMES,
        "Also accept adapters whose config gives NAME as their base; may be repeated.",
        repeated=True)
    lora_root: tuple[Path, ...] = setting(
        "", kinds.FOLDERS,
        "Let publishers load adapters from folders below DIR of this machine, by file:// or "
        "vLLM's /v1/load_lora_adapter; may be repeated.",
        repeated=True)
    watch_dir: Path | None = setting(
        "", kinds.optional(kinds.FOLDER),
        "Publish the adapters in DIR, each under its folder's name, and each change of one.")
    fetch_allow: tuple[str, ...] = setting(
        "", kinds.NAMES,
        "Let publishers register adapters by URIs that begin with NAME, such as hf://org/ or "
        "https://models.example.com/lora/; may be repeated.",
        repeated=True)
    fetch_token: tuple[str, ...] = setting(
        "", kinds.NAMES,
        "Where the token for URIs that begin so is: 'hf:// FILE', or 'hf:// env:HF_TOKEN'; may "
        "be repeated.",
        repeated=True)
    resolve: str = setting(
        "", kinds.TEXT,
        "Fetch an adapter that is asked for and not there from this URI, with {name} for its "
        "name; empty fetches none.")
    fetch_deadline: float = setting(
        "600", kinds.SOME_SECONDS,
        "How long fetching an adapter from a URI may take.")
    hf_endpoint: str = setting(
        "", kinds.TEXT,
        "URL of the hub that hf:// means; empty is HF_ENDPOINT, else https://huggingface.co.")
    grace: float = setting(
        "30", kinds.SECONDS,
        "How long running requests may take to finish when the server stops.")
    reader_limit: float = setting(
        "30", kinds.SECONDS,
        "How long a stream waits for a caller that reads nothing before it is ended.")
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral", "none"] = setting(
        "auto", kinds.one_of("auto", "hermes", "llama3_json", "mistral", "none"),
        "Format of tool calls in answers; auto: as the chat template has it.")
    constraint_bytes: int = setting(
        "32KiB", kinds.bytes_between("1KiB", "128KiB"),
        "Largest JSON schema, regular expression or list of choices.")
    constraint_workers: int = setting(
        "2", kinds.whole(1, 64),
        "Constraints compiled at once; one caller may use all but one of these workers.")
    constraint_seconds: float = setting(
        "0.5", kinds.CPU_SECONDS,
        "CPU time that compiling a constraint may take.")
    constraint_memory: int = setting(
        "16MiB", kinds.bytes_between("4MiB", "64GiB"),
        "Memory that compiling or following one constraint may take.")
    constraint_mask_seconds: float = setting(
        "0.1", kinds.CPU_SECONDS,
        "CPU time for finding the tokens that may come next, for each token.")
    constraint_fuel: int = setting(
        "50000", kinds.whole(1000, 10_000_000),
        "The same limit in llguidance's own unit (step_lexer_fuel), on any machine.")
    constraint_matcher_memory: int = setting(
        "48MiB", kinds.bytes_between("16MiB", "64GiB"),
        "Memory for all running constraints; slow ones get half as much again.")
    constraint_number_digits: int = setting(
        "20", kinds.whole(0, 1000),
        "Most digits in a row of numbers in JSON, before the point and behind it, where the "
        "schema allows fewer too; 0 does not bound them.")
    reasoning_parser: Literal["auto", "think", "mistral", "none"] = setting(
        "auto", kinds.one_of("auto", "think", "mistral", "none"),
        "Split <think>...</think>, or Mistral's [THINK]...[/THINK], off the answers to chats: "
        "of templates that have the tag (auto), one of them off all (think, mistral), or none.")
    log_format: Literal["console", "json"] = setting(
        "console", kinds.one_of("console", "json"),
        "Format of the log on stderr.")
    port_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Write the bound addresses to FILE as JSON when ready.")
    # fmt: on

    @property
    def asks_callers(self) -> bool:
        """Whether callers must say who they are."""
        return self.keys_file is not None or bool(self.jwt_issuer)


OPTIONS: Final = tuple(Option(field.name, **field.metadata) for field in fields(ServerConfig))
"""Every setting, in the order that the help shows."""
