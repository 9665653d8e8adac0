"""The CPU backend in C++: executes a whole step in one call; compiled at the first start."""
