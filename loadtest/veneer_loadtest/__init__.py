"""Veneer."""
