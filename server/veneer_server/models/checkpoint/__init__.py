"""Reads a base's own files without transformers, which only computes rotary frequencies."""
