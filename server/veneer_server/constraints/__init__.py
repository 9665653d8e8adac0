"""Constrained output: compiled and followed in processes that may be killed."""
