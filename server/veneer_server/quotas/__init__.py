"""Limits on each caller and tenant, and their usage."""
