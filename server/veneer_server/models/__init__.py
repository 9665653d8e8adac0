"""Base models: where they come from, what shapes they have, how they run."""
