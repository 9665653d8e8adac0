"""Virtual token counters: shares by weight, no credit for idling, bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from veneer_server.engine.scheduling.fair_shares import FairShares, Share


def least(shares: list[Share]) -> Share:
    return min(shares, key=lambda share: share.counter)


def tenant_of(share: Share) -> Share:
    assert share.owner is not None
    return share.owner


@given(
    st.lists(st.floats(0.001, 1000), min_size=2, max_size=5),
    st.lists(st.integers(1, 5000), min_size=1, max_size=200),
)
def test_service_is_by_weight_as_closely_as_one_charge(
    weights: list[float], costs: list[int]
) -> None:
    shares = FairShares()
    held = [shares.hold(f"t{i}", "", weight) for i, weight in enumerate(weights)]
    for share in held:
        shares.set_runnable(share, runnable=True)
    tenants = [tenant_of(share) for share in held]
    served = dict.fromkeys(tenants, 0.0)
    for cost in costs:
        chosen = least(tenants)
        held[tenants.index(chosen)].charge(cost)
        served[chosen] += cost
        normal = [served[t] / w for t, w in zip(tenants, weights, strict=True)]
        bound = max(costs) / min(weights)
        assert max(normal) - min(normal) <= bound * (1 + 1e-9)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.booleans())
def test_who_comes_back_from_idle_has_no_credit_and_no_less(
    before: int, meanwhile: int, busy: bool
) -> None:
    shares = FairShares()
    idle, other = shares.hold("idle", "", 1), shares.hold("other", "", 1)
    shares.set_runnable(idle, runnable=True)
    shares.set_runnable(other, runnable=True)
    idle.charge(before + 1)
    shares.set_runnable(idle, runnable=False)
    other.charge(meanwhile + 1)
    if not busy:
        shares.set_runnable(other, runnable=False)
    shares.set_runnable(idle, runnable=True)
    assert tenant_of(idle).counter == max(before, meanwhile) + 1


def test_those_that_a_gateway_calls_for_share_its_tenants_part() -> None:
    shares = FairShares()
    direct = shares.hold("direct", "", 1)
    users = [shares.hold("gateway", f"user {i}", 1) for i in range(100)]
    held = [direct, *users]
    for share in held:
        shares.set_runnable(share, runnable=True)
    served = dict.fromkeys(held, 0)
    for _ in range(1000):
        tenant = least([tenant_of(direct), tenant_of(users[0])])
        share = direct if tenant is tenant_of(direct) else least(users)
        share.charge(10)
        served[share] += 10
    assert served[direct] == 5000
    assert {served[user] for user in users} == {50}


def test_few_of_ten_thousand_idle_shares_are_remembered() -> None:
    shares = FairShares(most_idle=100)
    busy = shares.hold("busy", "", 1)
    shares.set_runnable(busy, runnable=True)
    busy.charge(5000)
    for number in range(10_000):
        share = shares.hold("gateway", f"user {number}", 1)
        shares.set_runnable(share, runnable=True)
        assert tenant_of(share).counter >= 5000, "a forgotten share gains by it"
        share.charge(1)
        shares.set_runnable(share, runnable=False)
        shares.release(share)
    assert len(shares) == 101
    again = shares.hold("busy", "", 1)
    assert again is busy, "one that has sequences is never forgotten"


def test_a_weight_counts_from_when_it_is_changed() -> None:
    shares = FairShares()
    share = shares.hold("a", "", 1)
    share.charge(100)
    assert shares.hold("a", "", 4) is share
    share.charge(100)
    assert tenant_of(share).counter == 125


def test_a_new_caller_has_its_turn_after_those_that_are_there() -> None:
    """A gateway that sends another name each time would always go first."""
    shares = FairShares()
    old = shares.hold("gateway", "ann", 1.0)
    shares.take_turn(old)
    new = shares.hold("gateway", "bob", 1.0)
    assert new.turn >= old.turn
    assert shares.hold("another", "", 1.0).turn >= old.turn
