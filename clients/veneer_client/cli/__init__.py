"""The command ``veneer``."""
