"""Packs a base for the native kernels, and keeps the packed form between starts."""
