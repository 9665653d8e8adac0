"""Small experiments (`veneer-train lab`); counts of the example adapters' right answers."""
