"""Tests of several servers together: followers of a registry, over real sockets that fail."""
