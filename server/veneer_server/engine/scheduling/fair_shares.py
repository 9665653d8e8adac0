"""Fair shares: the tenant with the lowest virtual token counter starts the next sequence.

Based on VTC ("Fairness in Serving Large Language Models", arXiv 2401.00588), on two levels:
tenants share by weight, and the users of a gateway's tenant share equally below it. A counter
rises by the prompt tokens that a sequence computes when it first starts, and by its output
tokens as they are generated, divided by the weight; a token under a large adapter counts for
several (`token_work`). Tokens found in the prefix cache are not computed and not charged, nor
are tokens that a preempted sequence computes again.

A share is *runnable* while it has a waiting sequence that could start: one whose adapter is
resident. Among runnable shares the one with the lowest counter goes first. A share that
becomes runnable is lifted to the lowest counter of those that already are, so that nobody
saves up service by being idle; waiting for an adapter counts as being idle.

So the counters of shares that stay runnable differ by at most U = (P + 2 M) / w, where P is
the longest prompt, M the most output tokens that sequences of one share still get once they
have started (both weighted by their work), and w the lowest weight; between two moments their
service differs by at most 2 U.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

PROMPT_COST: Final = 1.0
"""Cost of a prompt token that is computed."""
OUTPUT_COST: Final = 2.0
"""Cost of a generated token, as in the paper: it takes its own row of a step."""
MOST_IDLE: Final = 4096
"""How many shares without a sequence are remembered. A forgotten one begins again at the lowest
counter of the runnable ones, to which it would be lifted anyway if its own were lower."""


class Share:
    """A tenant, or one of the users that a gateway calls for.

    Attributes:
        owner: the user's tenant; None if the share is a tenant itself.
        weight: finite and above 0.
        members: a tenant's users; one with the name "" if it is not a gateway.
        live: number of sequences that wait or run.
        turn: number of the turn that it last took, see `FairShares.take_turn`.
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
        """Add service to the counter of the share, and to its tenant's."""
        self.counter += cost / self.weight
        if self.owner is not None:
            self.owner.charge(cost)


class Members:
    """The shares of one level: all tenants, or the users of one tenant."""

    __slots__ = ("_last", "by_name", "runnable")

    def __init__(self) -> None:
        self.by_name: dict[str, Share] = {}
        self.runnable: dict[Share, None] = {}
        self._last: Share | None = None
        """The share that most recently stopped being runnable."""

    def enter(self, share: Share) -> None:
        """Make a share runnable, with its counter lifted to the lowest of the others."""
        if self.runnable:
            least = min(other.counter for other in self.runnable)
        else:
            least = share.counter if self._last is None else self._last.counter
        share.counter = max(share.counter, least)
        self.runnable[share] = None

    def leave(self, share: Share) -> None:
        """Mark a share as no longer runnable."""
        del self.runnable[share]
        self._last = share


class FairShares:
    """All shares, by tenant and by the users that a gateway calls for."""

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
        """Whether there are several shares, so that charges matter. The counter of a lone share
        makes no difference, since a second one begins at the same value."""
        return self._count > 1

    def hold(self, tenant: str, fairness_id: str, weight: float) -> Share:
        """Return the share of a new sequence, and count the sequence in it until `release`.

        Args:
            fairness_id: the user that a gateway calls for; "" for the tenant itself.
            weight: the tenant's weight, from now on.
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
        """Record that one of the share's prompts is the first of a step. New shares start
        behind the existing ones, or a gateway could go first with a new name each time."""
        self._turns += 1
        share.turn = self._turns
        if share.owner is not None:
            share.owner.turn = self._turns

    def release(self, share: Share) -> None:
        """Count a sequence of the share as ended."""
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
        """Set whether a waiting sequence of the share could start; call when that changes."""
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
        """Assert that no tenant is runnable; call when there is no sequence."""
        assert not self._tenants.runnable, "a tenant is runnable without a sequence"


def _owner(share: Share) -> Share:
    assert share.owner is not None, "sequences belong to shares of the lower level"
    return share.owner
