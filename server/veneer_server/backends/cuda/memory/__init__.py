"""Device memory that KV blocks and adapters share, and the waits before it is reused."""
