"""Read a Veneer server's Prometheus metrics while a load runs."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from veneer_loadtest.errors import TargetFailed
from veneer_loadtest.https import https_context
from veneer_loadtest.results import ServerCounts, TierShares, Totals

API_KEY: Final = "VENEER_API_KEY"
"""Environment variable with the API key, so that no option and no result contains it."""

_EVERY_S: Final = 1.0
_SETTLE_S: Final = 5.0
_SETTLE_EVERY_S: Final = 0.1

Labels = tuple[tuple[str, str], ...]
Samples = dict[str, dict[Labels, float]]


class Counters:
    """The values of one scrape."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def total(self, name: str) -> int:
        """Return the sum over all series of ``veneer_NAME``."""
        return int(sum(self._samples[f"veneer_{name}"].values()))

    def by(self, name: str, *labels: str) -> dict[str, int]:
        """Return sums of ``veneer_NAME`` by the values of ``labels``, joined by spaces."""
        sums: dict[str, int] = defaultdict(int)
        for series, value in self._samples[f"veneer_{name}"].items():
            own = dict(series)
            sums[" ".join(own.get(label, "") for label in labels)] += int(value)
        return dict(sums)


async def read_counters(address: str) -> Counters:
    """Scrape ``HOST:PORT`` or ``https://HOST:PORT``, with the key in VENEER_API_KEY.

    Raises:
        TargetFailed: no server answers there, or it is not Veneer.
        BadOption: see `https_context`.
    """
    tls = address.startswith("https://")
    url = f"{address if tls else f'http://{address}'}/metrics"
    context = https_context() if tls else None
    key = os.environ.get(API_KEY, "").strip()
    headers = {"authorization": f"Bearer {key}"} if key else {}

    def get() -> str:
        request = Request(url, headers=headers)
        with urlopen(request, timeout=10, context=context) as answer:  # nosec B310 # an operator's address
            text: bytes = answer.read()
            return text.decode()

    try:
        text = await asyncio.to_thread(get)
    except HTTPError as error:
        error.close()
        if error.code not in (401, 403):
            raise _no_metrics(address, str(error)) from error
        raise TargetFailed(
            f"the metrics at {address} need a key with the role metrics: set {API_KEY}, or "
            f"leave --metrics out [{error}]",
            metadata={"field": "--metrics", "address": address, "cause": "api_key"},
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise _no_metrics(address, str(error)) from error
    samples: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    if "veneer_num_requests_running" not in samples:
        raise TargetFailed(f"{address} serves metrics, but not a Veneer server's")
    return Counters(samples)


def _no_metrics(address: str, why: str) -> TargetFailed:
    return TargetFailed(
        f"no metrics at {address} ({why}): give --metrics the server's --metrics-listen "
        "(https://HOST:PORT if it has TLS), or leave it out",
        metadata={"field": "--metrics", "address": address},
    )


class MetricsWatch:
    """Scrapes a server once a second from the ``async with``'s entry to its exit."""

    def __init__(self, address: str, now: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._now = now
        self._times: list[float] = []
        self._scrapes: list[Counters] = []
        self._whole = False
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> MetricsWatch:
        await self._scrape()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
        with suppress(TargetFailed):  # a server that is gone has no final counts
            await self._settle()
            self._whole = True

    async def _settle(self) -> None:
        """Scrape until the server has counted the last request: an answer may arrive before it
        is counted, and a cancelled request ends a step later."""
        deadline = self._now() + _SETTLE_S
        while True:
            await self._scrape()
            last = self._scrapes[-1]
            busy = last.total("num_requests_running") + last.total("num_requests_waiting")
            before = self._scrapes[-2].total("requests_total")
            still = not busy and last.total("requests_total") == before
            if still or self._now() > deadline:
                return
            await asyncio.sleep(_SETTLE_EVERY_S)

    def residency(self, start: float) -> TierShares:
        """Return adapters by tier over time; ``start``: the load's start, on the same clock."""
        tiers = sorted(
            {t for each in self._scrapes for t in each.by("adapters_resident", "tier")}
        )

        def rows(name: str) -> dict[str, list[int]]:
            found = [each.by(name, "tier") for each in self._scrapes]
            return {tier: [values.get(tier, 0) for values in found] for tier in tiers}

        return TierShares(
            at_s=[round(moment - start, 3) for moment in self._times],
            adapters=rows("adapters_resident"),
            bytes=rows("adapter_bytes"),
        )

    def counts(self, client: Totals, *, comparable: bool) -> ServerCounts | None:
        """Return the server's counts between entry and exit, compared with the client's totals;
        None if the server could not be scraped at the end."""
        if not self._whole:
            return None
        before, after = self._scrapes[0], self._scrapes[-1]

        def grown(name: str) -> int:
            return after.total(name) - before.total(name)

        def grown_by(name: str, *labels: str) -> dict[str, int]:
            old = before.by(name, *labels)
            new = after.by(name, *labels)
            return {key: new[key] - old.get(key, 0) for key in sorted(new)}

        requests, prompt = grown("requests_total"), grown("prompt_tokens_total")
        tokens = grown("generation_tokens_total")
        agrees = (requests, prompt, tokens) == (
            client.requests,
            client.prompt_tokens,
            client.tokens,
        )
        return ServerCounts(
            requests=requests,
            prompt_tokens=prompt,
            tokens=tokens,
            agrees=agrees if comparable else None,
            lookups=grown_by("adapter_cache_lookups_total", "tier", "result"),
            evictions=grown_by("adapter_evictions_total", "tier", "cause"),
        )

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            with suppress(TargetFailed):  # a missing point; only the last scrape matters
                await self._scrape()

    async def _scrape(self) -> None:
        moment = self._now()
        self._scrapes.append(await read_counters(self._address))
        self._times.append(moment)
