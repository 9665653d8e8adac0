"""A request for one sequence: its adapter, sampling and constraint, all resolved."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.wire.base import Message
from veneer_server.wire.sampling import SamplingParams

PRIORITY_SECONDS: Final = 10.0
"""Each step of priority is worth this many seconds of waiting. So a request whose priority is
better by n overtakes only requests that arrived at most n times this long before it."""

_MARK: Final = ":"
"""Occurs in neither a tenant's name nor a digest."""


def copy_key(tenant: str, weights_digest: str) -> str:
    """The key of a tenant's resident copy of these weights. Two tenants with the same weights
    have a copy each, so that neither can see or touch the other's copy in memory."""
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
    """Relative cost of a token with an adapter; a token of the base alone costs 1.

    Each element of an adapter's matrices is used once per token, as for the base's. Elements
    up to a sixth of the base's parameters (rank 64 in all projections of a base of 135M is
    0.15) count as nothing: such steps take about as long as the base's. Beyond that, an element
    counts as two of the base. Measured in CPU time at rank 512 and 1,024 (AMD EPYC, Zen 3,
    AVX2): 1.1 for prompts, 1.3 for eight rows that decode under one adapter, 2.4 for one row,
    which reads the adapter from memory for itself alone, as rows under different adapters do.

    Args:
        base_parameters: the base's parameters; 0 if unknown, and then all tokens cost 1.
    """
    if adapter is None or not base_parameters:
        return 1.0
    beyond = adapter.parameters / base_parameters - _FREE
    return 1.0 + _LARGE_ADAPTER * beyond if beyond > 0 else 1.0


class AdapterSource(Message, frozen=True):
    """The source of one revision's weights for the engine.

    Attributes:
        weights_digest: key of the resident copy, see `copy_key`; the digest in it is verified
            when the weights are read.
        folder: local folder with ``adapter_config.json`` and
            ``adapter_model.safetensors`` (made by the registry's store).
        parameters: elements of all A and B matrices; a resident copy takes this many times
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
        """The weights digest without the tenant."""
        return split_key(self.weights_digest)[1]


class Constraint(Message, frozen=True):
    """A constraint that the output must match. The front has checked its size only; the engine
    tries whether it compiles.

    Attributes:
        text: a JSON schema, a regular expression, a JSON array of strings, or a grammar in
            llguidance's form of Lark.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str


class SequenceRequest(Message, frozen=True):
    """A request for one sequence: made once, by `serving.generator`, then passed on unchanged.

    Lengths and ranges have been checked.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: maximum number of new tokens, at least 1, within the context.
        prompt_logprobs: also report the prompt's log-probabilities.
        prompt_ranks: with these, also report each prompt token's rank among all tokens.
        top_logprobs: how many most likely tokens to report beside each log-probability.
        stop_token_ids: tokens that end the sequence, in addition to the model's own.
        min_tokens: neither `stop_token_ids` nor the model's own are sampled before this many
            tokens, unless a constraint allows nothing else; at most ``max_tokens``.
        use_prefix_cache: whether to share K and V with other sequences of the same prefix.
        cache_scope: prefixes are shared only within a scope, the caller's tenant.
        deadline: when the first token is due, on the monotonic clock, which the processes
            of a machine share; a sequence that cannot meet it is refused.
        sender: sender whose turn is used in the queue for compiling constraints.
        tenant, fairness_id: tenant, and user of a gateway, that the request is charged to in
            fair scheduling.
        weight: the tenant's weight.
        priority: among requests of the same tenant and user; lower starts earlier, see
            `PRIORITY_SECONDS`.
        prediction: tokens that the caller expects as the answer, if any: a draft, see
            `engine.scheduling.speculation`. The answer does not depend on them.
        arrived: arrival of the request on the monotonic clock, for all its samples but the
            first: these go before requests that arrived later. None for the first sample.
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
    prediction: list[int] = msgspec.field(default_factory=list)
    arrived: float | None = None
