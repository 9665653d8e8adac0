"""The code of a matcher process, which follows sequences and computes their masks."""
