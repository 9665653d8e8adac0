"""A request for one sequence: its adapter, sampling and constraint, all resolved."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.wire.base import Message
from veneer_server.wire.sampling import SamplingParams

PRIORITY_SECONDS: Final = 10.0
"""A priority is worth this many seconds of waiting for each of its steps: so a request is
overtaken for its priority only by those that arrive within so long after it."""

_MARK: Final = ":"
"""In neither a tenant's name nor a digest."""


def copy_key(tenant: str, weights_digest: str) -> str:
    """The key of a tenant's resident copy of these weights: two tenants with the same weights
    have a copy each, so that neither can see or touch what the other has in memory."""
    if tenant == DEFAULT_TENANT:
        return weights_digest
    return f"{tenant}{_MARK}{weights_digest}"


def split_key(key: str) -> tuple[str, str]:
    """The tenant and the weights digest of a `copy_key`."""
    tenant, _, digest = key.rpartition(_MARK)
    return tenant or DEFAULT_TENANT, digest


_FREE: Final = 1 / 6
_LARGE_ADAPTER: Final = 2.0


def token_work(adapter: AdapterSource | None, base_parameters: int) -> float:
    """What a token under an adapter takes, beside one of the base alone, which is 1.

    An adapter's matrices are multiplied as the base's are, once for each element. Up to a sixth
    of the base's parameters (rank 64 in all projections of a base of 135M takes 0.15) that
    counts as nothing: such steps take about as long as the base's. Beyond, an element counts
    as two of the base. Measured in CPU time at rank 512 and 1,024 (AMD EPYC, Zen 3, AVX2): 1.1
    for prompts, 1.3 for eight rows that decode under one adapter, 2.4 for one row, which reads
    the adapter from memory for itself as rows under different adapters do.

    Args:
        base_parameters: 0 if unknown: all tokens take the same.
    """
    if adapter is None or not base_parameters:
        return 1.0
    beyond = adapter.parameters / base_parameters - _FREE
    return 1.0 + _LARGE_ADAPTER * beyond if beyond > 0 else 1.0


class AdapterSource(Message, frozen=True):
    """Where the engine finds the weights of one revision.

    Attributes:
        weights_digest: key of the resident copy, see `copy_key`; the digest in it is verified
            when the weights are read.
        folder: local folder with ``adapter_config.json`` and
            ``adapter_model.safetensors`` (made by the registry's store).
        parameters: elements of all A and B; a resident copy takes this many times
            `EngineInfo.adapter_itemsize` bytes.
        name: for messages only.
    """

    weights_digest: str
    folder: str
    parameters: int
    name: str

    def of(self, tenant: str) -> AdapterSource:
        """The tenant's own copy of these weights."""
        key = copy_key(tenant, self.weights_digest)
        return msgspec.structs.replace(self, weights_digest=key)

    @property
    def digest(self) -> str:
        """The weights digest, whosever copy it is."""
        return split_key(self.weights_digest)[1]


class Constraint(Message, frozen=True):
    """What the output must match; the front has checked that it compiles.

    Attributes:
        text: a JSON schema, a regular expression, a JSON array of strings, or a grammar in
            llguidance's form of Lark.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str


class SequenceRequest(Message, frozen=True):
    """A request for one sequence: made once, by `serving.generator`, and then only passed on.

    Lengths and ranges have been checked.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most new tokens, at least 1, within the context.
        prompt_logprobs: also report the prompt's log-probabilities.
        prompt_ranks: and with them each token's rank among all tokens.
        top_logprobs: how many most likely tokens to report beside each log-probability.
        stop_token_ids: end the sequence, in addition to the model's own.
        min_tokens: neither these nor the model's own are sampled earlier, unless a constraint
            allows nothing else; at most ``max_tokens``.
        use_prefix_cache: whether to share K and V with other sequences of the same prefix.
        cache_scope: prefixes are shared only within a scope, the caller's tenant.
        deadline: when the first token is due, on the monotonic clock, which the processes
            of a machine share; a sequence that cannot meet it is refused.
        sender: whose turn it uses in the queue for compiling constraints.
        tenant, fairness_id: whose service it counts as: a tenant's, and within a gateway's
            that of one whom the gateway calls for.
        weight: the tenant's.
        priority: within those; lower starts earlier, see `PRIORITY_SECONDS`.
        arrived: for a further sample, when its request arrived, on the monotonic clock: it goes
            before requests that arrived later. None for a first sample.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams
    adapter: AdapterSource | None = None
    ignore_eos: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    prompt_ranks: bool = False
    top_logprobs: int = 0
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    min_tokens: int = 0
    constraint: Constraint | None = None
    use_prefix_cache: bool = True
    cache_scope: str = ""
    deadline: float | None = None
    sender: Sender = NOBODY
    tenant: str = ""
    fairness_id: str = ""
    weight: float = 1.0
    priority: int = 0
    arrived: float | None = None
