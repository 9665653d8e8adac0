"""A base's own files, read without transformers."""
