"""Device memory that KV blocks and adapters share, and what must wait before it is used again."""
