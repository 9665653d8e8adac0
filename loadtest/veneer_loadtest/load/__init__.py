"""The load of ``veneer-loadtest run``: what is sent when, by whom, and what came of it."""
