"""The record of all settings, in the order that the help shows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal

from veneer_registry.bundled_base import CACHE_DIR

from veneer_server.config import kinds
from veneer_server.config.setting import Option, setting


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
        "Role of this server: all; registry (stores adapters, generates nothing); or engine "
        "(follows the server at --registry).")
    registry: str = setting(
        "", kinds.TEXT,
        "For --role engine: gRPC address of the registry, HOST:PORT, or https://HOST:PORT "
        "for TLS; its --admin-listen if it has one.")
    registry_ca: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "CA certificates (PEM) to verify the registry's certificate; implies TLS. Empty: the "
        "system's.")
    registry_key_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "File with the API key to send to the registry; the key needs the role operator.")
    registry_cert: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Client certificate (PEM) for the registry (mTLS).")
    registry_cert_key: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Private key of --registry-cert (PEM).")
    adapter_cache_bytes: int = setting(
        "10GiB", kinds.BYTES,
        "For --role engine: maximum size of the adapter cache on disk; the least recently "
        "used adapters are removed first.")
    max_registry_lag: float = setting(
        "0", kinds.SECONDS,
        "For --role engine: refuse calls that name an adapter when the view of the registry "
        "is older than this. 0: no limit; callers may set a lower one.")
    listen: kinds.Address = setting(
        "127.0.0.1:50051", kinds.ADDRESS,
        "Address for gRPC; port 0 picks a free port.")
    metrics_listen: kinds.Address | None = setting(
        "127.0.0.1:9095", kinds.optional(kinds.ADDRESS),
        "Address of the Prometheus metrics endpoint; empty disables it.")
    metrics_names: Literal["veneer", "vllm"] = setting(
        "veneer", kinds.one_of("veneer", "vllm"),
        "Metric names; vllm adds the metrics that routers expect, under vLLM's names, to our "
        "own.")
    openai_listen: kinds.Address | None = setting(
        "", kinds.optional(kinds.ADDRESS),
        "Address of the OpenAI-compatible HTTP gateway; empty disables it.")
    otlp_traces_endpoint: str = setting(
        "", kinds.TEXT,
        "OTLP endpoint for traces, such as http://127.0.0.1:4317; empty disables tracing "
        "unless OTEL_EXPORTER_OTLP_ENDPOINT is set.")
    admin_listen: kinds.Address | None = setting(
        "", kinds.optional(kinds.ADDRESS),
        "Address of a second gRPC port. If set, methods that change state are available only "
        "there; empty disables it.")
    allowed_hosts: tuple[str, ...] = setting(
        "", kinds.HOSTS,
        "Host names accepted by the HTTP gateway and the metrics port, besides localhost and "
        "their address; * accepts any. Empty: any if other machines can connect and callers "
        "need keys; without keys, only names that no outsider can register.")
    unknown_fields: Literal["refuse", "ignore", "warn"] = setting(
        "warn", kinds.one_of("refuse", "ignore", "warn"),
        "What the HTTP gateway does with fields that it does not know, and with tools of types "
        "that it does not serve: refuse the request; ignore them; or ignore them and name them "
        "in the answer's header veneer-ignored (warn). Ollama's API, /tokenize, /detokenize "
        "and the paths that load adapters always refuse such fields.")
    cors_origin: tuple[str, ...] = setting(
        "", kinds.ORIGINS,
        "Allow web pages from ORIGIN, such as https://chat.example.org, to call the HTTP "
        "gateway from a browser (CORS), also without keys; repeatable, * allows all.",
        repeated=True)
    keys_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "File of API keys, created by `veneer-server key new`; empty: callers need no key.")
    jwt_issuer: str = setting(
        "", kinds.TEXT,
        "Issuer (URL) of JSON Web Tokens accepted instead of a key; empty: none are accepted.")
    jwt_audience: str = setting(
        "veneer", kinds.TEXT,
        "Audience that JSON Web Tokens must have.")
    jwt_keys: str = setting(
        "", kinds.TEXT,
        "File or URL of the issuer's public keys (JWKS); empty: discovered from the issuer "
        "(OpenID Connect).")
    jwt_tenant_claim: str = setting(
        "tenant", kinds.TEXT,
        "Claim that names a token's tenant.")
    jwt_roles_claim: str = setting(
        "roles", kinds.TEXT,
        "Claim with a token's roles.")
    audit_log: Path | None = setting(
        "auto", kinds.optional(kinds.FILE, "auto"),
        "Audit log file, with a JSON line for each change and each refusal; auto: "
        "audit.jsonl in --data-dir if callers need a key or token.")
    tls_cert: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "TLS certificate for all ports (PEM, with intermediate certificates); reloaded when "
        "it changes.")
    tls_key: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Private key of the TLS certificate (PEM, without a password).")
    tls_client_ca: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "CA certificates (PEM) that client certificates must be signed by (mTLS).")
    insecure: bool = setting(
        "false", kinds.SWITCH,
        "Allow listening on addresses that other machines can reach without keys or without "
        "TLS.")
    data_dir: Path = setting(
        "~/.local/share/veneer", kinds.FOLDER,
        "Folder for adapters and their catalog; used by one server at a time.")
    store: str = setting(
        "", kinds.TEXT,
        "Object store for the adapters, such as s3://bucket/prefix, which several servers "
        "may share; needs --catalog; empty: adapters stay in --data-dir. For --role engine: "
        "the registry's store, which weights are fetched from first.")
    catalog: str = setting(
        "", kinds.TEXT,
        "PostgreSQL database for the catalog, such as postgresql://veneer@host/veneer, "
        "without a password; needs --store; empty: the catalog stays in --data-dir.")
    catalog_password_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "File with the password for --catalog; empty: PGPASSFILE is used.")
    store_cache_bytes: int = setting(
        "20GiB", kinds.bytes_between("1MiB", "100TiB"),
        "Maximum local disk space for copies of weights from --store; exceeded if requests "
        "need more.")
    max_tenants: int = setting(
        "64", kinds.whole(1, 4096),
        "Maximum number of tenants with adapters of their own; calls from further tenants "
        "are refused.")
    cache_dir: Path = setting(
        CACHE_DIR, kinds.FOLDER,
        "Folder for imported bases and 4-bit checkpoints; may be shared, or deleted.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", kinds.one_of("auto", "cpu", "cuda"),
        "Where the model runs; auto uses CUDA if its kernels pass a self-test.")
    quantization: Literal[
        "nf4", "fp4", "fp8", "none", "gguf", "gptq", "awq", "int-packed", "mxfp4"
    ] = setting(
        "nf4", kinds.one_of("nf4", "fp4", "fp8", "none"),
        "Quantization of the base model's linear layers; fp8 needs --backend cuda. A base that "
        "is stored quantized (GGUF, GPTQ, AWQ ...) is served as it is.")
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", kinds.one_of("bfloat16", "float16", "float32"),
        "Data type of activations, KV cache and adapters.")
    backend: Literal["auto", "native", "torch", "cuda"] = setting(
        "auto", kinds.one_of("auto", "native", "torch", "cuda"),
        "Backend that executes steps; auto uses the native CPU kernels where they can run. "
        "cuda needs --device cuda and has not been run on a GPU yet (docs/gpu.md).")
    native_instructions: Literal[
        "auto", "amx-bf16", "avx512-bf16", "avx512-vnni", "avx512", "avx2-vnni", "avx2",
        "neon-bf16", "neon"
    ] = setting(
        "auto", kinds.one_of("auto", "amx-bf16", "avx512-bf16", "avx512-vnni", "avx512",
        "avx2-vnni", "avx2", "neon-bf16", "neon", metavar="NAME"),
        "Instruction set of the native kernels; auto picks the best one that the CPU supports. "
        "On x86 amx-bf16, avx512-bf16, avx512-vnni, avx512, avx2-vnni or avx2; on ARM "
        "neon-bf16 or neon (docs/cpus.md).")
    int8_activations: bool = setting(
        "false", kinds.SWITCH,
        "Quantize the activations of the base's matrix multiplies to 8 bits: faster with few "
        "sequences, less exact (docs/cpus.md). Needs the native backend and 4-bit weights.")
    threads: int = setting(
        "auto", kinds.auto_whole(1, 1024),
        "CPU threads for a step; auto (or 0) uses one per physical core of one socket, or "
        "fewer if the container's CPU quota is lower.")
    tensor_parallel: int = setting(
        "1", kinds.whole(1, 64),
        "Number of GPUs to shard the base across, with one process each; budgets are per "
        "GPU. More than 1 needs --backend cuda.")
    max_running: int = setting(
        "64", kinds.whole(1, 4096),
        "Maximum number of sequences in one batch.")
    max_batch_tokens: int = setting(
        "512", kinds.whole(16, 1 << 20),
        "Maximum number of tokens in one step.")
    max_prefill_tokens: int = setting(
        "128", kinds.whole(1, 1 << 20),
        "Maximum number of prompt tokens in a step that also decodes (25 % more to finish a "
        "prompt).")
    max_prefill_seconds: float | None = setting(
        "auto", kinds.auto_number(0, 3600),
        "Longest time by which prompt tokens may extend a step that also decodes (25 % more to "
        "finish a prompt), as measured at start; 16 prompt tokens are always allowed. 0: no "
        "limit; auto: as long as four steps without them, at most 0.2 s.")
    prefix_cache: bool = setting(
        "true", kinds.SWITCH,
        "Cache the keys and values of prompts and share them between requests.")
    exact: bool = setting(
        "false", kinds.SWITCH,
        "Make tokens and log-probabilities bit-identical whatever else is in the batch; with "
        "the torch backend, this is much slower and turns the prefix cache off.")
    speculation: Literal["off", "on", "auto"] = setting(
        "off", kinds.one_of("off", "on", "auto"),
        "Guess the next tokens of an answer from its prompt, from earlier answers of the same "
        "tenant and adapter, and from the request's prediction, and check several in one step: "
        "faster where answers repeat text, and every answer stays the same to the bit. Needs "
        "the native backend; auto: on where that is used.")
    max_queue: int = setting(
        "256", kinds.whole(0, 1 << 20),
        "Maximum number of queued sequences (a request may have several); more are refused, "
        "starting with the tenant that has the most for its weight.")
    max_queue_wait: float = setting(
        "0", kinds.SECONDS,
        "Longest time that a request may wait for its first token; requests that have waited, "
        "or would wait, longer are refused. 0: no limit.")
    default_max_tokens: int | None = setting(
        "auto", kinds.optional(kinds.whole(1, 1 << 31), "auto"),
        "Maximum number of new tokens for requests that set no max_tokens; auto: what is left "
        "of the context over HTTP, 512 over gRPC. Always 16 for /v1/completions.")
    default_temperature: float | None = setting(
        "auto", kinds.auto_number(0, 100),
        "Temperature for requests that set none; auto: the base's own, else 0.7.")
    default_top_p: float | None = setting(
        "auto", kinds.auto_number(0.01, 1),
        "top_p for requests that set none; auto: the base's own, else 0.9.")
    max_connections: int = setting(
        "512", kinds.whole(8, 1 << 20),
        "Maximum number of connections to the gRPC port, and to the HTTP gateway. A further "
        "connection replaces one that is idle or makes no progress; if there is none, it is "
        "refused.")
    max_watchers: int = setting(
        "256", kinds.whole(1, 1 << 20),
        "Maximum number of open WatchAdapters calls; more are refused.")
    refusal_rate: int = setting(
        "100", kinds.whole(0, 1 << 20),
        "Invalid requests per second from one host that are refused immediately; further "
        "refusals are delayed by up to 3 s. 0: no delay.")
    kv_cache_bytes: int | None = setting(
        "auto", kinds.optional(kinds.BYTES, "auto"),
        "Memory for the KV cache; auto: a quarter of the memory left free by the base and "
        "the adapter budgets, raised to 1 GiB or to one sequence of the full context if that "
        "fits, and at most --max-running such sequences.")
    host_cache_bytes: int = setting(
        "2GiB", kinds.BYTES,
        "Memory for adapters in the HOST tier.")
    device_adapter_bytes: int = setting(
        "1GiB", kinds.BYTES,
        "Memory for adapters in the DEVICE tier (ready to run).")
    max_adapter_bytes: int = setting(
        "2GiB", kinds.BYTES,
        "Maximum size of an uploaded adapter.")
    retain_superseded: int = setting(
        "2", kinds.whole(0, 1000),
        "Number of superseded revisions kept on disk per name.")
    upload_ttl: float = setting(
        "24", kinds.HOURS,
        "How long the data of an interrupted upload is kept for resuming.")
    min_upload_rate: int = setting(
        "16KiB", kinds.BYTES,
        "Minimum rate of an upload in bytes per second, measured over a minute; slower "
        "uploads are ended.")
    upload_deadline: float = setting(
        "3600", kinds.SOME_SECONDS,
        "How long an upload may take; its data is kept and it can be resumed.")
    max_broken_uploads: int = setting(
        "16", kinds.whole(1, 1 << 20),
        "Maximum number of interrupted uploads to keep; older ones are removed.")
    max_broken_upload_bytes: int = setting(
        "512MiB", kinds.BYTES,
        "Maximum total size of interrupted uploads to keep; the newest is always kept.")
    quarantine_ttl: float = setting(
        "720", kinds.HOURS,
        "How long damaged adapters and content without an adapter stay in quarantine.")
    quarantine_bytes: int = setting(
        "10GiB", kinds.BYTES,
        "Size limit of the quarantine; the oldest content is removed first.")
    allow_base_name: tuple[str, ...] = setting(
        "", kinds.NAMES,
        "Also accept adapters whose config names NAME as their base; repeatable.",
        repeated=True)
    require_same_weights: bool = setting(
        "false", kinds.SWITCH,
        "If the base is stored quantized (GGUF, GPTQ, AWQ ...), refuse adapters that were "
        "trained on the model that it was quantized from; otherwise they get a warning.")
    lora_root: tuple[Path, ...] = setting(
        "", kinds.FOLDERS,
        "Let publishers load adapters from folders below DIR of this machine, by file:// or "
        "vLLM's /v1/load_lora_adapter; repeatable.",
        repeated=True)
    watch_dir: Path | None = setting(
        "", kinds.optional(kinds.FOLDER),
        "Publish the adapters in DIR, each under its folder's name, and republish them when "
        "they change.")
    fetch_allow: tuple[str, ...] = setting(
        "", kinds.NAMES,
        "Let publishers register adapters by URIs that begin with NAME, such as hf://org/ or "
        "https://models.example.com/lora/; repeatable.",
        repeated=True)
    fetch_token: tuple[str, ...] = setting(
        "", kinds.NAMES,
        "Token for URIs with this prefix: 'hf:// FILE' or 'hf:// env:HF_TOKEN'; repeatable.",
        repeated=True)
    resolve: str = setting(
        "", kinds.TEXT,
        "Fetch a requested adapter that is not registered from this URI, where {name} stands "
        "for its name; empty: none are fetched.")
    fetch_deadline: float = setting(
        "600", kinds.SOME_SECONDS,
        "How long fetching an adapter from a URI may take.")
    hf_endpoint: str = setting(
        "", kinds.TEXT,
        "URL of the hub for hf:// URIs; empty: HF_ENDPOINT, else https://huggingface.co.")
    store_responses: Literal["auto", "on", "off"] = setting(
        "auto", kinds.one_of("auto", "on", "off"),
        "Store the answers of /v1/responses on disk, unless a request says store: false, and "
        "conversations; auto: unless --role is engine or registry.")
    stored_responses_bytes: int = setting(
        "1GiB", kinds.bytes_between("16MiB", "100TiB"),
        "Maximum disk space for stored responses and conversations; the oldest of the tenant "
        "that stores most are removed first.")
    stored_responses_age: float = setting(
        "720", kinds.HOURS,
        "How long responses are stored, and conversations after their last change.")
    grace: float = setting(
        "30", kinds.SECONDS,
        "How long running requests may take to finish when the server shuts down.")
    reader_limit: float = setting(
        "30", kinds.SECONDS,
        "How long a stream waits for a caller that reads nothing before the stream is ended.")
    tool_parser: Literal["auto", "hermes", "llama3_json", "mistral", "none"] = setting(
        "auto", kinds.one_of("auto", "hermes", "llama3_json", "mistral", "none"),
        "Format of tool calls in answers; auto: detected from the chat template.")
    constraint_bytes: int = setting(
        "32KiB", kinds.bytes_between("1KiB", "128KiB"),
        "Largest JSON schema, regular expression or list of choices.")
    constraint_workers: int = setting(
        "2", kinds.whole(1, 64),
        "Number of constraints compiled at once; one caller may use all but one of these "
        "workers.")
    constraint_seconds: float = setting(
        "0.5", kinds.CPU_SECONDS,
        "Maximum CPU time for compiling a constraint.")
    constraint_memory: int = setting(
        "16MiB", kinds.bytes_between("4MiB", "64GiB"),
        "Maximum memory for compiling or applying one constraint.")
    constraint_mask_seconds: float = setting(
        "0.1", kinds.CPU_SECONDS,
        "Maximum CPU time per token for computing the allowed next tokens.")
    constraint_fuel: int = setting(
        "50000", kinds.whole(1000, 10_000_000),
        "Limit per token like --constraint-mask-seconds, in llguidance's own unit "
        "(step_lexer_fuel), independent of the machine.")
    constraint_matcher_memory: int = setting(
        "48MiB", kinds.bytes_between("16MiB", "64GiB"),
        "Memory for all running constraints; slow ones get another 50 %.")
    constraint_number_digits: int = setting(
        "20", kinds.whole(0, 1000),
        "Maximum number of digits of a JSON number before and after the point, if the schema "
        "allows that few; 0: no limit.")
    reasoning_parser: Literal["auto", "think", "mistral", "none"] = setting(
        "auto", kinds.one_of("auto", "think", "mistral", "none"),
        "Separate <think>...</think>, or Mistral's [THINK]...[/THINK], from chat answers: "
        "where the chat template has the tag (auto), always (think, mistral), or never "
        "(none).")
    log_format: Literal["console", "json"] = setting(
        "console", kinds.one_of("console", "json"),
        "Log format on stderr.")
    port_file: Path | None = setting(
        "", kinds.optional(kinds.FILE),
        "Write the bound addresses to FILE as JSON when ready.")
    # fmt: on

    @property
    def asks_callers(self) -> bool:
        """Whether callers must authenticate with a key or token."""
        return self.keys_file is not None or bool(self.jwt_issuer)


OPTIONS: Final = tuple(Option(field.name, **field.metadata) for field in fields(ServerConfig))
"""Every setting, in the order that the help shows."""
