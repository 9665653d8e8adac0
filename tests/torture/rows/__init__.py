"""One module a row of the scoreboard: ``row_<number>_<what>.py``; `tests.torture.row` has
the shape that each follows, ``python -m tests.torture`` runs them."""
