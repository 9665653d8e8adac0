"""A registry's feed of changes to its followers, and its record of the followers."""
