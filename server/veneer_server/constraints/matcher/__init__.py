"""What runs in a matcher process: it follows sequences and computes their masks."""
