"""Small experiments, each one command that writes a table, a plot and what they cannot show."""
