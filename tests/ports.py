"""Find free ports, for servers that need a port number before they start."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """Return a loopback port that nobody listens on, below the system's ephemeral range.

    An ephemeral port could become the local end of someone's next connection before the server
    binds it.
    """
    while True:
        # Not of the seed: processes that draw the same port at the same time race for it.
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
