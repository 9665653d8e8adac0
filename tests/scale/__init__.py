"""Several servers together: followers of a registry, on real sockets that fail."""
