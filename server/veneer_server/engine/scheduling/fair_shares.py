"""Who gets the next place: whoever has had the least, by virtual token counters.

After VTC ("Fairness in Serving Large Language Models", arXiv 2401.00588), on two levels:
tenants by weight, and below a gateway's tenant those that it calls for, in equal parts. A
counter rises by the prompt tokens that a sequence computes when it first starts, and by its
output tokens as they are generated, divided by the weight; a token under a large adapter counts
for several (`token_work`). What was found in the prefix cache
takes no computing and is not charged, nor is what a preempted sequence computes again.

A share is *runnable* while it has a waiting sequence that could start: one whose adapter is
resident. Among runnable shares the one with the least counter goes first. One that becomes
runnable is lifted to the least counter of those that are, so that nobody saves up service by
being idle; waiting for an adapter counts as being idle.

So the counters of shares that stay runnable differ by at most U = (P + 2 M) / w, with the
longest prompt P, the most output tokens M that sequences of one share still get once they have
started (both by their work), and the least weight w; between two moments their service differs
by at most 2 U.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

PROMPT_COST: Final = 1.0
"""Cost of a prompt token that is computed."""
OUTPUT_COST: Final = 2.0
"""Cost of a generated token, as in the paper: it takes a row of a step of its own."""
MOST_IDLE: Final = 4096
"""Shares without a sequence that are remembered. A forgotten one begins again at the least
counter of the runnable ones, as it would have to anyway if it had less."""


class Share:
    """A tenant, or one of those that a gateway calls for.

    Attributes:
        owner: the tenant; None for a tenant itself.
        weight: finite and above 0.
        members: of a tenant; one with the name "" if it is no gateway.
        live: sequences that wait or run.
        turn: grows each time a prompt of it is the first one of a step, see
            `FairShares.take_turn`.
    """

    __slots__ = ("counter", "live", "members", "name", "owner", "turn", "weight")

    def __init__(self, name: str, owner: Share | None, weight: float = 1.0) -> None:
        self.name = name
        self.owner = owner
        self.weight = weight
        self.counter = 0.0
        self.members = Members()
        self.live = 0
        self.turn = 0

    def charge(self, cost: float) -> None:
        """Count service."""
        self.counter += cost / self.weight
        if self.owner is not None:
            self.owner.charge(cost)


class Members:
    """The shares of one level."""

    __slots__ = ("_last", "by_name", "runnable")

    def __init__(self) -> None:
        self.by_name: dict[str, Share] = {}
        self.runnable: dict[Share, None] = {}
        self._last: Share | None = None
        """The last one that was runnable."""

    def enter(self, share: Share) -> None:
        """A share becomes runnable."""
        if self.runnable:
            least = min(other.counter for other in self.runnable)
        else:
            least = share.counter if self._last is None else self._last.counter
        share.counter = max(share.counter, least)
        self.runnable[share] = None

    def leave(self, share: Share) -> None:
        """A share is no longer runnable."""
        del self.runnable[share]
        self._last = share


class FairShares:
    """All shares, by tenant and by whom a gateway calls for."""

    def __init__(self, most_idle: int = MOST_IDLE) -> None:
        self._tenants = Members()
        self._most_idle = most_idle
        self._idle: OrderedDict[Share, None] = OrderedDict()
        self._turns = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def several(self) -> bool:
        """Whether charges matter: a share that is alone gains nothing by what it has had, since
        a second one begins at its counter."""
        return self._count > 1

    def hold(self, tenant: str, fairness_id: str, weight: float) -> Share:
        """The share of a new sequence, until `release`.

        Args:
            fairness_id: whom a gateway calls for; "" for the tenant itself.
            weight: the tenant's, from now on.
        """
        owner = self._tenants.by_name.get(tenant)
        if owner is None:
            owner = self._tenants.by_name[tenant] = Share(tenant, None)
            owner.turn = self._turns
        owner.weight = weight
        share = owner.members.by_name.get(fairness_id)
        if share is None:
            share = owner.members.by_name[fairness_id] = Share(fairness_id, owner)
            share.turn = self._turns
            self._count += 1
        if not share.live:
            self._idle.pop(share, None)
        share.live += 1
        return share

    def take_turn(self, share: Share) -> None:
        """Note that a prompt of a share is the first one of a step. A share that is new is
        behind those that are there, or a gateway could go first with a new name each time."""
        self._turns += 1
        share.turn = self._turns
        if share.owner is not None:
            share.owner.turn = self._turns

    def release(self, share: Share) -> None:
        """A sequence has ended."""
        share.live -= 1
        if share.live:
            return
        self._idle[share] = None
        if len(self._idle) > self._most_idle:
            forgotten, _ = self._idle.popitem(last=False)
            owner = _owner(forgotten)
            del owner.members.by_name[forgotten.name]
            self._count -= 1
            if not owner.members.by_name:
                del self._tenants.by_name[owner.name]

    def set_runnable(self, share: Share, runnable: bool) -> None:
        """Whether a waiting sequence of the share could start; call it when that changes."""
        owner = _owner(share)
        siblings = owner.members
        if runnable:
            if not siblings.runnable:
                self._tenants.enter(owner)
            siblings.enter(share)
        else:
            siblings.leave(share)
            if not siblings.runnable:
                self._tenants.leave(owner)

    def check_unused(self) -> None:
        """Assert, when there is no sequence, that no share counts as live or runnable."""
        assert not self._tenants.runnable, "a tenant is runnable without a sequence"


def _owner(share: Share) -> Share:
    assert share.owner is not None, "sequences belong to shares of the lower level"
    return share.owner
