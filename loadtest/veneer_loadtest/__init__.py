"""Load tests: beside a peer, and what a swap of adapters costs."""
