"""The load of ``veneer-loadtest run``: its requests, the sending workers, and the results."""
