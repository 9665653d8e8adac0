"""Device memory that KV blocks and adapters share, and what waits before it is used again."""
