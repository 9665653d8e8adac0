"""The rows of the scoreboard, one module each: ``row_<number>_<what>.py``. `tests.torture.row`
describes their interface; ``python -m tests.torture`` runs them."""
