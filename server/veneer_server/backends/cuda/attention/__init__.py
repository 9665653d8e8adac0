"""Attention over paged keys and values: decode splits contexts, prefill works in chunks."""
