"""Attention over paged keys and values: decode with split contexts, prefill by chunks."""
