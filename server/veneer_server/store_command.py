"""``veneer-server store verify`` and ``store gc``: what they print."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from veneer_registry import upkeep

__all__ = ["collect", "verify"]

_MIB = 1 << 20


def verify(
    data_dir: Path, tell: Callable[[str], None], *, quarantine: bool, as_json: bool
) -> bool:
    """Check every stored byte; True if all is whole.

    Args:
        quarantine: serve damaged weights no more; needs the folder's lock.

    Raises as `upkeep.verify` and `upkeep.quarantine`.
    """
    found = upkeep.verify(data_dir, _progress if sys.stderr.isatty() else _silent)
    if quarantine and found.damaged:
        upkeep.quarantine(data_dir, found.damaged)
    if as_json:
        tell(json.dumps(asdict(found)))
        return not found.damaged
    tell(
        f"{found.names} names, {found.revisions} revisions, {found.weights} weights, "
        f"{found.bytes / _MIB:.1f} MiB: "
        + (f"{len(found.damaged)} damaged" if found.damaged else "all whole")
    )
    for damage in found.damaged:
        tell(f"  damaged {damage.kind} {damage.digest[:12]}: {damage.why}")
        tell(f"    needed by {', '.join(damage.adapters)}")
    if quarantine and found.damaged:
        tell("  damaged weights are in quarantine: push the adapters again to repair them")
    for digest, why in found.quarantined.items():
        tell(f"  in quarantine {digest[:12]}: {why}")
    if found.unreferenced:
        tell(f"  {found.unreferenced} folders that no adapter needs: `store gc` removes them")
    if found.uploads:
        tell(f"  {found.uploads} uploads under way or broken off")
    return not found.damaged


def collect(
    data_dir: Path,
    tell: Callable[[str], None],
    *,
    upload_hours: float,
    quarantine: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what nothing needs. Raises as `upkeep.collect`."""
    removed = upkeep.collect(
        data_dir,
        uploads_older_than=time.time() - upload_hours * 3600,
        quarantine=quarantine,
        dry_run=dry_run,
    )
    if as_json:
        tell(json.dumps({**asdict(removed), "dry_run": dry_run}))
        return
    tell(
        f"{'would remove' if dry_run else 'removed'} {removed.unreferenced} folders that no "
        f"adapter needs, {removed.uploads} old uploads, {removed.quarantined} from quarantine: "
        f"{removed.bytes / _MIB:.1f} MiB"
    )


def _silent(at: int, total: int) -> None:
    pass


def _progress(at: int, total: int) -> None:
    end = "\n" if at == total else ""
    print(f"\rverifying {at} of {total}", end=end, file=sys.stderr, flush=True)
