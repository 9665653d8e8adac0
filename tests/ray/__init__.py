"""``python -m tests.ray``: a registry and two engines on Ray Serve, with the real base."""
