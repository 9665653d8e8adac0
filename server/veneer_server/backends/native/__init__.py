"""The CPU backend in C++: a whole step in one call, compiled at first start."""
