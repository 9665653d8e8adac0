"""A follower's state towards its registry: connected or not, and how old its names are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NoReturn

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import FailedPrecondition, Unavailable, VeneerError
from veneer_registry.freshness import RETRY_S, CopyAge


class Standing(CopyAge):
    """State of the connection to the registry. May be read from any thread.

    Attributes:
        registry: the registry's address, for messages.
        sequence: number of the last applied change.
        fault: why the registry cannot be followed, in words; "" if it can.
        unfit: the same if only one of this server and the registry authenticates callers.
    """

    def __init__(
        self,
        registry: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        most_lag_s: float = math.inf,
    ) -> None:
        """Args: most_lag_s: maximum age of the names for answering calls."""
        super().__init__("its registry", clock, most_lag_s=most_lag_s)
        self.registry = registry
        self.sequence = 0
        self.fault = ""
        self.unfit = ""

    def missing(self, ref: AdapterRef) -> VeneerError:
        """Unavailable: it is being deleted, or its row in the registry is damaged."""
        return self.unreachable(f"adapter {ref.short}", "its record is missing")

    def fit(self, *, asks_here: bool, asks_there: bool) -> None:
        """Note whether this server and its registry authenticate callers. If only one does, a
        caller could see or change at one of them what the other denies.

        Raises:
            FailedPrecondition: only one of them authenticates callers.
        """
        self.unfit = ""
        if asks_here and not asks_there:
            self.unfit = (
                "this server requires keys (--keys-file or --jwt-issuer) but the registry at "
                f"{self.registry} does not, so a caller could change every tenant's adapters "
                "there: start the registry with the same --keys-file or --jwt-issuer"
            )
        elif asks_there and not asks_here:
            self.unfit = (
                f"the registry at {self.registry} requires keys (--keys-file or --jwt-issuer) "
                "but this server does not, so every caller would see all tenants' adapters "
                "here: start this server with the registry's --keys-file or --jwt-issuer"
            )
        self.check_fit()

    def check_fit(self) -> None:
        """Raise FailedPrecondition if `unfit` is set."""
        if self.unfit:
            raise FailedPrecondition(
                self.unfit, metadata={"cause": "callers", "registry": self.registry}
            )

    def unreachable(self, what: str, why: str) -> Unavailable:
        """The error for an operation that needs the registry while it cannot be reached."""
        return Unavailable(
            f"{what} needs the registry, which does not answer: retry",
            metadata={"cause": "registry_away", "lag_s": f"{self.lag_s:.1f}"},
            retry_after_s=RETRY_S,
            detail=f"{self.registry}: {why}",
        )

    def refuse(self, what: str) -> NoReturn:
        """Raise the error for something that only the registry does."""
        raise FailedPrecondition(
            f"{what} is not possible on this server, which follows the registry at "
            f"{self.registry}: send it there, or by gRPC to this server, which forwards it",
            metadata={"cause": "follower", "registry": self.registry},
        )
