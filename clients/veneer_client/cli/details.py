"""``veneer adapter show``: one adapter, as labels and texts."""

from __future__ import annotations

from typing import Final

from veneer_registry.adapter import SHORT_REVISION, Tier

from veneer_client.cli.show import ago, byte_size, place_of
from veneer_client.records import AdapterDetails, AdapterInfo

__all__ = ["detail_rows"]

_ALPHA: Final = "config.lora.alpha"
"""The key that `veneer-train` writes."""
_WORDS: Final = {
    "fingerprint": "by its fingerprint",
    "rule": "a copy of the served one, by its name",
    "publisher": "the served one, its publisher says",
    "none": "not recorded",
}
"""How the base was recognised as the served one; shown after its name."""


def detail_rows(details: AdapterDetails, *, full: bool = False) -> dict[str, str]:
    """One adapter and its name's revisions, as labels and texts, the main facts first.

    Args:
        full: add rarely needed rows and the whole training manifest.
    """
    adapter = details.adapter
    used = f"last used {ago(adapter.last_used)}"
    rows = {
        "name": adapter.name,
        "revision": adapter.revision,
        "state": adapter.state.value.replace("_", " "),
        "rank": str(adapter.rank),
        # Not part of the weights: the server knows it only from a training manifest.
        "alpha": adapter.training.get(_ALPHA, "not in its training manifest"),
        "targets": ", ".join(adapter.targets),
        "size": f"{byte_size(adapter.size)} in memory, {byte_size(adapter.disk_bytes)} on disk",
        "base model": _base(adapter),
        "created": adapter.created.isoformat(timespec="seconds"),
        "aliases": ", ".join(adapter.aliases) or "none",
        "resident": _resident(adapter),
        "in use": f"{_count(adapter.leases, 'request')}, {used}",
    }
    if adapter.tenant:
        rows["in use"] = "visible only to its own tenant"
        rows["tenant"] = f"{adapter.tenant} (shared by that tenant)"
    elif adapter.shared:
        rows["shared"] = "with all tenants"
    rows |= {f"label {key}": value for key, value in adapter.labels.items()}
    for number, revision in enumerate(details.revisions):
        # Labels must be unique, so each further line gets one of blanks.
        rows["revisions" if number == 0 else " " * number] = _revision_line(revision)
    if details.revisions_left_out:
        older = _count(details.revisions_left_out, "older revision")
        rows["  left out"] = f"{older}: `veneer adapter history {adapter.name}`"
    if not full:
        if adapter.training:
            facts = _count(len(adapter.training), "fact")
            rows["manifest"] = f"{facts}: `veneer adapter show {adapter.short} --full`"
        return rows
    rows |= {
        "weights": adapter.weights_digest,
        "parameters": f"{adapter.parameters:,}",
        "chat template": "its own" if adapter.has_chat_template else "the base's",
        "retain": _count(adapter.retain, "superseded revision"),
        "etag": adapter.etag,
    }
    return rows | {f"training {key}": value for key, value in adapter.training.items()}


def _base(adapter: AdapterInfo) -> str:
    """The base named in the adapter's config, and how it was recognised as the served one."""
    word = _WORDS.get(adapter.base_word, "")
    return " ".join(filter(None, (adapter.base_model, word and f"({word})")))


def _resident(adapter: AdapterInfo) -> str:
    if adapter.tier in (Tier.HOST, Tier.DEVICE):
        where = f"in {adapter.tier.value} memory"
    else:
        where = f"not in memory, on {adapter.tier.value} only"
    return f"{where}, pinned" if adapter.pinned else where


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _revision_line(revision: AdapterInfo) -> str:
    notes = ["current"] if revision.current else []
    notes += revision.aliases
    parts = [
        revision.revision[:SHORT_REVISION],
        revision.created.isoformat(timespec="seconds"),
        byte_size(revision.disk_bytes),
        place_of(revision),
    ]
    return "  ".join(parts) + (f"  ({', '.join(notes)})" if notes else "")
