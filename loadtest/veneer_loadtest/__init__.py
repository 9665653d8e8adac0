"""Load tests of a server, and measurements of what a swap of adapters costs."""
