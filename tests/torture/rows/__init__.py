"""One module per row of the scoreboard: ``row_<number>_<what>.py``. `tests.torture.row`
describes their interface; ``python -m tests.torture`` runs them."""
