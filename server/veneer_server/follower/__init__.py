"""A server that mirrors a registry: its view, its disk cache, and its connection."""
