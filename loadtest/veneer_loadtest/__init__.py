"""Load tests of a server, and what a swap of adapters costs."""
