"""The load of ``veneer-loadtest run``: its requests, who sends them, and their results."""
