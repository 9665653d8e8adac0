"""Constrained output: compiled and followed in processes that can be killed."""
